"""Distances between two samples: sliced Wasserstein-2 and maximum mean discrepancy.

Both are distances between empirical measures, so two samples of one distribution are some way
apart: compare with that noise floor, at the same sample size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from efm_jax import arrays, checks
from efm_jax.types import Array, Key


def sliced_wasserstein(
    key: Key, x: Float[Array, "n d"], y: Float[Array, "n d"], *, num_projections: int = 128
) -> Float[jax.Array, ""]:
    """Estimate the sliced 2-Wasserstein distance ``sqrt(E_theta W_2^2(theta . x, theta . y))``.

    Args:
      key: random key of the directions ``theta``, uniform on the sphere.
      x: ``[n, d]``.
      y: as many: in one dimension the optimal plan then pairs order statistics.
      num_projections: number of directions.

    Returns:
      A scalar, in the units of ``x``.

    Reference: Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures".

    Example:
      >>> x = jnp.array([[0.0], [1.0]])
      >>> round(float(sliced_wasserstein(jax.random.key(0), x, x + 2.0)), 3)
      2.0
    """
    x, y = _check_pair(x, y)
    checks.check_shape("y", y, x.shape)
    checks.check_integer("num_projections", num_projections, 1)
    theta = jax.random.normal(key, (x.shape[1], num_projections), x.dtype)
    theta = theta / jnp.linalg.norm(theta, axis=0, keepdims=True)
    project = jax.vmap(lambda direction, points: jnp.sort(points @ direction), in_axes=(1, None))
    return jnp.sqrt(jnp.mean((project(theta, x) - project(theta, y)) ** 2))


def mmd(
    x: Float[Array, "n d"], y: Float[Array, "m d"], *, bandwidths: tuple[float, ...] | None = None
) -> Float[jax.Array, ""]:
    """Compute the empirical measures' maximum mean discrepancy (biased, so at least 0).

    The kernel is the mean of Gaussians ``exp(-||x - y||^2 / (2 h^2))`` over the bandwidths h.

    Args:
      x: ``[n, d]``.
      y: ``[m, d]``.
      bandwidths: by default ``sqrt(d)`` times 1/4, 1/2 and 1, for data of unit variance.

    Returns:
      A scalar, the square root of ``E k(x, x') - 2 E k(x, y) + E k(y, y')``.

    Reference: Gretton et al. 2012, "A kernel two-sample test", eq. 5.

    Example:
      >>> x = jnp.array([[0.0], [1.0]])
      >>> float(mmd(x, x))
      0.0
    """
    x, y = _check_pair(x, y)
    if bandwidths is None:
        bandwidths = tuple(x.shape[1] ** 0.5 * scale for scale in (0.25, 0.5, 1.0))
    # Distances do not change with the origin, but their rounding does.
    center = jnp.mean(x, axis=0, keepdims=True)
    x, y = x - center, y - center

    def mean_kernel(a: Array, b: Array) -> jax.Array:
        products = jnp.matmul(a, b.T, precision="highest")
        squares = jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1)[None] - 2 * products
        kernels = [jnp.mean(jnp.exp(-jnp.maximum(squares, 0) / (2 * h**2))) for h in bandwidths]
        return jnp.mean(jnp.stack(kernels))

    return jnp.sqrt(jnp.maximum(mean_kernel(x, x) - 2 * mean_kernel(x, y) + mean_kernel(y, y), 0))


def _check_pair(x: Array, y: Array) -> tuple[jax.Array, jax.Array]:
    """Check two samples; return them in a common type of 32 bits at least."""
    for name, value in (("x", x), ("y", y)):
        checks.check_rank(name, value, 2)
        checks.check_float(name, value)
        checks.check_not_empty(name, value, 0)
    checks.check_shape("y", y, (jnp.shape(y)[0], jnp.shape(x)[1]))
    wide = arrays.wide_type(x, y)
    # Both axes of a kernel matrix are samples, and a sort needs all of them.
    return arrays.replicate((jnp.asarray(x).astype(wide), jnp.asarray(y).astype(wide)))
