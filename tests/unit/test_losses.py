"""Losses against NumPy float64 with recorded times and noise, and against exact expectations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal
from scipy.integrate import quad
from scipy.special import softmax

from efm_jax import exact, losses, paths, weights
from tests.reference import losses as reference
from tests.reference import paths as reference_paths

PATHS = {
    "ot": (paths.conditional_ot(), reference_paths.conditional_ot()),
    "vp_linear": (paths.vp_linear(), reference_paths.vp_linear()),
    "vp_cosine": (paths.vp_cosine(), reference_paths.vp_cosine()),
}
each_path = pytest.mark.parametrize("name", PATHS)
B, D, M = 8, 3, 4
KEY = 17


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def linear(x, t):
    """A field with a value of its own at every point and time; works for any leading axes."""
    return 0.3 * x[..., ::-1] - 0.2 * x + t[..., None]


def halves(array):
    """float64 as two float32: callbacks run on threads that may not have 64-bit types enabled."""
    high = array.astype(jnp.float32)
    return high, (array - high.astype(array.dtype)).astype(jnp.float32)


def whole(high, low):
    return np.asarray(high, np.float64) + np.asarray(low, np.float64)


class Recorder:
    """A field that keeps the points and times at which a loss calls it."""

    def __init__(self, field):
        self.field = field
        self.calls = []

    def __call__(self, x, t):
        jax.debug.callback(
            lambda x, t: self.calls.append((whole(*x), whole(*t))), halves(x), halves(t)
        )
        return self.field(x, t)

    def seen(self, ref, x0):
        """Points, times and the noise that must have been drawn."""
        jax.effects_barrier()
        assert len(self.calls) == 1
        x, t = self.calls[0]
        assert x.shape == x0.shape
        assert t.shape == x0.shape[:-1]
        return x, t, (x - ref.mu(t)[..., None] * x0) / ref.sigma(t)[..., None]


@functools.cache
def compiled(loss, path, field, time_weight):
    """A recorder and a loss that calls it, compiled once for all that ask."""
    recorder = Recorder(field)
    options = {} if time_weight is None else {"time_weight": time_weight}
    return recorder, jax.jit(
        lambda key, *arrays, **more: loss(recorder, path, key, *arrays, **options, **more)
    )


def recorded(ref, x0, loss, path, key, *arrays, field=linear, time_weight=None, **more):
    """(loss, aux, x, t, noise) of one batch loss called with a recording field."""
    recorder, run = compiled(loss, path, field, time_weight)
    recorder.calls.clear()
    value, aux = run(key, *(jnp.asarray(array) for array in arrays), **more)
    return value, aux, *recorder.seen(ref, x0)


# --- per sample ---


@each_path
def test_errors_per_sample(x64, name):
    path, ref = PATHS[name]
    x0, noise, t = normal(0, B, D), normal(1, B, D), np.linspace(0.05, 1.0, B)
    x = reference_paths.sample(ref, x0, noise, t)
    predict = np.asarray(linear(x, t))

    def field(x, t):
        assert x.shape == (D,)
        assert t.shape == ()
        return linear(x, t)

    velocity = jax.vmap(lambda *a: losses.cfm_error(field, path, *a))(x0, noise, t)
    assert_allclose(velocity, reference.cfm_errors(ref, predict, x0, noise, t), rtol=1e-10)
    score = jax.vmap(lambda *a: losses.dsm_error(field, path, *a))(x0, noise, t)
    assert_allclose(score, reference.dsm_errors(ref, predict, noise, t), rtol=1e-10)
    alone = losses.cfm_error(
        field, path, jnp.asarray(x0[0]), jnp.asarray(noise[0]), jnp.asarray(t[0])
    )
    assert alone.shape == ()


@each_path
def test_the_true_conditional_field_has_no_error(x64, name):
    path, _ = PATHS[name]
    x0, noise, t = jnp.asarray(normal(0, D)), jnp.asarray(normal(1, D)), jnp.asarray(0.4)
    velocity, score = path.velocity(x0, noise, t), path.score(noise, t)
    assert losses.cfm_error(lambda x, t: velocity, path, x0, noise, t) == pytest.approx(
        0.0, abs=1e-20
    )
    assert losses.dsm_error(lambda x, t: score, path, x0, noise, t) == pytest.approx(0.0, abs=1e-20)


# --- per batch, against NumPy ---


@each_path
def test_cfm_and_dsm_match_numpy(x64, name):
    path, ref = PATHS[name]
    x0, key = normal(2, B, D), jax.random.key(KEY)
    value, _, x, t, noise = recorded(ref, x0, losses.cfm, path, key, jnp.asarray(x0))
    assert_allclose(value, reference.cfm(ref, linear(x, t), x0, noise, t), rtol=1e-8)
    value, _, x, t, noise = recorded(ref, x0, losses.dsm, path, key, jnp.asarray(x0))
    assert_allclose(value, reference.dsm(ref, linear(x, t), noise, t), rtol=1e-8)


@each_path
@pytest.mark.parametrize("prediction", paths.PREDICTIONS)
@pytest.mark.parametrize("shape", [(B, D), (B, M, D)])
def test_any_prediction_with_importance_weights_matches_numpy(x64, name, prediction, shape):
    path, ref = PATHS[name]
    x0, key = normal(2, *shape), jax.random.key(KEY)
    w = np.random.default_rng(3).exponential(size=shape[:-1])
    w /= w.mean(-1, keepdims=True)
    loss = functools.partial(losses.matching, prediction=prediction)
    value, aux, x, t, noise = recorded(
        ref, x0, loss, path, key, jnp.asarray(x0), weights=jnp.asarray(w)
    )
    target = {
        "velocity": reference_paths.velocity(ref, x0, noise, t),
        "score": reference_paths.score(ref, noise, t),
        "noise": noise,
        "data": x0,
    }[prediction]
    errors = ((np.asarray(linear(x, t)) - target) ** 2).sum(-1)
    assert_allclose(value, (w * errors).mean(), rtol=1e-7)
    ess, top = w.sum(-1) ** 2 / (w**2).sum(-1), w.max(-1) / w.sum(-1)
    assert_allclose(aux["ess"], ess.mean(), rtol=1e-10)
    assert_allclose(aux["top_weight"], top.mean(), rtol=1e-10)


def test_a_mask_is_the_mean_over_what_it_keeps(x64):
    path, x0 = PATHS["ot"][0], jnp.asarray(normal(2, B, D))
    keys = losses.sample_keys(jax.random.key(KEY), B)
    mask = jnp.arange(B) < 3
    for loss in (losses.cfm, losses.dsm):
        masked, aux = loss(linear, path, keys, x0, weights=mask * B / 3)
        kept, _ = loss(linear, path, keys[:3], x0[:3])
        assert_allclose(masked, kept, rtol=1e-12)
        assert float(aux["ess"]) == pytest.approx(3)


def test_no_gradient_flows_into_importance_weights():
    path, x0 = PATHS["ot"][0], jnp.asarray(normal(2, B, D), jnp.float32)
    loss = lambda w: losses.cfm(linear, path, jax.random.key(KEY), x0, weights=w)[0]  # noqa: E731
    assert_array_equal(jax.grad(loss)(jnp.ones(B)), np.zeros(B))


def test_contrast_with_weights_of_its_own_is_ceps(x64):
    path, x0 = PATHS["vp_cosine"][0], jnp.asarray(normal(2, B, M, D))
    energy, key = jnp.asarray(normal(3, B, M)), jax.random.key(KEY)
    g = M * softmax(-2.0 * np.asarray(energy), axis=-1)
    log_ratio = lambda x, t: (x * t[..., None]).sum(-1)  # noqa: E731
    own = losses.contrastive(log_ratio, path, key, x0, jnp.asarray(g))
    for a, b in zip(
        jax.tree.leaves(own),
        jax.tree.leaves(losses.cep(log_ratio, path, key, x0, energy, 2.0)),
        strict=True,
    ):
        assert_allclose(a, b, rtol=1e-12)


@each_path
@pytest.mark.parametrize("beta", [0.0, 7.0])
def test_cefm_and_ced_match_numpy(x64, name, beta):
    path, ref = PATHS[name]
    x0, energy, key = normal(2, B, D), normal(3, B), jax.random.key(KEY)
    arguments = (path, key, jnp.asarray(x0), jnp.asarray(energy), beta)
    ess = 1.0 / (softmax(-beta * energy) ** 2).sum()
    value, aux, x, t, noise = recorded(ref, x0, losses.cefm, *arguments)
    expected = reference.cefm(ref, linear(x, t), x0, noise, t, energy, beta)
    assert_allclose(value, expected, rtol=1e-8)
    assert_allclose(aux["ess"], ess, rtol=1e-8)
    value, aux, x, t, noise = recorded(ref, x0, losses.ced, *arguments)
    assert_allclose(value, reference.ced(ref, linear(x, t), noise, t, energy, beta), rtol=1e-8)
    assert_allclose(aux["ess"], ess, rtol=1e-8)


@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_a_dataset_normalizer_matches_numpy(x64, beta):
    """Weights ``exp(-beta E - log Z) / B``: the softmax times the sum that weights should have."""
    path, ref = PATHS["vp_cosine"]
    x0, energy, key, log_z = normal(2, B, D), normal(3, B), jax.random.key(KEY), 0.4
    arguments = (path, key, jnp.asarray(x0), jnp.asarray(energy), beta)
    total = np.exp(-beta * energy - log_z).mean()
    value, aux, x, t, noise = recorded(ref, x0, losses.cefm, *arguments, log_normalizer=log_z)
    expected = total * reference.cefm(ref, linear(x, t), x0, noise, t, energy, beta)
    assert_allclose(value, expected, rtol=1e-8)
    shares = softmax(-beta * energy)
    expected_aux = {"ess": 1 / (shares**2).sum(), "top_weight": shares.max(), "weight_sum": total}
    assert aux.keys() == expected_aux.keys()
    for name, number in expected_aux.items():
        assert_allclose(aux[name], number, rtol=1e-10)
    value, aux, x, t, noise = recorded(ref, x0, losses.ced, *arguments, log_normalizer=log_z)
    expected = total * reference.ced(ref, linear(x, t), noise, t, energy, beta)
    assert_allclose(value, expected, rtol=1e-8)
    assert_allclose(aux["weight_sum"], total, rtol=1e-10)


def test_time_weight_replaces_sigma_squared(x64):
    path, ref = PATHS["vp_cosine"]
    x0, energy, key = normal(2, B, D), normal(3, B), jax.random.key(KEY)

    def weight(t):
        return 1.0 + t**3

    value, _, x, t, noise = recorded(
        ref, x0, losses.dsm, path, key, jnp.asarray(x0), time_weight=weight
    )
    assert_allclose(value, reference.dsm(ref, linear(x, t), noise, t, weight), rtol=1e-8)
    arguments = (path, key, jnp.asarray(x0), jnp.asarray(energy), 2.0)
    value, _, x, t, noise = recorded(ref, x0, losses.ced, *arguments, time_weight=weight)
    assert_allclose(
        value, reference.ced(ref, linear(x, t), noise, t, energy, 2.0, weight), rtol=1e-8
    )


@each_path
@pytest.mark.parametrize("beta", [0.0, 1.5])
def test_support_losses_match_numpy(x64, name, beta):
    path, ref = PATHS[name]
    actions, q_values, key = normal(4, B, M, D), normal(5, B, M), jax.random.key(KEY)
    arguments = (path, key, jnp.asarray(actions), jnp.asarray(q_values), beta)
    value, aux, x, t, noise = recorded(ref, actions, losses.support_cefm, *arguments)
    expected = reference.support_cefm(ref, linear(x, t), actions, noise, t, q_values, beta)
    assert_allclose(value, expected, rtol=1e-8)
    assert 1.0 <= np.mean(aux["ess"]) <= M + 1e-6
    if beta == 0.0:
        errors = reference.cfm_errors(ref, linear(x, t), actions, noise, t)
        assert_allclose(value, errors.mean(), rtol=1e-8)
    assert len(np.unique(t)) == B * M  # a time for every action, drawn apart
    value, aux, x, t, noise = recorded(ref, actions, losses.support_ced, *arguments)
    expected = reference.support_ced(ref, linear(x, t), actions * 0 + noise, t, q_values, beta)
    assert_allclose(value, expected, rtol=1e-8)
    assert 1.0 <= np.mean(aux["ess"]) <= M + 1e-6


def test_high_q_value_takes_its_state(x64):
    path, ref = PATHS["ot"]
    actions, q_values = normal(4, B, M, D), np.zeros((B, M))
    best = np.arange(B) % M
    q_values[np.arange(B), best] = 1e6
    arguments = (path, jax.random.key(KEY), jnp.asarray(actions), jnp.asarray(q_values), 3.0)
    value, aux, x, t, noise = recorded(ref, actions, losses.support_cefm, *arguments)
    errors = reference.cfm_errors(ref, linear(x, t), actions, noise, t)
    assert_allclose(value, errors[np.arange(B), best].mean(), rtol=1e-8)
    assert_allclose(aux["ess"], 1.0, rtol=1e-8)


@each_path
def test_cep_matches_numpy(x64, name):
    path, ref = PATHS[name]
    x0, energy, beta = normal(2, B, D), normal(3, B), 2.0

    def log_ratio(x, t):
        assert x.shape == (B, D)
        return jnp.sin(x).sum(-1) * (1.0 + t)

    arguments = (path, jax.random.key(KEY), jnp.asarray(x0), jnp.asarray(energy), beta)
    value, _, x, t, noise = recorded(ref, x0, losses.cep, *arguments, field=log_ratio)
    assert len(np.unique(t)) == 1  # one time for the whole batch
    assert 0.0 <= t[0] <= 1.0
    assert len(np.unique(noise.round(6))) == B * D
    expected = reference.cep((np.sin(x).sum(-1) * (1.0 + t)), energy, beta)
    assert_allclose(value, expected, rtol=1e-8)


def test_cep_is_stationary_at_its_weights(x64):
    """A shift of f changes nothing; the gradient vanishes where softmax(f) equals the weights."""
    path, _ = PATHS["ot"]
    x0, energy = jnp.asarray(normal(2, B, D)), jnp.asarray(normal(3, B))

    def loss(c):
        return losses.cep(lambda x, t: x.sum(-1) + c, path, jax.random.key(1), x0, energy, 1.0)[0]

    assert_allclose(loss(0.0), loss(5.0), rtol=1e-10)

    def at(f):
        return losses.cep(lambda x, t: f, path, jax.random.key(1), x0, energy, 2.0)[0]

    assert_allclose(jax.grad(at)(-2.0 * energy), 0.0, atol=1e-12)  # f = -beta E is stationary
    assert np.abs(jax.grad(at)(2.0 * energy)).max() > 0.01


# --- structure ---


@each_path
def test_beta_zero_is_the_plain_mean_with_the_same_key(x64, name):
    path, _ = PATHS[name]
    x0, energy, key = jnp.asarray(normal(2, B, D)), jnp.asarray(normal(3, B)), jax.random.key(KEY)
    plain, weighted = (
        losses.cfm(linear, path, key, x0)[0],
        losses.cefm(linear, path, key, x0, energy, 0.0),
    )
    assert_allclose(weighted[0], plain, rtol=1e-12)
    assert_allclose(weighted[1]["ess"], B, rtol=1e-12)
    plain, weighted = (
        losses.dsm(linear, path, key, x0)[0],
        losses.ced(linear, path, key, x0, energy, 0.0),
    )
    assert_allclose(weighted[0], plain, rtol=1e-12)


@pytest.mark.parametrize("lowest", [-np.inf, -1e6])
def test_one_lowest_energy_picks_one_sample(x64, lowest):
    path, ref = PATHS["ot"]
    x0, energy = normal(2, B, D), normal(3, B)
    energy[5] = lowest
    arguments = (path, jax.random.key(KEY), jnp.asarray(x0), jnp.asarray(energy), 1.0)
    value, aux, x, t, noise = recorded(ref, x0, losses.cefm, *arguments)
    assert_allclose(value, reference.cfm_errors(ref, linear(x, t), x0, noise, t)[5], rtol=1e-8)
    assert_allclose(aux["ess"], 1.0)


def test_gradient_is_the_hand_weighted_one(x64):
    path, ref = PATHS["ot"]
    x0, energy, beta, key = normal(2, B, D), normal(3, B), 1.5, jax.random.key(KEY)
    _, _, x, t, noise = recorded(
        ref, x0, losses.cefm, path, key, jnp.asarray(x0), jnp.asarray(energy), beta
    )
    weights, target = softmax(-beta * energy), reference_paths.velocity(ref, x0, noise, t)
    theta = normal(6, D, D)
    expected = 2.0 * x.T @ (weights[:, None] * (x @ theta - target))

    def loss(theta):
        return losses.cefm(
            lambda x, t: x @ theta, path, key, jnp.asarray(x0), jnp.asarray(energy), beta
        )[0]

    assert_allclose(jax.grad(loss)(jnp.asarray(theta)), expected, rtol=1e-7, atol=1e-9)


def test_keys_matter_and_repeat(x64):
    path, ref = PATHS["ot"]
    x0 = normal(2, 64, D)
    _, _, _, t, noise = recorded(ref, x0, losses.cfm, path, jax.random.key(0), jnp.asarray(x0))
    _, _, _, again, _ = recorded(ref, x0, losses.cfm, path, jax.random.key(0), jnp.asarray(x0))
    _, _, _, other, other_noise = recorded(
        ref, x0, losses.cfm, path, jax.random.key(1), jnp.asarray(x0)
    )
    assert_array_equal(t, again)
    assert not np.intersect1d(t, other).size
    assert np.abs(np.corrcoef(noise.ravel(), other_noise.ravel())[0, 1]) < 0.3
    assert len(np.unique(t)) == 64
    assert np.abs(np.corrcoef(np.c_[t, noise].T) - np.eye(D + 1)).max() < 0.5  # one key used once


SEPARABLE = {
    "cfm": lambda f, p, k, x: losses.cfm(f, p, k, x[:, 0])[0],
    "dsm": lambda f, p, k, x: losses.dsm(f, p, k, x[:, 0])[0],
    "support_cefm": lambda f, p, k, x: losses.support_cefm(f, p, k, x, x.sum(-1), 2.0)[0],
    "support_ced": lambda f, p, k, x: losses.support_ced(f, p, k, x, x.sum(-1), 2.0)[0],
    "cep": lambda f, p, k, x: losses.cep(lambda x, t: f(x, t).sum(-1), p, k, x, x.sum(-1), 2.0)[0],
}


@pytest.mark.parametrize("name", SEPARABLE)
def test_parts_of_a_batch_draw_what_it_draws_at_once(x64, name):
    path, x0 = PATHS["vp_cosine"][0], jnp.asarray(normal(0, 6, 3, D))
    keys = losses.sample_keys(jax.random.key(KEY), 6)
    batches = [(jax.random.key(KEY), x0), *((keys[i : i + 2], x0[i : i + 2]) for i in (0, 2, 4))]
    whole, *parts = (
        SEPARABLE[name](lambda x, t: x * t[..., None], path, *batch) for batch in batches
    )
    assert_allclose(np.mean(parts), whole, rtol=1e-12)
    with pytest.raises(ValueError, match=r"key: expected shape \(6,\)"):
        SEPARABLE[name](lambda x, t: x, path, keys[:2], x0)


def test_one_group_has_one_time_and_takes_one_key():
    keys, x0 = jax.random.split(jax.random.key(0)), jnp.ones((2, D))
    with pytest.raises(ValueError, match=r"key: expected shape \(\)"):
        losses.cep(lambda x, t: x.sum(-1), PATHS["ot"][0], keys, x0, x0.sum(-1), 1.0)


def test_times_are_uniform_and_noise_is_normal(x64):
    from scipy.stats import kstest

    path, ref = PATHS["ot"]
    x0 = np.zeros((4000, 2))
    _, _, _, t, noise = recorded(ref, x0, losses.cfm, path, jax.random.key(3), jnp.asarray(x0))
    assert t.min() >= 0.0
    assert t.max() <= 1.0
    assert kstest(t, "uniform").pvalue > 1e-3
    assert kstest(noise.ravel(), "norm").pvalue > 1e-3


# --- many devices ---

BATCH_LOSSES = {
    "cfm": lambda f, p, k, x, e, a: losses.cfm(f, p, k, x, axis_name=a),
    "cefm": lambda f, p, k, x, e, a: losses.cefm(f, p, k, x, e, 2.0, axis_name=a),
    "dsm": lambda f, p, k, x, e, a: losses.dsm(f, p, k, x, axis_name=a),
    "ced": lambda f, p, k, x, e, a: losses.ced(f, p, k, x, e, 2.0, axis_name=a),
    "cefm_log_normalizer": lambda f, p, k, x, e, a: losses.cefm(
        f, p, k, x, e, 2.0, log_normalizer=0.4, axis_name=a
    ),
    "ced_log_normalizer": lambda f, p, k, x, e, a: losses.ced(
        f, p, k, x, e, 2.0, log_normalizer=weights.log_normalizer(e, 2.0, axis_name=a), axis_name=a
    ),
}


@pytest.mark.parametrize("name", BATCH_LOSSES)
def test_shares_of_four_parts_sum_to_the_whole(x64, name):
    """An axis named by `vmap`; the contract tests do the same with `pmap` and `shard_map`."""
    path, loss = PATHS["vp_cosine"][0], BATCH_LOSSES[name]
    x0, energy, key = jnp.asarray(normal(2, B, D)), jnp.asarray(normal(3, B)), jax.random.key(KEY)
    theta = jnp.asarray(normal(6, D, D))

    def gradient(x0, energy, axis_name):
        def function(theta):
            return loss(lambda x, t: x @ theta + t[:, None], path, key, x0, energy, axis_name)

        return jax.value_and_grad(function, has_aux=True)(theta)

    (expected, expected_aux), expected_gradient = jax.jit(lambda x, e: gradient(x, e, None))(
        x0, energy
    )
    parts = jax.jit(jax.vmap(lambda x, e: gradient(x, e, "i"), axis_name="i"))
    (value, aux), share = parts(x0.reshape(4, B // 4, D), energy.reshape(4, B // 4))
    assert_allclose(value.sum(), expected, rtol=1e-10)
    assert_allclose(share.sum(0), expected_gradient, rtol=1e-9)
    assert np.ptp(value) > 1e-6  # a share, not the sum everywhere
    assert aux.keys() == expected_aux.keys()
    assert ("ess" in aux) == name.startswith("ce")
    for statistic, number in expected_aux.items():
        assert_allclose(aux[statistic], np.full(4, number), rtol=1e-10)


@pytest.mark.parametrize("name", ["cfm", "ced", "cefm_log_normalizer", "ced_log_normalizer"])
def test_shard_map_with_its_replication_check_on(devices, name):
    path, loss = PATHS["ot"][0], BATCH_LOSSES[name]
    x0, energy = jnp.asarray(normal(2, B, D), jnp.float32), jnp.asarray(normal(3, B), jnp.float32)
    mesh, split, same = Mesh(np.array(devices), ("i",)), PartitionSpec("i"), PartitionSpec()
    key = jax.random.key(KEY)

    def share(key, x0, energy):
        return loss(linear, path, key, x0, energy, "i")[0][None]

    mapped = jax.shard_map(share, mesh=mesh, in_specs=(same, split, split), out_specs=split)
    expected = jax.jit(lambda k, x, e: loss(linear, path, k, x, e, None)[0])(key, x0, energy)
    assert_allclose(jax.jit(mapped)(key, x0, energy).sum(), expected, rtol=1e-5)


# --- expectations ---


def mean_and_error(function, number):
    """Mean of a loss over many keys, and its standard error."""
    values = np.asarray(jax.jit(jax.vmap(function))(jax.random.split(jax.random.key(5), number)))
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(number)


@pytest.mark.parametrize("name", ["ot", "vp_cosine"])
def test_cfm_has_the_expectation_of_gaussian_data(x64, name):
    """``x0 ~ N(m, s^2 I)``, ``v = a x``: ``E||a x_t - u||^2`` is one integral over t."""
    path, ref = PATHS[name]
    m, s, a = np.array([1.0, -0.5]), 0.7, 0.4

    def integrand(t):
        t = np.asarray(t)
        for_x0, for_noise = a * ref.mu(t) - ref.mu_dot(t), a * ref.sigma(t) - ref.sigma_dot(t)
        return for_x0**2 * (m @ m + 2 * s**2) + for_noise**2 * 2

    def loss(key):
        for_data, for_loss = jax.random.split(key)
        x0 = m + s * jax.random.normal(for_data, (128, 2))
        return losses.cfm(lambda x, t: a * x, path, for_loss, x0)[0]

    mean, error = mean_and_error(loss, 300)
    assert error < 0.02 * mean
    assert abs(mean - quad(integrand, 0.0, 1.0)[0]) < 4 * error


@each_path
def test_dsm_of_the_zero_score_is_the_dimension(x64, name):
    """``lambda = sigma^2`` makes it noise prediction: ``E||eps||^2 = d`` on every path."""
    path, _ = PATHS[name]
    x0 = jnp.asarray(normal(2, 128, 3))
    mean, error = mean_and_error(
        lambda key: losses.dsm(lambda x, t: 0.0 * x, path, key, x0)[0], 200
    )
    assert abs(mean - 3.0) < 4 * error


@pytest.mark.parametrize("name", ["ot", "vp_cosine"])
def test_the_guided_field_minimizes_cefm(x64, name):
    """Thm 4.3: the gradient vanishes at Thm 4.1's field, and not at the unguided one."""
    path, _ = PATHS[name]
    data, energy, beta = jnp.asarray(1.5 * normal(7, 6, 2)), jnp.asarray(normal(8, 6)), 2.0
    x0, energies = (
        jnp.tile(data, (32, 1)),
        jnp.tile(energy, 32),
    )  # every batch holds p_0 itself: no bias

    def gradient(key, log_weights):
        def loss(theta):
            def field(x, t):
                features = jnp.stack([jnp.ones_like(t), x[:, 0], jnp.sin(2 * x[:, 1]), t], -1)
                return exact.velocity(path, x, t, data, log_weights) + features @ theta

            return losses.cefm(field, path, key, x0, energies, beta)[0]

        return jax.grad(loss)(jnp.zeros((4, 2)))

    mean, error = mean_and_error(lambda key: gradient(key, -beta * energy), 200)
    assert np.abs(mean / error).max() < 4.5
    unguided, error = mean_and_error(lambda key: gradient(key, jnp.zeros(6)), 200)
    assert np.abs(unguided / error).max() > 20


