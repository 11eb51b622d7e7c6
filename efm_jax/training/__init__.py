"""State, step, scan over steps, devices, checkpoints, metrics."""
