"""QGPO: the behavior model guided by a learned intermediate energy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from efm_jax import losses
from efm_jax.guidance import contrastive_guided
from efm_jax.losses import Aux
from efm_jax.networks import LogRatio
from efm_jax.rl.policies.base import Acting, Batch
from efm_jax.rl.policies.qipo import QIPO
from efm_jax.rl.samples import Samples
from efm_jax.rl.support import SupportSet
from efm_jax.types import Array, Field, Params
from efm_jax.weights import AxisName

if TYPE_CHECKING:
    from efm_jax.rl.config import QIPOConfig


class QGPO(QIPO):
    """Contrastive energy prediction on support sets of the behavior model, and its gradient at
    every step.

    The log-ratio network learns ``-E_t(a_t; s)`` of ``mu(a|s) exp(beta Q)`` on the support sets
    that QIPO begins with; the policy's score is the behavior model's plus the network's gradient.
    The behavior model is not trained again.

    Reference: Lu et al. 2023 (arXiv 2304.12824), Algorithm 1.
    """

    renews = False

    @classmethod
    def name(cls, config: QIPOConfig) -> str:
        return "qgpo"

    @property
    def actions_per_state(self) -> int:
        return self.config.support_size + 1

    @property
    def log_ratio(self) -> LogRatio:
        """The network of the intermediate energy, as wide as the behavior model's."""
        config = self.config
        return LogRatio(
            config.hidden_dims, config.activation, config.layer_norm, config.time_features
        )

    def init(self, key: Array) -> Params:
        inputs = (
            jnp.zeros((1, self.action_size)),
            jnp.zeros(1),
            jnp.zeros((1, self.observation_size)),
        )
        return self.log_ratio.init(key, *inputs)

    def start(self, behavior: Params, params: Params) -> Params:
        return params

    def rows(
        self, acting: Acting, key: Array, renewal: Array, samples: Samples, indices: Array
    ) -> SupportSet:
        return super().rows(acting._replace(policy=acting.behavior), key, renewal, samples, indices)

    def gather(
        self, key: Array, table: SupportSet, indices: Array, axis_name: AxisName
    ) -> SupportSet:
        # Contrasting needs all actions of a state.
        return jax.tree.map(lambda leaf: leaf[indices], table)

    def loss(
        self, params: Params, key: Array, batch: Batch, axis_name: AxisName
    ) -> tuple[Array, Aux]:
        observations = batch.samples.observations[:, None]

        def log_ratio(x: Array, t: Array) -> Array:
            return self.log_ratio.apply(params, x, t, observations)

        return losses.cep(
            log_ratio, self.model.path, key, batch.rows.actions, -batch.rows.log_weights, 1.0,
            axis_name=axis_name,
        )  # fmt: skip

    def sample(self, acting: Acting, observations: Array, noise: Array) -> Array:
        score = self.model.field(acting.behavior, observations)

        def log_ratio(x: Array, t: Array) -> Array:
            return self.log_ratio.apply(acting.policy, x, t, observations)

        guided: Field = contrastive_guided(score, log_ratio)
        return self.model.integrate(guided, noise)
