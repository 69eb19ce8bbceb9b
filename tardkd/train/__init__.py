"""Training: one lean loop, its configuration, evaluation, checkpoints, logs and plots."""
