"""Gaussian mixtures with quadratic energies against NumPy, integration and finite data."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.integrate import quad
from scipy.stats import norm

from efm_jax import exact, paths, sampling
from tests.problems import COSINE, OT, PATHS, each_path, normal
from tests.reference import mixture as reference
from tests.reference import paths as reference_paths

INNER = np.array([0.02, 0.25, 0.5, 0.75, 0.97])
ENDS = np.array([0.0, 0.0, 1.0, 1.0, 0.5])
B, D = 5, 2
BETA = 1.7
WITH_FLOOR = {
    "ot_sigma_min": (paths.conditional_ot(0.1), reference_paths.conditional_ot(0.1)),
    **PATHS,
}
with_sigma_min = pytest.mark.parametrize(("path", "ref"), WITH_FLOOR.values(), ids=WITH_FLOOR)


def problem(d=D, k=3, dtype=np.float64):
    """Ours and the reference's mixture and energy; our weights sum to 6."""
    rng = np.random.default_rng(k + 10 * d)
    weights, means = rng.dirichlet(np.ones(k)), 2 * rng.normal(size=(k, d))
    variances, center = rng.uniform(0.05, 1.0, k), rng.normal(size=d)
    ours = exact.GaussianMixture(
        *(jnp.asarray(a, dtype) for a in (np.log(6 * weights), means, variances))
    )
    energy = exact.QuadraticEnergy(*(jnp.asarray(a, dtype) for a in (center, 1.4, -0.3)))
    return ours, energy, (weights, means, variances), (center, 1.4, -0.3)


@functools.partial(jax.jit, static_argnums=0)
def everything(path, mixture, energy, x, t, beta=BETA):
    """Every field of the plain and of the guided mixture; compiled once for all tests."""
    guided = mixture.guided(energy, beta)
    names = ("marginal_log_density", "x0", "velocity", "score")
    fields = {name: getattr(mixture, name)(path, x, t) for name in names}
    fields |= {f"guided {name}": getattr(guided, name)(path, x, t) for name in names}
    fields["intermediate_energy"] = mixture.intermediate_energy(path, x, t, energy, beta)
    fields["cg_score"] = mixture.cg_score(path, x, t, energy, beta)
    return fields


# --- against NumPy ---


