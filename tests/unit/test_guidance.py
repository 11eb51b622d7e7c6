"""Guidance methods with exact ingredients: the fields of eq. 4.6 and 4.7 on finite data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from efm_jax import exact, guidance
from tests.problems import OT, each_path


@pytest.fixture
def problem(x64):
    """Points, times, data and energies in [0, 1]."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(9, 2))
    return (
        jnp.asarray(rng.normal(size=(5, 2))),
        jnp.asarray([0.1, 0.3, 0.5, 0.7, 0.9]),
        jnp.asarray(data),
        jnp.asarray(rng.uniform(size=9)),
    )


def exact_logit(path, data, energy):
    """The classifier's minimizer log p / (1 - p), p = E[exp(-E(x0)) | x] = exp(-E_t) at beta 1."""

    def logit(x, t):
        log_prob = -exact.intermediate_energy(path, x, t, data, energy, 1.0)
        return log_prob - jnp.log(-jnp.expm1(log_prob))

    return logit


@each_path
def test_methods_with_exact_ingredients_give_their_scores(path, ref, problem):
    """Eq. 4.6 by a classifier and without; at every beta eq. 4.7 by contrast."""
    x, t, data, energy = problem

    def plain(x, t):
        return exact.score(path, x, t, data)

    def conditional(x, t):
        return exact.score(path, x, t, data, -energy)

    @jax.jit
    def scores(beta):
        def log_ratio(x, t):  # any function of t may be added: it has no gradient in x
            return 3 * t - exact.intermediate_energy(path, x, t, data, energy, beta)

        logit = exact_logit(path, data, energy)
        found = {
            "classifier": guidance.classifier_guided(plain, logit, beta)(x, t),
            "classifier-free": guidance.classifier_free_guided(plain, conditional, beta)(x, t),
            "contrastive": guidance.contrastive_guided(plain, log_ratio)(x, t),
        }
        eq_46 = exact.cg_score(path, x, t, data, jnp.exp(-energy), beta)
        return found, eq_46, exact.score(path, x, t, data, -beta * energy)

    for beta in (0.0, 1.0, 4.0):
        found, eq_46, eq_47 = scores(beta)
        assert_allclose(found["classifier"], eq_46, rtol=1e-7)
        assert_allclose(found["classifier-free"], eq_46, rtol=1e-9)
        assert_allclose(found["contrastive"], eq_47, rtol=1e-7)


def test_classifier_loss_is_least_at_the_posterior_probability(x64):
    # One time, two data points in one dimension, and a logit for each cell of x: the minimizer is
    # known.
    path, data = OT, jnp.array([[-1.0], [1.0]])
    prob = jnp.array([0.9, 0.2])
    x0 = jnp.tile(data, (40_000, 1))
    edges = jnp.array([-1.0, -0.3, 0.3, 1.0])

    def logit_fn(table):
        return lambda x, t: table[jnp.digitize(x[:, 0], edges)]

    def loss(table):
        return guidance.classifier_loss(
            logit_fn(table), path, jax.random.key(0), x0, jnp.tile(prob, 40_000)
        )[0]

    # E[p(c | x0) | cell], by integration over t uniform and the noise.
    rng = np.random.default_rng(0)
    t, which = rng.uniform(size=200_000), rng.integers(2, size=200_000)
    x = (1 - t) * np.asarray(data)[which, 0] + t * rng.normal(size=200_000)
    cell = np.digitize(x, np.asarray(edges))
    expected = np.array([np.asarray(prob)[which[cell == i]].mean() for i in range(5)])
    # The loss is convex, and least where its gradient is 0: P(cell) (sigmoid(logit) - expected).
    gradient = jax.jit(jax.grad(loss))
    share = np.bincount(cell) / len(cell)
    at_expected = gradient(jnp.log(expected / (1 - expected))) / share
    assert_allclose(at_expected, np.zeros(5), atol=0.01)
    assert_allclose(gradient(jnp.zeros(5)) / share, 0.5 - expected, atol=0.01)


