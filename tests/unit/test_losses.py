"""Losses against NumPy float64 with recorded times and noise, and against exact expectations."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import softmax
from scipy.stats import kstest

from efm_jax import losses, weights
from tests.problems import COSINE, OT, PATHS, each_path, normal, on_devices
from tests.reference import losses as reference
from tests.reference import paths as reference_paths

B, D, M = 8, 3, 4
KEY = 17


def linear(x, t):
    """A field with a value of its own at every point and time; works for any leading axes."""
    return 0.3 * x[..., ::-1] - 0.2 * x + t[..., None]


@functools.cache
def recording(loss, path, field):
    """A loss that also returns where it called the field, once; compiled for all that ask."""

    def run(key, *arrays, **more):
        calls = []

        def recorder(x, t):
            calls.append((x, t))
            return field(x, t)

        value, aux = loss(recorder, path, key, *arrays, **more)
        [(x, t)] = calls
        return value, aux, x, t

    return jax.jit(run)


def recorded(loss, paths_of_both, x0, *arrays, seed=KEY, field=linear, **more):
    """(loss, aux, x, t, noise), the noise that must have been drawn."""
    path, ref = paths_of_both
    run = recording(loss, path, field)
    value, aux, x, t = jax.device_get(run(jax.random.key(seed), x0, *arrays, **more))
    assert t.shape == x0.shape[:-1]
    return value, aux, x, t, (x - ref.mu(t)[..., None] * x0) / ref.sigma(t)[..., None]


def concentration(shares):
    """Of weights that sum to one along the last axis."""
    return {"ess": (1 / (shares**2).sum(-1)).mean(), "top_weight": shares.max(-1).mean()}


# --- per batch, against NumPy ---


def in_numpy(loss, ref, field, x0, noise, t, *more):
    """The reference's, whose functions of scores need no data."""
    data = (x0,) if loss.endswith("fm") else ()
    return getattr(reference, loss)(ref, field, *data, noise, t, *more)


@each_path
@pytest.mark.parametrize("loss", ["cfm", "dsm", "cefm", "ced", "support_cefm", "support_ced"])
def test_losses_match_numpy(x64, path, ref, loss):
    x0 = normal(2, B, M, D) if "support" in loss else normal(2, B, D)
    energy = normal(3, *x0.shape[:-1])
    for more in [(energy, beta) for beta in (0.0, 7.0)] if "ce" in loss else [()]:
        value, aux, x, t, noise = recorded(getattr(losses, loss), (path, ref), x0, *more)
        assert_allclose(value, in_numpy(loss, ref, linear(x, t), x0, noise, t, *more), rtol=1e-8)
        assert len(np.unique(t)) == t.size  # a time for every action, drawn apart
        if more:
            exponent = energy if "support" in loss else -energy
            expected = concentration(softmax(more[1] * exponent, axis=-1))
            chex.assert_trees_all_close(aux, expected, rtol=1e-8)


def test_a_mask_is_the_mean_over_what_it_keeps(x64):
    x0, mask = jnp.asarray(normal(2, B, D)), jnp.arange(B) < 3
    keys = losses.sample_keys(jax.random.key(KEY), B)
    for loss in (losses.cfm, losses.dsm):
        run = jax.jit(functools.partial(loss, linear, OT))
        masked, aux = run(keys, x0, weights=mask * B / 3)
        kept, _ = run(keys[:3], x0[:3])
        assert_allclose(masked, kept, rtol=1e-12)
        assert float(aux["ess"]) == pytest.approx(3)


@pytest.mark.parametrize("loss", ["cefm", "ced"])
@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_a_dataset_normalizer_matches_numpy(x64, loss, beta):
    """Weights ``exp(-beta E - log Z) / B``: the softmax times the sum that weights should have."""
    both, x0, energy, log_z = PATHS["vp_cosine"], normal(2, B, D), normal(3, B), 0.4
    ours = getattr(losses, loss)
    value, aux, x, t, noise = recorded(ours, both, x0, energy, beta, log_normalizer=log_z)
    total = np.exp(-beta * energy - log_z).mean()
    found = in_numpy(loss, both[1], linear(x, t), x0, noise, t, energy, beta)
    assert_allclose(value, total * found, rtol=1e-8)
    expected = concentration(softmax(-beta * energy)) | {"weight_sum": total}
    chex.assert_trees_all_close(aux, expected, rtol=1e-10)


@pytest.mark.parametrize("loss", ["dsm", "ced"])
def test_time_weight_replaces_sigma_squared(x64, loss):
    both, x0 = PATHS["vp_cosine"], normal(2, B, D)
    more = (normal(3, B), 2.0) if loss == "ced" else ()

    def weight(t):
        return 1.0 + t**3

    ours = functools.partial(getattr(losses, loss), time_weight=weight)
    value, _, x, t, noise = recorded(ours, both, x0, *more)
    expected = in_numpy(loss, both[1], linear(x, t), x0, noise, t, *more, weight)
    assert_allclose(value, expected, rtol=1e-8)