@with_sigma_min
def test_fields_match_numpy(x64, path, ref):
    mixture, energy, ref_mixture, ref_energy = problem()
    x = 1.5 * normal(0, B, D)
    tilted, _ = reference.guided(ref_mixture, ref_energy, BETA)
    got, expected = everything(path, mixture, energy, x, INNER), {}
    for field in got:
        if field in ("intermediate_energy", "cg_score"):
            inputs = ref, ref_mixture, x, INNER, ref_energy, BETA
        else:
            inputs = ref, tilted if field.startswith("guided") else ref_mixture, x, INNER
        expected[field] = getattr(reference, field.removeprefix("guided "))(*inputs)
    chex.assert_type(list(got.values()), jnp.float64)
    chex.assert_trees_all_close(got, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("d", [1, 5])
def test_density_guided_mixture_and_normalizer_match_numpy(x64, d):
    mixture, energy, ref_mixture, ref_energy = problem(d)
    x = normal(1, B, d)
    assert_allclose(energy(x), reference.energy_at(ref_energy, x), rtol=1e-12)
    assert_allclose(mixture.log_density(x), reference.log_density(ref_mixture, x), rtol=1e-10)
    (weights, *expected), log_z = reference.guided(ref_mixture, ref_energy, BETA)
    guided = mixture.guided(energy, BETA)
    chex.assert_trees_all_close(tuple(guided), (np.log(weights), *expected), rtol=1e-9, atol=1e-9)
    assert_allclose(mixture.log_normalizer(energy, BETA), log_z, rtol=1e-10)


# --- against numerical integration ---


def test_normalizer_and_guided_density_by_integration(x64):
    mixture, energy, (weights, means, variances), (center, curvature, offset) = problem(d=1)

    def p(x):
        return (weights * norm.pdf(x, means[:, 0], np.sqrt(variances))).sum()

    def tilted(x):
        return p(x) * np.exp(-BETA * (offset + curvature * (x - center[0]) ** 2 / 2))

    edges = [-15.0, *np.sort(means[:, 0]), 15.0]  # split where the components are
    options = {"epsabs": 1e-12, "epsrel": 1e-10, "limit": 200}
    z = sum(quad(tilted, a, b, **options)[0] for a, b in itertools.pairwise(edges))
    assert_allclose(mixture.log_normalizer(energy, BETA), np.log(z), rtol=1e-9)
    grid = np.linspace(-4, 4, 9)
    expected = [np.log(tilted(x) / z) for x in grid]
    got = mixture.guided(energy, BETA).log_density(grid[:, None])
    assert_allclose(got, expected, rtol=1e-8, atol=1e-9)


# --- consistency ---


@each_path
def test_scores_are_gradients(x64, path, ref):
    """Of ``log p_t``; and ``q_t = p_t exp(-E_t) / Z`` in value and gradient, at both ends too."""
    mixture, energy, _, _ = problem()
    guided, x = mixture.guided(energy, BETA), jnp.asarray(normal(0, B, D))

    @jax.jit
    def gradients(x, t):
        return (
            jax.grad(lambda x: mixture.marginal_log_density(path, x, t).sum())(x),
            jax.grad(lambda x: guided.marginal_log_density(path, x, t).sum())(x),
            jax.grad(lambda x: mixture.intermediate_energy(path, x, t, energy, BETA).sum())(x),
        )

    for t in (INNER, ENDS):
        got = everything(path, mixture, energy, x, t)
        plain, tilted, pulled = gradients(x, t)
        assert_allclose(got["score"], plain, rtol=1e-9, atol=1e-10)
        assert_allclose(got["guided score"], tilted, rtol=1e-9, atol=1e-10)
        assert_allclose(pulled, got["score"] - got["guided score"], rtol=1e-8, atol=1e-8)
        ratio = got["marginal_log_density"] - got["guided marginal_log_density"]
        expected = ratio - mixture.log_normalizer(energy, BETA)
        assert_allclose(got["intermediate_energy"], expected, rtol=1e-9, atol=1e-10)


def test_guidance_composes(x64):
    """``beta = 0`` changes nothing, and two guidances in turn are one with both scales' sum."""
    mixture, energy, _, _ = problem()
    unchanged = mixture.guided(energy, 0.0)
    normalized = mixture._replace(log_weights=jax.nn.log_softmax(mixture.log_weights))
    chex.assert_trees_all_close(unchanged, normalized, rtol=1e-12)
    assert_allclose(mixture.log_normalizer(energy, 0.0), 0.0, atol=1e-12)
    twice, once = mixture.guided(energy, 0.5).guided(energy, 1.2), mixture.guided(energy, 1.7)
    chex.assert_trees_all_close(twice, once, rtol=1e-10)


def test_weights_need_not_be_normalized(x64):
    mixture, energy, _, _ = problem()
    shifted = mixture._replace(log_weights=mixture.log_weights + 700.0)
    x, t = normal(0, B, D), INNER
    assert_allclose(shifted.log_density(x), mixture.log_density(x), rtol=1e-9)
    plain, moved = (everything(OT, which, energy, x, t) for which in (mixture, shifted))
    chex.assert_trees_all_close(moved, plain, rtol=1e-9, atol=1e-10)
    # A weight of 0 leaves its component out: as many of the same kind as one alone.
    only = mixture._replace(log_weights=jnp.array([-jnp.inf, 0.0, -jnp.inf]))
    alike = exact.GaussianMixture(jnp.zeros(3), *(jnp.stack([a[1]] * 3) for a in mixture[1:]))
    got, expected = (everything(OT, which, energy, x, t) for which in (only, alike))
    chex.assert_trees_all_close(got, expected, rtol=1e-10, atol=1e-10)


# --- both ends ---


@each_path
def test_finite_in_float32_at_both_ends(path, ref):
    mixture, energy, _, _ = problem(dtype=np.float32)
    x, t = normal(0, B, D).astype(np.float32), ENDS.astype(np.float32)
    fields = everything(path, mixture, energy, x, t)
    chex.assert_type(list(fields.values()), np.float32)
    chex.assert_tree_all_finite(fields)


@each_path
def test_differentiable_at_both_ends(path, ref):
    """In points, mixture and energy, also where the linear VP path's sigma' is infinite."""
    mixture, energy, _, _ = problem(dtype=np.float32)
    x, t = normal(0, B, D).astype(np.float32), ENDS.astype(np.float32)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradients(mixture, energy, x):
        intermediate = mixture.intermediate_energy(path, x, t, energy, BETA)
        return intermediate.sum() + mixture.guided(energy, BETA).velocity(path, x, t).sum()

    found = gradients(mixture, energy, x)
    chex.assert_tree_all_finite(found)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))


