"""Gymnasium environments as data sees them: a spec in JSON, and spaces where they can be had.

This module alone knows of Gymnasium Robotics (mazes, Adroit, kitchen), whose ids exist only after
its import.
"""

import contextlib
import copy
import importlib
import importlib.util
import io
import json
import os
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from efm_jax.envs.flatten import flat_size
from efm_jax.errors import DataError, reason

# Fields that older Gymnasium versions wrote into a spec and newer ones refuse.
_REMOVED_FIELDS = ("apply_api_compatibility", "autoreset")
_ROBOTICS = "gymnasium_robotics"


def read_spec(source: str, env: str) -> EnvSpec:
    """A spec of its own for an id, or for the JSON that any Gymnasium version wrote.

    Ids are Gymnasium's and those of an installed Gymnasium Robotics; ``module:Name-v0`` imports the
    module first.

    Raises:
      DataError: no such environment, or JSON of something else; the message begins with ``source``.
    """
    is_json = str(env).lstrip().startswith("{")
    try:
        if not is_json:
            return copy.deepcopy(_registered(env))
        fields = json.loads(env)
        for name in _REMOVED_FIELDS:
            fields.pop(name, None)
        return EnvSpec.from_json(json.dumps(fields))
    except (
        gymnasium.error.Error,
        ImportError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
    ) as error:
        problem = "the JSON of its EnvSpec" if is_json else f"environment {env!r}"
        raise DataError(
            f"{source}: {problem} is not known to Gymnasium ({reason(error)})"
        ) from error


def _registered(env: str) -> EnvSpec:
    try:
        return gymnasium.spec(env)
    except gymnasium.error.NameNotFound as error:
        if importlib.util.find_spec(_ROBOTICS) is None:
            hint = "Environments of Gymnasium Robotics need pip install -e .[robotics]"
            raise type(error)(f"{error} {hint}") from error
    _import_robotics()
    return gymnasium.spec(env)


def make(spec: EnvSpec, **arguments: Any) -> gymnasium.Env:
    """``gymnasium.make``, whose failures become a :class:`DataError` with what to install."""
    try:
        if str(spec.entry_point).startswith(_ROBOTICS):
            _import_robotics()
        env = gymnasium.make(spec, **arguments)
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise DataError(
            f"environment {spec.id} cannot run here: {error}; {_install_hint(spec)}"
        ) from error
    except (gymnasium.error.Error, AttributeError, TypeError) as error:
        raise DataError(f"environment {spec.id} cannot be made: {error}") from error
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
        return "install its simulator: pip install -e .[mujoco]"
    package = module.split(".")[0].replace("_", "-")
    if package == _ROBOTICS.replace("_", "-"):
        return "install it and its simulator: pip install -e .[robotics]"
    return (
        f"install the package that provides it, {package}, and for MuJoCo pip install -e .[mujoco]"
    )


def _import_robotics() -> None:
    """Register the environments, without the news that some versions print when imported."""
    before = dict(gymnasium.registry)
    with contextlib.redirect_stderr(io.StringIO()):
        gymnasium.register_envs(importlib.import_module(_ROBOTICS))
    # Restored, because the import also replaces Gymnasium's own retired environments by some that
    # need mujoco-py.
    gymnasium.registry.update(before)


def spec_of(env: gymnasium.Env) -> EnvSpec:
    """Return the spec that ``env`` was made from."""
    if env.spec is None:
        raise ValueError(f"env: expected an environment made from a spec; got {env}")
    return env.spec


def spec_json(source: str, spec: EnvSpec | None) -> str | None:
    """The spec as JSON; a :class:`DataError` for a spec with functions, as retired ones have."""
    if spec is None:
        return None
    try:
        return spec.to_json()
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{source}: environment {spec.id} cannot be used ({reason(error)})"
        ) from error


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
