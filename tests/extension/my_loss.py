"""The error of the data prediction, weighted toward the data's end."""

import functools

from efm_jax.losses import LOSSES, LossEntry, matching

early = functools.partial(matching, prediction="data", time_weight=lambda t: 2 * (1 - t) + 0.1)
LOSSES["early"] = LossEntry(early, "data")
