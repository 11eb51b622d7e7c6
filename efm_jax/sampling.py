"""From noise to samples, and from samples to log-likelihoods.

Sampling integrates ``dx/dt = u_t(x)`` from ``t = 1`` (noise) to ``t = 0`` (data).
"""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jax import Array, lax

from efm_jax import checks
from efm_jax.paths import GaussianPath
from efm_jax.solvers import SOLVERS, integrate, vary_like
from efm_jax.types import Field

SAMPLE_SOLVERS = (*SOLVERS, "dopri5")

# On the OT and cosine paths: far enough from mu = 0 to divide by mu in float32, near enough to
# noise.
_PURE_NOISE_MARGIN = 1e-3


def sample(
    field: Field,
    noise: Array,
    *,
    solver: str = "euler",
    num_steps: int = 10,
    t_start: float = 1.0,
    t_end: float = 0.0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Array:
    """Integrate a velocity field from noise to data.

    Args:
      field: velocity field, ``(x: [..., d], t: [...]) -> [..., d]``.
      noise: standard normal samples, ``[..., d]``.
      solver: ``euler``, ``midpoint``, ``heun``, ``rk4`` in equal steps, or ``dopri5``, adaptive
        (diffrax; reverse-mode gradients only, and under ``shard_map`` it needs
        ``check_vma=False``).
      num_steps: steps of a fixed-step solver; not used by ``dopri5``.
      t_start: time of ``noise``.
      t_end: time of the result.  A field that is singular at 0 (the exact field of finite data, any
        score of the linear VP path) needs ``t_end > 0`` with solvers that evaluate their end point.
      rtol: relative tolerance of ``dopri5``.
      atol: absolute tolerance of ``dopri5``.

    Returns:
      Samples at ``t_end``, ``[..., d]``.

    Raises:
      ValueError: for an unknown solver or ``num_steps < 1``.

    Example:
      >>> noise = jax.random.normal(jax.random.key(0), (4, 2))
      >>> sample(lambda x, t: jnp.ones_like(x), noise, num_steps=5).shape
      (4, 2)
    """
    checks.check_choice("solver", solver, SAMPLE_SOLVERS)
    checks.check_rank("noise", noise, 1)
    checks.check_float("noise", noise)
    noise = jnp.asarray(noise)

    def slope(t: Array, x: Array) -> Array:
        return field(x, jnp.full(x.shape[:-1], t, x.dtype))

    return _solve(slope, noise, t_start, t_end, solver, num_steps, rtol, atol)


def _solve(
    f: Callable[[Any, Any], Any],
    y0: Any,
    t_start: float,
    t_end: float,
    solver: str,
    num_steps: int,
    rtol: float,
    atol: float,
) -> Any:
    if solver != "dopri5":
        return integrate(f, y0, t_start, t_end, solver=solver, num_steps=num_steps)
    dtype = jnp.result_type(*jax.tree.leaves(y0))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, _: f(t, y)),
        diffrax.Dopri5(),
        t0=jnp.asarray(t_start, dtype),
        t1=jnp.asarray(t_end, dtype),
        dt0=None,
        y0=y0,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, norm=_largest),
        max_steps=16384,
    )
    return jax.tree.map(lambda leaf: leaf[-1], solution.ys)


def _largest(error: Any) -> Array:
    """The worst sample decides the step; a root mean square would let a few samples go wrong."""
    return jnp.max(
        jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(error)])
    )


def sample_dpmpp(
    score_field: Field,
    path: GaussianPath,
    noise: Array,
    *,
    num_steps: int = 15,
    order: int = 2,
    prediction: str = "score",
    t_start: float | None = None,
    t_end: float = 0.0,
) -> Array:
    """DPM-Solver++ (multistep, data prediction) for any Gaussian path.

    Args:
      score_field: score, or another ``prediction``, ``(x: [..., d], t: [...]) -> [..., d]``.
      path: probability path.
      noise: standard normal samples, ``[..., d]``.
      num_steps: number of evaluations of the field.
      order: 1 (DDIM) or 2.
      prediction: of :data:`efm_jax.paths.PREDICTIONS`; the field predicts it.
      t_start: where to start; by default 1, or just before 1 on paths whose ``mu_1`` is 0, since a
        score at pure noise does not determine ``x_0``.
      t_end: where to stop.

    Returns:
      Samples at ``t_end``, ``[..., d]``.

    Raises:
      ValueError: for ``num_steps < 1``, an order other than 1 or 2, or times out of order.

    Reference: Lu et al. 2022 (arXiv 2211.01095), Algorithm 2.

    Example:
      >>> from efm_jax import paths
      >>> noise = jax.random.normal(jax.random.key(0), (4, 2))
      >>> sample_dpmpp(lambda x, t: -x, paths.vp_linear(), noise).shape
      (4, 2)
    """
    checks.check_integer("num_steps", num_steps, 1)
    checks.check_choice("order", order, (1, 2))
    checks.check_rank("noise", noise, 1)
    checks.check_float("noise", noise)
    noise = jnp.asarray(noise)
    if t_start is None:
        t_start = latest_time(path)
    if not 0 <= t_end < t_start <= 1:
        raise ValueError(
            f"t_start, t_end: expected 0 <= t_end < t_start <= 1; got {t_start}, {t_end}"
        )
    times, coefficients = _dpmpp_grid(path, t_start, t_end, num_steps, noise.dtype)

    def step(carry: tuple[Array, Array], inputs: tuple) -> tuple[tuple[Array, Array], None]:
        x, previous = carry
        t, (decay, gain, correction) = inputs
        t = jnp.full(x.shape[:-1], t, x.dtype)
        x0 = path.convert(score_field(x, t), x, t, prediction, "data")
        extrapolated = x0 + correction * (x0 - previous) if order == 2 else x0
        return (decay * x + gain * extrapolated, x0), None

    noise = vary_like(
        noise, lambda: score_field(noise, jnp.full(noise.shape[:-1], times[0], noise.dtype))
    )
    (x, _), _ = lax.scan(step, (noise, jnp.zeros_like(noise)), (times, coefficients))
    return x