@with_sigma_min
def test_values_at_the_ends_are_the_limits(x64, path, ref):
    mixture, energy, _, _ = problem()
    x = normal(0, B, D)
    at_ends = everything(path, mixture, energy, x, ENDS)
    inside = everything(path, mixture, energy, x, np.abs(ENDS - 1e-7))
    chex.assert_trees_all_close(at_ends, inside, rtol=2e-5, atol=2e-5)
    if path != WITH_FLOOR["ot_sigma_min"][0]:  # all others start from the data themselves
        data = ENDS == 0
        assert_allclose(at_ends["x0"][data], x[data], rtol=1e-12)
        assert_allclose(at_ends["intermediate_energy"][data], BETA * energy(x[data]), rtol=1e-12)
        assert_allclose(
            at_ends["marginal_log_density"][data], mixture.log_density(x[data]), rtol=1e-12
        )
    if ref.mu(1.0) < 1e-9:  # all others end in noise that knows nothing of the data
        noise = ENDS == 1
        mean = jax.nn.softmax(mixture.log_weights) @ mixture.means
        assert_allclose(at_ends["x0"][noise], np.tile(mean, (2, 1)), rtol=1e-10)
        assert_allclose(
            at_ends["intermediate_energy"][noise], -mixture.log_normalizer(energy, BETA), rtol=1e-10
        )


# --- against finite data ---


@each_path
def test_tiny_variances_are_finite_data(x64, path, ref):
    mixture, energy, _, _ = problem()
    x, t = jnp.asarray(normal(0, B, D)), jnp.asarray(INNER).at[0].set(0.2)
    data, weights, energies = mixture.means, mixture.log_weights, energy(mixture.means)

    @jax.jit
    def finite():
        fields = {}
        for field in ("x0", "velocity", "score"):
            function = getattr(exact, field)
            fields[field] = function(path, x, t, data, weights)
            fields[f"guided {field}"] = function(path, x, t, data, weights - BETA * energies)
        # These two functions of finite data have no weights of their own: equal ones.
        even = {
            "intermediate_energy": exact.intermediate_energy(path, x, t, data, energies, BETA),
            "cg_score": exact.cg_score(path, x, t, data, jnp.exp(-energies), BETA),
        }
        return fields, even

    fields, even = finite()
    for variance in (0.0, 1e-12):
        points = mixture._replace(variances=jnp.full(3, variance))
        for expected, log_weights in ((fields, weights), (even, jnp.zeros(3))):
            got = everything(path, points._replace(log_weights=log_weights), energy, x, t)
            got = {field: got[field] for field in expected}
            chex.assert_trees_all_close(got, expected, rtol=1e-6, atol=1e-8)


# --- samples and flows ---