def linear_gradient(name, theta, data, weight):
    """The gradient in theta of the loss of the field ``x @ theta``, integrated over t and noise by
    hand.

    On the conditional OT path ``E[x x^T] = (x0 x0^T + I) / 3`` and ``E[x u^T] = (I - x0 x0^T) /
    2``; on cosine VP ``E[sigma^2 x x^T] = x0 x0^T / 8 + 3 I / 8`` and ``E[sigma x eps^T] = I / 2``.
    """
    second, identity = (weight[:, None] * data).T @ data, weight.sum() * np.eye(data.shape[1])
    if name == "cefm":
        return 2 * ((second + identity) @ theta / 3 - (identity - second) / 2)
    return 2 * ((second + 3 * identity) @ theta / 8 + identity / 2)


@pytest.mark.parametrize("name", ["cefm", "ced"])
def test_a_dataset_normalizer_makes_the_gradient_of_a_batch_unbiased(x64, name):
    """Batches of 4 of 50 have Thm 4.3's own gradient; the softmax over so few is far from it."""
    path = PATHS["ot" if name == "cefm" else "vp_cosine"][0]
    data, theta, beta = 1.5 * normal(7, 50, 2), normal(6, 2, 2), 2.0
    energy = data[:, 0] + 0.3 * normal(8, 50)
    log_z = weights.log_normalizer(jnp.asarray(energy), beta)

    def gradient(key, log_normalizer):
        for_data, for_loss = jax.random.split(key)
        rows = jax.random.randint(for_data, (4,), 0, 50)
        x0, energies = jnp.asarray(data)[rows], jnp.asarray(energy)[rows]

        def loss(theta):
            options = {"log_normalizer": log_normalizer}
            return getattr(losses, name)(
                lambda x, t: x @ theta, path, for_loss, x0, energies, beta, **options
            )

        (_, aux), share = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(theta))
        return jnp.append(share.ravel(), aux.get("weight_sum", 1.0))

    expected = linear_gradient(name, theta, data, softmax(-beta * energy)).ravel()
    mean, error = mean_and_error(lambda key: gradient(key, log_z), 40_000)
    assert np.abs((mean - np.append(expected, 1.0)) / error).max() < 4.5
    assert error[:4].max() < 0.1 * np.abs(expected).max()
    biased, error = mean_and_error(lambda key: gradient(key, None), 40_000)
    assert np.abs((biased[:4] - expected) / error[:4]).max() > 20


