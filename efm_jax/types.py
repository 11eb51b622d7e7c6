"""Records shared by every module, and the conventions stated once.

Time: ``t = 0`` is data, ``t = 1`` is noise.  Energy: low is good; in offline RL
``E = -Q(s, a)``.  A *field* is any callable ``field(x, t) -> [..., d]``.

Shape letters: ``B`` batch, ``d`` event size, ``n``/``N`` number of data points or
transitions, ``M`` support actions of a state, ``S`` observation size, ``A`` action size,
``K`` training seeds, ``E`` evaluation episodes.
"""

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
