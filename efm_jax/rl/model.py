"""The generative model of actions: a conditional field, its losses and its sampler.

On the OT and cosine paths the network predicts the velocity and is trained by flow matching
(QIPO-OT); on the linear VP path it predicts the noise and is trained by denoising score matching
(QIPO-Diff).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp
from flax import linen as nn

from efm_jax import losses, sampling
from efm_jax.networks import FIELDS
from efm_jax.paths import PATHS, GaussianPath
from efm_jax.types import Array, Field, Params
from efm_jax.weights import AxisName

if TYPE_CHECKING:  # the configuration imports the registries, and they this module
    from efm_jax.rl.config import QIPOConfig

# Ends of the sampling interval that every conversion of a score can divide by.
_SCORE_T_END = 1e-3


def _solver(name: str, predicts_score: bool) -> str:
    if name == "auto":
        return "dpmpp" if predicts_score else "midpoint"
    return name


@dataclasses.dataclass(frozen=True)
class GenerativeModel:
    """Behavior model and improved policies are parameter sets of one model."""

    network: nn.Module
    path: GaussianPath
    predicts_score: bool
    solver: str
    sample_steps: int

    @classmethod
    def from_config(cls, config: QIPOConfig) -> GenerativeModel:
        """The model that a validated configuration describes."""
        network = FIELDS[config.network](
            config.hidden_dims,
            config.activation,
            config.layer_norm,
            config.time_features,
            # Not by name where it is the default: 64-bit inputs stay 64-bit.
            dtype=None if config.dtype == "float32" else config.dtype,
        )
        predicts_score = config.path == "vp"
        solver = _solver(config.solver, predicts_score)
        return cls(network, PATHS[config.path](), predicts_score, solver, config.sample_steps)

    def with_sampler(self, solver: str, sample_steps: int) -> GenerativeModel:
        """The same model with another solver and number of steps."""
        solver = _solver(solver, self.predicts_score)
        return dataclasses.replace(self, solver=solver, sample_steps=sample_steps)

    def init(self, key: Array, observation_size: int, action_size: int) -> Params:
        """Fresh parameters."""
        inputs = jnp.zeros((1, action_size)), jnp.zeros(1), jnp.zeros((1, observation_size))
        return self.network.init(key, *inputs)

    def field(self, params: Params, observations: Array) -> Field:
        """The velocity or, on a score path, the score, with states ``[..., S]`` closed over."""

        def velocity(x: Array, t: Array) -> Array:
            return self.network.apply(params, x, t, observations)

        def score(x: Array, t: Array) -> Array:
            return self.path.score(velocity(x, t), t)

        return score if self.predicts_score else velocity

    def behavior_loss(
        self, params: Params, key: Array, observations: Array, actions: Array, axis_name: AxisName
    ) -> tuple[Array, losses.Aux]:
        """Plain CFM or denoising score matching on ``observations [B, S]``, ``actions [B, A]``."""
        loss = losses.dsm if self.predicts_score else losses.cfm
        return loss(self.field(params, observations), self.path, key, actions, axis_name=axis_name)

    def support_loss(
        self,
        params: Params,
        key: Array,
        observations: Array,
        actions: Array,
        log_weights: Array,
        axis_name: AxisName,
    ) -> tuple[Array, losses.Aux]:
        """The energy-weighted loss on support actions ``[B, M, A]`` with ``log_weights [B, M]``."""
        loss = losses.support_ced if self.predicts_score else losses.support_cefm
        field = self.field(params, observations[:, None])
        return loss(field, self.path, key, actions, log_weights, 1.0, axis_name=axis_name)

    def sample(self, params: Params, observations: Array, noise: Array) -> Array:
        """Actions in [-1, 1] from standard normal ``noise [..., A]``, states ``[..., S]`` broadcast to it."""
        return self.integrate(self.field(params, observations), noise)

    def integrate(self, field: Field, noise: Array) -> Array:
        """Actions in [-1, 1] from a field of the kind that the network predicts, velocity or score."""
        if self.solver == "dpmpp":
            score = field
            if not self.predicts_score:

                def score(x: Array, t: Array) -> Array:
                    return self.path.score_from_velocity(field(x, t), x, t)

            actions = sampling.sample_dpmpp(score, self.path, noise, num_steps=self.sample_steps)
        elif self.predicts_score:

            def velocity(x: Array, t: Array) -> Array:
                return self.path.velocity_from_score(field(x, t), x, t)

            actions = sampling.sample(
                velocity, noise, solver=self.solver, num_steps=self.sample_steps, t_end=_SCORE_T_END
            )
        else:
            actions = sampling.sample(field, noise, solver=self.solver, num_steps=self.sample_steps)
        return jnp.clip(actions, -1, 1)
