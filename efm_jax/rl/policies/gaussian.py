"""IQL's policy: a Gaussian regressed on advantage-weighted data actions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from efm_jax.losses import Aux
from efm_jax.networks import GaussianActor
from efm_jax.rl.critics.base import global_mean, share_of_mean
from efm_jax.rl.policies.base import Acting, Batch
from efm_jax.rl.policies.reweighting import Reweighting
from efm_jax.types import Array, Params
from efm_jax.weights import AxisName

if TYPE_CHECKING:
    from efm_jax.rl.config import QIPOConfig


class Gaussian(Reweighting):
    """Advantage-weighted regression ``-exp(beta A(s, a)) log pi(a|s)``, with the weights of
    reweighting.

    Reference: Kostrikov et al. 2021 (arXiv 2110.06169), eq. 7.
    """

    separable = True

    @classmethod
    def name(cls, config: QIPOConfig) -> str:
        return "gaussian"

    @property
    def actor(self) -> GaussianActor:
        """The network of mean and standard deviation, as wide as the behavior model's."""
        config = self.config
        return GaussianActor(
            config.hidden_dims, self.action_size, config.activation, config.layer_norm
        )

    def init(self, key: Array) -> Params:
        return self.actor.init(key, jnp.zeros((1, self.observation_size)))

    def start(self, behavior: Params, params: Params) -> Params:
        return params

    def loss(
        self, params: Params, key: Array, batch: Batch, axis_name: AxisName
    ) -> tuple[Array, Aux]:
        mean, std = self.actor.apply(params, batch.samples.observations)
        z = (batch.samples.actions - mean) / std
        log_prob = -0.5 * jnp.sum(z**2 + 2 * jnp.log(std) + jnp.log(2 * jnp.pi), axis=-1)
        aux = {"std": global_mean(std, axis_name)}
        return share_of_mean(-jnp.exp(batch.rows) * log_prob, axis_name), aux

    def sample(self, acting: Acting, observations: Array, noise: Array) -> Array:
        mean, std = self.actor.apply(acting.policy, observations)
        return jnp.clip(mean + std * noise, -1, 1)

    def mean(self, acting: Acting, observations: Array, noise: Array) -> Array:
        return self.actor.apply(acting.policy, observations[:, 0])[0]