def test_classifier_loss_is_finite_for_huge_logits_and_takes_no_gradient_of_the_probability():
    x0, prob = jnp.ones((4, 2)), jnp.array([0.0, 1.0, 0.3, 0.7])

    def loss(prob):
        return guidance.classifier_loss(
            lambda x, t: 1e4 * x[:, 0], OT, jax.random.key(0), x0, prob
        )[0]

    value, gradient = jax.value_and_grad(loss)(prob)
    assert jnp.isfinite(value)
    assert_array_equal(gradient, 0.0)


def test_labels_are_dropped_at_the_stated_rate():
    labels = jnp.ones(20_000, jnp.int32)
    dropped = guidance.drop_labels(jax.random.key(0), labels, 0.2, null_label=2)
    assert dropped.dtype == labels.dtype
    assert set(np.unique(dropped)) == {1, 2}
    assert_allclose((dropped == 2).mean(), 0.2, atol=4 * np.sqrt(0.2 * 0.8 / 20_000))
    assert_array_equal(guidance.drop_labels(jax.random.key(0), labels, 0.0, 2), labels)


def test_bad_arguments_are_named():
    key, x0 = jax.random.key(0), jnp.ones((4, 2))
    with pytest.raises(ValueError, match="class_prob"):
        guidance.classifier_loss(lambda x, t: x[:, 0], OT, key, x0, jnp.ones(3))
    with pytest.raises(ValueError, match="logit_fn"):
        guidance.classifier_loss(lambda x, t: x, OT, key, x0, jnp.ones(4))
    with pytest.raises(ValueError, match="rate"):
        guidance.drop_labels(key, jnp.ones(3, int), 1.5, 0)
    with pytest.raises(TypeError, match="labels"):
        guidance.drop_labels(key, jnp.ones(3), 0.5, 0)
    with pytest.raises(ValueError, match="log_factor"):
        guidance.contrastive_guided(lambda x, t: x, lambda x, t: x)(x0, jnp.ones(4))


@each_path
@pytest.mark.parametrize("prediction", ["velocity", "noise", "data"])
def test_any_prediction_is_guided_as_its_score_is(x64, path, ref, prediction):
    rng = np.random.default_rng(0)
    x, t = jnp.asarray(rng.normal(size=(5, 2))), jnp.linspace(0.1, 0.9, 5)
    logit, score = (lambda x, t: jnp.sin(x).sum(-1) * t), (lambda x, t: -x)
    scale = lambda t: 1 + t  # noqa: E731
    plain = lambda x, t: path.convert(score(x, t), x, t, "score", prediction)  # noqa: E731
    options = {"prediction": prediction, "path": path}
    got = guidance.classifier_guided(plain, logit, scale, **options)(x, t)
    want = guidance.classifier_guided(score, logit, 1 + t)(x, t)
    np.testing.assert_allclose(got, path.convert(want, x, t, "score", prediction), rtol=1e-9)
    at_noise = guidance.classifier_guided(lambda x, t: x, logit, 2.0, **options)
    assert np.isfinite(at_noise(x, jnp.ones(5))).all()


@each_path
def test_monte_carlo_guidance_over_all_data_is_exact(x64, path, ref):
    rng = np.random.default_rng(0)
    data, energy = jnp.asarray(rng.normal(size=(30, 2))), jnp.asarray(rng.normal(size=30))
    x, t = jnp.asarray(rng.normal(size=(5, 2))), jnp.linspace(0.1, 0.9, 5)
    plain = lambda x, t: exact.velocity(path, x, t, data)  # noqa: E731
    got = guidance.monte_carlo_guided(plain, path, data, energy, 2.0)(x, t)
    np.testing.assert_allclose(got, exact.velocity(path, x, t, data, -2.0 * energy), rtol=1e-9)
