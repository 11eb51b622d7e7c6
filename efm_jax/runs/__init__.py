"""Work directories: what a training run leaves, who writes it and who reads it."""
