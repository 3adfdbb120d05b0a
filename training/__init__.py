"""Training and evaluation: config, engine, loop, checkpoints, metrics."""
