"""Other normalizers of the energy weights, for :mod:`experiments.rl.ablations`; call ``register``
to use them.

QIPO divides ``exp(beta Q)`` by its sum over a state's support set.  What divides by a sum over
other states too has the same optimum, since a factor of a state's own moves no conditional
distribution; but it trains mostly the states whose values are high, with few effective samples.
"""

import math

import jax.numpy as jnp
from jax import lax

from efm_jax import losses
from efm_jax.losses import Aux
from efm_jax.rl.policies import POLICIES, Batch
from efm_jax.rl.policies.qipo import QIPO
from efm_jax.rl.policies.reweighting import Reweighting
from efm_jax.rl.support import SupportSet, WeightedSupport
from efm_jax.types import Array, Params
from efm_jax.weights import AxisName, effective_sample_size, log_normalizer


class DatasetQIPO(QIPO):
    """QIPO with Thm 4.3's weights, ``exp(beta Q) / Z`` with Z the mean over all states' support
    actions.

    Reference: Zhang et al. 2025, Thm 4.3.
    """

    separable = False

    def prepare(
        self, rows: SupportSet, axis_name: AxisName
    ) -> tuple[WeightedSupport, dict[str, Array]]:
        table, summary = super().prepare(rows, axis_name)
        logits = summary["beta"] * rows.q_values
        logits = logits.at[..., 0].add(math.log(self.config.data_copies))
        log_weights = logits - log_normalizer(-logits.ravel(), 1.0, axis_name=axis_name)
        size = log_weights.size * (1 if axis_name is None else lax.axis_size(axis_name))
        ess = effective_sample_size(jnp.exp(log_weights).ravel(), axis_name=axis_name)
        return WeightedSupport(table.actions, log_weights), summary | {"ess_share": ess / size}

    def loss(
        self, params: Params, key: Array, batch: Batch, axis_name: AxisName
    ) -> tuple[Array, Aux]:
        return self._flat_loss(params, key, batch, axis_name, log_normalizer=0.0)

    def _flat_loss(
        self, params: Params, key: Array, batch: Batch, axis_name: AxisName, **options: float
    ) -> tuple[Array, Aux]:
        """The energy-weighted loss on all support actions of the batch together."""
        states, support = batch.samples.observations, batch.rows
        size = support.log_weights.shape[1]
        states = jnp.repeat(states, size, axis=0)
        actions = support.actions.reshape(states.shape[0], -1)
        loss = losses.ced if self.model.predicts_score else losses.cefm
        field, energy = self.model.field(params, states), -support.log_weights.ravel()
        return loss(
            field, self.model.path, key, actions, energy, 1.0, axis_name=axis_name, **options
        )


class BatchQIPO(DatasetQIPO):
    """QIPO with Algorithm 1's weights: a softmax over all support actions of the batch."""

    def loss(
        self, params: Params, key: Array, batch: Batch, axis_name: AxisName
    ) -> tuple[Array, Aux]:
        return self._flat_loss(params, key, batch, axis_name)


class BatchReweighting(Reweighting):
    """One-step reweighting with Algorithm 1's weights: a softmax over the batch's data actions."""

    def loss(
        self, params: Params, key: Array, batch: Batch, axis_name: AxisName
    ) -> tuple[Array, Aux]:
        loss = losses.ced if self.model.predicts_score else losses.cefm
        field = self.model.field(params, batch.samples.observations)
        return loss(
            field,
            self.model.path,
            key,
            batch.samples.actions,
            -batch.rows,
            1.0,
            axis_name=axis_name,
        )


def register() -> None:
    """Make them values of the configuration field ``policy``."""
    POLICIES.update(qipo_dataset=DatasetQIPO, qipo_batch=BatchQIPO, reweight_batch=BatchReweighting)
