"""In-support softmax Q-learning."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from efm_jax.losses import Aux
from efm_jax.networks import QEnsemble
from efm_jax.rl.critics.base import Critic, CriticBatch, global_mean, share_of_mean
from efm_jax.types import Array, Params
from efm_jax.weights import AxisName

if TYPE_CHECKING:
    from efm_jax.rl.config import QIPOConfig


@dataclasses.dataclass(frozen=True)
class SoftmaxQ(Critic):
    """In-support softmax Q-learning (Lu et al. 2023, arXiv 2304.12824, eq. 18).

    ``y = r + discount (1 - terminated) sum_j softmax_j(beta_q Q'(s', a'_j)) Q'(s', a'_j)`` with
    actions ``a'_j`` of the behavior model at s' and Q' the minimum of the target networks.
    """

    beta_q: float

    uses_next_actions = True

    @classmethod
    def from_config(cls, config: QIPOConfig) -> SoftmaxQ:
        network = QEnsemble(
            config.critic_hidden_dims, config.num_critics, layer_norm=config.critic_layer_norm
        )
        return cls(network, config.beta_q)

    def loss(
        self,
        params: Params,
        target: Params,
        key: Array,
        batch: CriticBatch,
        axis_name: AxisName = None,
    ) -> tuple[Array, Aux]:
        samples = batch.samples
        next_q = self.q_values(target, samples.next_observations[:, None], batch.next_actions)
        next_value = jnp.sum(jax.nn.softmax(self.beta_q * next_q, axis=-1) * next_q, axis=-1)
        errors, q = self.temporal_difference(params, samples, next_value)
        return share_of_mean(errors, axis_name), {"q_mean": global_mean(q, axis_name)}
