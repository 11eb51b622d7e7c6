"""Returns of policies in a Gymnasium environment, one batched policy call a step for all episodes."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from efm_jax import checks
from efm_jax.envs.environments import find_spec, make
from efm_jax.envs.flatten import flatten_observation
from efm_jax.types import Array


class Rollouts(NamedTuple):
    """What every episode gave; nothing is averaged here."""

    returns: np.ndarray  # [K, E] float64, undiscounted, in the environment's own reward units
    lengths: np.ndarray  # [K, E] int64, number of environment steps


def evaluate(
    act: Callable[[np.ndarray, int], Array],
    env_spec: str,
    *,
    num_policies: int = 1,
    episode_seeds: Sequence[int],
    max_steps: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Rollouts:
    """Runs ``E = len(episode_seeds)`` episodes of each of ``K = num_policies`` policies.

    All ``K * E`` episodes are sub-environments of one vector environment, so ``act`` is called
    once a step, always with the same shapes. Episode ``e`` of every policy is reset with
    ``episode_seeds[e]``. After an episode has ended its environment is left alone: its observation
    stays the last one, its actions are ignored, and nothing is added to its return.

    Args:
      act: ``(observations [K, E, S] float32, step) -> actions [K, E, A]`` in environment units;
        ``step`` counts from 0. Actions are clipped to the bounds of the action space.
      env_spec: a Gymnasium ``EnvSpec`` as JSON, or the id of a registered environment.
      num_policies: ``K``, for example the training seeds.
      episode_seeds: ``[E]`` seeds of the environment's initial state and noise.
      max_steps: cuts episodes after this many steps. Needed where ``env_spec`` has no limit of its
        own; where it has one, the smaller of the two holds.
      progress: called after every step with ``(steps done, episodes ended)``.

    Returns:
      Returns and lengths, ``[K, E]`` each; the reward of an episode's last step is counted.

    Raises:
      ValueError: unknown environment, simulator that is not installed, no limit on the episode's
        length, an action space that is not a flat ``Box``, actions of another shape, or a
        non-finite action (with its step and episode: a diverged policy must not be scored as one
        that stands still).
    """
    checks.check_integer("num_policies", num_policies, 1)
    if len(episode_seeds) == 0:
        raise ValueError("episode_seeds: expected at least one seed; got none")
    for seed in episode_seeds:
        checks.check_integer("episode_seeds", seed, 0)
    spec = read_spec(env_spec)
    limit = step_limit(spec, max_steps)
    seeds = [int(seed) for seed in episode_seeds]
    batch = (num_policies, len(seeds))

    with contextlib.closing(_vectorize(spec, num_policies * len(seeds))) as environments:
        action_space = environments.single_action_space
        if not isinstance(action_space, gymnasium.spaces.Box) or len(action_space.shape) != 1:
            raise ValueError(
                f"environment {spec.id}: expected a Box action space [A]; got {action_space}"
            )
        returns = np.zeros(batch, np.float64)
        lengths = np.zeros(batch, np.int64)
        running = np.ones(batch, bool)
        observations, _ = environments.reset(seed=seeds * num_policies)
        for step in range(limit):
            flat = flatten_observation(environments.single_observation_space, observations, 1)
            actions = np.asarray(act(np.asarray(flat, np.float32).reshape(*batch, -1), step))
            checks.check_shape("actions", actions, (*batch, *action_space.shape))
            check_finite(actions, running, step, seeds)
            actions = np.clip(actions, action_space.low, action_space.high).astype(
                action_space.dtype
            )
            observations, rewards, terminated, truncated, _ = environments.step(
                actions.reshape(-1, *action_space.shape)
            )
            returns += np.where(running, rewards.reshape(batch), 0.0)
            lengths += running
            running &= ~(terminated | truncated).reshape(batch)
            if progress is not None:
                progress(step + 1, int(running.size - running.sum()))
            if not running.any():
                break
    return Rollouts(returns, lengths)


class _OneEpisode(gymnasium.Wrapper):
    """An environment that plays a single episode and then stands still.

    Gymnasium's autoreset would start, and simulate, a further episode in every finished
    sub-environment until the slowest one ends. Under ``NEXT_STEP`` the vector environment calls
    ``reset()`` without a seed once after the end; here that call, and every step after it, does
    nothing.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self._last_observation: Any = None
        self._ended = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict]:
        if self._ended:
            return self._last_observation, {}
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        if self._ended:
            return self._last_observation, 0.0, False, False, {}
        observation, reward, terminated, truncated, _ = self.env.step(action)
        self._ended = bool(terminated or truncated)
        self._last_observation = observation
        return observation, float(reward), bool(terminated), bool(truncated), {}


def read_spec(env_spec: str) -> EnvSpec:
    """The ``EnvSpec`` named by an id or written as JSON, without rendering."""
    if env_spec.lstrip().startswith("{"):
        try:
            spec = EnvSpec.from_json(env_spec)
        except (gymnasium.error.Error, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"env_spec: not the JSON of a gymnasium EnvSpec: {type(error).__name__}: "
                f"{one_line(error)}"
            ) from error
    else:
        try:
            spec = find_spec(env_spec)
        except (gymnasium.error.Error, ImportError) as error:
            raise ValueError(
                f"environment {env_spec!r}: unknown to Gymnasium: {one_line(error)}"
            ) from error
    # A recorded spec may ask for windows or images; evaluation shows nothing.
    spec.kwargs.pop("render_mode", None)
    return spec


def step_limit(spec: EnvSpec, max_steps: int | None) -> int:
    """The smaller of the environment's limit and ``max_steps``; a ``ValueError`` where there is neither."""
    if max_steps is not None:
        checks.check_integer("max_steps", max_steps, 1)
    limits = [limit for limit in (spec.max_episode_steps, max_steps) if limit is not None]
    if not limits:
        raise ValueError(
            f"environment {spec.id} has no limit on the length of an episode: max_steps is needed"
        )
    return min(limits)


def _vectorize(spec: EnvSpec, count: int) -> SyncVectorEnv:
    """``count`` copies behind one vector environment; on an error those already made are closed."""
    environments: list[gymnasium.Env] = []
    try:
        for _ in range(count):
            # The checker tests environments, not policies, and warns once for every copy.
            environments.append(_OneEpisode(make(spec, disable_env_checker=True)))
        # NEXT_STEP, because the returned observation and reward then belong to the same episode and
        # no sub-environment is reset within the step that ended it.
        return SyncVectorEnv(
            [lambda env=env: env for env in environments], autoreset_mode=AutoresetMode.NEXT_STEP
        )
    except BaseException:
        for environment in environments:
            environment.close()
        raise


def check_finite(actions: np.ndarray, running: np.ndarray, step: int, seeds: Sequence[int]) -> None:
    """No NaN and no infinity in the actions ``[K, E, A]`` of ``running [K, E]`` episodes."""
    bad = np.argwhere(running & ~np.isfinite(actions).all(axis=-1))
    if len(bad):
        policy, episode = bad[0]
        raise ValueError(
            f"actions: non-finite action {actions[policy, episode]} at step {step} of episode "
            f"{episode} "
            f"(seed {seeds[episode]}) of policy {policy}"
        )


def one_line(error: Exception) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())
