"""Presets of the launcher, each with ``get_config()``."""
