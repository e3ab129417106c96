"""Training dynamics: what the loss and the optimizer do to the course of training."""
