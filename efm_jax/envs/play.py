"""One episode at a time, by policies that see one observation as the environment gives it."""

import itertools
from collections.abc import Callable
from typing import Any

import gymnasium
import jax
import numpy as np

from efm_jax.envs.environments import spec_of
from efm_jax.envs.flatten import flatten_observation
from efm_jax.errors import DataError
from efm_jax.types import Array

# One observation to an action [A] in the environment's units, inside its bounds or not.
Act = Callable[[Any], np.ndarray]
# The policy of an episode, given the episode's number.
Begin = Callable[[int], Act]

# Purpose of the noise of `batched`, folded into its seed: no other random number has it.
_ACTION_NOISE = 5


def play(env: gymnasium.Env, seed: int, act: Act) -> tuple[float, int]:
    """Return and length of one episode, whose actions are clipped to their bounds."""
    space = action_box(env)
    observation, _ = env.reset(seed=seed)
    total, length, over = 0.0, 0, False
    while not over:
        action = np.clip(check_action(env, act(observation)), space.low, space.high)
        observation, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        length += 1
        over = terminated or truncated
    return total, length


def action_box(env: gymnasium.Env) -> gymnasium.spaces.Box:
    """Return the space of ``env``'s actions; a ``DataError`` if it is no ``Box``."""
    space = env.action_space
    if not isinstance(space, gymnasium.spaces.Box):
        raise DataError(f"environment {spec_of(env).id}: expected actions in a Box; got {space}")
    return space


def check_action(env: gymnasium.Env, action: Any) -> np.ndarray:
    """The action in ``env``'s type; a ``DataError`` if its shape differs or it is not finite."""
    space = env.action_space
    array = np.asarray(action, space.dtype)
    if array.shape != space.shape:
        raise DataError(
            f"actions: expected shape {space.shape}, of {spec_of(env).id}; got {array.shape}"
        )
    if not np.isfinite(array).all():
        raise DataError(f"actions: expected finite numbers; got {array}")
    return array


def random_actions(space: gymnasium.spaces.Box, rng: np.random.Generator) -> Act:
    """Actions uniform between the bounds of ``space``."""
    return lambda observation: rng.uniform(space.low, space.high)


def batched(
    env: gymnasium.Env, policy: Callable[[np.ndarray, Array], Array], seed: int, noise: float = 0.0
) -> Begin:
    """A policy of batches, such as a trained one, for single episodes of ``env``.

    Args:
      env: what it will act in.
      policy: ``(observations [B, S] float32, key) -> actions [B, A]``; observations are flattened.
      seed: the keys and the noise are folded from it, the episode and the step.
      noise: standard deviation of Gaussian noise on the actions, in units of half their range.
    """
    space = action_box(env)
    deviation = noise * (space.high - space.low) / 2
    root = jax.random.key(seed)
    fold = jax.jit(
        lambda episode, step: jax.random.fold_in(jax.random.fold_in(root, episode), step)
    )

    def begin(episode: int) -> Act:
        rng = np.random.default_rng([seed, _ACTION_NOISE, episode])
        steps = itertools.count()

        def act(observation: Any) -> np.ndarray:
            flat = flatten_observation(env.observation_space, observation, 0)
            actions = np.asarray(policy(flat[None], fold(episode, next(steps))))
            return actions[0] + deviation * rng.standard_normal(space.shape)

        return act

    return begin
