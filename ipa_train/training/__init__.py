"""Lightning: the training step, checkpoints, callbacks."""