def test_one_lowest_energy_takes_all(x64):
    both, x0, energy = PATHS["ot"], normal(2, B, D), normal(3, B)
    for energy[5] in (-np.inf, -1e6):
        value, aux, x, t, noise = recorded(losses.cefm, both, x0, energy, 1.0)
        assert_allclose(
            value, reference.cfm_errors(both[1], linear(x, t), x0, noise, t)[5], rtol=1e-8
        )
        assert_allclose(aux["ess"], 1.0)


def test_the_highest_q_value_takes_its_state(x64):
    both, actions, best = PATHS["ot"], normal(4, B, M, D), np.arange(B) % M
    q_values = 1e6 * np.eye(M)[best]
    value, aux, x, t, noise = recorded(losses.support_cefm, both, actions, q_values, 3.0)
    errors = reference.cfm_errors(both[1], linear(x, t), actions, noise, t)
    assert_allclose(value, errors[np.arange(B), best].mean(), rtol=1e-8)
    assert_allclose(aux["ess"], 1.0)


def log_ratio(x, t):
    return jnp.sin(x).sum(-1) * (1.0 + t)


@each_path
def test_cep_matches_numpy(x64, path, ref):
    x0, energy, beta = normal(2, B, D), normal(3, B), 2.0
    value, _, x, t, noise = recorded(losses.cep, (path, ref), x0, energy, beta, field=log_ratio)
    assert len(np.unique(t)) == 1  # one time for the whole batch
    assert 0.0 <= t[0] <= 1.0
    assert len(np.unique(noise.round(6))) == B * D
    assert_allclose(value, reference.cep(log_ratio(x, t), energy, beta), rtol=1e-8)


def test_contrast_with_weights_of_its_own_is_ceps(x64):
    x0, energy, key = jnp.asarray(normal(2, B, M, D)), normal(3, B, M), jax.random.key(KEY)
    own, ceps = (
        jax.jit(functools.partial(loss, log_ratio, COSINE))(key, x0, *more)
        for loss, more in (
            (losses.contrastive, [M * softmax(-2.0 * energy, axis=-1)]),
            (losses.cep, [energy, 2.0]),
        )
    )
    chex.assert_trees_all_close(own, ceps, rtol=1e-12)


# --- structure ---


def test_gradient_is_the_hand_weighted_one(x64):
    x0, energy, beta, theta = normal(2, B, D), normal(3, B), 1.5, normal(6, D, D)
    _, _, x, t, noise = recorded(losses.cefm, PATHS["ot"], x0, energy, beta)
    target = reference_paths.velocity(PATHS["ot"][1], x0, noise, t)
    expected = 2.0 * x.T @ (softmax(-beta * energy)[:, None] * (x @ theta - target))

    def loss(theta):
        key = jax.random.key(KEY)
        return losses.cefm(lambda x, t: x @ theta, OT, key, jnp.asarray(x0), energy, beta)[0]

    assert_allclose(jax.jit(jax.grad(loss))(theta), expected, rtol=1e-7, atol=1e-9)


def test_keys_draw_uniform_times_and_normal_noise_repeatably(x64):
    x0, draws = np.zeros((2000, D)), []
    for seed in (0, 0, 1):
        _, _, _, t, noise = recorded(losses.cfm, PATHS["ot"], x0, seed=seed)
        draws.append(np.c_[t, noise])
    assert_array_equal(draws[0], draws[1])
    assert not np.intersect1d(draws[0], draws[2]).size
    everything = np.c_[draws[0], draws[2]]  # uncorrelated: a key is used once
    assert np.abs(np.corrcoef(everything.T) - np.eye(2 * (D + 1))).max() < 0.11
    assert 0.0 <= everything[:, 0].min() < everything[:, 0].max() <= 1.0
    assert kstest(everything[:, 0], "uniform").pvalue > 1e-3
    assert kstest(everything[:, 1 : D + 1].ravel(), "norm").pvalue > 1e-3


SEPARABLE = {
    "cfm": lambda f, k, x: losses.cfm(f, COSINE, k, x[:, 0]),
    "support_ced": lambda f, k, x: losses.support_ced(f, COSINE, k, x, x.sum(-1), 2.0),
    "cep": lambda f, k, x: losses.cep(lambda x, t: f(x, t).sum(-1), COSINE, k, x, x.sum(-1), 2.0),
}