def latest_time(path: GaussianPath) -> float:
    """The last time at which a score or noise determines ``x_0``: 1, or just before it."""
    with jax.ensure_compile_time_eval():
        return 1.0 if path.mean_coef(jnp.ones(())) > 0 else 1.0 - _PURE_NOISE_MARGIN


def _dpmpp_grid(
    path: GaussianPath, t_start: float, t_end: float, num_steps: int, dtype: jnp.dtype
) -> tuple[Array, tuple[Array, Array, Array]]:
    """Times ``[num_steps]`` and per-step coefficients of ``x``, of ``x_hat0`` and of its
    extrapolation.

    Times are quadratic in the step, denser near the data.  Unlike steps of equal log-SNR they reach
    ``t = 0`` itself, and the error falls at second order on all three paths.
    """
    grid = t_end + (t_start - t_end) * jnp.linspace(1, 0, num_steps + 1, dtype=dtype) ** 2
    mean, std = path.mean_coef(grid), path.std(grid)
    decay = std[1:] / std[:-1]
    gain = mean[1:] - mean[:-1] * decay
    log_snr = jnp.log(mean) - jnp.log(std)
    h = log_snr[1:] - log_snr[:-1]
    # h / (2 h_previous); the first step has no previous one, and a step to sigma = 0 is infinitely
    # long.
    ratio = h[1:] / (2 * h[:-1])
    correction = jnp.concatenate([jnp.zeros(1, dtype), jnp.where(jnp.isfinite(ratio), ratio, 0)])
    return grid[:-1], (decay, gain, correction)


def log_likelihood(
    field: Field,
    x0: Array,
    *,
    key: Array | None = None,
    num_steps: int = 100,
    solver: str = "rk4",
    t_start: float = 0.0,
    t_end: float = 1.0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Array:
    """Log-density of data under a flow, by the instantaneous change of variables.

    ``log p_0(x_0) = log N(x_1; 0, I) + int_0^1 div u_t(x_t) dt`` along the flow from data to noise.

    Args:
      field: velocity field, ``(x: [B, d], t: [B]) -> [B, d]``, each sample on its own.
      x0: data, ``[B, d]``.
      key: None for the exact divergence (d Jacobian-vector products a step); a random key for
        Hutchinson's unbiased estimate with one Rademacher vector per sample.
      num_steps: steps of a fixed-step solver.
      solver: as in :func:`sample`.
      t_start: time of ``x0``; above 0 for fields that are singular there.
      t_end: time at which the density is standard normal.
      rtol: relative tolerance of ``dopri5``.
      atol: absolute tolerance of ``dopri5``.

    Returns:
      ``[B]``, in nats; differentiable.

    Reference: Chen et al. 2018 (arXiv 1806.07366), Thm 1; Grathwohl et al. 2019 (arXiv 1810.01367).

    Example:
      >>> log_likelihood(lambda x, t: -x, jnp.zeros((4, 2))).shape
      (4,)
    """
    checks.check_choice("solver", solver, SAMPLE_SOLVERS)
    checks.check_float("x0", x0)
    checks.check_rank("x0", x0, 2)
    x0 = jnp.asarray(x0)
    # Directions to differentiate along, each with the part of the trace that it estimates.
    if key is None:
        directions = jnp.broadcast_to(
            jnp.eye(x0.shape[-1], dtype=x0.dtype)[:, None], (x0.shape[-1], *x0.shape)
        )
    else:
        directions = jax.random.rademacher(key, (1, *x0.shape), x0.dtype)

    def slope(t: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        x, _ = state

        def velocity(x: Array) -> Array:
            return field(x, jnp.full(x.shape[:-1], t, x.dtype))

        value, push = jax.linearize(velocity, x)
        along = directions + jnp.zeros_like(
            x
        )  # under shard_map a tangent must vary as its point does
        return value, jnp.sum(along * jax.vmap(push)(along), axis=(0, -1))

    start = (x0, jnp.zeros_like(x0[..., 0]))
    x1, divergence = _solve(slope, start, t_start, t_end, solver, num_steps, rtol, atol)
    return jax.scipy.stats.norm.logpdf(x1).sum(-1) + divergence
