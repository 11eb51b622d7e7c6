"""Energy-weighted flow matching, energy-weighted diffusion and QIPO offline RL in JAX."""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = ("distances", "exact", "guidance", "losses", "networks", "paths", "sampling", "weights")
_HOMES = {
    "Dataset": "data.dataset",
    "QIPOConfig": "rl.config",
    "export_policy": "runs.export",
    "load_dataset": "data",
    "load_policy": "runs.loading",
    "train": "runs.train",
}

__all__ = ["__version__", *_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    # On demand, because a preset that imports efm_jax.rl.config needs none of these.
    if name in _MODULES:
        return importlib.import_module(f"efm_jax.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"efm_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
