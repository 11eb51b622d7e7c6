"""ODE solvers through `sampling.sample`: against NumPy steps, closed forms and their order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from efm_jax.sampling import sample
from tests.problems import normal
from tests.reference import solvers as reference

FIXED = list(reference.ORDERS)
NOISE = normal(0, 3, 2)


def field(x, t, numpy=jnp):
    """``dx/dt = (2 cos(2t) I + (1 + t) J) x``, J a quarter turn."""
    t = t[..., None]
    turned = numpy.stack([-x[..., 1], x[..., 0]], -1)
    return 2.0 * numpy.cos(2.0 * t) * x + (1.0 + t) * turned


def solution(x, t_start=1.0, t_end=0.0):
    """Scaled by ``exp(sin 2t)`` and turned by ``t + t^2/2``."""
    scale = np.exp(np.sin(2 * t_end) - np.sin(2 * t_start))
    angle = t_end + t_end**2 / 2 - t_start - t_start**2 / 2
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return scale * x @ rotation.T


@functools.cache
def compiled(solver, num_steps):
    def run(x, t_start=1.0, t_end=0.0):
        options = {"num_steps": num_steps, "t_start": t_start, "t_end": t_end}
        return sample(field, x, solver=solver, **options)

    return jax.jit(run)


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize(("num_steps", "t_start", "t_end"), [(1, 1.0, 0.0), (4, 0.8, 0.3)])
def test_steps_match_numpy(x64, solver, num_steps, t_start, t_end):
    got = compiled(solver, num_steps)(NOISE, t_start, t_end)
    plain = lambda x, t: field(x, np.full(3, t), np)  # noqa: E731
    expected = reference.integrate(plain, NOISE, solver, num_steps, t_start, t_end)
    assert got.dtype == jnp.float64
    assert_allclose(got, expected, rtol=1e-10)


@pytest.mark.parametrize("solver", FIXED)
def test_order_of_convergence(x64, solver):
    steps = np.array([16, 64])
    errors = [np.abs(compiled(solver, int(n))(NOISE) - solution(NOISE)).max() for n in steps]
    rate = -np.diff(np.log(errors)) / np.diff(np.log(steps))
    assert rate == pytest.approx(reference.ORDERS[solver], abs=0.25)
    assert errors[-1] < {1: 0.2, 2: 4e-3, 4: 1.6e-6}[reference.ORDERS[solver]]


@pytest.mark.parametrize("solver", [*FIXED, "dopri5"])
def test_start_and_end_times_and_direction(x64, solver):
    tolerance = {"euler": 0.15, "midpoint": 3e-3, "heun": 3e-3, "rk4": 1e-6}.get(solver, 1e-3)
    for times in ((0.9, 0.2), (0.0, 1.0)):
        got = compiled(solver, 64)(NOISE, *times)
        assert_allclose(got, solution(NOISE, *times), atol=tolerance)


def test_dopri5_follows_its_tolerances(x64):
    run = jax.jit(lambda x, tol: sample(field, x, solver="dopri5", rtol=tol, atol=tol))
    loose, tight = (np.abs(run(NOISE, tol) - solution(NOISE)).max() for tol in (1e-4, 1e-10))
    assert tight < 1e-8
    assert 1e-9 < loose < 1e-2  # adaptive: a loose tolerance takes fewer steps


@pytest.mark.parametrize("solver", [*FIXED, "dopri5"])
def test_defaults_shapes_and_float32(solver):
    shapes = []

    def watched(x, t):
        shapes.append((x.shape, t.shape, x.dtype, t.dtype))
        return field(x, t)

    noise = NOISE.astype(np.float32)
    got = sample(watched, noise, solver=solver)
    assert (got.shape, got.dtype) == (noise.shape, jnp.float32)
    assert set(shapes) == {((3, 2), (3,), jnp.dtype("float32"), jnp.dtype("float32"))}
    assert_allclose(got, solution(NOISE), atol=1.0 if solver == "euler" else 0.1)
    if solver == "euler":
        assert_allclose(sample(field, noise), compiled("euler", 10)(noise), rtol=1e-5)


def test_gradient_through_the_solver(x64):
    """The flow map of a linear field is a matrix: its transpose is the gradient."""
    run, weights = compiled("rk4", 16), NOISE[::-1]
    gradient = jax.jit(jax.grad(lambda x: (weights * run(x)).sum()))(NOISE)
    matrix = np.linalg.lstsq(NOISE, run(NOISE), rcond=None)[0]  # x -> x @ matrix
    assert_allclose(gradient, weights @ matrix.T, rtol=1e-9)


def test_unknown_solver_names_the_choices():
    with pytest.raises(ValueError, match="solver") as info:
        sample(field, jnp.ones((3, 2)), solver="rk9")
    assert all(name in str(info.value) for name in ("rk9", *FIXED, "dopri5"))


@pytest.mark.parametrize("num_steps", [0, -1, 2.5])
def test_bad_number_of_steps(num_steps):
    with pytest.raises((ValueError, TypeError), match="num_steps"):
        sample(field, jnp.ones((3, 2)), num_steps=num_steps)
