"""Sampling and likelihood against closed forms for Gaussian data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.linalg import expm

from efm_jax.sampling import log_likelihood, sample, sample_dpmpp
from tests.problems import COSINE, OT, each_path, normal
from tests.reference import gaussian
from tests.reference import paths as reference_paths
from tests.reference import solvers as reference_solvers

MEAN, SCALE = np.array([1.5, -0.5]), 0.4
NOISE = normal(0, 32, 2)


def velocity_of(path):
    """Exact velocity of ``N(MEAN, SCALE^2 I)``, finite at both ends of time."""

    def field(x, t):
        mu, sigma = path.mean_coef(t)[:, None], path.std(t)[:, None]
        mean = jnp.asarray(MEAN, x.dtype)
        centered = (x - mu * mean) / (mu**2 * SCALE**2 + sigma**2)
        x0 = mean + mu * SCALE**2 * centered
        return path.mean_coef_dot(t)[:, None] * x0 + path.std_dot(t)[:, None] * sigma * centered

    return field


def score_of(path):
    def score(x, t):
        mu, sigma = path.mean_coef(t)[:, None], path.std(t)[:, None]
        return -(x - mu * jnp.asarray(MEAN, x.dtype)) / (mu**2 * SCALE**2 + sigma**2)

    return score


def halves(array):
    """float64 as two float32: callbacks run on threads that may not have 64-bit types enabled."""
    high = array.astype(jnp.float32)
    return high, (array - high.astype(array.dtype)).astype(jnp.float32)


def whole(high, low):
    return np.asarray(high, np.float64) + np.asarray(low, np.float64)


def recorded_calls(path, **options):
    """(x, t) of every call that `sample_dpmpp` makes of the exact score, in order."""
    calls = []

    def score(x, t):
        jax.debug.callback(
            lambda x, t: calls.append((whole(*x), whole(*t))), halves(x), halves(t), ordered=True
        )
        return score_of(path)(x, t)

    sample_dpmpp(score, path, jnp.asarray(NOISE), **options)
    jax.effects_barrier()
    return calls


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def dpmpp(path, order, num_steps, noise=NOISE):
    return sample_dpmpp(score_of(path), path, noise, num_steps=num_steps, order=order)


def flow_end(ref):
    return gaussian.flow_map(ref, NOISE, np.asarray(1.0), np.asarray(0.0), MEAN, SCALE)


@each_path
def test_dopri5_reaches_the_closed_form_flow(x64, path, ref):
    end = 1e-6 if ref.mu(1.0) > 1e-3 else 0.0  # the linear VP path's sigma' is infinite at 0
    options = {"solver": "dopri5", "t_end": end, "rtol": 1e-9, "atol": 1e-9}
    got = jax.jit(lambda x: sample(velocity_of(path), x, **options))(NOISE)
    assert_allclose(got, flow_end(ref), atol=1e-5)


@each_path
def test_dpmpp_reaches_the_closed_form_flow(x64, path, ref):
    """Few steps come close, more come closer at the order's rate, and order 2 beats order 1."""
    steps = np.array([15, 60])
    start = recorded_calls(path, num_steps=1)[0][1][0]  # it may start a little before pure noise
    assert 0.99 < start <= 1.0
    from_start = gaussian.flow_map(ref, NOISE, start, np.asarray(0.0), MEAN, SCALE)
    results = {(order, int(n)): dpmpp(path, order, int(n)) for order in (1, 2) for n in steps}
    worst = {case: np.abs(result - flow_end(ref)).max() for case, result in results.items()}
    assert worst[2, 15] < 0.5 * worst[1, 15]
    assert worst[2, 60] < 0.5 * worst[1, 60]
    assert worst[2, 15] < 0.05
    assert worst[2, 60] < 0.006
    for order in (1, 2):
        errors = [np.sqrt(((results[order, int(n)] - from_start) ** 2).mean()) for n in steps]
        rate = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
        assert rate > order - 0.35, (order, errors)


@each_path
def test_dpmpp_steps_match_numpy(x64, path, ref):
    """Every recorded step but the last is the published update between the sampler's times."""
    for order in (1, 2):
        calls = recorded_calls(path, num_steps=8, order=order)
        assert len(calls) == 8  # one evaluation a step
        x, t = [call[0] for call in calls], [call[1][0] for call in calls]
        assert all(call[1].shape == (32,) for call in calls)
        assert (np.diff(t) < 0).all()
        assert t[0] > 0.98
        scores = [gaussian.score(ref, x[k], np.full(32, t[k]), MEAN, SCALE) for k in range(8)]
        x0 = [reference_paths.convert(ref, "x0", "score", scores[k], x[k], t[k]) for k in range(8)]
        for k in range(7):
            previous = (x0[k - 1], t[k - 1]) if order == 2 and k > 0 else ()
            expected = reference_solvers.dpmpp_step(ref, x[k], x0[k], t[k], t[k + 1], *previous)
            assert_allclose(x[k + 1], expected, rtol=1e-6, atol=1e-6, err_msg=f"step {k}")


