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

import chex
import jax
import numpy as np
from jaxtyping import Float, Real

# Functions take either and return jax.Array.  A single axis is written with a leading space,
# Float[Array, " B"], because linters read a bare word as a forward reference.
Array = jax.Array | np.ndarray
Points = Float[Array, "*batch d"]
Times = Float[Array, "*batch"]
# A number that may be traced, so it may be an array without axes.
Scalar = Real[chex.Numeric, ""]
Key = chex.PRNGKey
# A pytree of arrays; Any, because a checker knows of no keys in a chex.ArrayTree.
Params = Any
Field = Callable[[Any, Any], jax.Array]
# Every host's array, in the order of hosts; see efm_jax.training.hosts.gather.
Gather = Callable[[np.ndarray], list[np.ndarray]]
# Which of a source's rows to read, given their number.
Rows = Callable[[int], slice]


def one_host(array: np.ndarray) -> list[np.ndarray]:
    """Gather the arrays of all hosts where there is one: a :data:`Gather`."""
    return [array]


def all_rows(count: int) -> slice:
    """Choose every row of a source: a :data:`Rows`."""
    return slice(0, count)


class Transitions(NamedTuple):
    """One-step transitions on the host; a pytree of arrays that share the leading axis.

    ``terminated`` is 1 only where the environment's own dynamics ended the episode: a
    truncated (timed-out) step keeps 0 and its real next observation.
    """

    observations: np.ndarray  # [N, S] float32
    actions: np.ndarray  # [N, A] float32
    rewards: np.ndarray  # [N] float32
    next_observations: np.ndarray  # [N, S] float32
    terminated: np.ndarray  # [N] float32, 0 or 1

    @property
    def size(self) -> int:
        """Count the transitions (``len`` of a named tuple is its number of fields)."""
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
    reference_scores: tuple[float, float] | None  # mean returns at the scores 0 and 100
    first_row: int = 0
    notes: tuple[str, ...] = ()  # what a user should know of how it was read, a line each

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


def _mix(x: np.ndarray) -> np.ndarray:
    """Spread every bit of a uint64 over all: SplitMix64's finalizer (Steele, Lea, Flood 2014)."""
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
        """Map observations ``[..., S]`` from their own units to zero mean and unit variance."""
        return (observations - self.observation_mean) / self.observation_std

    def scale_actions(self, actions: Array) -> Array:
        """Map actions ``[..., A]`` from the environment's bounds to [-1, 1]."""
        return 2.0 * (actions - self.action_low) / (self.action_high - self.action_low) - 1.0

    def unscale_actions(self, actions: Array) -> Array:
        """Map actions ``[..., A]`` from [-1, 1] back to the environment's bounds."""
        return self.action_low + 0.5 * (actions + 1.0) * (self.action_high - self.action_low)
