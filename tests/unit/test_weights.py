"""Energy weights, effective sample size and the choice of beta."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import logsumexp

from efm_jax import weights
from efm_jax.weights import bisect
from tests.problems import normal, on_devices
from tests.reference import weights as reference

# Compiled; errors, which are of concrete arguments, come from the functions themselves.
energy_weights = jax.jit(weights.energy_weights, static_argnames="axis")
effective_sample_size = jax.jit(weights.effective_sample_size, static_argnames="axis")
log_normalizer = jax.jit(weights.log_normalizer, static_argnames="axis")
beta_for_ess = jax.jit(weights.beta_for_ess, static_argnames="axis")

inf, nan = np.inf, np.nan
each_axis = pytest.mark.parametrize("axis", [-1, 0, 1])


@each_axis
def test_weights_and_sample_sizes_match_scipy(x64, axis):
    energy = normal(0, 4, 5, 6)
    for beta in (0.0, 0.3, 1.0, 20.0):
        expected = reference.energy_weights(energy, beta, axis)
        got = energy_weights(energy, beta, axis=axis)
        assert_allclose(got, expected, rtol=1e-12)
        sizes = effective_sample_size(3.0 * got, axis=axis)
        assert_allclose(sizes, reference.effective_sample_size(expected, axis), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_huge_energies_stay_finite(x64, dtype):
    for scale in (1e4, 1e6, 1e30):
        got = energy_weights(dtype([0.0, 1.0, -1.0, -1.0, 0.5]) * dtype(scale), 3.0)
        assert got.dtype == dtype
        assert_array_equal(got, [0.0, 0.0, 0.5, 0.5, 0.0])


@pytest.mark.parametrize(
    ("energy", "beta", "expected"),
    [
        ([1e30, -1e30, 0, 0], 1e30, [0, 1, 0, 0]),
        ([0, -inf, 1e6, inf], 2, [0, 1, 0, 0]),
        ([-inf, 0, -inf, -1e30], 2, [0.5, 0, 0.5, 0]),
        ([[0, -inf], [0, 0]], 1, [[0, 1], [0.5, 0.5]]),  # a row of its own stays untouched
        ([0, inf, inf, 0], 2, [0.5, 0, 0, 0.5]),
        ([inf, inf, inf, inf], 2, [0.25] * 4),
        ([1e30, -3, 0, 7], 0, [0.25] * 4),
        ([inf, -inf, 0, 7], 0, [0.25] * 4),
        ([[0, nan], [nan, -inf], [0, 0]], 1, [[nan, nan], [nan, nan], [0.5, 0.5]]),
        ([[0, nan], [nan, -inf], [0, 0]], 0, [[nan, nan], [nan, nan], [0.5, 0.5]]),
    ],
)
def test_weights_at_their_limits(energy, beta, expected):
    assert_allclose(energy_weights(jnp.array(energy, jnp.float32), float(beta)), expected)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    energy=st.lists(st.floats(-100, 100), min_size=8, max_size=8),
    shift=st.floats(-1e3, 1e3),
    beta=st.floats(0, 10),
)
def test_shift_invariance(x64, energy, shift, beta):
    got = energy_weights(np.array(energy), beta)
    assert_allclose(got, energy_weights(np.array(energy) + shift, beta), rtol=1e-8, atol=1e-10)
    assert_allclose(got, reference.energy_weights(energy, beta), rtol=1e-9, atol=1e-300)
    assert 1 - 1e-9 <= effective_sample_size(got) <= 8 + 1e-9


def test_gradients_match_the_softmax(x64):
    energy, c, beta = normal(2, 6), normal(3, 6), 1.7
    w = reference.energy_weights(energy, beta)
    gradient = jax.jit(jax.grad(lambda e, b: (energy_weights(e, b) * c).sum(), argnums=(0, 1)))
    for_energy, for_beta = gradient(energy, beta)
    assert_allclose(for_energy, -beta * w * (c - w @ c), rtol=1e-9)
    assert_allclose(for_beta, -(w * energy) @ c + (w @ energy) * (w @ c), rtol=1e-9)


gradient_of_weights = jax.jit(
    jax.grad(lambda e, b: (energy_weights(e, b) * jnp.arange(3.0)).sum(), argnums=(0, 1))
)


FINITE = [[0, 1, -1], [1e6, -1e6, 0], [1e30, -1e30, 0], [3e38, -3e38, 0]]


@pytest.mark.parametrize("energy", [*FINITE, [inf, 0, 1e6], [-inf, 0, 1], [-inf, inf, -inf]])
def test_gradients_are_finite(energy):
    for_energy, for_beta = gradient_of_weights(jnp.array(energy, jnp.float32), 2.0)
    assert np.isfinite(for_energy).all()
    assert np.isfinite(for_beta)
    if np.ptp(energy) > 1e5:  # the best takes all at any beta > 0
        assert_allclose(for_beta, 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "axis"), [("vmap", -1), ("vmap", 0), ("pmap", 0), ("shard_map", -1)]
)
def test_devices_together_give_the_weights_of_one(devices, how, axis):
    where, plain = np.arange(16), normal(4, 16)
    infinite = [where == 5, np.isin(where, [5, 14]), where < 4, where >= 0]  # 4 on a device
    cases = [plain, 1e6 * plain, np.where(where == 9, nan, plain)]
    cases += [np.where(here, sign * inf, plain) for here in infinite for sign in (1, -1)]
    cases = np.float32(cases)

    def everything(energy, **options):
        got = weights.energy_weights(energy, 1.5, **options)
        return {
            "weights": got,
            "by a number": weights.energy_weights(energy, 1.5, log_normalizer=0.3, **options),
            "size": weights.effective_sample_size(got, **options),
            "log Z": weights.log_normalizer(energy, 1.5, **options),
        }

    expected = jax.jit(everything)(cases)
    shards = cases.reshape(11, 4, 4).transpose((1, 0, 2) if axis == -1 else (1, 2, 0))
    got = on_devices(how, lambda e: everything(e, axis=axis, axis_name="i"), devices, shards)
    for name in ("weights", "by a number"):
        parts = np.moveaxis(np.asarray(got[name]), 1 if axis == -1 else 2, 0)
        assert_allclose(parts.reshape(11, 16), expected[name], rtol=1e-5, atol=1e-30)
    for name in ("size", "log Z"):
        assert_allclose(got[name], np.stack([expected[name]] * 4), rtol=1e-5)


# --- the choice of beta ---


def test_bisection_halves_every_bracket_on_its_own(x64):
    """Falling functions ``-x^3``, with roots inside, at neither end reached, and beyond an end."""
    targets, low, high = np.array([[-8.0, -2.0], [-0.027, 5.0]]), np.zeros((2, 2)), np.ones((2, 2))
    search = jax.jit(lambda low, high: bisect(lambda x: -(x**3) > targets, low, high, 40))
    low, high = search(low, 4 * high)
    assert_allclose(high - low, 4.0 * 0.5**40, rtol=1e-3)
    assert_allclose((low + high) / 2, [[2, 2 ** (1 / 3)], [0.3, 0]], atol=1e-11)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 0.9, 0.999])
def test_beta_for_ess_hits_the_fraction(x64, fraction):
    for scale in (1e-3, 1.0, 1e4):
        energy = scale * normal(6, 50) + 3.0
        beta = beta_for_ess(energy, fraction)
        got = reference.effective_sample_size(reference.energy_weights(energy, beta))
        assert_allclose(got, fraction * 50, rtol=1e-4)
        assert_allclose(beta, reference.beta_for_ess(energy, fraction), rtol=1e-2)


def test_beta_for_ess_along_an_axis(x64):
    energy = normal(7, 3, 20)
    expected = [reference.beta_for_ess(row, 0.4) for row in energy]
    assert_allclose(beta_for_ess(energy, 0.4), expected, rtol=1e-3)
    assert_allclose(beta_for_ess(energy.T, 0.4, axis=0), expected, rtol=1e-3)


def test_beta_for_ess_at_its_limits_and_in_float32():
    energy = normal(6, 50).astype(np.float32)
    beta = beta_for_ess(energy, 0.3)
    assert beta.dtype == jnp.float32
    assert_allclose(effective_sample_size(energy_weights(energy, beta)), 15.0, rtol=1e-3)
    assert beta_for_ess(energy, 1.0) == 0.0  # the whole batch
    assert beta_for_ess(np.ones(50, np.float32), 0.5) == 0.0  # every beta gives ESS = n
    tie = beta_for_ess((np.arange(50) > 2).astype(np.float32), 0.02)  # ESS >= 3 for every beta
    assert_allclose(energy_weights(np.float32([0, 0, 0, 1]), tie), [1 / 3] * 3 + [0], atol=1e-6)


def test_beta_for_ess_has_the_gradient_of_its_root(x64):
    energy, step = normal(8, 12), 1e-6
    gradient = jax.jit(jax.grad(weights.beta_for_ess, argnums=(0, 1)))
    by_energy, by_fraction = gradient(energy, 0.4)
    for i in range(3):
        shift = step * np.eye(12)[i]
        difference = beta_for_ess(energy + shift, 0.4) - beta_for_ess(energy - shift, 0.4)
        assert_allclose(by_energy[i], difference / (2 * step), rtol=1e-4, atol=1e-6)
    difference = beta_for_ess(energy, 0.4 + step) - beta_for_ess(energy, 0.4 - step)
    assert_allclose(by_fraction, difference / (2 * step), rtol=1e-4)
    # beta = 0 and targets out of reach have nothing to differentiate, and no NaN.
    for same in (np.ones(12), np.eye(12)[11]):
        assert np.isfinite(gradient(same, 0.25)[0]).all()
    assert np.isfinite(gradient(energy, 1.0)[0]).all()


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, nan])
def test_beta_for_ess_refuses_a_bad_fraction(fraction):
    with pytest.raises(ValueError, match="fraction"):
        weights.beta_for_ess(jnp.arange(4.0), fraction)


# --- a normalizer of the whole dataset ---


def log_mean_exp(energy, beta, axis=-1):
    return logsumexp(-beta * energy, axis=axis) - np.log(energy.shape[axis])


@each_axis
def test_log_normalizer_and_its_weights_match_scipy(x64, axis):
    energy, other = 3.0 + normal(0, 4, 5, 6), normal(9, 4, 5, 6)
    for beta in (0.0, 0.3, 1.0, 20.0):
        log_z, expected = log_normalizer(energy, beta, axis=axis), log_mean_exp(energy, beta, axis)
        assert_allclose(log_z, expected, rtol=1e-12, atol=1e-13)
        for own, shift in ((log_z, np.expand_dims(expected, axis)), (0.7, 0.7)):
            got = energy_weights(other, beta, axis=axis, log_normalizer=own)
            assert_allclose(got, np.exp(-beta * other - shift) / energy.shape[axis], rtol=1e-10)
        # Of one's own energies they are the softmax.
        own = energy_weights(energy, beta, axis=axis, log_normalizer=log_z)
        assert_allclose(own, reference.energy_weights(energy, beta, axis), rtol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_log_normalizer_of_huge_energies(x64, dtype):
    energy = dtype([1e6, -1e6, -1e6, 0.0])
    log_z = log_normalizer(energy, 3.0)
    got = energy_weights(energy, 3.0, log_normalizer=log_z)
    assert log_z.dtype == got.dtype == dtype
    assert_allclose(log_z, 3e6 - np.log(2), rtol=1e-7)
    assert_allclose(got, [0, 0.5, 0.5, 0], rtol=0.2 if dtype == jnp.float32 else 1e-8)


@pytest.mark.parametrize(
    ("beta", "log_z", "expected"),
    [
        (1.0, 0.0, [0, inf, inf, 1 / 6, 0, nan]),
        # An infinite normalizer says that the dataset has an energy of -inf (or none finite).
        (1.0, inf, [0, nan, 0, 0, 0, nan]),
        (1.0, -inf, [nan, inf, inf, inf, inf, nan]),
        (0.0, 0.0, [1 / 6] * 5 + [nan]),
    ],
)
def test_what_no_number_holds_is_not_clipped(beta, log_z, expected):
    energy = np.float32([inf, -inf, -1e6, 0.0, 1e6, nan])
    assert_allclose(energy_weights(energy, beta, log_normalizer=log_z), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("energy", "beta", "expected"),
    [
        ([0.0, inf], 2.0, np.log(0.5)),
        ([0.0, -inf], 2.0, inf),
        ([inf, -inf], 2.0, inf),
        ([inf, inf], 2.0, -inf),
        ([inf, -inf], 0.0, 0.0),
        ([1e30, 7.0], 0.0, 0.0),
        ([0.0, nan], 2.0, nan),
        ([inf, nan], 0.0, nan),
        ([-inf, nan], 1.0, nan),
        ([1e30, 1e30], 1e30, -inf),
    ],
)
def test_log_normalizer_at_its_limits(energy, beta, expected):
    assert_allclose(log_normalizer(jnp.array(energy), beta), expected, rtol=1e-6)


def test_log_normalizer_gradients(x64):
    energy, beta = normal(2, 6), 1.7
    w = reference.energy_weights(energy, beta)
    gradient = jax.jit(jax.grad(log_normalizer, argnums=(0, 1)))
    expected = (-beta * w, -w @ energy)
    chex.assert_trees_all_close(gradient(energy, beta), expected, rtol=1e-9)
    assert_allclose(gradient(energy, 0.0)[1], -energy.mean(), rtol=1e-9)

    def second(energy, log_z):
        return energy_weights(energy, beta, log_normalizer=log_z)[1]

    weight = np.exp(-beta * energy[1] - 0.4) / 6
    expected = (-beta * weight * np.eye(6)[1], -weight)
    found = jax.jit(jax.grad(second, argnums=(0, 1)))(energy, 0.4)
    chex.assert_trees_all_close(found, expected, rtol=1e-9)


@pytest.mark.parametrize("shape", [(3,), (1,), (3, 4), (3, 1)])
def test_a_normalizer_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="log_normalizer"):
        energy_weights(jnp.ones((2, 3, 4)), 1.0, axis=1, log_normalizer=jnp.zeros(shape))


def test_beta_per_slice_but_not_per_sample(x64):
    """With a beta of each sample's own, weights would change with the energies' origin."""
    energy, beta = normal(11, 3, 5), np.array([[0.5], [1.0], [4.0]])
    rows = reference.energy_weights(beta * energy, 1.0)
    assert_allclose(energy_weights(energy, beta), rows, rtol=1e-10)
    assert_allclose(energy_weights(energy.T, beta.T, axis=0).T, rows, rtol=1e-10)
    assert_allclose(log_normalizer(energy, beta), log_mean_exp(beta * energy, 1.0), rtol=1e-10)
    several = energy_weights(energy[0], beta)  # one set of energies, three scales
    assert_allclose(several, reference.energy_weights(beta * energy[0], 1.0), rtol=1e-10)
    for wrong in (np.ones(5), np.ones((3, 5)), np.ones((2, 1)), np.ones((4, 1, 5))):
        for function in (weights.energy_weights, weights.log_normalizer):
            with pytest.raises(ValueError, match="beta"):
                function(energy, wrong)
    with pytest.raises(ValueError, match="beta"):
        weights.log_normalizer(jnp.ones(3), -1.0)
    with pytest.raises(ValueError, match="energy"):
        weights.log_normalizer(jnp.asarray(1.0), 1.0)


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e17])
def test_effective_sample_size_of_weights_of_any_scale(scale):
    w = np.random.default_rng(0).exponential(size=2000)
    got = weights.effective_sample_size(jnp.asarray(scale * w, jnp.float32))
    assert_allclose(got, w.sum() ** 2 / (w**2).sum(), rtol=1e-5)
    many = weights.effective_sample_size(jnp.full(3, 2**30, jnp.int32))
    assert float(many) == pytest.approx(3)


def test_beta_for_ess_of_all_devices_energies(x64):
    energy = jnp.asarray(normal(0, 4, 25))
    whole = weights.beta_for_ess(energy.ravel(), 0.3)
    split = jax.vmap(lambda e: weights.beta_for_ess(e, 0.3, axis_name="i"), axis_name="i")
    assert_allclose(split(energy), np.full(4, whole), rtol=1e-10)
