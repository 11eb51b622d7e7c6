"""The record of a dataset, and datasets of arrays that a program holds."""

import contextlib
import hashlib
from typing import NamedTuple

import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import ArrayLike

from efm_jax import checks
from efm_jax.data import validation
from efm_jax.data.rows import Columns, read_steps
from efm_jax.envs import environments, scores, specs
from efm_jax.errors import DataError
from efm_jax.types import Gather, Transitions, one_host


class Dataset(NamedTuple):
    """Offline data as read from its source, in the environment's own units, on the host.

    A host may have read only some of the rows: ``transitions`` are then those from ``first_row``
    on, and the episodes those that begin in them.
    """

    name: str
    transitions: Transitions
    episode_returns: np.ndarray  # [number of episodes] float64, undiscounted
    episode_lengths: np.ndarray  # [number of episodes] int64
    action_low: np.ndarray  # [A] float32
    action_high: np.ndarray  # [A] float32
    env_spec: str | None  # gymnasium EnvSpec as JSON; None where the source names no environment
    reference_scores: tuple[float, float] | None  # mean returns at the scores 0 and 100
    first_row: int = 0
    notes: tuple[str, ...] = ()  # what a user should know of how it was read, a line each
    own_env: EnvSpec | None = None  # of this program: env_spec then says its name and limit alone

    @property
    def observation_size(self) -> int:
        return self.transitions.observations.shape[1]

    @property
    def action_size(self) -> int:
        return self.transitions.actions.shape[1]

    def fingerprint(self, gather: Gather = one_host) -> str:
        """Return 64 hex digits of every transition and its place: the same ones, the same policy.

        The digits do not depend on how the rows are split over hosts, being made of a 64-bit sum of
        a hash of every row.  They tell datasets apart that differ by accident, not by intent.
        """
        columns = np.concatenate(
            [np.asarray(a, np.float32).reshape(len(a), -1) for a in self.transitions], axis=1
        )
        rows = _mix(np.arange(self.first_row, self.first_row + len(columns), dtype=np.uint64))
        for column in np.ascontiguousarray(columns.T).view(np.uint32):
            rows = _mix(rows ^ column)
        total = sum(int(part) for part in gather(rows.sum(dtype=np.uint64)))
        sizes = [int(part) for part in gather(np.asarray(len(columns)))]
        widths = (columns.shape[1], self.observation_size, self.action_size)
        return hashlib.sha256(repr((sum(sizes), *widths, total % 2**64)).encode()).hexdigest()

    def head(self, count: int) -> "Dataset":
        """The first transitions, with the episodes that begin in them."""
        if count == self.transitions.size:
            return self
        firsts = np.cumsum(self.episode_lengths) - self.episode_lengths
        begun = firsts < count  # where each step is a transition
        return self._replace(
            transitions=Transitions(*(array[:count] for array in self.transitions)),
            episode_returns=self.episode_returns[begun],
            episode_lengths=self.episode_lengths[begun],
        )

    @classmethod
    def from_arrays(
        cls,
        observations: ArrayLike,
        actions: ArrayLike,
        rewards: ArrayLike,
        terminated: ArrayLike,
        truncated: ArrayLike,
        *,
        next_observations: ArrayLike | None = None,
        action_low: ArrayLike | None = None,
        action_high: ArrayLike | None = None,
        env: specs.Environment | None = None,
        max_episode_steps: int | None = None,
        reference_scores: tuple[float, float] | None = None,
        name: str = "arrays",
    ) -> "Dataset":
        """Make a dataset of recorded steps, with the checks and the rules that files get.

        Rows are steps, episode after episode, in the environment's units; they are copied, to
        float32.  Without ``next_observations`` the next row's observation is the next one; the last
        row of a truncated episode has none, and is dropped, as is a last row that is not
        terminated.

        Args:
          observations: ``[N, S]``.
          actions: ``[N, A]``, continuous.
          rewards: ``[N]``.
          terminated: ``[N]``, 1 where the environment's own dynamics ended the episode.
          truncated: ``[N]``, 1 where a limit of steps or the end of the recording did.
          next_observations: ``[N, S]``, after the step and before any reset.
          action_low, action_high: bounds, ``[A]`` or one number; by default those of ``env``,
            without one -1 and 1.
          env: where policies are evaluated, as :meth:`in_environment` takes it; None: nowhere.
          max_episode_steps: of an evaluated episode; by default the environment's.
          reference_scores: mean returns at the scores 0 and 100.
          name: what results and messages call it.

        Raises:
          DataError: a ``ValueError`` of one line: lengths that disagree, numbers that are not
            finite, actions that are discrete or out of bounds, an environment that cannot be had.

        Example:
          >>> data = Dataset.from_arrays(
          ...     observations=[[0.0], [0.5], [1.0]], actions=[[0.1], [-0.2], [0.3]],
          ...     rewards=[0.0, 0.0, 1.0], terminated=[0, 0, 1], truncated=[0, 0, 0])
          >>> data.transitions.next_observations.tolist()  # of a terminated step never used
          [[0.5], [1.0], [1.0]]
        """
        given = {
            "observations": observations,
            "actions": actions,
            "rewards": rewards,
            "terminated": terminated,
            "truncated": truncated,
            "next_observations": next_observations,
        }
        arrays = {key: np.asarray(value) for key, value in given.items() if value is not None}
        columns = Columns(name, arrays, tuple(arrays))
        if reference_scores is not None:
            scores.check_references(f"{name}: reference_scores", reference_scores)
        low, high, size = -1.0, 1.0, columns["actions"].shape[1]
        if env is not None and (action_low is None or action_high is None):
            spec = specs.named(name, env)
            environments.check_sizes(name, spec, columns["observations"].shape[1], size)
            with contextlib.closing(environments.make(spec)) as made:
                box = validation.check_action_space(name, made.action_space)
            low, high = box.low, box.high
        low = _bound(f"{name}: action_low", low if action_low is None else action_low, size)
        high = _bound(f"{name}: action_high", high if action_high is None else action_high, size)
        validation.check_bounds(name, low, high)
        ended, cut = columns.flags("terminated"), columns.flags("truncated")
        dataset = cls(
            name=name,
            **read_steps(name, columns, low, high, ended, cut, ended | cut)._asdict(),
            action_low=low,
            action_high=high,
            env_spec=None,
            reference_scores=reference_scores,
        )
        return dataset if env is None else dataset.in_environment(env, max_episode_steps)

    def in_environment(
        self, env: specs.Environment, max_episode_steps: int | None = None
    ) -> "Dataset":
        """Return the same data, whose policies are evaluated in another environment.

        Args:
          env: a Gymnasium id; ``module:Id``, which imports the module; or a function that returns a
            new environment at every call.
          max_episode_steps: of an evaluated episode; by default the environment's own limit.

        Raises:
          DataError: an environment that is not known or cannot be made.
        """
        spec = specs.named(self.name, env)
        if max_episode_steps is not None:
            checks.check_integer("max_episode_steps", max_episode_steps, 1)
            spec.max_episode_steps = max_episode_steps
        if not callable(env):
            return self._replace(env_spec=specs.to_json(self.name, spec), own_env=None)
        # Without the function, because files choose no code.
        stated = EnvSpec(spec.id, max_episode_steps=spec.max_episode_steps)
        return self._replace(env_spec=stated.to_json(), own_env=spec)


