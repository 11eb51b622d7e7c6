"""Offline critics: in-support softmax Q-learning and implicit Q-learning.

A critic is trained by the same step as a policy: ``average`` holds the target networks, and the loss
is this device's share.  Q-values are the minimum over the ensemble of target networks.
"""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from efm_jax.losses import Aux
from efm_jax.networks import QEnsemble, Value
from efm_jax.rl.config import QIPOConfig
from efm_jax.types import Array, Params, Transitions
from efm_jax.weights import AxisName


class CriticBatch(NamedTuple):
    """A batch of transitions and, for critics that ask for them, behaviour actions at the next states."""

    transitions: Transitions
    next_actions: Array | None  # [B, M, A]


@dataclasses.dataclass(frozen=True)
class Critic(abc.ABC):
    """A critic; its parameters hold at least the Q ensemble under ``"q"``."""

    q_network: QEnsemble
    discount: float

    uses_next_actions = False

    def init(self, key: Array, observation_size: int, action_size: int) -> Params:
        """Fresh parameters."""
        return {"q": self.q_network.init(key, jnp.zeros((1, observation_size)), jnp.zeros((1, action_size)))}

    def q_values(self, params: Params, observations: Array, actions: Array) -> Array:
        """``min_k Q_k(s, a)``: states ``[..., S]`` broadcast against actions ``[..., A]``."""
        return self.q_network.apply(params["q"], observations, actions).min(0)

    @abc.abstractmethod
    def loss(
        self, params: Params, target: Params, key: Array, batch: CriticBatch, axis_name: AxisName = None
    ) -> tuple[Array, Aux]:
        """This device's share of the mean loss over the global batch; ``aux`` has means over it."""

    def _temporal_difference(
        self, params: Params, batch: Transitions, next_value: Array
    ) -> tuple[Array, Array]:
        """Squared errors ``[B]``, summed over the ensemble, and Q-values ``[num, B]``."""
        # terminated, not truncated: a timed-out state still has a future.
        target = batch.rewards + self.discount * (1 - batch.terminated) * next_value
        q = self.q_network.apply(params["q"], batch.observations, batch.actions)
        return jnp.sum((q - lax.stop_gradient(target)) ** 2, axis=0), q


@dataclasses.dataclass(frozen=True)
class SoftmaxQ(Critic):
    """In-support softmax Q-learning (Lu et al. 2023, arXiv 2304.12824, eq. 18).

    ``y = r + discount (1 - terminated) sum_j softmax_j(beta_q Q'(s', a'_j)) Q'(s', a'_j)`` with actions
    ``a'_j`` of the behaviour model at s' and Q' the minimum of the target networks.
    """

    beta_q: float

    uses_next_actions = True

    def loss(
        self, params: Params, target: Params, key: Array, batch: CriticBatch, axis_name: AxisName = None
    ) -> tuple[Array, Aux]:
        transitions = batch.transitions
        next_q = self.q_values(target, transitions.next_observations[:, None], batch.next_actions)
        next_value = jnp.sum(jax.nn.softmax(self.beta_q * next_q, axis=-1) * next_q, axis=-1)
        errors, q = self._temporal_difference(params, transitions, next_value)
        return _share_of_mean(errors, axis_name), {"q_mean": _global_mean(q, axis_name)}


@dataclasses.dataclass(frozen=True)
class IQL(Critic):
    """Implicit Q-learning (Kostrikov et al. 2021, arXiv 2110.06169, eqs. 5 and 6).

    V is the expectile of Q' over the data's actions, Q regresses on ``r + discount (1 - terminated) V(s')``.
    """

    v_network: Value
    expectile: float

    def init(self, key: Array, observation_size: int, action_size: int) -> Params:
        q_key, v_key = jax.random.split(key)
        params = super().init(q_key, observation_size, action_size)
        return params | {"v": self.v_network.init(v_key, jnp.zeros((1, observation_size)))}

    def loss(
        self, params: Params, target: Params, key: Array, batch: CriticBatch, axis_name: AxisName = None
    ) -> tuple[Array, Aux]:
        transitions = batch.transitions
        value = self.v_network.apply(params["v"], transitions.observations)
        advantage = self.q_values(target, transitions.observations, transitions.actions) - value
        weight = jnp.where(advantage > 0, self.expectile, 1 - self.expectile)
        next_value = self.v_network.apply(params["v"], transitions.next_observations)
        errors, q = self._temporal_difference(params, transitions, next_value)
        aux = {"q_mean": _global_mean(q, axis_name), "v_mean": _global_mean(value, axis_name)}
        return _share_of_mean(errors + weight * advantage**2, axis_name), aux


def _share_of_mean(values: Array, axis_name: AxisName) -> Array:
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    return values.mean() / devices


def _global_mean(values: Array, axis_name: AxisName) -> Array:
    return values.mean() if axis_name is None else lax.pmean(values.mean(), axis_name)


def make_critic(config: QIPOConfig) -> Critic:
    """The critic that a validated configuration describes."""
    dims, layer_norm = config.critic_hidden_dims, config.critic_layer_norm
    q_network = QEnsemble(dims, layer_norm=layer_norm)
    if config.critic == "softmax_q":
        return SoftmaxQ(q_network, config.discount, config.beta_q)
    return IQL(q_network, config.discount, Value(dims, layer_norm=layer_norm), config.expectile)
