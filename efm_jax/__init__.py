"""Energy-weighted flow matching, energy-weighted diffusion and QIPO offline RL in JAX."""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = ("distances", "exact", "guidance", "losses", "networks", "paths", "sampling", "weights")

__all__ = ["__version__", "load_policy", *_MODULES]


def __getattr__(name: str) -> Any:
    # On demand, because a preset that imports efm_jax.rl.config needs none of these.
    if name in _MODULES:
        return importlib.import_module(f"efm_jax.{name}")
    if name == "load_policy":
        return importlib.import_module("efm_jax.runs.loading").load_policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
