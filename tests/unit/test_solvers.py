"""ODE solvers through `sampling.sample`: against NumPy steps, closed forms and their order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from efm_jax.sampling import sample
from tests.reference import solvers as reference

FIXED = list(reference.ORDERS)
NOISE = np.random.default_rng(0).normal(size=(3, 2))


def field(x, t):
    """``dx/dt = (2 cos(2t) I + (1 + t) J) x``, J a quarter turn."""
    t = t[..., None]
    turned = jnp.stack([-x[..., 1], x[..., 0]], -1)
    return 2.0 * jnp.cos(2.0 * t) * x + (1.0 + t) * turned


def solution(x, t_start, t_end):
    """Scaled by ``exp(sin 2t)`` and turned by ``t + t^2/2``."""
    scale = np.exp(np.sin(2 * t_end) - np.sin(2 * t_start))
    angle = t_end + t_end**2 / 2 - t_start - t_start**2 / 2
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return scale * x @ rotation.T


@functools.cache
def compiled(solver, num_steps, t_start=1.0, t_end=0.0):
    return jax.jit(
        lambda x: sample(field, x, solver=solver, num_steps=num_steps, t_start=t_start, t_end=t_end)
    )


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize(("num_steps", "t_start", "t_end"), [(1, 1.0, 0.0), (4, 0.8, 0.3)])
def test_steps_match_numpy(x64, solver, num_steps, t_start, t_end):
    got = sample(
        field, jnp.asarray(NOISE), solver=solver, num_steps=num_steps, t_start=t_start, t_end=t_end
    )

    def plain(x, t):
        turned = np.stack([-x[:, 1], x[:, 0]], -1)
        return 2.0 * np.cos(2.0 * t) * x + (1.0 + t) * turned

    expected = reference.integrate(plain, NOISE, solver, num_steps, t_start, t_end)
    assert got.dtype == jnp.float64
    assert_allclose(got, expected, rtol=1e-10)


@pytest.mark.parametrize("solver", FIXED)
def test_order_of_convergence(x64, solver):
    steps = np.array([16, 32, 64, 128])
    expected = solution(NOISE, 1.0, 0.0)
    errors = [np.abs(compiled(solver, int(n))(jnp.asarray(NOISE)) - expected).max() for n in steps]
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order == pytest.approx(reference.ORDERS[solver], abs=0.15)
    assert errors[-1] < {1: 0.1, 2: 1e-3, 4: 1e-7}[reference.ORDERS[solver]]


@pytest.mark.parametrize("solver", [*FIXED, "dopri5"])
@pytest.mark.parametrize(("t_start", "t_end"), [(0.9, 0.2), (0.0, 1.0)])
def test_start_and_end_times_and_direction(x64, solver, t_start, t_end):
    got = compiled(solver, 100, t_start, t_end)(jnp.asarray(NOISE))
    tolerance = {"euler": 0.1, "midpoint": 1e-3, "heun": 1e-3, "rk4": 1e-6, "dopri5": 1e-3}[solver]
    assert_allclose(got, solution(NOISE, t_start, t_end), atol=tolerance)


@pytest.mark.parametrize(("tolerance", "allowed"), [(1e-4, 1e-2), (1e-10, 1e-8)])
def test_dopri5_follows_its_tolerances(x64, tolerance, allowed):
    got = sample(field, jnp.asarray(NOISE), solver="dopri5", rtol=tolerance, atol=tolerance)
    error = np.abs(got - solution(NOISE, 1.0, 0.0)).max()
    assert error < allowed
    if tolerance == 1e-4:
        assert error > 1e-9  # adaptive: a loose tolerance takes fewer steps


@pytest.mark.parametrize("solver", [*FIXED, "dopri5"])
def test_defaults_shapes_and_float32(solver):
    shapes = []

    def watched(x, t):
        shapes.append((x.shape, t.shape, x.dtype, t.dtype))
        return field(x, t)

    noise = jnp.asarray(NOISE, jnp.float32)
    got = sample(watched, noise, solver=solver)
    assert got.shape == noise.shape
    assert got.dtype == jnp.float32
    assert set(shapes) == {((3, 2), (3,), jnp.dtype("float32"), jnp.dtype("float32"))}
    tolerance = 1.0 if solver == "euler" else 0.1
    assert_allclose(got, solution(NOISE, 1.0, 0.0), atol=tolerance)


def test_default_is_ten_euler_steps(x64):
    assert_allclose(
        sample(field, jnp.asarray(NOISE)), compiled("euler", 10)(jnp.asarray(NOISE)), rtol=1e-12
    )


@pytest.mark.parametrize("solver", ["heun", "rk4"])
def test_gradient_through_the_solver(x64, solver):
    """The flow map of a linear field is a matrix: its transpose is the gradient."""
    run, weights = compiled(solver, 16), jnp.asarray(NOISE[::-1])
    gradient = jax.grad(lambda x: (weights * run(x)).sum())(jnp.asarray(NOISE))
    matrix = np.linalg.lstsq(NOISE, run(jnp.asarray(NOISE)), rcond=None)[0]  # x -> x @ matrix
    assert_allclose(gradient, weights @ matrix.T, rtol=1e-9)


def test_unknown_solver_names_the_choices():
    with pytest.raises(ValueError, match="solver") as info:
        sample(field, jnp.ones((3, 2)), solver="rk9")
    for name in ("rk9", *FIXED, "dopri5"):
        assert name in str(info.value)


@pytest.mark.parametrize("num_steps", [0, -1, 2.5])
def test_bad_number_of_steps(num_steps):
    with pytest.raises((ValueError, TypeError), match="num_steps"):
        sample(field, jnp.ones((3, 2)), num_steps=num_steps)
