"""How fast everything is, as ratios: ``python -m experiments.systems.benchmarks``."""