def _bound(name: str, value: ArrayLike, size: int) -> np.ndarray:
    bound = np.asarray(value, np.float32)
    bound = np.full(size, bound) if bound.ndim == 0 else bound
    checks.check_shape(name, bound, (size,))
    return bound


def check_dataset(dataset: Dataset) -> None:
    """Refuse arrays given in Python that no file may have; the loaders have refused them before."""
    name, data = dataset.name, dataset.transitions
    ranks = {"observations": 2, "actions": 2, "rewards": 1, "next_observations": 2, "terminated": 1}
    arrays = {key: np.asarray(array) for key, array in zip(ranks, data, strict=True)}
    validation.check_action_dtype(name, arrays["actions"])
    validation.check_lengths(name, arrays, ranks)
    for key, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise DataError(f"{name}: {key}: expected real numbers; got type {array.dtype}")
        validation.check_finite(name, key, array)
    validation.as_flags(name, "terminated", arrays["terminated"])
    shapes = arrays["observations"].shape, arrays["next_observations"].shape
    if shapes[0] != shapes[1]:
        raise DataError(
            f"{name}: observations have shape {shapes[0]}, next_observations {shapes[1]}"
        )
    low, high = np.asarray(dataset.action_low), np.asarray(dataset.action_high)
    if low.shape != high.shape or low.shape != arrays["actions"].shape[1:]:
        raise DataError(
            f"{name}: actions have shape {arrays['actions'].shape}, their bounds {low.shape} and "
            f"{high.shape}"
        )
    validation.check_bounds(name, low, high)
    validation.clip_actions(name, arrays["actions"], low, high)


def _mix(x: np.ndarray) -> np.ndarray:
    """Spread every bit of a uint64 over all: SplitMix64's finalizer (Steele, Lea, Flood 2014)."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
