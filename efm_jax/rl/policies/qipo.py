"""QIPO: Q-weighted iterative policy optimization."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from efm_jax.losses import Aux, sample_keys
from efm_jax.rl.policies.base import Acting, Batch, Policy
from efm_jax.rl.samples import Samples
from efm_jax.rl.support import (
    SupportSet,
    WeightedSupport,
    draw_noise,
    summarize,
    support_beta,
    weigh,
)
from efm_jax.types import Array, Params
from efm_jax.weights import AxisName

if TYPE_CHECKING:
    from efm_jax.rl.config import QIPOConfig


class QIPO(Policy):
    """The energy-weighted loss on support sets that are redrawn from the policy every
    ``renew_every`` steps.

    After l renewals the target is ``mu(a|s) exp((l + 1) beta Q)`` (Zhang et al. 2025, Sec. 5,
    Algorithm 2, eq. 5.4), held back by the data action, which counts as ``data_copies`` actions of
    each support set.
    """

    renews = True
    separable = True

    @classmethod
    def name(cls, config: QIPOConfig) -> str:
        return f"qipo_{config.path_name}"

    @property
    def actions_per_state(self) -> int:
        return self.config.support_size + 1 if self.config.estimator == "full" else 1

    def rows(
        self, acting: Acting, key: Array, renewal: Array, samples: Samples, indices: Array
    ) -> SupportSet:
        key = jax.random.fold_in(key, renewal)
        noise = draw_noise(key, indices, (self.config.support_size, self.action_size))
        observations = samples.observations[:, None]
        drawn = self.model.sample(acting.policy, observations, noise)
        actions = jnp.concatenate([samples.actions[:, None], drawn], axis=1)
        return SupportSet(actions, self.critic.q_values(acting.critic, observations, actions))

    def prepare(
        self, rows: SupportSet, axis_name: AxisName
    ) -> tuple[WeightedSupport, dict[str, Array]]:
        copies, target = self.config.data_copies, self.config.target_ess
        beta = (
            support_beta(rows.q_values, copies, target, axis_name) if target else self.config.beta
        )
        return weigh(rows, beta, copies), summarize(rows, beta, copies, axis_name)

    def gather(
        self, key: Array, table: WeightedSupport, indices: Array, axis_name: AxisName
    ) -> WeightedSupport:
        if self.config.estimator == "full":
            return super().gather(key, table, indices, axis_name)
        # One action a state, drawn by its weight: the same expected gradient, M + 1 times cheaper.
        # One uniform number against the cumulative weights: jax.random.categorical would draw M +
        # 1.
        keys = sample_keys(key, indices.shape[0], axis_name)
        reached = jnp.cumsum(jnp.exp(table.log_weights[indices]), axis=-1)
        drawn = jax.vmap(jax.random.uniform)(keys).astype(reached.dtype) * reached[:, -1]
        choice = jnp.sum(reached <= drawn[:, None], axis=-1)
        return WeightedSupport(*(leaf[indices, choice] for leaf in table))

    def loss(
        self, params: Params, key: Array, batch: Batch, axis_name: AxisName
    ) -> tuple[Array, Aux]:
        observations, support = batch.samples.observations, batch.rows
        if self.config.estimator == "full":
            return self.model.support_loss(
                params, key, observations, support.actions, support.log_weights, axis_name
            )
        return self.model.behavior_loss(params, key, observations, support.actions, axis_name)

    def sample(self, acting: Acting, observations: Array, noise: Array) -> Array:
        return self.model.sample(acting.policy, observations, noise)