def test_samples_have_the_moments_of_the_mixture():
    mixture, energy, _, _ = problem(dtype=np.float32)
    guided, number = mixture.guided(energy, 0.5), 40_000
    samples = np.asarray(guided.sample(jax.random.key(3), number))
    weights, means = np.exp(guided.log_weights), np.asarray(guided.means)
    mean = weights @ means
    covariance = np.einsum("k,ki,kj->ij", weights, means - mean, means - mean)
    covariance += weights @ np.asarray(guided.variances) * np.eye(D)
    error = np.sqrt(np.diag(covariance) / number)
    assert (np.abs(samples.mean(0) - mean) < 4.5 * error).all()
    assert_allclose(np.cov(samples.T), covariance, atol=0.05 * np.trace(covariance))
    assert_array_equal(samples, guided.sample(jax.random.key(3), number))
    assert not np.array_equal(samples[:10], guided.sample(jax.random.key(4), 10))


def test_the_mean_energy_of_samples_is_the_slope_of_the_normalizer():
    """``-d log Z / d beta = E_q[E]``, by samples of the guided mixture."""
    mixture, energy, _, _ = problem(dtype=np.float32)
    slope = jax.grad(lambda beta: mixture.log_normalizer(energy, beta))(0.8)
    energies = np.asarray(energy(mixture.guided(energy, 0.8).sample(jax.random.key(0), 20_000)))
    assert abs(energies.mean() + slope) < 4.5 * energies.std() / np.sqrt(20_000)


def test_the_likelihood_of_the_flow_is_the_density(x64):
    mixture, energy, _, _ = problem()
    guided = mixture.guided(energy, BETA)
    x = guided.sample(jax.random.key(2), B)

    @jax.jit
    def likelihood(x):
        return sampling.log_likelihood(lambda x, t: guided.velocity(OT, x, t), x, num_steps=150)

    assert_allclose(likelihood(x), guided.log_density(x), rtol=1e-5, atol=1e-5)


# --- numbers that overflow ---


@each_path
def test_float32_with_huge_energies(path, ref):
    """``beta E`` of 1e4 is never exponentiated; an offset takes no digits from the weights."""
    mixture, _, ref_mixture, _ = problem(dtype=np.float32)
    x, t = normal(0, B, D).astype(np.float32), INNER.astype(np.float32)
    wide = x.astype(np.float64), t.astype(np.float64)
    for offset in (0.0, 1e4):
        numbers = np.array([40.0, -30.0]), 8.0, offset
        energy = exact.QuadraticEnergy(*(np.float32(number) for number in numbers))
        got = everything(path, mixture, energy, x, t, 1.0)
        chex.assert_type(list(got.values()), jnp.float32)
        chex.assert_tree_all_finite(got)
        tilted, _ = reference.guided(ref_mixture, numbers, 1.0)
        expected = reference.velocity(ref, tilted, *wide)
        assert_allclose(got["guided velocity"], expected, rtol=1e-3, atol=1e-2)
        expected = reference.intermediate_energy(ref, ref_mixture, *wide, numbers, 1.0)
        assert reference.energy_at(numbers, x).min() > 8e3
        assert_allclose(got["intermediate_energy"], expected, rtol=1e-4)


def test_a_float32_offset_costs_no_digits():
    mixture, energy, _, _ = problem(dtype=np.float32)
    plain = mixture.guided(energy._replace(offset=0.0), BETA)
    assert_array_equal(
        mixture.guided(energy._replace(offset=1e7), BETA).log_weights, plain.log_weights
    )


# --- transformations and bad input ---


