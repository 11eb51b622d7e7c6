"""Gymnasium environments as data sees them: made from a spec, and spaces where they can be had."""

import contextlib
import os
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from efm_jax.envs.flatten import flat_size
from efm_jax.envs.specs import ROBOTICS
from efm_jax.errors import DataError, install, reason


def make(spec: EnvSpec, **arguments: Any) -> gymnasium.Env:
    """``gymnasium.make``, whose failures become a :class:`DataError` with what to install."""
    try:
        env = gymnasium.make(spec, **arguments)
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise DataError(
            f"environment {spec.id} cannot run here: {error}; {_install_hint(spec)}"
        ) from error
    except Exception as error:  # an environment, and a simulator, may raise anything
        raise DataError(f"environment {spec.id} cannot be made: {reason(error)}") from error
    # Removed here, because a maze writes its model to the system's temporary folder, reads it at
    # once, and leaves it there.
    model = getattr(env.unwrapped, "tmp_xml_file_path", None)
    if model is not None:
        with contextlib.suppress(OSError):
            os.unlink(model)
    return env


def _install_hint(spec: EnvSpec) -> str:
    module = str(spec.entry_point).split(":")[0]
    if module.startswith("gymnasium.envs.mujoco"):
        return f"install its simulator: {install('mujoco')}"
    package = module.split(".")[0].replace("_", "-")
    if package == ROBOTICS.replace("_", "-"):
        return f"install it and its simulator: {install('robotics')}"
    return f"install the package that provides it, {package}, and for MuJoCo {install('mujoco')}"


def spec_of(env: gymnasium.Env) -> EnvSpec:
    """Return the spec that ``env`` was made from."""
    if env.spec is None:
        raise ValueError(f"env: expected an environment made from a spec; got {env}")
    return env.spec


def make_spaces(spec: EnvSpec) -> tuple[gymnasium.Space, gymnasium.Space] | None:
    """(observation, action) spaces, or None where the environment cannot be made here."""
    try:
        with contextlib.closing(make(spec)) as env:
            return env.observation_space, env.action_space
    except DataError:
        return None


def check_sizes(source: str, spec: EnvSpec, observation_size: int, action_size: int) -> None:
    """Refuse an environment, if it can be made, whose sizes are not the data's."""
    spaces = make_spaces(spec)
    if spaces is None:
        return
    try:
        expected = flat_size(spaces[0]), spaces[1].shape
    except DataError as error:
        raise DataError(f"{source}: environment {spec.id}: {error}") from error
    if expected != (observation_size, (action_size,)):
        raise DataError(
            f"{source}: environment {spec.id} has {expected[0]} observation dimensions and actions "
            f"of shape {expected[1]}; the data has {observation_size} and {(action_size,)}"
        )


def check_bounds(
    source: str, spec: EnvSpec, space: gymnasium.Space, low: np.ndarray, high: np.ndarray
) -> None:
    """Refuse a space of actions with other bounds than the data's, whose actions mean others."""
    if not isinstance(space, gymnasium.spaces.Box):
        return
    for i, theirs in enumerate(zip(space.low, space.high, strict=True)):
        if not np.allclose(theirs, (low[i], high[i]), rtol=1e-5, atol=0.0):
            raise DataError(
                f"{source}: action dimension {i} has bounds [{low[i]:g}, {high[i]:g}] in the data "
                f"and [{theirs[0]:g}, {theirs[1]:g}] in {spec.id}; was it recorded in a wrapper "
                "such as RescaleAction? Register the environment with it, and give "
                "--env=MODULE:NAME"
            )