@pytest.mark.parametrize("loss", SEPARABLE.values(), ids=SEPARABLE)
def test_parts_of_a_batch_draw_what_it_draws_at_once(x64, loss):
    x0, key = jnp.asarray(normal(0, 6, 3, D)), jax.random.key(KEY)
    keys = losses.sample_keys(key, 6)
    run = jax.jit(lambda key, x0: loss(lambda x, t: x * t[..., None], key, x0)[0])
    parts = [run(keys[i : i + 2], x0[i : i + 2]) for i in (0, 2, 4)]
    assert_allclose(np.mean(parts), run(key, x0), rtol=1e-12)
    with pytest.raises(ValueError, match=r"key: expected shape \(6,\)"):
        run(keys[:2], x0)


def test_one_group_has_one_time_and_takes_one_key():
    keys, x0 = jax.random.split(jax.random.key(0)), jnp.ones((2, D))
    with pytest.raises(ValueError, match=r"key: expected shape \(\)"):
        losses.cep(log_ratio, OT, keys, x0, x0.sum(-1), 1.0)


def test_no_gradient_flows_into_the_weights(x64):
    x0, energy, key = jnp.asarray(normal(2, B, D)), jnp.asarray(normal(3, B)), jax.random.key(KEY)

    def loss(weights, energy, beta, log_z):
        own = losses.cfm(linear, OT, key, x0, weights=weights)[0]
        return own + losses.cefm(linear, OT, key, x0, energy, beta, log_normalizer=log_z)[0]

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(jnp.ones(B), energy, 1.0, 0.3)
    jax.tree.map(lambda gradient: assert_array_equal(gradient, 0), gradients)


# --- many devices ---


def batch_loss(name, field, key, x0, **axis):
    """A loss whose batch devices may share; energies are sums of the data."""
    if name == "cep":
        groups = x0.reshape(-1, 2, D)
        inputs = (lambda x, t: field(x, t).sum(-1)), COSINE, key, groups, groups.sum(-1), 0.7
        return losses.cep(*inputs, **axis)
    loss, energy, more = name.partition(" ")[0], x0.sum(-1), {}
    if name.endswith("by a number"):
        more["log_normalizer"] = 0.4
    if name.endswith("by all energies"):
        more["log_normalizer"] = weights.log_normalizer(energy, 2.0, **axis)
    energies = (energy, 2.0) if loss in ("cefm", "ced") else ()
    return getattr(losses, loss)(field, COSINE, key, x0, *energies, **more, **axis)


NAMES = ["cfm", "dsm", "cefm", "ced", "cefm by a number", "ced by all energies", "cep"]
MAPPED = [(how, name) for name in NAMES for how in ("pmap", "shard_map")]


