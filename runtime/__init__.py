"""What running needs: flags, data, processes, checkpoints, small verbs of a training loop."""
