"""Entry points with absl flags; the only place that reads flags, signals and the command line."""
