"""Training: state, optimizer, precision, the loop, checkpoints and metrics."""
