"""From noise to samples, and from samples to log-likelihoods.

Sampling integrates ``dx/dt = u_t(x)`` from ``t = 1`` (noise) to ``t = 0`` (data).  Points are
``[B, d]``, or ``[B, *event]``, or pytrees of such arrays.  States and times are in 32 bits at
least; a field sees points of the type of ``noise``, and so are the results.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from efm_jax import arrays, checks
from efm_jax.paths import GaussianPath
from efm_jax.solvers import SOLVERS, integrate
from efm_jax.types import Array, Field, Key, Scalar

SAMPLE_SOLVERS = (*SOLVERS, "dopri5")
# An array [*batch, *event], usually [B, d], or a pytree of such arrays.
Points = Any

# On the OT and cosine paths: far enough from mu = 0 to divide by mu in float32, near enough to
# noise.
_PURE_NOISE_MARGIN = 1e-3


class Trajectory(NamedTuple):
    """A path of samples and its cost."""

    points: Points  # [T, B, d], the noise first
    times: Float[jax.Array, " T"]
    num_evaluations: jax.Array  # [], int32: calls of the field


def sample(
    field: Field,
    noise: Points,
    *,
    solver: str = "euler",
    num_steps: int = 10,
    t_start: Scalar = 1.0,
    t_end: Scalar = 0.0,
    times: Float[Array, " T"] | None = None,
    event_ndim: int | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 16384,
) -> Points:
    """Integrate a velocity field from noise to data.

    Args:
      field: velocity field, ``(x: [B, d], t: [B]) -> [B, d]``.
      noise: standard normal samples, ``[B, d]``; one point ``[d]`` has ``t: []``.
      solver: ``euler``, ``midpoint``, ``heun``, ``rk4`` in fixed steps, or ``dopri5``, adaptive
        (diffrax; reverse-mode gradients only, and under ``shard_map`` it needs
        ``check_vma=False``).
      num_steps: steps of a fixed-step solver, of equal length; not used by ``dopri5``.
      t_start: time of ``noise``.
      t_end: time of the result.  A field that is singular at 0 (the exact field of finite data, any
        score of the linear VP path) needs ``t_end > 0`` with solvers that evaluate their end point.
      times: a grid of one's own, ``[T]``, instead of the three arguments above; for
        ``dopri5`` its ends count.
      event_ndim: trailing axes that make one point; None: all but the first.
      rtol: relative tolerance of ``dopri5``.
      atol: absolute tolerance of ``dopri5``.
      max_steps: of ``dopri5``; more raise an error.

    Returns:
      Samples at ``t_end``, like ``noise``.

    Raises:
      ValueError: for an unknown solver, ``num_steps < 1``, times that are not finite, or a field
        that returns other shapes than ``noise`` has.

    Example:
      >>> noise = jax.random.normal(jax.random.key(0), (4, 2))
      >>> sample(lambda x, t: jnp.ones_like(x), noise, num_steps=5).shape
      (4, 2)
    """
    grid, adaptive = _grid(num_steps, t_start, t_end, times), _Adaptive(rtol, atol, max_steps)
    return _flow(field, noise, solver, grid, event_ndim, adaptive, all_points=False).points


def sample_trajectory(
    field: Field,
    noise: Points,
    *,
    solver: str = "euler",
    num_steps: int = 10,
    t_start: Scalar = 1.0,
    t_end: Scalar = 0.0,
    times: Float[Array, " T"] | None = None,
    event_ndim: int | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 16384,
) -> Trajectory:
    """Integrate as :func:`sample` does, and keep the points at all times of the grid.

    Arguments and errors as in :func:`sample`; with ``dopri5`` the points are interpolated to the
    grid.

    Example:
      >>> path = sample_trajectory(lambda x, t: x, jnp.ones((4, 2)), solver="heun", num_steps=5)
      >>> path.points.shape, path.times.shape, int(path.num_evaluations)
      ((6, 4, 2), (6,), 10)
    """
    grid, adaptive = _grid(num_steps, t_start, t_end, times), _Adaptive(rtol, atol, max_steps)
    return _flow(field, noise, solver, grid, event_ndim, adaptive, all_points=True)


class _Adaptive(NamedTuple):
    """What ``dopri5`` is told."""

    rtol: float
    atol: float
    max_steps: int


def _grid(
    num_steps: int, t_start: Scalar, t_end: Scalar, times: Array | None
) -> Callable[[Any], jax.Array]:
    """Check a time grid; the result makes it in a given type."""
    if times is not None:
        if jnp.ndim(times) != 1 or jnp.shape(times)[0] < 2:
            raise ValueError(f"times: expected shape [T]; got {jnp.shape(times)}")
        if not isinstance(times, jax.core.Tracer):
            steps = np.diff(np.asarray(times, np.float64))
            if not (np.all(steps > 0) or np.all(steps < 0)):
                raise ValueError(f"times: expected a rising or a falling grid; got {times}")
        return lambda dtype: arrays.to_float("times", times).astype(dtype)
    checks.check_integer("num_steps", num_steps, 1)
    checks.check_number("t_start", t_start)
    checks.check_number("t_end", t_end)

    def equal_steps(dtype: Any) -> jax.Array:
        start, end = (arrays.to_float("t", t).astype(dtype) for t in (t_start, t_end))
        return jnp.linspace(start, end, num_steps + 1, dtype=dtype)

    return equal_steps


def _on_states(
    field: Field, noise: Points, event_ndim: int | None
) -> tuple[Points, tuple[int, ...], Callable]:
    """Make the first state, the batch shape and ``(t: [], state) -> field``, checked; all wide."""
    for leaf in jax.tree.leaves(noise):
        checks.check_rank("noise", leaf, 1)
        checks.check_float("noise", leaf)
    batch = arrays.batch_shape("noise", noise, event_ndim)
    state = jax.tree.map(lambda leaf: arrays.widen("noise", leaf), noise)

    def call(t: jax.Array, state: Points) -> Points:
        x = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), state, noise)
        value = field(x, jnp.full(batch, t))
        arrays.check_like("field(x, t)", value, x)
        return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), value, state)

    return state, batch, call


def _flow(
    field: Field,
    noise: Points,
    solver: str,
    grid: Callable[[Any], jax.Array],
    event_ndim: int | None,
    adaptive: _Adaptive,
    *,
    all_points: bool,
) -> Trajectory:
    checks.check_choice("solver", solver, SAMPLE_SOLVERS)
    state, _, slope = _on_states(field, noise, event_ndim)
    times = grid(arrays.wide_type(*jax.tree.leaves(state)))
    solved, evaluations = _solve(slope, state, times, solver, adaptive, all_points)
    points = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), solved, noise)
    return Trajectory(points, times, evaluations)


def _solve(
    f: Callable[[jax.Array, Any], Any],
    y0: Any,
    times: jax.Array,
    solver: str,
    adaptive: _Adaptive,
    all_points: bool = False,
) -> tuple[Any, jax.Array]:
    """Solve ``dy/dt = f(t, y)``: the last state, or all; and the number of evaluations."""
    if solver != "dopri5":
        evaluations = (times.size - 1) * len(SOLVERS[solver].nodes)
        solved = integrate(f, y0, times, solver=solver, all_states=all_points)
        return solved, jnp.asarray(evaluations, jnp.int32)
    sharded = any(map(arrays.is_sharded, jax.tree.leaves(y0)))

    def slope(t: Any, y: Any, _: Any) -> Any:
        # Types with shardings change along diffrax's loop, so its state is on every device; and its
        # default adjoint does not know them.
        return arrays.replicate(f(t, jax.tree.map(arrays.shard_like, y, y0)))

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(slope),
        diffrax.Dopri5(),
        t0=times[0],
        t1=times[-1],
        dt0=None,
        y0=arrays.replicate(y0),
        saveat=diffrax.SaveAt(ts=times) if all_points else diffrax.SaveAt(t1=True),
        stepsize_controller=diffrax.PIDController(adaptive.rtol, adaptive.atol, norm=_largest),
        adjoint=diffrax.DirectAdjoint() if sharded else diffrax.RecursiveCheckpointAdjoint(),
        max_steps=adaptive.max_steps,
    )
    if all_points:
        solved = solution.ys
    else:
        solved = jax.tree.map(lambda y, like: arrays.shard_like(y[-1], like), solution.ys, y0)
    # Every attempt evaluates six stages, the last of which is the next one's first.
    return solved, jnp.asarray(6 * solution.stats["num_steps"] + 1, jnp.int32)


def _largest(error: Any) -> jax.Array:
    """The worst sample decides the step; a root mean square would let a few samples go wrong."""
    return jnp.max(
        jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(error)])
    )


def sample_dpmpp(
    score_field: Field,
    path: GaussianPath,
    noise: Points,
    *,
    num_steps: int = 15,
    order: int = 2,
    prediction: str = "score",
    t_start: float | None = None,
    t_end: float = 0.0,
    event_ndim: int | None = None,
) -> Points:
    """DPM-Solver++ (multistep, data prediction) for any Gaussian path.

    Args:
      score_field: score, or another ``prediction``, ``(x: [B, d], t: [B]) -> [B, d]``.
      path: probability path.
      noise: standard normal samples, ``[B, d]``.
      num_steps: number of evaluations of the field.
      order: 1 (DDIM) or 2.
      prediction: of :data:`efm_jax.paths.PREDICTIONS`; the field predicts it.
      t_start: where to start; by default 1, or just before 1 on paths whose ``mu_1`` is 0, since a
        score at pure noise does not determine ``x_0``.
      t_end: where to stop.
      event_ndim: as in :func:`sample`.

    Returns:
      Samples at ``t_end``, like ``noise``.

    Raises:
      ValueError: for ``num_steps < 1``, an order other than 1 or 2, times out of order, or a field
        that returns other shapes than ``noise`` has.

    Reference: Lu et al. 2022 (arXiv 2211.01095), Algorithm 2.

    Example:
      >>> from efm_jax import paths
      >>> noise = jax.random.normal(jax.random.key(0), (4, 2))
      >>> sample_dpmpp(lambda x, t: -x, paths.vp_linear(), noise).shape
      (4, 2)
    """
    checks.check_integer("num_steps", num_steps, 1)
    checks.check_choice("order", order, (1, 2))
    state, predict = _on_data(score_field, path, noise, prediction, event_ndim)
    t_start = latest_time(path) if t_start is None else t_start
    _check_descending(t_start, t_end)
    dtype = arrays.wide_type(*jax.tree.leaves(state))
    times, coefficients = _dpmpp_grid(path, t_start, t_end, num_steps, dtype)

    def step(carry: tuple[Points, Points], inputs: tuple) -> tuple[tuple[Points, Points], None]:
        x, previous = carry
        t, (decay, gain, correction) = inputs
        x0 = predict(t, x)

        def advance(x: jax.Array, x0: jax.Array, previous: jax.Array) -> jax.Array:
            extrapolated = x0 + correction * (x0 - previous) if order == 2 else x0
            return decay * x + gain * extrapolated

        return (jax.tree.map(advance, x, x0, previous), x0), None

    state = arrays.vary_like(state, lambda: predict(times[0], state))
    start = state, jax.tree.map(jnp.zeros_like, state)
    (x, _), _ = lax.scan(step, start, (times, coefficients))
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), x, noise)


def _on_data(
    field: Field, path: GaussianPath, noise: Points, prediction: str, event_ndim: int | None
) -> tuple[Points, Callable]:
    """As :func:`_on_states`, of the data ``x_hat0`` that a field of any prediction implies."""
    state, batch, call = _on_states(field, noise, event_ndim)

    def predict(t: jax.Array, x: Points) -> Points:
        return path.convert(call(t, x), x, jnp.full(batch, t), prediction, "data")

    return state, predict


def _check_descending(t_start: Any, t_end: Any, names: str = "t_start, t_end") -> None:
    if not 0 <= t_end < t_start <= 1:
        raise ValueError(f"{names}: expected to fall within 1 and 0; got {t_start}, {t_end}")


def latest_time(path: GaussianPath) -> float:
    """The last time at which a score or noise determines ``x_0``: 1, or just before it."""
    with jax.ensure_compile_time_eval():
        return 1.0 if path.mean_coef(jnp.ones(())) > 0 else 1.0 - _PURE_NOISE_MARGIN


def _first_time(path: GaussianPath, prediction: str) -> float:
    """The last time at which a prediction determines ``x_0``."""
    return 1.0 if prediction in ("velocity", "data") else latest_time(path)


def _quadratic_grid(t_start: float, t_end: float, num_steps: int, dtype: Any) -> jax.Array:
    """Times ``[num_steps + 1]``, denser near the data.

    Unlike steps of equal log-SNR they reach ``t = 0`` itself, and DPM-Solver++'s error falls at
    second order on all three paths.
    """
    return t_end + (t_start - t_end) * jnp.linspace(1, 0, num_steps + 1, dtype=dtype) ** 2


def _dpmpp_grid(
    path: GaussianPath, t_start: float, t_end: float, num_steps: int, dtype: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Times ``[num_steps]`` and per-step coefficients of ``x``, of ``x_hat0`` and of its
    extrapolation.
    """
    grid = _quadratic_grid(t_start, t_end, num_steps, dtype)
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


