"""Probability paths against NumPy float64, automatic differentiation and their own limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from efm_jax import paths
from tests.reference import paths as reference

PATHS = {
    "ot": (paths.conditional_ot(), reference.conditional_ot()),
    "ot_floor": (paths.conditional_ot(sigma_min=0.1), reference.conditional_ot(0.1)),
    "vp_linear": (paths.vp_linear(), reference.vp_linear()),
    "vp_linear_wide": (
        paths.vp_linear(beta_min=0.2, beta_max=15.0),
        reference.vp_linear(0.2, 15.0),
    ),
    "vp_cosine": (paths.vp_cosine(), reference.vp_cosine()),
}
CONVERSIONS = [
    f"{target}_from_{source}"
    for source in ("velocity", "noise", "score", "x0")
    for target in ("velocity", "noise", "score", "x0")
    if source != target
]
AT_ZERO = {
    "velocity_from_score", "noise_from_velocity", "x0_from_velocity", "x0_from_score",
    "noise_from_score", "x0_from_noise",
}  # fmt: skip
AT_ONE = {
    "score_from_velocity", "noise_from_velocity", "velocity_from_x0", "x0_from_velocity",
    "score_from_x0", "noise_from_score", "noise_from_x0", "score_from_noise",
}  # fmt: skip
FINITE = {  # conversions with a finite limit, for fixed value and x, at (t = 0, t = 1)
    "ot": (AT_ZERO | {"velocity_from_noise"}, AT_ONE),
    "ot_floor": (set(CONVERSIONS), AT_ONE),
    "vp_linear": (AT_ZERO | {"score_from_velocity"}, set(CONVERSIONS)),
    "vp_linear_wide": (AT_ZERO | {"score_from_velocity"}, set(CONVERSIONS)),
    "vp_cosine": (AT_ZERO | {"velocity_from_noise"}, AT_ONE),
}
COEFFICIENTS = {
    "mean_coef": "mu",
    "std": "sigma",
    "mean_coef_dot": "mu_dot",
    "std_dot": "sigma_dot",
}
INTERIOR = np.linspace(0.02, 0.98, 25)

each_path = pytest.mark.parametrize("name", PATHS)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@each_path
@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_coefficients_match_numpy(x64, name, coefficient):
    path, ref = PATHS[name]
    t = np.concatenate([[1e-6, 1e-3], INTERIOR, [1.0]])
    got = getattr(path, coefficient)(jnp.asarray(t))
    assert got.shape == t.shape
    assert got.dtype == jnp.float64
    assert_allclose(got, getattr(ref, COEFFICIENTS[coefficient])(t), rtol=1e-10, atol=1e-14)


@each_path
@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_coefficients_keep_the_shape_of_t(name, coefficient):
    for shape in [(), (3,), (3, 4)]:
        function = getattr(PATHS[name][0], coefficient)
        got = jax.eval_shape(function, jax.ShapeDtypeStruct(shape, jnp.float32))
        assert got.shape == shape
        assert got.dtype == jnp.float32


@each_path
@pytest.mark.parametrize("coefficient", ["mean_coef", "std"])
def test_derivatives_match_autodiff_and_differences(x64, name, coefficient):
    function, dot = (getattr(PATHS[name][0], c) for c in (coefficient, f"{coefficient}_dot"))
    t = jnp.asarray(INTERIOR)
    assert_allclose(jax.vmap(jax.grad(function))(t), dot(t), rtol=1e-9)
    h = 1e-5
    assert_allclose((function(t + h) - function(t - h)) / (2 * h), dot(t), rtol=1e-5, atol=1e-8)


@each_path
def test_ends_of_time(x64, name):
    path, _ = PATHS[name]
    zero, one = jnp.zeros(()), jnp.ones(())
    assert path.mean_coef(zero) == 1.0
    assert path.std(zero) == (0.1 if name == "ot_floor" else 0.0)
    assert_allclose(path.std(one), 1.0, atol=1e-3)
    assert_allclose(path.mean_coef(one), 0.0, atol=0.03 if "vp_linear" in name else 1e-12)
    for t in (zero, one):
        assert np.isfinite([path.mean_coef(t), path.std(t), path.mean_coef_dot(t)]).all()
    assert np.isfinite(path.std_dot(one))
    if "vp_linear" in name:  # sigma ~ sqrt(b0 t)
        assert path.std_dot(zero) == np.inf
    else:
        assert np.isfinite(path.std_dot(zero))


@each_path
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_coefficients_differentiate_at_the_ends(name, end):
    path, ref = PATHS[name]
    for coefficient in ("mean_coef", "std"):
        expected = getattr(ref, COEFFICIENTS[f"{coefficient}_dot"])(np.asarray(end))
        if np.isfinite(expected):
            got = jax.grad(getattr(path, coefficient))(jnp.float32(end))
            assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_vp_linear_std_keeps_its_digits_near_zero():
    path, ref = PATHS["vp_linear"]
    t = np.float32([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1])
    for coefficient, name in COEFFICIENTS.items():
        expected = getattr(ref, name)(t.astype(np.float64))
        assert_allclose(getattr(path, coefficient)(jnp.asarray(t)), expected, rtol=1e-5)


@each_path
@pytest.mark.parametrize(
    ("t_shape", "x_shape"), [((), (3,)), ((), (5, 3)), ((5,), (5, 3)), ((5, 4), (5, 4, 3))]
)
def test_sample_velocity_score(x64, name, t_shape, x_shape):
    path, ref = PATHS[name]
    t = np.random.default_rng(0).uniform(0.05, 0.95, t_shape)
    x0, noise = normal(1, *x_shape), normal(2, *x_shape)
    assert_allclose(path.sample(x0, noise, t), reference.sample(ref, x0, noise, t), rtol=1e-12)
    assert_allclose(path.velocity(x0, noise, t), reference.velocity(ref, x0, noise, t), rtol=1e-9)
    assert_allclose(path.score(noise, t), reference.score(ref, noise, t), rtol=1e-12)


@each_path
def test_velocity_is_the_time_derivative_of_sample(x64, name):
    path, _ = PATHS[name]
    x0, noise = jnp.asarray(normal(1, 3)), jnp.asarray(normal(2, 3))
    for t in (0.1, 0.5, 0.9):
        _, dot = jax.jvp(lambda s: path.sample(x0, noise, s), (jnp.asarray(t),), (jnp.ones(()),))
        assert_allclose(path.velocity(x0, noise, jnp.asarray(t)), dot, rtol=1e-9)


@each_path
def test_score_is_the_gradient_of_the_conditional_log_density(x64, name):
    path, ref = PATHS[name]
    x0, noise, t = jnp.asarray(normal(1, 3)), jnp.asarray(normal(2, 3)), 0.37

    def log_density(x):
        return -0.5 * ((x - ref.mu(t) * x0) ** 2).sum() / ref.sigma(t) ** 2

    expected = jax.grad(log_density)(path.sample(x0, noise, jnp.asarray(t)))
    assert_allclose(path.score(noise, jnp.asarray(t)), expected, rtol=1e-9)


def convert_all(path, conversions, value, x, t):
    """Every conversion of the list in one compilation."""

    def all_of_them(value, x, t):
        return {conversion: getattr(path, conversion)(value, x, t) for conversion in conversions}

    return jax.jit(all_of_them)(value, x, t)


@each_path
@pytest.mark.parametrize(
    ("t_shape", "x_shape"), [((), (3,)), ((), (5, 3)), ((5,), (5, 3)), ((5, 4), (5, 4, 3))]
)
def test_conversions_match_numpy(x64, name, t_shape, x_shape):
    path, ref = PATHS[name]
    t = np.random.default_rng(3).uniform(0.01, 0.99, t_shape)
    value, x = normal(4, *x_shape), normal(5, *x_shape)
    for conversion, got in convert_all(path, CONVERSIONS, value, x, t).items():
        assert got.shape == x_shape
        assert got.dtype == jnp.float64
        expected = reference.convert(ref, *conversion.split("_from_"), value, x, t)
        assert_allclose(got, expected, rtol=1e-9, atol=1e-9, err_msg=conversion)


@each_path
@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-4), (np.float32, 1e-3)])
def test_conversions_reach_their_limit_at_the_ends(x64, name, end, dtype, tolerance):
    path, ref = PATHS[name]
    value, x, t = normal(4, 2, 3), normal(5, 2, 3), np.full(2, abs(end - 1e-11))
    got = convert_all(
        path, sorted(FINITE[name][end]), dtype(value), dtype(x), np.full(2, end, dtype)
    )
    for conversion, result in got.items():
        assert result.dtype == dtype
        expected = reference.convert(ref, *conversion.split("_from_"), value, x, t)
        assert_allclose(result, expected, rtol=tolerance, atol=tolerance, err_msg=conversion)


def test_limits_written_by_hand(x64):
    ot, vp, cosine = (PATHS[n][0] for n in ("ot", "vp_linear", "vp_cosine"))
    value, x, zero, one = (
        jnp.asarray(normal(4, 3)),
        jnp.asarray(normal(5, 3)),
        jnp.zeros(()),
        jnp.ones(()),
    )
    half = np.pi / 2

    def same(got, expected):
        assert_allclose(got, expected, rtol=1e-12, atol=1e-12)

    same(ot.x0_from_velocity(value, x, zero), x)  # u = eps - x0, x = (1 - t) x0 + t eps
    same(ot.x0_from_velocity(value, x, one), x - value)
    same(ot.noise_from_velocity(value, x, zero), x + value)
    same(ot.noise_from_velocity(value, x, one), x)
    same(ot.score_from_velocity(value, x, one), -x)
    same(ot.velocity_from_score(value, x, zero), -x)
    same(ot.velocity_from_x0(value, x, one), x - value)
    same(ot.velocity_from_noise(value, x, zero), value - x)
    for path in (ot, vp, cosine):
        same(path.x0_from_score(value, x, zero), x)
        same(path.x0_from_velocity(value, x, zero), x)
    same(vp.velocity_from_score(value, x, zero), -0.05 * (x + value))  # -(b0/2)(x + s)
    same(vp.score_from_velocity(value, x, zero), -20.0 * value - x)
    same(vp.noise_from_velocity(value, x, zero), 0.0 * x)
    same(cosine.x0_from_velocity(value, x, one), -value / half)
    same(cosine.noise_from_velocity(value, x, zero), value / half)
    same(cosine.score_from_x0(value, x, one), -x)


@each_path
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(t=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_conversions_round_trip(x64, name, t, seed):
    path, _ = PATHS[name]
    x0, noise, t = jnp.asarray(normal(seed, 3)), jnp.asarray(normal(seed + 1, 3)), jnp.asarray(t)
    x, velocity, score = (
        path.sample(x0, noise, t),
        path.velocity(x0, noise, t),
        path.score(noise, t),
    )
    truth = {"velocity": velocity, "score": score, "noise": noise, "x0": x0}
    for conversion in CONVERSIONS:
        target, source = conversion.split("_from_")
        got = getattr(path, conversion)(truth[source], x, t)
        assert_allclose(got, truth[target], rtol=1e-8, atol=1e-8, err_msg=conversion)


@pytest.mark.parametrize("sigma_min", [-0.1, 1.5, float("nan")])
def test_bad_sigma_min_raises(sigma_min):
    with pytest.raises(ValueError, match="sigma_min"):
        paths.conditional_ot(sigma_min=sigma_min)


@pytest.mark.parametrize("path", [paths.conditional_ot(0.1), paths.vp_linear(), paths.vp_cosine()])
def test_whole_number_times_are_times(path):
    for name in ("mean_coef", "std", "mean_coef_dot", "std_dot"):
        coefficient = getattr(path, name)
        assert_allclose(coefficient(jnp.array([1])), coefficient(jnp.array([1.0])), rtol=1e-6)
    x0, noise, t = jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.array([1, 1])
    velocity = path.velocity(x0, noise, t)
    back = path.noise_from_velocity(velocity, path.sample(x0, noise, t), t)
    assert_allclose(back, noise, atol=1e-3)
