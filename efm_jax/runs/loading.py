"""Trained policies as functions, for code that is not ours."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.typing import ArrayLike

from efm_jax import checks
from efm_jax.rl.agents import Agent, State, make_agent
from efm_jax.rl.agents.agent import POLICIES
from efm_jax.rl.config import QIPOConfig
from efm_jax.runs.checkpoint import Checkpointer
from efm_jax.runs.workdir import CHECKPOINTS_FOLDER, RunInfo, check_name, resolve
from efm_jax.types import Key, Normalizer

# Fields of a configuration that only concern acting.
ACTING_FIELDS = ("action_selection", "num_candidates", "eval_solver", "eval_sample_steps")


def acting_config(config: QIPOConfig, **options: Any) -> QIPOConfig:
    """Change ``ACTING_FIELDS`` of a configuration; a ``ValueError`` for any other field."""
    for name in options:
        checks.check_choice("option", name, ACTING_FIELDS)
    return dataclasses.replace(config, **options).validate()


class Restored(NamedTuple):
    """A run as its newest readable checkpoint has it."""

    info: RunInfo
    agent: Agent
    step: int  # of all phases
    state: State  # with a leading seed axis
    normalizer: Normalizer


def restore(workdir: epath.Path, report: Callable[[str], None], **options: Any) -> Restored:
    """Read the newest checkpoint of a run whose policy is trained, or is being trained.

    Args:
      workdir: what ``launch.train`` left.
      report: called with one line about every checkpoint that cannot be read.
      **options: ``ACTING_FIELDS``, instead of the run's.

    Raises:
      ValueError: no run, no checkpoint or none of the policy phase, or an option out of range.
    """
    check_name(workdir)
    info = RunInfo.read(workdir)
    sizes = info.observation_size, info.action_size
    agent = make_agent(acting_config(info.config, **options), *sizes)
    keys = jnp.stack([jax.random.key(seed) for seed in info.seeds])
    bounds = (jax.ShapeDtypeStruct((size,), np.float32) for size in np.repeat(sizes, 2))
    template = {
        "state": jax.eval_shape(jax.vmap(agent.init), keys),
        "normalizer": Normalizer._make(bounds),
    }
    template = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template)
    found = None
    if (workdir / CHECKPOINTS_FOLDER).exists():
        checkpointer = Checkpointer(workdir / CHECKPOINTS_FOLDER, report=report, read_only=True)
        try:
            found = checkpointer.restore(template)
        finally:
            checkpointer.close()
    if found is None:
        raise ValueError(f"workdir {workdir}: no checkpoint has been saved yet")
    step, tree = found
    last = "policy" if info.phase_steps["policy"] else "critic"
    if int(getattr(tree["state"], last).step[0]) == 0:
        raise ValueError(
            f"workdir {workdir}: training stopped before the {last} phase; nothing to evaluate"
        )
    return Restored(info, agent, step, tree["state"], Normalizer(*tree["normalizer"]))


class Policy:
    """A trained policy as a function of observations, compiled once for each number of them.

    ``policy(observations, key=None)`` maps one observation ``[S]``, or many ``[..., S]``, to
    actions ``[A]`` or ``[..., A]`` float32, both in the environment's units; dict observations
    flattened as :mod:`efm_jax.envs.flatten` says.  A policy is stochastic: the key draws the noise
    of its actions, without one it is always the same, so that the same observations give the same
    actions.  It works under ``jit`` and ``vmap``.

    Args:
      restored: what acts.
      name: of ``POLICIES``.
      seed_index: which of the run's training seeds, from 0.

    Raises:
      ValueError: an unknown name, or a seed that the run has not; when called, observations of
        another size.
    """

    def __init__(self, restored: Restored, name: str = "policy", seed_index: int = 0):
        checks.check_choice("name", name, POLICIES)
        checks.check_integer("seed_index", seed_index, 0)
        if seed_index >= restored.info.num_seeds:
            raise ValueError(
                f"seed_index: expected less than the run's {restored.info.num_seeds} seeds; "
                f"got {seed_index}"
            )
        self.name, self.observation_size = name, restored.info.observation_size
        params = jax.tree.map(lambda leaf: leaf[seed_index], restored.state.params())
        act, normalizer = restored.agent.act, restored.normalizer
        self._act = jax.jit(lambda states, key: act(params, normalizer, key, states, name))

    def __call__(self, observations: ArrayLike, key: Key | None = None) -> jax.Array:
        """Return actions for observations; see the class."""
        states = jnp.asarray(observations, jnp.float32)
        if states.shape[-1:] != (self.observation_size,):
            size = self.observation_size
            raise ValueError(
                f"observations: expected shape ({size},) or (..., {size}); got {states.shape}"
            )
        key = jax.random.key(0) if key is None else key
        actions = self._act(states.reshape(-1, self.observation_size), key)
        return actions.reshape(*states.shape[:-1], -1)


def load_policy(
    workdir: str,
    *,
    name: str = "policy",
    seed_index: int = 0,
    report: Callable[[str], None] | None = None,
    **options: Any,
) -> Policy:
    """Load the policy of a work directory of ``launch.train`` or :func:`efm_jax.train`.

    Args:
      workdir: local or ``gs://``.
      name: "policy" or "behavior".
      seed_index: which of the run's training seeds acts, from 0.
      report: called with one line about every newer checkpoint that cannot be read; None: a
        warning.
      **options: ``ACTING_FIELDS``, instead of the run's.

    Raises:
      ValueError: no run or no checkpoint of a trained policy there, or an argument out of range.

    Example:
      >>> policy = load_policy("runs/qipo_ot-efm-pendulum-scripted-v0-seed0")  # doctest: +SKIP
      >>> policy(observations, jax.random.key(0))  # doctest: +SKIP
    """
    report = report or (lambda text: warnings.warn(text, stacklevel=5))
    return Policy(restore(resolve(workdir), report, **options), name, seed_index)