@pytest.mark.parametrize(("how", "name"), [("vmap", "cefm"), *MAPPED])
def test_shares_of_four_devices_sum_to_the_whole(x64, devices, how, name):
    """In loss and gradient; `shard_map` with its replication check on."""
    x0, theta = normal(2, B, D), normal(6, D, D)

    def gradient(theta, x0, **axis):
        def function(theta):
            return batch_loss(name, lambda x, t: x @ theta + t[..., None], key, x0, **axis)

        key = jax.random.key(KEY)
        return jax.value_and_grad(function, has_aux=True)(theta)

    (expected, expected_aux), expected_gradient = jax.jit(gradient)(theta, x0)
    thetas, shards = np.stack([theta] * 4), x0.reshape(4, B // 4, D)
    run = functools.partial(gradient, axis_name="i")
    (value, aux), share = on_devices(how, run, devices, thetas, shards)
    assert_allclose(value.sum(), expected, rtol=1e-10)
    assert_allclose(share.sum(0), expected_gradient, rtol=1e-9)
    assert np.ptp(value) > 1e-6 or how == "shard_map"  # whose checks make shares equal
    assert ("ess" in aux) == name.startswith("ce")
    chex.assert_trees_all_close(aux, jax.tree.map(lambda n: np.full(4, n), expected_aux), rtol=1e-9)


def test_a_single_group_is_not_split_over_devices():
    loss, x0 = functools.partial(losses.cep, axis_name="i"), jnp.ones((B, D))
    with pytest.raises(ValueError, match="x0: "):
        loss(log_ratio, OT, jax.random.key(0), x0, jnp.ones(B), 1.0)


# --- expectations ---


def mean_and_error(function, number, *arguments):
    """Mean of a loss over many keys, and its standard error."""
    keys = jax.random.split(jax.random.key(5), number)
    values = np.asarray(jax.jit(jax.vmap(lambda key: function(key, *arguments)))(keys))
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(number)


def linear_gradient(name, theta, data, weight):
    """The gradient in theta of the loss of ``x @ theta``, integrated over t and noise by hand.

    On the conditional OT path ``E[x x^T] = (x0 x0^T + I) / 3`` and ``E[x u^T] = (I - x0 x0^T) /
    2``; on cosine VP ``E[sigma^2 x x^T] = x0 x0^T / 8 + 3 I / 8`` and ``E[sigma x eps^T] = I / 2``.
    """
    second, identity = (weight[:, None] * data).T @ data, weight.sum() * np.eye(data.shape[1])
    if name == "cefm":
        return 2 * ((second + identity) @ theta / 3 - (identity - second) / 2)
    return 2 * ((second + 3 * identity) @ theta / 8 + identity / 2)


@pytest.mark.parametrize(("name", "path"), [("cefm", OT), ("ced", COSINE)])
def test_a_dataset_normalizer_makes_the_gradient_of_a_batch_unbiased(x64, name, path):
    """Batches of 4 of 50 have Thm 4.3's own gradient; the softmax over so few is far from it."""
    data, theta, beta = 1.5 * normal(7, 50, 2), normal(6, 2, 2), 2.0
    energy = data[:, 0] + 0.3 * normal(8, 50)

    def gradient(key, log_normalizer):
        for_data, for_loss = jax.random.split(key)
        rows = jax.random.randint(for_data, (4,), 0, 50)
        x0, energies = jnp.asarray(data)[rows], jnp.asarray(energy)[rows]

        def loss(theta):
            weighted = functools.partial(getattr(losses, name), log_normalizer=log_normalizer)
            return weighted(lambda x, t: x @ theta, path, for_loss, x0, energies, beta)

        (_, aux), share = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(theta))
        return jnp.append(share.ravel(), aux.get("weight_sum", 1.0))

    expected = linear_gradient(name, theta, data, softmax(-beta * energy)).ravel()
    log_z = weights.log_normalizer(jnp.asarray(energy), beta)
    mean, error = mean_and_error(gradient, 20_000, log_z)
    assert np.abs((mean - np.append(expected, 1.0)) / error).max() < 4.5
    assert error[:4].max() < 0.1 * np.abs(expected).max()
    biased, error = mean_and_error(gradient, 20_000, None)
    assert np.abs((biased[:4] - expected) / error[:4]).max() > 20


# --- bad input ---


def test_shapes_that_disagree_are_refused():
    inputs = linear, OT, jax.random.key(0), jnp.ones((B, D))
    for energy in (jnp.ones(B - 1), jnp.ones((B, 1))):
        with pytest.raises(ValueError, match="energy"):
            losses.cefm(*inputs, energy, 1.0)
    with pytest.raises(ValueError, match="q_values"):
        losses.support_cefm(*inputs[:3], jnp.ones((B, M, D)), jnp.ones((M, B)), 1.0)
    for loss in (losses.cefm, losses.ced):
        for shape in ((1,), (B,)):
            with pytest.raises(ValueError, match="log_normalizer"):
                loss(*inputs, jnp.ones(B), 1.0, log_normalizer=jnp.zeros(shape))


def test_cep_does_not_hide_a_nan_energy():
    energy, x0 = jnp.array([jnp.nan, *np.ones(B - 1)]), jnp.asarray(normal(0, B, D), jnp.float32)
    run = jax.jit(functools.partial(losses.cep, log_ratio, OT))
    loss, aux = run(jax.random.key(0), x0, energy, 1.0)
    assert jnp.isnan(loss)
    assert jnp.isnan(aux["ess"])


def test_errors_of_a_coupling_of_ones_own(x64):
    path, ref = PATHS["vp_cosine"]
    x0, noise, t = normal(2, B, D), normal(3, B, D), np.linspace(0.1, 1, B)
    got = losses.errors(linear, path, None, jnp.asarray(x0), noise=noise, t=t)
    x = reference_paths.sample(ref, x0, noise, t)
    expected = reference.cfm_errors(ref, np.asarray(linear(x, t)), x0, noise, t)
    assert_allclose(got, expected, rtol=1e-10)
    weighted, _ = losses.cfm(
        linear, path, None, jnp.asarray(x0), noise=noise, t=t, time_weight=lambda t: 1 / t
    )
    assert_allclose(weighted, (expected / t).mean(), rtol=1e-10)


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_other_kinds_of_keys_draw_the_same_for_a_part(kind):
    key, x0 = jax.random.key(0, impl=kind), jnp.asarray(normal(2, B, D), jnp.float32)
    noise, t = losses.draw(key, x0)
    part, part_t = losses.draw(losses.sample_keys(key, B)[3:5], x0[3:5])
    assert_array_equal(part, noise[3:5])
    assert_array_equal(part_t, t[3:5])
    assert len(np.unique(noise)) == noise.size
