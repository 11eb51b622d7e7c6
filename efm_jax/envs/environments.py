"""Gymnasium environments as data sees them: a spec in JSON, and spaces where they can be had.

The one place that knows of Gymnasium Robotics (mazes, Adroit, kitchen): its ids exist only after
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


def find_spec(env: str) -> EnvSpec:
    """A copy of the spec of a registered id, of Gymnasium or of an installed Gymnasium Robotics.

    Raises:
      gymnasium.error.Error: no such environment.
      ImportError, ValueError: from an id that names a module, as in ``module:Name-v0``.
    """
    try:
        return copy.deepcopy(gymnasium.spec(env))
    except gymnasium.error.NameNotFound as error:
        if importlib.util.find_spec(_ROBOTICS) is None:
            hint = "Environments of Gymnasium Robotics need pip install -e .[robotics]"
            raise type(error)(f"{error} {hint}") from error
    _import_robotics()
    return copy.deepcopy(gymnasium.spec(env))


def make(spec: EnvSpec, **arguments: Any) -> gymnasium.Env:
    """``gymnasium.make``; a :class:`DataError` that says what to install, or why it cannot be made."""
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
    # A maze writes its model to the system's temporary folder and reads it at once, but never
    # removes it.
    model = getattr(env.unwrapped, "tmp_xml_file_path", None)
    if model is not None:
        with contextlib.suppress(OSError):
            os.unlink(model)
    return env


def _install_hint(spec: EnvSpec) -> str:
    module = str(spec.entry_point).split(":")[0]
    if module.startswith("gymnasium.envs.mujoco"):
        return "install its simulator: pip install -e .[mujoco]"
    package = module.split(".")[0]
    if package == _ROBOTICS:
        return "install it and its simulator: pip install -e .[robotics]"
    package = package.replace("_", "-")
    return (
        f"install the package that provides it, {package}, and for MuJoCo pip install -e .[mujoco]"
    )


def _import_robotics() -> None:
    """Register the environments; some versions print news of other environments when imported."""
    before = dict(gymnasium.registry)
    with contextlib.redirect_stderr(io.StringIO()):
        gymnasium.register_envs(importlib.import_module(_ROBOTICS))
    # It also replaces Gymnasium's own retired environments by some that need mujoco-py.
    gymnasium.registry.update(before)


def registered_spec(source: str, env: str) -> EnvSpec:
    """The spec of a Gymnasium id; :class:`DataError` where Gymnasium has no such environment."""
    try:
        return find_spec(env)
    except (gymnasium.error.Error, ImportError, ValueError) as error:
        raise DataError(
            f"{source}: environment {env!r} is not known to Gymnasium ({reason(error)})"
        ) from error


def parse_spec(source: str, text: str) -> EnvSpec:
    """A spec from the JSON of any Gymnasium version."""
    try:
        fields = json.loads(text)
        for name in _REMOVED_FIELDS:
            fields.pop(name, None)
        return EnvSpec.from_json(json.dumps(fields))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(
            f"{source}: the environment spec cannot be read ({reason(error)})"
        ) from error


def spec_json(source: str, spec: EnvSpec) -> str:
    """The spec as JSON; :class:`DataError` for one that holds functions, as Gymnasium's retired ones do."""
    try:
        return spec.to_json()
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{source}: environment {spec.id} cannot be used ({reason(error)})"
        ) from error


def make_spaces(spec: EnvSpec) -> tuple[gymnasium.Space, gymnasium.Space] | None:
    """(observation, action) spaces, or None where the environment cannot be made here."""
    try:
        env = make(spec)
    except DataError:
        return None
    try:
        return env.observation_space, env.action_space
    finally:
        env.close()


def check_sizes(source: str, spec: EnvSpec, observation_size: int, action_size: int) -> None:
    """The environment must have the data's observation and action sizes; not checked if it cannot be made."""
    spaces = make_spaces(spec)
    if spaces is None:
        return
    try:
        expected = flat_size(spaces[0]), spaces[1].shape
    except DataError as error:
        raise DataError(f"{source}: environment {spec.id}: {error}") from error
    if expected != (observation_size, (action_size,)):
        raise DataError(
            f"{source}: environment {spec.id} has {expected[0]} observation dimensions and "
            "actions of shape "
            f"{expected[1]}; the data has {observation_size} and {(action_size,)}"
        )
