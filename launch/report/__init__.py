"""One HTML page about runs: ``python -m launch.report``."""
