"""Returns of policies in a Gymnasium environment, one batched policy call a step for all."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector.utils import concatenate, create_empty_array

from efm_jax import checks
from efm_jax.envs import environments, specs
from efm_jax.envs.flatten import flatten_observation
from efm_jax.errors import reason
from efm_jax.types import Array

# What environments call it in the information of a step: OGBench, Gymnasium Robotics' mazes and
# Adroit; its Fetch and hands; D4RL's Adroit.
SUCCESS_KEYS = ("success", "is_success", "goal_achieved")


class EvaluationError(ValueError):
    """An evaluation that came to no number: what the environment or the policy did, in one line."""


class Rollouts(NamedTuple):
    """What every episode gave; nothing is averaged here."""

    returns: np.ndarray  # [K, E] float64, undiscounted, in the environment's own reward units
    lengths: np.ndarray  # [K, E] int64, number of environment steps
    # [K, E] float64: 1 where a step was a success, 0 where none was; NaN: the environment says
    # nothing of it.
    successes: np.ndarray


def make_quietly(spec: EnvSpec) -> gymnasium.Env:
    """Make an environment without Gymnasium's checker, which warns once for every copy."""
    return environments.make(spec, disable_env_checker=True)


def evaluate(
    act: Callable[[np.ndarray, int], Array],
    env_spec: EnvSpec | specs.Environment,
    *,
    num_policies: int = 1,
    episode_seeds: Sequence[int],
    max_steps: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    make: Callable[[EnvSpec], gymnasium.Env] = make_quietly,
) -> Rollouts:
    """Run ``E = len(episode_seeds)`` episodes of each of ``K = num_policies`` policies.

    All ``K * E`` episodes go on side by side, so ``act`` is called once a step, always with the
    same shapes. Episode ``e`` of every policy is reset with ``episode_seeds[e]``. After an episode
    has ended its environment is left alone: its observation stays the last one, its actions are
    ignored, and nothing is added to its return. An episode with a success at any step is one.

    Args:
      act: ``(observations [K, E, S] float32, step) -> actions [K, E, A]`` in environment units;
        ``step`` counts from 0. Actions are clipped to the bounds of the action space.
      env_spec: a Gymnasium ``EnvSpec``, also as JSON, or what :func:`.specs.named` takes.
      num_policies: ``K``, for example the training seeds.
      episode_seeds: ``[E]`` seeds of the environment's initial state and noise.
      max_steps: cuts episodes after this many steps. Needed where ``env_spec`` has no limit of its
        own; where it has one, the smaller of the two holds.
      progress: called after every step with ``(steps done, episodes ended)``.
      make: makes an environment from the spec, whose limit is the smaller one.

    Returns:
      Returns, lengths and successes, ``[K, E]`` each; an episode's last step is counted.

    Raises:
      ValueError: unknown environment, simulator that is not installed, no limit on the episode's
        length, an action space that is not a flat ``Box``, or actions of another shape.
      EvaluationError: the environment raised an error, or a non-finite observation or action (with
        its step and episode: a diverged policy must not be scored as one that stands still).
    """
    checks.check_integer("num_policies", num_policies, 1)
    if len(episode_seeds) == 0:
        raise ValueError("episode_seeds: expected at least one seed; got none")
    for seed in episode_seeds:
        checks.check_integer("episode_seeds", seed, 0)
    spec, limit = bounded_spec(env_spec, max_steps)
    seeds = [int(seed) for seed in episode_seeds]
    batch = (num_policies, len(seeds))
    returns = np.zeros(batch, np.float64)
    lengths = np.zeros(batch, np.int64)
    successes = np.full(batch, np.nan)
    running = np.ones(batch, bool)

    with contextlib.ExitStack() as stack:
        games = [stack.enter_context(contextlib.closing(make(spec))) for _ in range(running.size)]
        space, observed = games[0].action_space, games[0].observation_space
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"environment {spec.id}: expected a Box action space [A]; got {space}")
        states = []
        for game, seed in zip(games, seeds * num_policies, strict=True):
            with _environment_errors(spec, "reset", seed):
                states.append(game.reset(seed=seed)[0])
        for step in range(limit):
            with _environment_errors(spec, f"the observations of step {step}"):
                together = concatenate(observed, states, create_empty_array(observed, len(games)))
                observations = flatten_observation(observed, together, 1).reshape(*batch, -1)
            _check_finite(f"environment {spec.id}: observation", observations, running, step, seeds)
            actions = np.asarray(act(observations, step))
            checks.check_shape("actions", actions, (*batch, *space.shape))
            _check_finite("actions: action", actions, running, step, seeds)
            actions = np.clip(actions, space.low, space.high).astype(space.dtype)
            for place in zip(*np.nonzero(running), strict=True):
                game = place[0] * len(seeds) + place[1]
                with _environment_errors(spec, f"step {step}", seeds[place[1]]):
                    state, reward, terminated, truncated, info = games[game].step(actions[place])
                    states[game], reward = state, float(reward)
                    said = [float(bool(info[key])) for key in SUCCESS_KEYS if key in info]
                returns[place] += reward
                lengths[place] += 1
                successes[place] = np.fmax(successes[place], max(said, default=np.nan))
                running[place] = not (terminated or truncated)
            if progress is not None:
                progress(step + 1, int(running.size - running.sum()))
            if not running.any():
                break
    return Rollouts(returns, lengths, successes)


def bounded_spec(
    env: EnvSpec | specs.Environment, max_steps: int | None = None
) -> tuple[EnvSpec, int]:
    """What is played, and its limit: the smaller of its spec's limit of steps and ``max_steps``."""
    if isinstance(env, EnvSpec):
        spec = copy.deepcopy(env)
    elif isinstance(env, str) and env.lstrip().startswith("{"):
        spec = specs.stated("env_spec", env)
    else:
        spec = specs.named("env_spec", env)
    # Dropped, because evaluation shows nothing, and a recorded spec may ask for windows or images.
    spec.kwargs.pop("render_mode", None)
    if max_steps is not None:
        checks.check_integer("max_steps", max_steps, 1)
    limits = [limit for limit in (spec.max_episode_steps, max_steps) if limit is not None]
    if not limits:
        raise ValueError(
            f"environment {spec.id} has no limit on the length of an episode: max_steps is needed "
            "(on the command line --max_episode_steps)"
        )
    spec.max_episode_steps = min(limits)
    return spec, min(limits)


@contextlib.contextmanager
def _environment_errors(spec: EnvSpec, when: str, seed: int | None = None) -> Iterator[None]:
    """Name the environment and the moment in whatever its own code raises."""
    try:
        yield
    except Exception as error:
        episode = "" if seed is None else f" of the episode with seed {seed}"
        raise EvaluationError(
            f"environment {spec.id} failed at {when}{episode}: {reason(error)}"
        ) from error


def _check_finite(
    what: str, values: np.ndarray, running: np.ndarray, step: int, seeds: Sequence[int]
) -> None:
    """Refuse a NaN or an infinity in ``values [K, E, ...]`` of ``running [K, E]`` episodes."""
    bad = np.argwhere(running & ~np.isfinite(values).all(axis=-1))
    if len(bad):
        policy, episode = bad[0]
        raise EvaluationError(
            f"{what.replace(': ', ': non-finite ')} {values[policy, episode]} at step {step} of "
            f"episode {episode} (seed {seeds[episode]}) of policy {policy}"
        )
