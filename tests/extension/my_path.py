"""A path that leaves the data slowly: ``mu = 1 - t^2``, ``sigma = t``."""

import dataclasses

import jax.numpy as jnp

from efm_jax.paths import PATHS, GaussianPath, PathEntry


@dataclasses.dataclass(frozen=True)
class Slow(GaussianPath):
    def mean_coef(self, t):
        return 1 - jnp.asarray(t) ** 2

    def std(self, t):
        return jnp.asarray(t)

    def mean_coef_dot(self, t):
        return -2 * jnp.asarray(t)

    def std_dot(self, t):
        return jnp.ones_like(t)


PATHS["slow"] = PathEntry(Slow, prediction="data", label="slow")
