"""An ensemble of independent critics and its lower confidence bound."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from efm_jax.losses import Aux
from efm_jax.networks import QEnsemble, ValueEnsemble
from efm_jax.rl.critics.base import CriticBatch, expectile_loss, global_mean, share_of_mean
from efm_jax.rl.critics.iql import IQL
from efm_jax.types import Array, Params
from efm_jax.weights import AxisName

if TYPE_CHECKING:
    from efm_jax.rl.config import QIPOConfig


@dataclasses.dataclass(frozen=True)
class EnsembleLCB(IQL):
    """Members that share nothing, each with an in-sample target of its own; their lower confidence
    bound.

    Member k is implicit Q-learning with a Q-network, a target network and a value network of its
    own.  Where targets are shared, members agree about actions that none of them has seen;
    independent ones do not, and their spread measures it (Ghasemipour et al. 2022, "Why so
    pessimistic?", arXiv 2205.13703, Sec. 4). Policies maximize the bound of the advantage, ``mean_k
    A_k - pessimism std_k A_k`` with ``A_k = Q_k(s, a) - V_k(s)``, plus ``mean_k V_k(s)``: the
    spread of Q itself would also count what the members disagree about in the state, whatever the
    action.
    """

    v_network: ValueEnsemble
    pessimism: float

    @classmethod
    def from_config(cls, config: QIPOConfig) -> EnsembleLCB:
        dims, layer_norm = config.critic_hidden_dims, config.critic_layer_norm
        return cls(
            QEnsemble(dims, config.num_critics, layer_norm=layer_norm),
            ValueEnsemble(dims, config.num_critics, layer_norm=layer_norm),
            config.expectile,
            config.pessimism,
        )

    def q_values(self, params: Params, observations: Array, actions: Array) -> Array:
        """The lower confidence bound of ``Q(s, a)``; shapes as in :meth:`Critic.q_values`."""
        values = self.v_network.apply(params["v"], observations)
        advantages = self.q_network.apply(params["q"], observations, actions) - values
        return values.mean(0) + advantages.mean(0) - self.pessimism * advantages.std(0)

    def values(self, params: Params, observations: Array) -> Array:
        return self.v_network.apply(params["v"], observations).mean(0)

    def loss(
        self,
        params: Params,
        target: Params,
        key: Array,
        batch: CriticBatch,
        axis_name: AxisName = None,
    ) -> tuple[Array, Aux]:
        samples = batch.samples
        value = self.v_network.apply(params["v"], samples.observations)
        target_q = self.q_network.apply(target["q"], samples.observations, samples.actions)
        next_value = self.v_network.apply(params["v"], samples.next_observations)
        errors, q = self.temporal_difference(params, samples, next_value)
        v_errors = expectile_loss(target_q - value, self.expectile).sum(0)
        aux = {
            "q_mean": global_mean(q, axis_name),
            "v_mean": global_mean(value, axis_name),
            "advantage_std": global_mean((q - value).std(0), axis_name),
        }
        return share_of_mean(errors + v_errors, axis_name), aux
