"""What every offline critic is.

A critic is trained by the same step as a policy: ``average`` holds the target networks, and the
loss is this device's share.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import lax

from efm_jax.losses import Aux
from efm_jax.networks import QEnsemble
from efm_jax.rl.samples import Samples
from efm_jax.types import Array, Params
from efm_jax.weights import AxisName

if TYPE_CHECKING:  # the configuration imports the registry of critics
    from efm_jax.rl.config import QIPOConfig


class CriticBatch(NamedTuple):
    """A batch of samples and, for critics that ask for them, behavior actions at the next states."""

    samples: Samples
    next_actions: Array | None  # [B, M, A]


@dataclasses.dataclass(frozen=True)
class Critic(abc.ABC):
    """A critic; its parameters hold at least the Q ensemble under ``"q"``."""

    q_network: QEnsemble

    uses_next_actions = False  # whether the loss needs behavior actions at the next states

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: QIPOConfig) -> Critic:
        """The critic that a validated configuration describes."""

    def init(self, key: Array, observation_size: int, action_size: int) -> Params:
        """Fresh parameters."""
        return {
            "q": self.q_network.init(
                key, jnp.zeros((1, observation_size)), jnp.zeros((1, action_size))
            )
        }

    def q_values(self, params: Params, observations: Array, actions: Array) -> Array:
        """What policies maximize, by default ``min_k Q_k(s, a)``.

        States ``[..., S]`` broadcast against actions ``[..., A]``; the result has their leading
        axes.
        """
        return self.q_network.apply(params["q"], observations, actions).min(0)

    def values(self, params: Params, observations: Array) -> Array | None:
        """``V(s)`` of the value network, ``[..., S] -> [...]``; None where there is none."""
        return None

    @abc.abstractmethod
    def loss(
        self,
        params: Params,
        target: Params,
        key: Array,
        batch: CriticBatch,
        axis_name: AxisName = None,
    ) -> tuple[Array, Aux]:
        """This device's share of the mean loss over the global batch; ``aux`` has means over it.

        A step may compute a large batch in parts, so ``key`` may hold a key for each sample
        (:func:`efm_jax.losses.sample_keys`).
        """

    def temporal_difference(
        self, params: Params, samples: Samples, next_value: Array
    ) -> tuple[Array, Array]:
        """Squared errors ``[B]``, summed over the ensemble, and Q-values ``[num, B]``.

        ``next_value`` is ``[B]``, or ``[num, B]`` where every member has a target of its own.
        """
        target = samples.rewards + samples.discounts * next_value
        q = self.q_network.apply(params["q"], samples.observations, samples.actions)
        return jnp.sum((q - lax.stop_gradient(target)) ** 2, axis=0), q


def expectile_loss(difference: Array, expectile: float) -> Array:
    """``|expectile - 1(difference < 0)| difference^2`` (Kostrikov et al. 2021, arXiv 2110.06169, eq. 4)."""
    return jnp.where(difference > 0, expectile, 1 - expectile) * difference**2


def share_of_mean(values: Array, axis_name: AxisName) -> Array:
    """This device's share of the mean over the global batch."""
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    return values.mean() / devices


def global_mean(values: Array, axis_name: AxisName) -> Array:
    """The mean over the global batch."""
    return values.mean() if axis_name is None else lax.pmean(values.mean(), axis_name)
