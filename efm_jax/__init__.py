"""Energy-weighted flow matching, energy-weighted diffusion and QIPO offline RL in JAX."""

__version__ = "0.1.0"