def sample_ancestral(
    field: Field,
    path: GaussianPath,
    key: Key,
    noise: Points,
    *,
    num_steps: int = 100,
    eta: Scalar = 1.0,
    prediction: str = "score",
    t_start: float | None = None,
    t_end: float = 0.0,
    event_ndim: int | None = None,
) -> Points:
    """Draw samples by the posterior of each step given the predicted data, with fresh noise.

    From t to s the new point is ``mu_s x_hat0 + sqrt(sigma_s^2 - c^2) eps_hat + c eps`` with ``c =
    eta (sigma_s / sigma_t) sqrt(sigma_t^2 - (mu_t sigma_s / mu_s)^2)``: ancestral sampling at ``eta
    = 1``, which solves the reverse SDE in the limit of many steps, and DDIM at ``eta = 0``.

    Args:
      field: a ``prediction``, ``(x: [B, d], t: [B]) -> [B, d]``.
      path: probability path.
      key: random key of the fresh noise.
      noise: standard normal samples, ``[B, d]``.
      num_steps: number of evaluations of the field.
      eta: share of the posterior's standard deviation, in [0, 1].
      prediction: of :data:`efm_jax.paths.PREDICTIONS`.
      t_start: as in :func:`sample_dpmpp`; 1 for a velocity and data, which determine ``x_0`` there.
      t_end: where to stop.
      event_ndim: as in :func:`sample`.

    Returns:
      Samples at ``t_end``, like ``noise``.

    Raises:
      ValueError: for ``num_steps < 1``, ``eta`` outside [0, 1], or as :func:`sample_dpmpp`.

    Reference: Ho et al. 2020 (arXiv 2006.11239), Algorithm 2; Song et al. 2021 (arXiv 2010.02502),
    eq. 12 and 16.

    Example:
      >>> from efm_jax import paths
      >>> key, noise = jax.random.key(1), jax.random.normal(jax.random.key(0), (4, 2))
      >>> sample_ancestral(lambda x, t: -x, paths.vp_linear(), key, noise).shape
      (4, 2)
    """
    checks.check_integer("num_steps", num_steps, 1)
    checks.check_number("eta", eta, minimum=0.0, maximum=1.0)
    state, predict = _on_data(field, path, noise, prediction, event_ndim)
    t_start = _first_time(path, prediction) if t_start is None else t_start
    _check_descending(t_start, t_end)
    dtype = arrays.wide_type(*jax.tree.leaves(state))
    times = _quadratic_grid(t_start, t_end, num_steps, dtype)
    mean, std = path.mean_coef(times), path.std(times)
    # The forward process from s to t keeps a = mu_t / mu_s of a point and adds the variance
    # sigma_t^2 - a^2 sigma_s^2; given x_0 and x_t, that of x_s is this times (sigma_s / sigma_t)^2.
    kept = mean[:-1] / mean[1:]
    added = jnp.maximum(std[:-1] ** 2 - (kept * std[1:]) ** 2, 0)
    fresh = jnp.asarray(eta, dtype) * jnp.sqrt(added) * std[1:] / std[:-1]
    old = jnp.sqrt(jnp.maximum(std[1:] ** 2 - fresh**2, 0)) / std[:-1]

    def step(x: Points, inputs: tuple) -> tuple[Points, None]:
        t, key, mean, mean_next, old, fresh = inputs
        x0 = predict(t, x)

        def advance(x: jax.Array, x0: jax.Array, drawn: jax.Array) -> jax.Array:
            return mean_next * x0 + old * (x - mean * x0) + fresh * drawn

        return jax.tree.map(advance, x, x0, _draw_like(key, x)), None

    state = arrays.vary_like(state, lambda: predict(times[0], state))
    inputs = times[:-1], jax.random.split(key, num_steps), mean[:-1], mean[1:], old, fresh
    x, _ = lax.scan(step, state, inputs)
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), x, noise)


