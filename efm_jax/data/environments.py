"""Gymnasium environments as data sees them: a spec in JSON, and spaces where they can be had."""

import json

import gymnasium
from gymnasium.envs.registration import EnvSpec

from efm_jax.data.errors import DataError, reason
from efm_jax.data.flatten import flat_size

# Fields that older Gymnasium versions wrote into a spec and newer ones refuse.
_REMOVED_FIELDS = ("apply_api_compatibility", "autoreset")


def registered_spec(source: str, env: str) -> EnvSpec:
    """The spec of a Gymnasium id; :class:`DataError` where Gymnasium has no such environment."""
    try:
        return gymnasium.spec(env)
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
        raise DataError(f"{source}: the environment spec cannot be read ({reason(error)})") from error


def spec_json(source: str, spec: EnvSpec) -> str:
    """The spec as JSON; :class:`DataError` for one that holds functions, as Gymnasium's retired ones do."""
    try:
        return spec.to_json()
    except (ValueError, TypeError) as error:
        raise DataError(f"{source}: environment {spec.id} cannot be used ({reason(error)})") from error


def make_spaces(spec: EnvSpec) -> tuple[gymnasium.Space, gymnasium.Space] | None:
    """(observation, action) spaces, or None where the environment's simulator is not installed."""
    try:
        env = gymnasium.make(spec)
    except (gymnasium.error.Error, ImportError):
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
            f"{source}: environment {spec.id} has {expected[0]} observation dimensions and actions of shape "
            f"{expected[1]}; the data has {observation_size} and {(action_size,)}"
        )