@each_path
def test_dpmpp_float32_keeps_dtype_and_is_finite(path, ref):
    got = dpmpp(path, 2, 15, NOISE.astype(np.float32))
    assert (got.shape, got.dtype) == (NOISE.shape, jnp.float32)
    assert_allclose(got, flow_end(ref), atol=0.06)


@each_path
def test_dpmpp_one_step(x64, path, ref):
    """With a score that knows the data is one point, a single step lands on it."""

    def score(x, t):
        return -(x - path.mean_coef(t)[:, None] * MEAN) / path.std(t)[:, None] ** 2

    got = jax.jit(lambda noise: sample_dpmpp(score, path, noise, num_steps=1))(NOISE)
    assert_allclose(got, np.broadcast_to(MEAN, NOISE.shape), atol=0.05)


def test_dpmpp_refuses():
    path, noise = OT, jnp.ones((2, 2))
    with pytest.raises((ValueError, TypeError), match="order"):
        sample_dpmpp(score_of(path), path, noise, order=3)
    with pytest.raises((ValueError, TypeError), match="num_steps"):
        sample_dpmpp(score_of(path), path, noise, num_steps=0)


# --- log-likelihood ---


@pytest.mark.parametrize(("path", "solver"), [(OT, "rk4"), (COSINE, "dopri5")])
def test_log_likelihood_of_a_gaussian(x64, path, solver):
    x0 = MEAN + 0.6 * NOISE
    options = {"num_steps": 50, "solver": solver}
    got = jax.jit(lambda x0: log_likelihood(velocity_of(path), x0, **options))(x0)
    tolerance = 1e-4 if solver == "rk4" else 1e-3
    assert_allclose(got, gaussian.log_density(x0, MEAN, SCALE), atol=tolerance)


MATRIX = np.array([[0.5, 0.8, -0.3], [-0.4, -0.7, 0.6], [0.9, 0.2, 0.3]])
POINTS = normal(1, 5, 3)


def linear(x, t):
    return x @ jnp.asarray(MATRIX.T, x.dtype) + 0.0 * t[:, None]


def linear_answer():
    """``log N(e^A x; 0, I) + tr A``."""
    return gaussian.log_density(POINTS @ expm(MATRIX).T, np.zeros(3), 1.0) + np.trace(MATRIX)


@pytest.mark.parametrize("solver", ["midpoint", "rk4", "dopri5"])
def test_log_likelihood_with_a_full_jacobian(x64, solver):
    options = {"num_steps": 40, "solver": solver}
    got = jax.jit(lambda x0: log_likelihood(linear, x0, **options))(POINTS)
    assert_allclose(got, linear_answer(), atol=1e-4 if solver == "rk4" else 2e-3)


def test_hutchinson_is_unbiased(x64):
    """The mean over keys is the exact divergence, of a field whose estimate varies."""
    keys = jax.random.split(jax.random.key(2), 400)
    options = {"num_steps": 8, "solver": "rk4"}
    estimate = jax.vmap(lambda key: log_likelihood(linear, jnp.asarray(POINTS), key=key, **options))
    estimates = jax.jit(estimate)(keys)
    assert estimates.shape == (400, 5)
    mean, error = estimates.mean(0), estimates.std(0, ddof=1) / np.sqrt(400)
    assert (error > 1e-4).all()
    assert (np.abs(mean - linear_answer()) < 4.5 * error + 1e-4).all()
    # A probe for every point.
    assert np.abs(np.corrcoef(np.asarray(estimates).T) - np.eye(5)).max() < 0.3


def test_log_likelihood_gradient_in_float32():
    def total(scale):
        field, points = lambda x, t: scale * linear(x, t), jnp.asarray(POINTS, jnp.float32)
        return log_likelihood(field, points, num_steps=20).sum()

    (value, gradient), h = jax.jit(jax.value_and_grad(total))(1.0), 1e-2
    assert value.dtype == jnp.float32
    assert_allclose(value, linear_answer().sum(), rtol=1e-4)
    ahead, behind = jax.jit(jax.vmap(total))(jnp.array([1 + h, 1 - h]))
    assert_allclose(gradient, (ahead - behind) / (2 * h), rtol=1e-2)


def test_log_likelihood_refuses_an_unknown_solver():
    with pytest.raises(ValueError, match="solver"):
        log_likelihood(linear, jnp.asarray(POINTS), solver="rk9")
