"""Agents with other normalizers of the energy weights, for :mod:`experiments.rl.ablations`.

QIPO divides ``exp(beta Q)`` by its sum over a state's support set.  What divides by a sum over
other states too has the same optimum, since a factor of a state's own moves no conditional
distribution; but it trains mostly the states whose values are high, with few effective samples.
"""

from typing import final

import jax.numpy as jnp

from efm_jax import weights as w
from efm_jax.losses import Aux
from efm_jax.rl.agents import AGENTS, Agent
from efm_jax.rl.agents.qipo import QIPO, Support, weigh_support
from efm_jax.rl.agents.reweighting import Reweighting
from efm_jax.rl.batch import Batch, gather
from efm_jax.training.step import StepFn
from efm_jax.types import Array, Params

QIPO_BATCH, QIPO_DATASET, REWEIGHT_BATCH = "qipo_batch", "qipo_dataset", "reweight_batch"


def batch_weights(log_weights: Array, axis_name: w.AxisName) -> Array:
    """Weigh by Algorithm 1: a softmax over the global batch, times its size."""
    weights = w.energy_weights(-log_weights.ravel(), 1.0, axis_name=axis_name)
    size = w.psum_if(jnp.asarray(weights.size, weights.dtype), axis_name)
    return size * weights.reshape(log_weights.shape)


@final
class PooledQIPO(Agent):
    """QIPO with weights that are normalized over the support actions of all states together.

    ``qipo_dataset`` divides by the mean over the dataset (Zhang et al. 2025, Thm 4.3),
    ``qipo_batch`` by that over the batch (Algorithm 1).
    """

    renews = True
    support_set, sample = QIPO.support_set, Reweighting.sample

    def step(
        self, phase: str, axis_name: w.AxisName = None, *, in_parts: bool | None = None
    ) -> StepFn:
        # At once, because the noise of an action is drawn by its place among the batch's actions.
        return super().step(phase, axis_name, in_parts=False if phase == "policy" else in_parts)

    def weigh(
        self, support: Support, axis_name: w.AxisName
    ) -> tuple[tuple[Array, Array], dict[str, Array]]:
        _, summary = weigh_support(self.config, support, axis_name)
        logits = w.boltzmann_logits(-support.q_values, summary["beta"])
        logits = logits.at[..., 0].add(jnp.log(self.config.data_copies))
        log_weights = logits - w.log_normalizer(-logits.ravel(), 1.0, axis_name=axis_name)
        ess = w.effective_sample_size(jnp.exp(log_weights).ravel(), axis_name=axis_name)
        share = ess / w.psum_if(jnp.asarray(logits.size, ess.dtype), axis_name)
        return (support.actions, log_weights), summary | {"ess_share": share}

    def gather(
        self, key: Array, table: tuple[Array, Array], index: Array, axis_name: w.AxisName
    ) -> tuple[Array, Array]:
        actions, log_weights = gather(table, index)
        if self.config.policy == QIPO_DATASET:
            return actions, jnp.exp(log_weights)
        return actions, batch_weights(log_weights, axis_name)

    def policy_loss(
        self, params: Params, key: Array, batch: Batch, axis_name: w.AxisName
    ) -> tuple[Array, Aux]:
        actions, weights = batch.support
        states = jnp.repeat(batch.observations, weights.shape[1], axis=0)
        actions, weights = actions.reshape(-1, self.action_size), weights.ravel()
        return self.model.loss(params, key, states, actions, weights=weights, axis_name=axis_name)


@final
class BatchReweighting(Agent):
    """One-step reweighting with Algorithm 1's weights: a softmax over the batch's data actions."""

    support_set, weigh = Reweighting.support_set, Reweighting.weigh
    policy_loss, sample = Reweighting.policy_loss, Reweighting.sample

    def gather(self, key: Array, table: Array, index: Array, axis_name: w.AxisName) -> Array:
        return batch_weights(jnp.log(table[index]), axis_name)


AGENTS[QIPO_BATCH] = AGENTS[QIPO_DATASET] = PooledQIPO
AGENTS[REWEIGHT_BATCH] = BatchReweighting
