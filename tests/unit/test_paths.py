"""Probability paths against NumPy float64, automatic differentiation and their own limits."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from efm_jax import paths
from tests import problems
from tests.problems import normal
from tests.reference import paths as reference

PATHS = {
    **problems.PATHS,
    "ot_floor": (paths.conditional_ot(sigma_min=0.1), reference.conditional_ot(0.1)),
    "vp_linear_wide": (paths.vp_linear(beta_min=0.2, beta_max=15), reference.vp_linear(0.2, 15)),
}
each_path = pytest.mark.parametrize("name", PATHS)
PREDICTIONS = ("velocity", "noise", "score", "x0")
CONVERSIONS = [f"{a}_from_{b}" for b in PREDICTIONS for a in PREDICTIONS if a != b]
AT_ZERO = {"velocity_from_score", "noise_from_velocity", "x0_from_velocity"}
AT_ZERO |= {"x0_from_score", "noise_from_score", "x0_from_noise"}
AT_ONE = {"score_from_velocity", "noise_from_velocity", "velocity_from_x0", "x0_from_velocity"}
AT_ONE |= {"score_from_x0", "noise_from_score", "noise_from_x0", "score_from_noise"}
FINITE = {  # conversions with a finite limit, for fixed value and x, at (t = 0, t = 1)
    "ot": (AT_ZERO | {"velocity_from_noise"}, AT_ONE),
    "ot_floor": (set(CONVERSIONS), AT_ONE),
    "vp_linear": (AT_ZERO | {"score_from_velocity"}, set(CONVERSIONS)),
    "vp_linear_wide": (AT_ZERO | {"score_from_velocity"}, set(CONVERSIONS)),
    "vp_cosine": (AT_ZERO | {"velocity_from_noise"}, AT_ONE),
}
NAMES = {"mean_coef": "mu", "std": "sigma", "mean_coef_dot": "mu_dot", "std_dot": "sigma_dot"}
INTERIOR = np.linspace(0.02, 0.98, 25)


@functools.partial(jax.jit, static_argnums=0)
def coefficients(path, t):
    return {theirs: getattr(path, ours)(t) for ours, theirs in NAMES.items()}


def in_numpy(ref, t):
    return {name: getattr(ref, name)(np.asarray(t, np.float64)) for name in NAMES.values()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def convert_all(path, conversions, values, x, t):
    """Every conversion of the list, of one value or of the value of its source."""
    return {
        name: getattr(path, name)(
            values[name.split("_")[-1]] if isinstance(values, dict) else values, x, t
        )
        for name in conversions
    }


def all_in_numpy(ref, conversions, value, x, t):
    return {
        name: reference.convert(ref, *name.split("_from_"), value, x, t) for name in conversions
    }


@each_path
def test_coefficients_match_numpy(x64, name):
    path, ref = PATHS[name]
    t = np.concatenate([[1e-6, 1e-3], INTERIOR, [1.0]])
    got = coefficients(path, t)
    chex.assert_type(list(got.values()), jnp.float64)
    chex.assert_trees_all_close(got, in_numpy(ref, t), rtol=1e-10, atol=1e-14)


@each_path
def test_coefficients_keep_shape_and_type_of_t(name):
    for shape in [(), (3,), (3, 4)]:
        found = coefficients(PATHS[name][0], jnp.zeros(shape, jnp.float32))
        chex.assert_shape(list(found.values()), shape)
        chex.assert_type(list(found.values()), jnp.float32)


@each_path
def test_derivatives_match_autodiff(x64, name):
    path, _ = PATHS[name]
    t = jnp.asarray(INTERIOR)
    slopes = jax.jit(jax.vmap(jax.jacfwd(lambda t: coefficients(path, t))))(t)
    got = coefficients(path, t)
    assert_allclose(slopes["mu"], got["mu_dot"], rtol=1e-9)
    assert_allclose(slopes["sigma"], got["sigma_dot"], rtol=1e-9)


@each_path
def test_ends_of_time(x64, name):
    path, _ = PATHS[name]
    zero, one = coefficients(path, 0.0), coefficients(path, 1.0)
    assert zero["mu"] == 1.0
    assert zero["sigma"] == (0.1 if name == "ot_floor" else 0.0)
    assert_allclose(one["sigma"], 1.0, atol=1e-3)
    assert_allclose(one["mu"], 0.0, atol=0.03 if "vp_linear" in name else 1e-12)
    if "vp_linear" in name:  # sigma ~ sqrt(b0 t)
        assert zero.pop("sigma_dot") == np.inf
    chex.assert_tree_all_finite((zero, one))


@each_path
def test_coefficients_differentiate_at_the_ends(name):
    path, ref = PATHS[name]
    ends, expected = np.float32([0, 1]), in_numpy(ref, [0, 1])
    for function, dot in ((path.mean_coef, "mu_dot"), (path.std, "sigma_dot")):
        found, finite = jax.vmap(jax.grad(function))(ends), np.isfinite(expected[dot])
        assert_allclose(found[finite], expected[dot][finite], rtol=1e-5, atol=1e-6)


def test_vp_linear_keeps_its_digits_near_zero():
    path, ref = PATHS["vp_linear"]
    t = np.float32([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1])
    chex.assert_trees_all_close(coefficients(path, t), in_numpy(ref, t), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "t_shape", "x_shape"),
    [*((name, (5, 4), (5, 4, 3)) for name in PATHS), ("ot", (), (5, 3)), ("vp_linear", (), (3,))],
)
def test_samples_targets_and_conversions_match_numpy(x64, name, t_shape, x_shape):
    path, ref = PATHS[name]
    t = np.random.default_rng(0).uniform(0.01, 0.99, t_shape)
    x0, noise = normal(1, *x_shape), normal(2, *x_shape)
    assert_allclose(path.sample(x0, noise, t), reference.sample(ref, x0, noise, t), rtol=1e-12)
    targets = {"data": x0, "noise": noise, "score": reference.score(ref, noise, t)}
    targets["velocity"] = reference.velocity(ref, x0, noise, t)
    found = {name: path.target(name, x0, noise, t) for name in paths.PREDICTIONS}
    chex.assert_trees_all_close(found, targets, rtol=1e-9)
    value, x = normal(4, *x_shape), normal(5, *x_shape)
    got = convert_all(path, tuple(CONVERSIONS), value, x, t)
    chex.assert_type(list(got.values()), jnp.float64)
    expected = all_in_numpy(ref, CONVERSIONS, value, x, t)
    chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-9)


@each_path
@pytest.mark.parametrize("end", [0, 1])
def test_conversions_reach_their_limit_at_the_ends(name, end):
    path, ref = PATHS[name]
    value, x, conversions = normal(4, 2, 3), normal(5, 2, 3), tuple(sorted(FINITE[name][end]))
    got = convert_all(path, conversions, *map(np.float32, (value, x)), np.full(2, end, np.float32))
    chex.assert_type(list(got.values()), jnp.float32)
    expected = all_in_numpy(ref, conversions, value, x, np.full(2, abs(end - 1e-11)))
    chex.assert_trees_all_close(got, expected, rtol=1e-3, atol=1e-3)


@each_path
def test_conversions_take_the_truth_to_the_truth_in_float32(name):
    path, _ = PATHS[name]
    x0, noise, t = map(np.float32, (normal(0, 25, 3), normal(1, 25, 3), INTERIOR))
    truth = {"velocity": path.velocity(x0, noise, t), "score": path.score(noise, t)}
    truth |= {"noise": noise, "x0": x0}
    got = convert_all(path, tuple(CONVERSIONS), truth, path.sample(x0, noise, t), t)
    chex.assert_type(list(got.values()), jnp.float32)
    expected = {conversion: truth[conversion.split("_")[0]] for conversion in CONVERSIONS}
    chex.assert_trees_all_close(got, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("sigma_min", [-0.1, 1.5, float("nan")])
def test_bad_sigma_min_raises(sigma_min):
    with pytest.raises(ValueError, match="sigma_min"):
        paths.conditional_ot(sigma_min=sigma_min)


@pytest.mark.parametrize("name", ["ot_floor", "vp_linear", "vp_cosine"])
def test_whole_number_times_are_times(name):
    path, _ = PATHS[name]
    whole, real = coefficients(path, jnp.array([1])), coefficients(path, jnp.array([1.0]))
    chex.assert_trees_all_close(whole, real, rtol=1e-6)
    x0, noise, t = jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.array([1, 1])
    velocity = path.velocity(x0, noise, t)
    back = path.noise_from_velocity(velocity, path.sample(x0, noise, t), t)
    assert_allclose(back, noise, atol=1e-3)
