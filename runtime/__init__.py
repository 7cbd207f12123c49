"""What running needs: flags, data, processes, checkpoints and the small verbs of a training loop."""
