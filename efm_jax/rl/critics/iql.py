"""Implicit Q-learning."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from efm_jax.losses import Aux
from efm_jax.networks import QEnsemble, Value
from efm_jax.rl.critics.base import Critic, CriticBatch, expectile_loss, global_mean, share_of_mean
from efm_jax.types import Array, Params
from efm_jax.weights import AxisName

if TYPE_CHECKING:
    from efm_jax.rl.config import QIPOConfig


@dataclasses.dataclass(frozen=True)
class IQL(Critic):
    """Implicit Q-learning (Kostrikov et al. 2021, arXiv 2110.06169, eqs. 5 and 6).

    V is the expectile of Q' over the data's actions, Q regresses on ``r + discount (1 - terminated)
    V(s')``.
    """

    v_network: Value
    expectile: float

    @classmethod
    def from_config(cls, config: QIPOConfig) -> IQL:
        dims, layer_norm = config.critic_hidden_dims, config.critic_layer_norm
        q_network = QEnsemble(dims, config.num_critics, layer_norm=layer_norm)
        return cls(q_network, Value(dims, layer_norm=layer_norm), config.expectile)

    def init(self, key: Array, observation_size: int, action_size: int) -> Params:
        q_key, v_key = jax.random.split(key)
        params = super().init(q_key, observation_size, action_size)
        return params | {"v": self.v_network.init(v_key, jnp.zeros((1, observation_size)))}

    def values(self, params: Params, observations: Array) -> Array:
        return self.v_network.apply(params["v"], observations)

    def loss(
        self,
        params: Params,
        target: Params,
        key: Array,
        batch: CriticBatch,
        axis_name: AxisName = None,
    ) -> tuple[Array, Aux]:
        samples = batch.samples
        value = self.values(params, samples.observations)
        advantage = self.q_values(target, samples.observations, samples.actions) - value
        next_value = self.values(params, samples.next_observations)
        errors, q = self.temporal_difference(params, samples, next_value)
        aux = {"q_mean": global_mean(q, axis_name), "v_mean": global_mean(value, axis_name)}
        return share_of_mean(errors + expectile_loss(advantage, self.expectile), axis_name), aux
