"""QIPO's settings on D4RL, as far as they are published: the presets of ``launch.reproduce``."""
