"""Records shared by every module, and the conventions stated once.

Time: ``t = 0`` is data, ``t = 1`` is noise.  Energy: low is good; in offline RL
``E = -Q(s, a)``.  A *field* is any callable ``field(x, t) -> [..., d]``.

Shape letters: ``B`` batch, ``d`` event size, ``n``/``N`` number of data points or
transitions, ``M`` support actions of a state, ``S`` observation size, ``A`` action size,
``K`` training seeds, ``E`` evaluation episodes.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
Field = Callable[[Array, Array], Array]
Params = Any
# Every host's array, in the order of hosts; see efm_jax.training.hosts.gather.
Gather = Callable[[np.ndarray], list[np.ndarray]]
# Which of a source's rows to read, given their number.
Rows = Callable[[int], slice]


def one_host(array: np.ndarray) -> list[np.ndarray]:
    """The :data:`Gather` of a host that is alone."""
    return [array]


def all_rows(count: int) -> slice:
    """The :data:`Rows` of a host that reads everything."""
    return slice(0, count)


class Transitions(NamedTuple):
    """One-step transitions; a pytree of arrays that share the leading axis.

    ``terminated`` is 1 only where the environment's own dynamics ended the episode: a
    truncated (timed-out) step keeps 0 and its real next observation.
    """

    observations: Array  # [N, S] float32
    actions: Array  # [N, A] float32
    rewards: Array  # [N] float32
    next_observations: Array  # [N, S] float32
    terminated: Array  # [N] float32, 0 or 1

    @property
    def size(self) -> int:
        """Number of transitions (``len`` of a named tuple is its number of fields)."""
        return self.rewards.shape[0]


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
    reference_scores: (
        tuple[float, float] | None
    )  # mean return of (random, expert) = scores (0, 100)
    first_row: int = 0

    @property
    def observation_size(self) -> int:
        return self.transitions.observations.shape[1]

    @property
    def action_size(self) -> int:
        return self.transitions.actions.shape[1]

    def fingerprint(self, gather: Gather = one_host) -> str:
        """64 hex digits of every transition and its place: with the same ones, the same policy is
        trained.

        It does not depend on how the rows are split over hosts: it is made of a 64-bit sum of a
        hash of every row.  It tells datasets apart that differ by accident, not by intent.
        """
        columns = np.concatenate(
            [np.asarray(a, np.float32).reshape(len(a), -1) for a in self.transitions], axis=1
        )
        rows = _mix(np.arange(self.first_row, self.first_row + len(columns), dtype=np.uint64))
        for column in np.ascontiguousarray(columns.T).view(np.uint32):
            rows = _mix(rows ^ column)
        total = sum(int(part) for part in gather(rows.sum(dtype=np.uint64)))
        sizes = [int(part) for part in gather(np.asarray(len(columns)))]
        summary = (
            sum(sizes),
            columns.shape[1],
            self.observation_size,
            self.action_size,
            total % 2**64,
        )
        return hashlib.sha256(repr(summary).encode()).hexdigest()


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014): every bit of a uint64 spreads over all."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Normalizer(NamedTuple):
    """Statistics that travel with a checkpoint; a pytree, usable on NumPy and JAX arrays alike."""

    observation_mean: Array  # [S]
    observation_std: Array  # [S], > 0
    action_low: Array  # [A]
    action_high: Array  # [A]

    def normalize_observations(self, observations: Array) -> Array:
        """Environment units to zero mean and unit variance, ``[..., S]``."""
        return (observations - self.observation_mean) / self.observation_std

    def scale_actions(self, actions: Array) -> Array:
        """The environment's bounds to [-1, 1], ``[..., A]``."""
        return 2.0 * (actions - self.action_low) / (self.action_high - self.action_low) - 1.0

    def unscale_actions(self, actions: Array) -> Array:
        """[-1, 1] back to the environment's bounds, ``[..., A]``; the inverse of :meth:`scale_actions`."""
        return self.action_low + 0.5 * (actions + 1.0) * (self.action_high - self.action_low)