def test_the_guided_score_minimizes_ced(x64):
    path, _ = PATHS["vp_cosine"]
    data, energy, beta = jnp.asarray(1.5 * normal(7, 6, 2)), jnp.asarray(normal(8, 6)), 2.0
    x0, energies = jnp.tile(data, (32, 1)), jnp.tile(energy, 32)

    def gradient(key, log_weights):
        def loss(theta):
            def field(x, t):
                features = jnp.stack([jnp.ones_like(t), x[:, 0], jnp.sin(2 * x[:, 1])], -1)
                return exact.score(path, x, t, data, log_weights) + features @ theta

            return losses.ced(field, path, key, x0, energies, beta)[0]

        return jax.grad(loss)(jnp.zeros((3, 2)))

    mean, error = mean_and_error(lambda key: gradient(key, -beta * energy), 200)
    assert np.abs(mean / error).max() < 4.5
    unguided, error = mean_and_error(lambda key: gradient(key, jnp.zeros(6)), 200)
    assert np.abs(unguided / error).max() > 20


# --- bad input ---


def test_shapes_that_disagree_are_refused():
    path, key = PATHS["ot"][0], jax.random.key(0)
    with pytest.raises((ValueError, TypeError), match="energy"):
        losses.cefm(linear, path, key, jnp.ones((B, D)), jnp.ones(B - 1), 1.0)
    with pytest.raises((ValueError, TypeError), match="energy"):
        losses.cefm(linear, path, key, jnp.ones((B, D)), jnp.ones((B, 1)), 1.0)
    with pytest.raises((ValueError, TypeError), match="q_values"):
        losses.support_cefm(linear, path, key, jnp.ones((B, M, D)), jnp.ones((M, B)), 1.0)


