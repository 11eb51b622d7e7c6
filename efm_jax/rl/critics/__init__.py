"""Offline critics.  Adding one is a file here and a line in ``CRITICS``."""

from efm_jax.rl.critics.base import Critic, CriticBatch
from efm_jax.rl.critics.ensemble import EnsembleLCB
from efm_jax.rl.critics.iql import IQL
from efm_jax.rl.critics.softmax_q import SoftmaxQ

# The names of the configuration field `critic`.
CRITICS: dict[str, type[Critic]] = {"softmax_q": SoftmaxQ, "iql": IQL, "ensemble": EnsembleLCB}

__all__ = ["CRITICS", "IQL", "Critic", "CriticBatch", "EnsembleLCB", "SoftmaxQ"]
