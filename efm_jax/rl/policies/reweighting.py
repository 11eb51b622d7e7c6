"""One-step reweighting: the data's own actions, weighted by their advantage."""

from __future__ import annotations

from efm_jax import losses
from efm_jax.losses import Aux
from efm_jax.rl.policies.base import Acting, Batch, Policy
from efm_jax.rl.samples import Samples
from efm_jax.rl.support import advantage_log_weights, summarize_advantages
from efm_jax.types import Array, Params
from efm_jax.weights import AxisName


class Reweighting(Policy):
    """The energy-weighted loss on data actions with ``E = -A(s, a)``: no support sets, no renewals.

    The weights are ``exp(beta A)``, clipped, over their mean in the dataset (Zhang et al. 2025, Thm
    4.3); taking the advantage instead of Q divides by the state's own normalizer (Peng et al. 2019,
    arXiv 1910.00177, eq. 11, for Gaussians).  It is the control for what QIPO's support sets and
    renewals add.
    """

    def rows(
        self, acting: Acting, key: Array, renewal: Array, samples: Samples, indices: Array
    ) -> Array:
        return self.advantages(acting, key, samples, indices)

    def prepare(self, rows: Array, axis_name: AxisName) -> tuple[Array, dict[str, Array]]:
        log_weights = advantage_log_weights(rows, self.config.beta, axis_name)
        return log_weights, summarize_advantages(rows, log_weights, axis_name)

    def loss(
        self, params: Params, key: Array, batch: Batch, axis_name: AxisName
    ) -> tuple[Array, Aux]:
        loss = losses.ced if self.model.predicts_score else losses.cefm
        field = self.model.field(params, batch.samples.observations)
        return loss(
            field, self.model.path, key, batch.samples.actions, -batch.rows, 1.0,
            log_normalizer=0.0, axis_name=axis_name,
        )  # fmt: skip

    def sample(self, acting: Acting, observations: Array, noise: Array) -> Array:
        return self.model.sample(acting.policy, observations, noise)