@pytest.mark.parametrize("loss", [losses.cefm, losses.ced])
def test_a_normalizer_of_another_shape_is_refused(loss):
    arguments = (linear, PATHS["ot"][0], jax.random.key(0), jnp.ones((B, D)), jnp.ones(B), 1.0)
    for shape in ((1,), (B,)):
        with pytest.raises(ValueError, match="log_normalizer"):
            loss(*arguments, log_normalizer=jnp.zeros(shape))


def test_no_gradient_flows_into_the_weights(x64):
    path, x0, energy = PATHS["ot"][0], jnp.asarray(normal(2, B, D)), jnp.asarray(normal(3, B))

    def loss(energy, beta, log_z):
        return losses.cefm(linear, path, jax.random.key(0), x0, energy, beta, log_normalizer=log_z)[
            0
        ]

    for gradient in jax.grad(loss, argnums=(0, 1, 2))(energy, 1.0, 0.3):
        assert_array_equal(gradient, 0)


def test_cep_does_not_hide_a_nan_energy():
    energy = jnp.array([jnp.nan, *np.ones(B - 1)])
    x0 = jnp.asarray(normal(0, B, D), jnp.float32)
    loss, aux = losses.cep(
        lambda x, t: x.sum(-1), paths.vp_linear(), jax.random.key(0), x0, energy, 1.0
    )
    assert jnp.isnan(loss)
    assert jnp.isnan(aux["ess"])


