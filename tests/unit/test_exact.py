"""Exact posteriors, fields and energies against the plain NumPy way."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from efm_jax import exact
from tests.problems import OT, PATHS, each_path, normal
from tests.reference import exact as reference
from tests.reference import paths as reference_paths

B, D = 4, 2
TIMES = np.array([0.05, 0.3, 0.7, 1.0])
BETA = 1.7


def problem(n):
    """Points, times, data and log weights."""
    return normal(0, B, D), TIMES, 1.5 * normal(1, n, D), normal(2, n)


@functools.partial(jax.jit, static_argnums=0)
def everything(path, x, t, data, log_weights=None):
    """Every function, compiled once for all tests; weights of 0 are energies of infinity."""
    fields = {
        name: getattr(exact, name)(path, x, t, data, log_weights)
        for name in ("posterior", "x0", "velocity", "score")
    }
    if log_weights is not None:
        energy, probability = -log_weights, jax.nn.sigmoid(log_weights)
        fields["intermediate_energy"] = exact.intermediate_energy(path, x, t, data, energy, BETA)
        fields["cg_score"] = exact.cg_score(path, x, t, data, probability, 3.0)
    return fields


def in_numpy(ref, x, t, data, log_weights=None):
    weights = () if log_weights is None else (log_weights,)
    fields = {
        "posterior": reference.posterior(ref, x, t, data, *weights),
        "x0": reference.posterior_mean(ref, x, t, data, *weights),
        "velocity": reference.velocity(ref, x, t, data, *weights),
        "score": reference.score(ref, x, t, data, *weights),
    }
    if log_weights is not None:
        energy, probability = -log_weights, 1.0 / (1.0 + np.exp(-log_weights))
        fields["intermediate_energy"] = reference.intermediate_energy(ref, x, t, data, energy, BETA)
        fields["cg_score"] = reference.cg_score(ref, x, t, data, probability, 3.0)
    return fields


@each_path
@pytest.mark.parametrize(
    ("n", "weights"), [(1, "finite"), (7, "none"), (7, "some_impossible"), (5003, "impossible")]
)
def test_everything_matches_numpy(x64, path, ref, n, weights):
    x, t, data, log_weights = problem(n)
    if "impossible" in weights:
        log_weights[:: max(n // 3, 2)] = -np.inf  # the first point among them
    inputs = (x, t, data) if weights == "none" else (x, t, data, log_weights)
    got = everything(path, *inputs)
    chex.assert_type(list(got.values()), jnp.float64)
    chex.assert_trees_all_close(got, in_numpy(ref, *inputs), rtol=1e-8, atol=1e-9)


def test_constant_energy_passes_through(x64):
    x, t, data, _ = problem(7)
    got = everything(OT, x, t, data, np.full(7, -1e6))["intermediate_energy"]
    assert_allclose(got, BETA * 1e6, rtol=1e-12)


def test_velocity_differentiates_in_x(x64):
    path, ref = PATHS["vp_cosine"]
    x, t, data, log_weights = problem(23)
    direction, h = normal(9, B, D), 1e-6
    ahead, behind = (
        reference.velocity(ref, x + step * direction, t, data, log_weights) for step in (h, -h)
    )

    @jax.jit
    def derivatives(x):
        field = lambda x: exact.velocity(path, x, t, data, log_weights)  # noqa: E731
        tangent = jax.jvp(field, (x,), (jnp.asarray(direction),))[1]
        return tangent, jax.grad(lambda x: (field(x) * direction).sum())(x)

    tangent, pulled = derivatives(x)
    assert_allclose(tangent, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-5)
    # A posterior's Jacobian is symmetric: pulled and pushed forward are the same.
    assert_allclose(pulled, tangent, rtol=1e-8, atol=1e-12)


@each_path
def test_float32_far_from_the_data_near_time_zero(path, ref):
    """Distances over the variance are 1e10."""
    data, x = (1.5 * normal(1, 7, D)).astype(np.float32), normal(0, B, D).astype(np.float32)
    got = everything(path, x, np.full(B, 1e-5, np.float32), data, np.zeros(7, np.float32))
    chex.assert_type(list(got.values()), jnp.float32)
    chex.assert_tree_all_finite(got)
    near = np.argmin(((x[:, None] - data) ** 2).sum(-1), -1)
    assert_allclose(got["posterior"], np.eye(7)[near], atol=1e-6)


@each_path
def test_float32_towards_time_zero(path, ref):
    """Near its own datum, which takes all the posterior, a point loses only the rounding of x."""
    data = np.array([[-2.0, 0.5], [-1.0, -1.0], [0.0, 1.5], [1.0, 0.0], [2.0, -2.0]])
    noise, energy = normal(3, 5, D), 2.0 * normal(4, 5)
    for time in (1e-3, 1e-5, 1e-7):
        t = np.full(5, np.float32(time), np.float64)
        x = reference_paths.sample(ref, data, noise, t)
        got = everything(path, *(a.astype(np.float32) for a in (x, t, data, -energy)))
        assert_allclose(got["posterior"], np.eye(5), atol=1e-6)
        assert_allclose(got["x0"], data, rtol=1e-6, atol=1e-6)
        assert_allclose(got["intermediate_energy"], BETA * energy, rtol=1e-5, atol=1e-5)
        sigma, lost = ref.sigma(t)[0], 1e-6 / ref.sigma(t)[0]  # of the noise that x holds
        expected = reference_paths.velocity(ref, data, noise, t)
        assert_allclose(got["velocity"], expected, atol=lost * ref.sigma_dot(t)[0] + 1e-5)
        expected = reference_paths.score(ref, noise, t)
        assert_allclose(got["score"], expected, atol=(lost + 1e-5) / sigma)


@each_path
def test_both_ends(x64, path, ref):
    """At ``t = 0`` all is of the nearest datum; in pure noise (``mu = 0``) the weighted mean."""
    x, _, data, log_weights = problem(7)
    nearest = ((x[:, None] - data) ** 2).sum(-1).argmin(-1)
    got = everything(path, x, np.zeros(B), data, log_weights)
    assert_allclose(got["x0"], data[nearest], rtol=1e-12)
    assert_allclose(got["posterior"], np.eye(7)[nearest], atol=1e-12)
    assert_allclose(got["intermediate_energy"], -BETA * log_weights[nearest], rtol=1e-9)
    on_data = everything(path, data[:B], np.zeros(B), data, log_weights)
    assert_allclose(on_data["posterior"], np.eye(7)[:B], atol=1e-12)
    assert np.isfinite(on_data["velocity"]).all()
    if ref.mu(1.0) < 1e-9:
        expected = np.tile(np.exp(log_weights) @ data / np.exp(log_weights).sum(), (B, 1))
        got = everything(path, x, np.ones(B), data, log_weights)
        assert_allclose(got["x0"], expected, rtol=1e-10)


@each_path
def test_float32_keeps_its_digits(path, ref):
    """Two logarithms of sums of size 1 / sigma^2 must not be subtracted from each other."""
    x, t, data, log_weights = (a.astype(np.float32) for a in problem(7))
    for times, name in (
        (t, "velocity"),
        (t, "intermediate_energy"),
        (np.full(B, 1e-5, np.float32), "intermediate_energy"),
    ):
        got = everything(path, x, times, data, log_weights)[name]
        wide = [a.astype(np.float64) for a in (x, times, data, log_weights)]
        assert_allclose(got, in_numpy(ref, *wide)[name], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("block_elements", "n"), [(1, 40), (4 * 37, 5003), (4 * 5003, 5003)])
def test_streaming_in_several_blocks(x64, monkeypatch, block_elements, n):
    """Whole blocks carry no weight, the first and the last among them."""
    monkeypatch.setattr(exact, "_BLOCK_ELEMENTS", block_elements)
    path, ref = PATHS["ot"]
    x, t, data, log_weights = problem(n)
    log_weights[: n // 4] = log_weights[-n // 4 :] = -np.inf
    got = jax.jit(everything.__wrapped__, static_argnums=0)(path, x, t, data, log_weights)
    expected = in_numpy(ref, x, t, data, log_weights)
    chex.assert_trees_all_close(got, expected, rtol=1e-8, atol=1e-9)


def test_memory_does_not_hold_every_pair():
    """Compiled: work space against one ``[B, n, d]`` array."""

    def work_space(function, n=1_000_000, d=16, batch=64):
        shapes = (batch, d), (batch,), (n, d), (n,)
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        memory = jax.jit(function).lower(*inputs).compile().memory_analysis()
        return memory.temp_size_in_bytes / (4 * batch * n * d)

    def energy(x, t, data, w):
        return exact.intermediate_energy(OT, x, t, data, w, 1.0).sum()

    assert work_space(lambda x, t, data, w: exact.x0(OT, x, t, data, w)) < 0.05
    assert work_space(lambda x, t, data, w: exact.velocity(OT, x, t, data, w)) < 0.05
    assert work_space(lambda x, t, data, w: exact.cg_score(OT, x, t, data, w, 2.0)) < 0.05
    assert work_space(energy) < 0.05
    assert work_space(jax.grad(energy)) < 0.15
    # In many dimensions few points make a block, whose differences a gradient keeps.
    pixels = jax.grad(lambda x, t, data, w: exact.velocity(OT, x, t, data, w).sum())
    assert work_space(pixels, n=50_000, d=784) < 0.05


def test_a_million_points():
    """Streamed in float32; one point of the batch sits on a datum at a small time."""
    data = normal(6, 1_000_000, 2).astype(np.float32)
    x, t = np.stack([data[700_000], np.ones(2, np.float32)]), np.array([1e-4, 0.6], np.float32)
    got = jax.jit(lambda *inputs: exact.x0(OT, *inputs))(x, t, data)
    assert_allclose(got[0], data[700_000], atol=1e-3)
    # Standard normal data: E[x_0 | x] = mu x / (mu^2 + sigma^2).
    assert_allclose(got[1], 0.4 / (0.4**2 + 0.6**2) * x[1], atol=0.01)
