"""What the scripts share: a training run, flags, data, processes, checkpoints, log."""