def test_contrast_of_groups_over_devices():
    """Groups split over devices: the shares of loss and gradient sum to those of one device."""
    x0 = jax.random.normal(jax.random.key(0), (4, 5, 2))
    energy = x0.sum(-1)

    def loss(w, x0, energy, axis_name=None):
        return losses.cep(
            lambda x, t: w * (x**2).sum(-1), paths.vp_linear(), jax.random.key(1), x0, energy, 0.7,
            axis_name=axis_name,
        )  # fmt: skip

    grad = jax.value_and_grad(loss, has_aux=True)
    (whole, aux), slope = jax.jit(grad)(0.3, x0, energy)
    split = jax.jit(jax.vmap(lambda x, e: grad(0.3, x, e, "i"), axis_name="i"))
    (shares, others), slopes = split(x0.reshape(2, 2, 5, 2), energy.reshape(2, 2, 5))
    assert shares.sum() == pytest.approx(float(whole), rel=1e-5)
    assert slopes.sum() == pytest.approx(float(slope), rel=1e-5)
    for name, value in aux.items():
        assert_allclose(others[name], [value, value], rtol=1e-5)
    with pytest.raises(ValueError, match="x0: "):
        jax.vmap(lambda x, e: loss(0.3, x, e, "i"), axis_name="i")(x0, energy)