def test_any_leading_axes_compiled_and_mapped(x64):
    mixture, energy, _, _ = problem()
    x, t = normal(0, B, D), INNER
    expected = everything(COSINE, mixture, energy, x, t)
    compiled = everything._cache_size()
    everything(COSINE, mixture.guided(energy, 1.0), energy, x, t)
    assert everything._cache_size() == compiled  # mixtures are data

    def fields(mixture, x, t):
        return everything(COSINE, mixture, energy, x, t)

    several = fields(mixture, np.stack([x, x])[:, :, None], np.stack([t, t])[..., None])
    several = jax.tree.map(lambda leaf: leaf[1, :, 0], several)
    pair = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), mixture)
    over_mixtures = jax.vmap(fields, (0, None, None))(pair, x, t)
    over_mixtures = jax.tree.map(lambda leaf: leaf[1], over_mixtures)
    mapped = jax.vmap(fields, (None, 0, 0))(mixture, x, t)
    for found in (several, mapped, over_mixtures):
        chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "field", ["marginal_log_density", "x0", "velocity", "score", "intermediate_energy", "cg_score"]
)
def test_points_and_times_that_disagree_are_refused(field):
    mixture, energy, _, _ = problem(dtype=np.float32)
    function, t = functools.partial(getattr(mixture, field), OT), jnp.ones(B)
    more = (energy, 1.0) if field in ("intermediate_energy", "cg_score") else ()
    for x, times, message in (
        (jnp.ones((B, D + 1)), t, r"x: expected shape \(5, 2\); got \(5, 3\)"),
        (jnp.ones((B, D)), t[1:], r"t: expected shape \(5,\); got \(4,\)"),
        (jnp.ones((B, D)), 0.5, r"t: expected shape \(5,\); got \(\)"),
        (jnp.ones((B, D), jnp.int32), t, r"x: expected a floating-point array"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            function(x, times, *more)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"means": jnp.ones(3)}, ValueError, r"means: expected shape \[K, d\]"),
        ({"variances": jnp.ones(2)}, ValueError, r"variances: expected shape \(3,\); got \(2,\)"),
        ({"variances": jnp.ones((3, 2))}, ValueError, r"variances: expected shape \(3,\)"),
        ({"log_weights": jnp.ones(4)}, ValueError, r"log_weights: expected shape \(3,\); got"),
        ({"means": jnp.ones((3, 2), int)}, TypeError, r"means: expected a floating-point array"),
    ],
)
def test_mixtures_that_do_not_fit_are_refused(change, error, message):
    mixture, energy, _, _ = problem(dtype=np.float32)
    broken = mixture._replace(**change)
    with pytest.raises(error, match=message):
        broken.log_density(jnp.ones((B, D)))
    with pytest.raises(error, match=message):
        broken.guided(energy, 1.0)
    with pytest.raises(error, match=message):
        broken.sample(jax.random.key(0), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"center": jnp.ones(3)}, r"center: expected shape \(2,\); got \(3,\)"),
        ({"curvature": jnp.ones(2)}, r"curvature: expected shape \(\)"),
        ({"curvature": -1.0}, r"curvature: expected a finite number in \[0.0"),
        ({"offset": jnp.ones(2)}, r"offset: expected shape \(\)"),
    ],
)
def test_energies_that_do_not_fit_are_refused(change, message):
    mixture, energy, _, _ = problem(dtype=np.float32)
    broken = energy._replace(**change)
    with pytest.raises(ValueError, match=message):
        mixture.guided(broken, 1.0)
    with pytest.raises(ValueError, match=message):
        mixture.log_normalizer(broken, 1.0)
    with pytest.raises(ValueError, match=message):
        broken(jnp.ones((B, D)))


def test_scales_and_numbers_out_of_range_are_refused():
    mixture, energy, _, _ = problem(dtype=np.float32)
    with pytest.raises(ValueError, match=r"beta: expected a finite number in \[0.0"):
        mixture.guided(energy, -1.0)
    with pytest.raises(ValueError, match=r"beta: expected shape \(\); got \(2,\)"):
        mixture.log_normalizer(energy, jnp.ones(2))
    with pytest.raises(ValueError, match="num"):
        mixture.sample(jax.random.key(0), 0)
    with pytest.raises(ValueError, match="x"):
        mixture.log_density(jnp.float32(1.0))