def _draw_like(key: Key, x: Points) -> Points:
    """Draw standard normal points for every leaf."""
    leaves, structure = jax.tree.flatten(x)
    keys = jax.random.split(key, len(leaves))
    drawn = (
        jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)
    )
    return structure.unflatten(list(map(arrays.shard_like, drawn, leaves)))


def sample_sde(
    field: Field,
    path: GaussianPath,
    key: Key,
    noise: Points,
    *,
    num_steps: int = 100,
    diffusion: Scalar | Callable[[jax.Array], jax.Array] | None = None,
    prediction: str = "velocity",
    t_start: float | None = None,
    t_end: float = 0.0,
    times: Float[Array, " T"] | None = None,
    event_ndim: int | None = None,
) -> Points:
    """Draw samples by Euler-Maruyama steps of a reverse-time SDE with any noise level.

    ``dx = [u_t(x) - (g_t^2 / 2) s_t(x)] dt + g_t dW``, run from noise to data, has the marginals of
    the path for every ``g``, and is the ODE at ``g = 0``.  The error of the steps is of first order
    in distribution.

    Args:
      field: a ``prediction``, ``(x: [B, d], t: [B]) -> [B, d]``.
      path: probability path.
      key: random key of the SDE's noise.
      noise: standard normal samples, ``[B, d]``.
      num_steps: number of evaluations of the field.
      diffusion: ``g``: a number, or a function of times ``[T]``.  None: ``sqrt(sigma_t)``, with
        which the drift is bounded near the data, where the score may not be; a ``g`` that stays
        above 0 there needs steps shorter than ``(sigma_t / g)^2``.
      prediction: of :data:`efm_jax.paths.PREDICTIONS`.
      t_start: as in :func:`sample_ancestral`.
      t_end: where to stop.
      times: a falling grid of one's own, ``[T]``, instead of the steps and ends.
      event_ndim: as in :func:`sample`.

    Returns:
      Samples at ``t_end``, like ``noise``.

    Raises:
      ValueError: for ``num_steps < 1``, a negative ``diffusion``, a grid that does not fall from at
        most 1 to at least 0, or a field that returns other shapes than ``noise`` has.

    Reference: Song et al. 2021 (arXiv 2011.13456), eq. 6 and 13; Albergo et al. 2023 (arXiv
    2303.08797), Sec. 2.4; Ma et al. 2024 (arXiv 2401.08740), Sec. 2.4, for the choice of ``g``.

    Example:
      >>> from efm_jax import paths
      >>> key, noise = jax.random.key(1), jax.random.normal(jax.random.key(0), (4, 2))
      >>> sample_sde(lambda x, t: x, paths.conditional_ot(), key, noise, diffusion=0.5).shape
      (4, 2)
    """
    t_start = _first_time(path, prediction) if t_start is None else t_start
    make_grid = _grid(num_steps, t_start, t_end, times)
    if times is None:
        _check_descending(t_start, t_end)
    elif not isinstance(times, jax.core.Tracer):
        first, last = np.asarray(times)[[0, -1]]
        _check_descending(first, last, "first and last of times")
    state, batch, call = _on_states(field, noise, event_ndim)
    grid = make_grid(arrays.wide_type(*jax.tree.leaves(state)))
    starts, steps = grid[:-1], jnp.diff(grid)
    std = path.std(starts)
    if diffusion is None:
        level = jnp.sqrt(std)
    elif callable(diffusion):
        level = arrays.to_float("diffusion", diffusion(starts)).astype(grid.dtype)
        checks.check_shape("diffusion(times)", level, starts.shape)
    else:
        checks.check_number("diffusion", diffusion, minimum=0.0)
        level = jnp.full_like(starts, diffusion)
    per_std = level**2 / std

    def step(x: Points, inputs: tuple) -> tuple[Points, None]:
        t, key, dt, per_std, kick = inputs
        value, time = call(t, x), jnp.full(batch, t)
        velocity, eps = (
            path.convert(value, x, time, prediction, kind) for kind in ("velocity", "noise")
        )

        def advance(x: jax.Array, u: jax.Array, eps: jax.Array, drawn: jax.Array) -> jax.Array:
            # The score is -eps / sigma.
            return x + dt * (u + per_std / 2 * eps) + kick * drawn

        return jax.tree.map(advance, x, velocity, eps, _draw_like(key, x)), None

    state = arrays.vary_like(state, lambda: call(grid[0], state))
    keys = jax.random.split(key, steps.size)
    x, _ = lax.scan(step, state, (starts, keys, steps, per_std, level * jnp.sqrt(-steps)))
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), x, noise)


