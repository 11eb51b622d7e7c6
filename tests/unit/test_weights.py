"""Energy weights, effective sample size and the choice of beta."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import logsumexp

from efm_jax.weights import (
    beta_for_ess,
    bisect,
    effective_sample_size,
    energy_weights,
    log_normalizer,
)
from tests.reference import weights as reference

quick = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 20.0])
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_weights_match_scipy(x64, beta, axis):
    energy = normal(0, 4, 5, 6)
    got = energy_weights(jnp.asarray(energy), beta, axis=axis)
    assert_allclose(got, reference.energy_weights(energy, beta, axis), rtol=1e-12)


def test_low_energy_gets_the_larger_weight():
    got = energy_weights(jnp.array([0.0, 1.0, 2.0]), 1.0)
    assert got[0] > got[1] > got[2]


@pytest.mark.parametrize("scale", [1e4, 1e6, 1e30])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_huge_energies_stay_finite(x64, scale, dtype):
    energy = jnp.asarray([0.0, 1.0, -1.0, -1.0, 0.5], dtype) * dtype(scale)
    got = energy_weights(energy, 3.0)
    assert got.dtype == dtype
    assert_array_equal(got, [0.0, 0.0, 0.5, 0.5, 0.0])
    shifted = energy_weights(jnp.asarray([0.0, 1.0], jnp.float64) + scale, 1.0)
    assert np.isfinite(shifted).all()
    assert_allclose(shifted.sum(), 1.0)


def test_beta_of_huge_size_does_not_overflow():
    assert_array_equal(energy_weights(jnp.array([1e30, -1e30, 0.0]), 1e30), [0.0, 1.0, 0.0])


def test_minus_infinity_takes_all_and_ties_share():
    inf = jnp.inf
    assert_array_equal(energy_weights(jnp.array([0.0, -inf, 1e6, inf]), 2.0), [0, 1, 0, 0])
    assert_array_equal(energy_weights(jnp.array([-inf, 0.0, -inf, -1e30]), 2.0), [0.5, 0, 0.5, 0])
    table = energy_weights(
        jnp.array([[0.0, -inf], [0.0, 0.0]]), 1.0
    )  # a row of its own stays untouched
    assert_allclose(table, [[0, 1], [0.5, 0.5]])


def test_plus_infinity_gets_nothing():
    got = energy_weights(jnp.array([0.0, jnp.inf, 0.0]), 2.0)
    assert_allclose(got, [0.5, 0.0, 0.5])


def test_all_plus_infinity_sums_to_one():
    assert_allclose(energy_weights(jnp.full(4, jnp.inf), 2.0), 0.25)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_nan_stays_nan_on_its_whole_axis_only(beta):
    energy = jnp.array([[0.0, jnp.nan, 1.0], [0.0, 1.0, 2.0], [jnp.nan, -jnp.inf, jnp.inf]])
    got = energy_weights(energy, beta)
    assert_array_equal(np.isnan(got), [[True] * 3, [False] * 3, [True] * 3])


def test_beta_zero_is_uniform():
    assert_allclose(energy_weights(jnp.array([1e30, -3.0, 0.0, 7.0]), 0.0), 0.25)
    infinite = energy_weights(jnp.array([jnp.inf, -jnp.inf, 0.0, 7.0]), 0.0)
    assert np.isfinite(infinite).all()
    assert_allclose(infinite.sum(), 1.0)


@quick
@given(
    energy=st.lists(st.floats(-100, 100), min_size=2, max_size=8),
    shift=st.floats(-1e3, 1e3),
    beta=st.floats(0, 10),
)
def test_shift_invariance(x64, energy, shift, beta):
    energy = jnp.asarray(energy)
    got, shifted = energy_weights(energy, beta), energy_weights(energy + shift, beta)
    assert_allclose(got, shifted, rtol=1e-8, atol=1e-10)
    assert_allclose(got.sum(), 1.0, rtol=1e-12)
    assert_allclose(got, reference.energy_weights(energy, beta), rtol=1e-9, atol=1e-300)


@quick
@given(weights=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=10))
def test_effective_sample_size_lies_between_one_and_n(x64, weights):
    got = float(effective_sample_size(jnp.asarray(weights)))
    assert 1 - 1e-9 <= got <= len(weights) * (1 + 1e-9)
    assert_allclose(got, reference.effective_sample_size(weights), rtol=1e-9)


def test_effective_sample_size_ends_and_axis(x64):
    assert effective_sample_size(jnp.full(7, 0.3)) == pytest.approx(7.0)
    assert effective_sample_size(jnp.eye(7)[2]) == pytest.approx(1.0)
    weights = np.abs(normal(1, 3, 4, 5))
    for axis in (-1, 0, 1):
        expected = reference.effective_sample_size(weights, axis)
        assert_allclose(effective_sample_size(jnp.asarray(weights), axis=axis), expected)


def test_gradients_match_the_softmax(x64):
    energy, c, beta = normal(2, 6), normal(3, 6), 1.7
    w = reference.energy_weights(energy, beta)
    for_energy = jax.grad(lambda e: (energy_weights(e, beta) * c).sum())(jnp.asarray(energy))
    assert_allclose(for_energy, -beta * w * (c - w @ c), rtol=1e-9)
    for_beta = jax.grad(lambda b: (energy_weights(jnp.asarray(energy), b) * c).sum())(beta)
    assert_allclose(for_beta, -(w * energy) @ c + (w @ energy) * (w @ c), rtol=1e-9)


@pytest.mark.parametrize(
    "energy",
    [
        [0.0, 1.0, -1.0],
        [1e6, -1e6, 0.0],
        [1e30, -1e30, 0.0],
        [np.inf, 0.0, 1.0],
        [-np.inf, 0.0, 1.0],
        [-np.inf, np.inf, -np.inf],
    ],
)
def test_gradients_are_finite(energy):
    energy = jnp.asarray(energy, jnp.float32)
    value = jnp.arange(3.0)
    gradient = jax.grad(lambda e: (energy_weights(e, 2.0) * value).sum())(energy)
    assert np.isfinite(gradient).all()
    if np.isfinite(energy).all():
        assert np.isfinite(jax.grad(lambda b: (energy_weights(energy, b) * value).sum())(2.0))


SPECIAL = {
    "plain": normal(4, 16),
    "huge": 1e6 * normal(4, 16),
    "minus_inf": np.where(np.arange(16) == 5, -np.inf, normal(4, 16)),
    "two_minus_inf": np.where(np.isin(np.arange(16), [5, 14]), -np.inf, normal(4, 16)),
    "inf_on_one_device": np.where(np.arange(16) < 4, np.inf, normal(4, 16)),
    "all_inf": np.full(16, np.inf),
    "nan": np.where(np.arange(16) == 9, np.nan, normal(4, 16)),
}


def on_devices(how, function, devices, *arguments):
    """Map ``function`` over the leading axis of 4, with an axis named ``i``."""
    if how == "vmap":
        return jax.vmap(function, axis_name="i")(*arguments)
    if how == "pmap":
        return jax.pmap(function, axis_name="i", devices=devices)(*arguments)
    mesh, spec = Mesh(np.array(devices), ("i",)), PartitionSpec("i")

    def body(*shards):
        return jnp.asarray(function(*(shard[0] for shard in shards)))[None]

    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))(*arguments)


@pytest.mark.parametrize("how", ["vmap", "pmap", "shard_map"])
@pytest.mark.parametrize("case", SPECIAL)
def test_devices_together_give_the_weights_of_one(devices, how, case):
    energy = jnp.asarray(SPECIAL[case], jnp.float32)
    shards = energy.reshape(4, 4)
    got = on_devices(how, lambda e: energy_weights(e, 1.5, axis_name="i"), devices, shards)
    expected = energy_weights(energy, 1.5)
    assert_allclose(np.asarray(got).reshape(-1), expected, rtol=1e-5, atol=1e-30)
    if case == "plain":
        assert_allclose(expected, reference.energy_weights(SPECIAL[case], 1.5), rtol=1e-5)
    sizes = on_devices(
        how, lambda w: effective_sample_size(w, axis_name="i"), devices, jnp.asarray(got)
    )
    assert_allclose(sizes, jnp.full(4, effective_sample_size(expected)), rtol=1e-5)


@pytest.mark.parametrize("how", ["vmap", "pmap", "shard_map"])
def test_axis_name_with_an_axis_of_its_own(devices, how):
    energy = normal(5, 4, 3, 2).astype(
        np.float32
    )  # 4 devices, axis 0 of 3 on each, 2 independent columns
    got = on_devices(
        how, lambda e: energy_weights(e, 2.0, axis=0, axis_name="i"), devices, jnp.asarray(energy)
    )
    expected = reference.energy_weights(energy.reshape(12, 2), 2.0, axis=0).reshape(4, 3, 2)
    assert_allclose(got, expected, rtol=1e-5)
    sizes = on_devices(
        how,
        lambda w: effective_sample_size(w, axis=0, axis_name="i"),
        devices,
        jnp.asarray(expected, jnp.float32),
    )
    chex.assert_shape(sizes, (4, 2))
    assert_allclose(
        sizes[0], reference.effective_sample_size(expected.reshape(12, 2), 0), rtol=1e-5
    )


def test_bisection_halves_every_bracket_on_its_own(x64):
    """Falling functions ``-x^3``, with roots inside, at neither end reached, and beyond an end."""
    targets = jnp.array([[-8.0, -2.0], [-0.027, 5.0]])
    low, high = jnp.zeros((2, 2)), jnp.full((2, 2), 4.0)
    low, high = jax.jit(lambda low, high: bisect(lambda x: -(x**3) > targets, low, high, 40))(
        low, high
    )
    assert_allclose(high - low, 4.0 * 0.5**40, rtol=1e-3)
    assert_allclose((low + high) / 2, [[2, 2 ** (1 / 3)], [0.3, 0]], atol=1e-11)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_beta_for_ess_hits_the_fraction(x64, fraction, scale):
    energy = jnp.asarray(scale * normal(6, 50) + 3.0)
    beta = jax.jit(beta_for_ess, static_argnames="fraction")(energy, fraction=fraction)
    got = effective_sample_size(energy_weights(energy, beta))
    assert_allclose(got, fraction * 50, rtol=1e-4)
    assert_allclose(beta, reference.beta_for_ess(energy, fraction), rtol=1e-2)


def test_beta_for_ess_with_a_traced_fraction_vmap_and_axis(x64):
    energy = normal(7, 3, 20)
    expected = [reference.beta_for_ess(row, 0.4) for row in energy]
    assert_allclose(jax.vmap(lambda e: beta_for_ess(e, 0.4))(energy), expected, rtol=1e-3)
    assert_allclose(beta_for_ess(jnp.asarray(energy), 0.4), expected, rtol=1e-3)
    assert_allclose(beta_for_ess(jnp.asarray(energy.T), 0.4, axis=0), expected, rtol=1e-3)
    assert_allclose(jax.jit(beta_for_ess)(energy, 0.4), expected, rtol=1e-3)


def test_beta_for_ess_of_the_whole_batch_is_zero(x64):
    energy = jnp.asarray(normal(8, 10))
    assert beta_for_ess(energy, 1.0) == pytest.approx(0.0, abs=1e-3)
    weights = energy_weights(energy, beta_for_ess(energy, 1.0))
    assert effective_sample_size(weights) == pytest.approx(10.0, rel=1e-4)


def test_beta_for_ess_survives_what_no_beta_solves():
    same = beta_for_ess(jnp.ones(8), 0.5)  # every beta gives ESS = n
    assert np.isfinite(same)
    assert same >= 0
    tie = beta_for_ess(jnp.array([0.0, 0.0, 0.0, 1.0]), 0.25)  # ESS >= 3 for every beta
    assert not np.isnan(tie)
    assert tie >= 0


def test_beta_for_ess_has_the_gradient_of_its_root(x64):
    energy, step = jnp.asarray(normal(8, 12)), 1e-6
    beta, gradient = jax.jit(beta_for_ess), jax.jit(jax.grad(beta_for_ess, argnums=(0, 1)))
    by_energy, by_fraction = gradient(energy, 0.4)
    for i in range(3):
        shift = step * jnp.eye(12)[i]
        difference = beta(energy + shift, 0.4) - beta(energy - shift, 0.4)
        assert_allclose(by_energy[i], difference / (2 * step), rtol=1e-4, atol=1e-6)
    difference = beta(energy, 0.4 + step) - beta(energy, 0.4 - step)
    assert_allclose(by_fraction, difference / (2 * step), rtol=1e-4)
    # beta = 0 and targets out of reach have nothing to differentiate, and no NaN.
    for same in (jnp.ones(12), jnp.eye(12)[11]):
        assert np.isfinite(gradient(same, 0.25)[0]).all()
    assert np.isfinite(gradient(energy, 1.0)[0]).all()


def test_beta_for_ess_in_float32():
    energy = jnp.asarray(normal(6, 50), jnp.float32)
    beta = beta_for_ess(energy, 0.3)
    assert beta.dtype == jnp.float32
    assert_allclose(effective_sample_size(energy_weights(energy, beta)), 15.0, rtol=1e-3)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_beta_for_ess_refuses_a_bad_fraction(fraction):
    with pytest.raises(ValueError, match="fraction"):
        beta_for_ess(jnp.arange(4.0), fraction)


# --- a normalizer of the whole dataset ---


def log_mean_exp(energy, beta, axis=-1):
    return logsumexp(-beta * energy, axis=axis) - np.log(energy.shape[axis])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 20.0])
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_log_normalizer_and_its_weights_match_scipy(x64, beta, axis):
    energy, other = 3.0 + normal(0, 4, 5, 6), normal(9, 4, 5, 6)
    log_z = log_normalizer(jnp.asarray(energy), beta, axis=axis)
    expected = log_mean_exp(energy, beta, axis)
    assert_allclose(log_z, expected, rtol=1e-12, atol=1e-13)
    got = energy_weights(jnp.asarray(other), beta, axis=axis, log_normalizer=log_z)
    raw = np.exp(-beta * other - np.expand_dims(expected, axis)) / energy.shape[axis]
    assert_allclose(got, raw, rtol=1e-10)
    # Of one's own energies they are the softmax; a scalar holds for every slice.
    own = energy_weights(jnp.asarray(energy), beta, axis=axis, log_normalizer=log_z)
    assert_allclose(own, reference.energy_weights(energy, beta, axis), rtol=1e-10)
    scalar = energy_weights(jnp.asarray(other), beta, axis=axis, log_normalizer=0.7)
    assert_allclose(scalar, np.exp(-beta * other - 0.7) / energy.shape[axis], rtol=1e-10)


def test_weights_of_random_batches_sum_to_one_on_average(x64):
    """Every batch once (with replacement, so energy by energy): the mean sum is 1 exactly."""
    energy, beta = normal(10, 6), 2.0
    log_z = log_normalizer(jnp.asarray(energy), beta)
    batches = np.stack(np.meshgrid(*3 * [np.arange(6)]), -1).reshape(-1, 3)
    sums = energy_weights(jnp.asarray(energy)[batches], beta, log_normalizer=log_z).sum(-1)
    assert_allclose(sums.mean(), 1.0, rtol=1e-12)
    assert sums.std() > 0.1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_log_normalizer_of_huge_energies(x64, dtype):
    energy = jnp.asarray([1e6, -1e6, -1e6, 0.0], dtype)
    log_z = log_normalizer(energy, 3.0)
    assert log_z.dtype == dtype
    assert_allclose(log_z, 3e6 - np.log(2), rtol=1e-7)
    got = energy_weights(energy, 3.0, log_normalizer=log_z)
    assert got.dtype == dtype
    assert_allclose(got, [0, 0.5, 0.5, 0], rtol=0.2 if dtype == jnp.float32 else 1e-8)


def test_what_no_number_holds_is_not_clipped():
    inf, nan = np.inf, np.nan
    energy = jnp.array([inf, -inf, -1e6, 0.0, 1e6, nan])
    got = energy_weights(energy, 1.0, log_normalizer=0.0)
    assert_allclose(got, [0, inf, inf, 1 / 6, 0, nan], rtol=1e-6)
    # An infinite normalizer says that the dataset has an energy of -inf (or none that is finite).
    got = energy_weights(energy, 1.0, log_normalizer=inf)
    assert_array_equal(got, [0, nan, 0, 0, 0, nan])
    got = energy_weights(energy, 1.0, log_normalizer=-inf)
    assert_array_equal(got, [nan, inf, inf, inf, inf, nan])
    got = energy_weights(energy, 0.0, log_normalizer=0.0)
    assert_allclose(got, [1 / 6] * 5 + [nan], rtol=1e-6)


@pytest.mark.parametrize(
    ("energy", "beta", "expected"),
    [
        ([0.0, np.inf], 2.0, np.log(0.5)),
        ([0.0, -np.inf], 2.0, np.inf),
        ([np.inf, -np.inf], 2.0, np.inf),
        ([np.inf, np.inf], 2.0, -np.inf),
        ([np.inf, -np.inf], 0.0, 0.0),
        ([1e30, 7.0], 0.0, 0.0),
        ([0.0, np.nan], 2.0, np.nan),
        ([np.inf, np.nan], 0.0, np.nan),
        ([-np.inf, np.nan], 1.0, np.nan),
        ([1e30, 1e30], 1e30, -np.inf),
    ],
)
def test_log_normalizer_at_its_limits(energy, beta, expected):
    assert_allclose(log_normalizer(jnp.array(energy), beta), expected, rtol=1e-6)


def test_log_normalizer_gradients(x64):
    energy, beta = normal(2, 6), 1.7
    w = reference.energy_weights(energy, beta)
    for_energy, for_beta = jax.jit(jax.grad(log_normalizer, argnums=(0, 1)))(
        jnp.asarray(energy), beta
    )
    assert_allclose(for_energy, -beta * w, rtol=1e-9)
    assert_allclose(for_beta, -w @ energy, rtol=1e-9)
    at_zero = jax.grad(log_normalizer, argnums=1)(jnp.asarray(energy), 0.0)
    assert_allclose(at_zero, -energy.mean(), rtol=1e-9)

    def second(energy, log_z):
        return energy_weights(energy, beta, log_normalizer=log_z)[1]

    for_energy, for_log_z = jax.grad(second, argnums=(0, 1))(jnp.asarray(energy), 0.4)
    weight = np.exp(-beta * energy[1] - 0.4) / 6
    assert_allclose(for_energy, -beta * weight * np.eye(6)[1], rtol=1e-9)
    assert_allclose(for_log_z, -weight, rtol=1e-9)


@pytest.mark.parametrize("how", ["vmap", "pmap", "shard_map"])
@pytest.mark.parametrize("case", SPECIAL)
def test_devices_together_normalize_as_one(devices, how, case):
    energy = jnp.asarray(SPECIAL[case], jnp.float32)
    shards = energy.reshape(4, 4)
    log_z = on_devices(how, lambda e: log_normalizer(e, 1.5, axis_name="i"), devices, shards)
    assert_allclose(log_z, np.full(4, log_normalizer(energy, 1.5)), rtol=1e-5)

    def weights(e):
        return energy_weights(e, 1.5, axis_name="i", log_normalizer=0.3)

    got = on_devices(how, weights, devices, shards)
    expected = energy_weights(energy, 1.5, log_normalizer=0.3)
    assert_allclose(np.asarray(got).reshape(-1), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("shape", [(3,), (1,), (3, 4), (3, 1)])
def test_a_normalizer_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="log_normalizer"):
        energy_weights(jnp.ones((2, 3, 4)), 1.0, axis=1, log_normalizer=jnp.zeros(shape))


def test_beta_per_slice_but_not_per_sample(x64):
    """With a beta of each sample's own, weights would change with the energies' origin."""
    energy, beta = normal(11, 3, 5), np.array([[0.5], [1.0], [4.0]])
    rows = [reference.energy_weights(row, b) for row, b in zip(energy, beta[:, 0], strict=True)]
    assert_allclose(energy_weights(jnp.asarray(energy), beta), rows, rtol=1e-10)
    assert_allclose(energy_weights(jnp.asarray(energy.T), beta.T, axis=0).T, rows, rtol=1e-10)
    assert_allclose(
        log_normalizer(jnp.asarray(energy), beta), log_mean_exp(beta * energy, 1.0), rtol=1e-10
    )
    several = energy_weights(jnp.asarray(energy[0]), beta)  # one set of energies, three scales
    assert_allclose(
        several, [reference.energy_weights(energy[0], b) for b in beta[:, 0]], rtol=1e-10
    )
    for wrong in (np.ones(5), np.ones((3, 5)), np.ones((2, 1)), np.ones((4, 1, 5))):
        for function in (energy_weights, log_normalizer):
            with pytest.raises(ValueError, match="beta"):
                function(jnp.asarray(energy), wrong)
    with pytest.raises(ValueError, match="beta"):
        log_normalizer(jnp.ones(3), -1.0)
    with pytest.raises(ValueError, match="energy"):
        log_normalizer(jnp.asarray(1.0), 1.0)


@pytest.mark.parametrize("energy", [[1e6, 0, np.inf], [-np.inf, 0, 1], [3e38, -3e38, 0]])
def test_gradients_in_beta_are_finite_at_infinite_gaps(energy):
    energy, values = jnp.array(energy, jnp.float32), jnp.arange(3.0)
    gradient = jax.grad(lambda beta: (energy_weights(energy, beta) * values).sum())(1.0)
    assert_allclose(gradient, 0.0, atol=1e-6)  # the best takes all at any beta > 0
