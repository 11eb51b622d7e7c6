"""A trained policy as a function, for code that is not ours."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from efm_jax import checks
from efm_jax.rl.algorithm import Algorithm
from efm_jax.rl.config import QIPOConfig
from efm_jax.runs.workdir import RunInfo, restore
from efm_jax.types import Array

# Fields of a configuration that only concern acting.
ACTING_FIELDS = ("action_selection", "num_candidates", "eval_solver", "eval_sample_steps")


def acting_config(config: QIPOConfig, **options: Any) -> QIPOConfig:
    """The configuration with other ``ACTING_FIELDS``; a ``ValueError`` for any other field."""
    for name in options:
        checks.check_choice("option", name, ACTING_FIELDS)
    return dataclasses.replace(config, **options).validate()


def load_policy(workdir: str, *, name: str = "policy", seed_index: int = 0, **options: Any) -> Callable:
    """The policy of a work directory of ``launch.train``.

    Args:
      workdir: local or ``gs://``.
      name: "policy" or "behavior".
      seed_index: which of the run's training seeds acts, from 0.
      **options: ``ACTING_FIELDS``, instead of the run's.

    Returns:
      A jitted ``policy(observations [B, S], key) -> actions [B, A]``, both in the environment's
      units; dict observations flattened as :mod:`efm_jax.envs.flatten` says.

    Raises:
      ValueError: no run or no checkpoint of a trained policy there, or an argument out of range.

    Example:
      >>> policy = load_policy("runs/qipo_ot-efm-pendulum-scripted-v0-seed0")  # doctest: +SKIP
      >>> policy(observations, jax.random.key(0))  # doctest: +SKIP
    """
    folder = epath.Path(workdir).expanduser()
    info = RunInfo.load(folder)
    if info is None:
        raise ValueError(f"workdir {folder}: holds no run (no config.json)")
    checks.check_choice("name", name, ("policy", "behavior"))
    checks.check_integer("seed_index", seed_index, 0)
    if seed_index >= info.num_seeds:
        raise ValueError(f"seed_index: expected less than the run's {info.num_seeds} seeds; got {seed_index}")
    algorithm = Algorithm(acting_config(info.config, **options), info.observation_size, info.action_size)
    restored = restore(folder, info, algorithm, lambda text: warnings.warn(text, stacklevel=3))
    acting = jax.tree.map(lambda leaf: leaf[seed_index], restored.state.acting())

    @jax.jit
    def policy(observations: Array, key: Array) -> Array:
        checks.check_shape("observations", observations, (observations.shape[0], info.observation_size))
        shape = (observations.shape[0], algorithm.num_noises(name), info.action_size)
        noise = jax.random.normal(key, shape)
        return algorithm.actions(name, acting, restored.normalizer, observations, noise)

    return policy