def log_likelihood(
    field: Field,
    x0: Points,
    *,
    key: Key | None = None,
    num_steps: int = 100,
    solver: str = "rk4",
    t_start: Scalar = 0.0,
    t_end: Scalar = 1.0,
    num_probes: int = 1,
    probe: str = "rademacher",
    chunk_size: int | None = None,
    event_ndim: int | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 16384,
) -> Float[jax.Array, "*batch"]:
    """Log-density of data under a flow, by the instantaneous change of variables.

    ``log p_0(x_0) = log N(x_1; 0, I) + int_0^1 div u_t(x_t) dt`` along the flow from data to noise.

    Args:
      field: velocity field, ``(x: [B, d], t: [B]) -> [B, d]``, each sample on its own.
      x0: data, ``[B, d]`` or ``[B, *event]``.
      key: None for the exact divergence (d Jacobian-vector products a step); a random key for
        Hutchinson's unbiased estimate with random vectors, the same at all times.
      num_steps: steps of a fixed-step solver.
      solver: as in :func:`sample`.
      t_start: time of ``x0``; above 0 for fields that are singular there.
      t_end: time at which the density is standard normal.
      num_probes: random vectors for each sample.
      probe: their distribution, ``rademacher`` or ``gaussian``.
      chunk_size: Jacobian-vector products that are computed at once; None: all.
      event_ndim: as in :func:`sample`.
      rtol: relative tolerance of ``dopri5``.
      atol: absolute tolerance of ``dopri5``.
      max_steps: of ``dopri5``.

    Returns:
      ``[B]``, in nats, float32 at least; differentiable.  :func:`bits_per_dim` converts it.

    Raises:
      ValueError: as :func:`sample`, and for an unknown ``probe``, ``num_probes < 1`` or
        ``chunk_size < 1``.

    Reference: Chen et al. 2018 (arXiv 1806.07366), Thm 1; Grathwohl et al. 2019 (arXiv 1810.01367).

    Example:
      >>> log_likelihood(lambda x, t: -x, jnp.zeros((4, 2))).shape
      (4,)
    """
    checks.check_choice("solver", solver, SAMPLE_SOLVERS)
    checks.check_choice("probe", probe, ("rademacher", "gaussian"))
    checks.check_integer("num_probes", num_probes, 1)
    checks.check_float("x0", x0)
    checks.check_rank("x0", x0, 2)
    state, batch, slope = _on_states(field, x0, event_ndim)
    event = state.shape[len(batch) :]
    axes = tuple(range(len(batch), state.ndim))
    size = math.prod(event)
    # Directions to differentiate along, each with the part of the trace that it estimates.
    if key is None:
        directions, share = jnp.eye(size, dtype=state.dtype).reshape(size, *event), 1.0
        directions = directions.reshape(size, *(1,) * len(batch), *event)
    else:
        draw = jax.random.rademacher if probe == "rademacher" else jax.random.normal
        directions, share = draw(key, (num_probes, *state.shape), state.dtype), 1 / num_probes
    if chunk_size is not None:
        checks.check_integer("chunk_size", chunk_size, 1)

    def rates(t: jax.Array, y: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        value, push = jax.linearize(lambda x: slope(t, x), y[0])

        def along(direction: jax.Array) -> jax.Array:
            # Under shard_map a tangent must vary as its point does.
            direction = jnp.broadcast_to(direction, y[0].shape) + jnp.zeros_like(y[0])
            return jnp.sum(direction * push(direction), axis=axes)

        if chunk_size is None:
            parts = jax.vmap(along)(directions)
        else:
            parts = lax.map(along, directions, batch_size=chunk_size)
        return value, share * parts.sum(0)

    grid = _grid(num_steps, t_start, t_end, None)(state.dtype)
    adaptive = _Adaptive(rtol, atol, max_steps)
    start = state, jnp.zeros_like(state.reshape(*batch, -1)[..., 0])
    (x1, divergence), _ = _solve(rates, start, grid, solver, adaptive)
    return jax.scipy.stats.norm.logpdf(x1).sum(axes) + divergence


def bits_per_dim(
    log_likelihood: Float[Array, "*batch"], num_dims: int, *, bits: float = 0.0
) -> Float[jax.Array, "*batch"]:
    """Convert a log-likelihood in nats to bits per dimension, ``bits - log p / (d log 2)``.

    Args:
      log_likelihood: in nats, ``[B]``.
      num_dims: d.
      bits: of one unit of the data's scale: 7 for 8-bit values that were scaled to [-1, 1].

    Example:
      >>> bits_per_dim(jnp.log(jnp.array([0.25])), num_dims=1).tolist()
      [2.0]
    """
    checks.check_integer("num_dims", num_dims, 1)
    return bits - arrays.widen("log_likelihood", log_likelihood) / (num_dims * math.log(2))
