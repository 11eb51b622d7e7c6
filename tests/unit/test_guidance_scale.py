"""The regression within states and the algorithm's own reference, where both are known."""

import itertools

import numpy as np
import pytest

from experiments.rl.guidance_scale_regression import reference_log_ratios, within_regression

N, M = 200, 12


def normal_log_density(x, mean, precision):
    return 0.5 * np.log(precision / (2 * np.pi)) - 0.5 * precision * (x - mean) ** 2


def gaussians(rng, b):
    """Q quadratic and mu Gaussian in every state: so is mu exp(b Q) / Z, the law holds exactly."""
    actions = rng.standard_normal((N, M))
    best, mean, level = rng.standard_normal((3, N, 1))
    q = -1.5 * (actions - best) ** 2 + 30 * level
    precision = 4.0 + 3.0 * b
    tilted = normal_log_density(actions, (4.0 * mean + 3.0 * b * best) / precision, precision)
    return tilted - normal_log_density(actions, mean, 4.0), q


@pytest.mark.parametrize("b", [0.5, 2.0, 40.0])
def test_the_slope_of_tilted_gaussians_is_the_guidance_scale(b):
    ratios, q = gaussians(np.random.default_rng(0), b)
    keep = np.random.default_rng(1).random(q.shape) < 0.7
    found = within_regression(ratios, q, keep)
    expected = [b, b, b, 1, b, b, b, 1, keep.mean()]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_levels_of_states_and_left_out_actions_do_not_matter():
    ratios, q = gaussians(np.random.default_rng(0), 2.0)
    keep = np.random.default_rng(1).random(q.shape) < 0.5
    keep[:5] = False
    keep[5:10] = np.arange(M) < 3  # too few for a slope
    noise = np.random.default_rng(2).standard_normal(q.shape)
    expected = within_regression(ratios + noise, q, keep)
    spoiled = np.where(keep, ratios + noise, np.nan)
    spoiled[5:10] = 1e9
    levels = 100 * np.random.default_rng(3).standard_normal((N, 1))
    found = within_regression(spoiled + levels, q - levels, keep)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.low < 2.0 < found.high
    assert found.pooled_low < 2.0 < found.pooled_high
    assert found.r2 < 1


def test_the_interval_covers():
    """95% intervals of 200 noisy data sets, with noise that states share a scale of."""
    hits, pooled = 0, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        ratios, q = gaussians(rng, 1.0)
        noise = 5 * rng.standard_normal((N, M)) * rng.exponential(size=(N, 1))
        found = within_regression(ratios + noise, q, np.ones_like(q), resamples=300, seed=seed)
        hits += found.low < 1.0 < found.high
        pooled += found.pooled_low < 1.0 < found.pooled_high
    assert 0.88 < hits / 200 < 0.99
    assert 0.88 < pooled / 200 < 0.99


def test_a_few_states_of_wide_values_move_the_pooled_slope_alone():
    ratios, q = gaussians(np.random.default_rng(0), 2.0)
    q[:10] *= 100
    found = within_regression(ratios, q, np.ones_like(q))
    assert found.slope == pytest.approx(2.0)
    assert found.pooled < 0.1
    # Without spread there is no slope.
    found = within_regression(np.zeros((3, 4)), np.ones((3, 4)), np.ones((3, 4)))
    assert np.isnan(found.slope)
    assert found.kept == 1


def one_period(mass, q, beta, size, copies):
    """The first period by enumeration of every support set."""
    places, new = range(len(mass)), np.zeros_like(mass)
    for chosen in itertools.product(places, repeat=size + 1):
        chosen = np.array(chosen)
        weights = np.exp(beta * q[chosen]) * np.array([copies] + [1] * size)
        np.add.at(new, chosen, np.prod(mass[chosen]) * weights / weights.sum())
    return np.log(new / mass)


@pytest.mark.parametrize("copies", [0.2, 1.0, 3.0])
def test_reference_agrees_with_enumeration(copies):
    mass, q = np.array([0.1, 0.4, 0.3, 0.2]), np.array([1.0, -0.5, 0.0, 2.0])
    found = reference_log_ratios(mass[None], q[None], np.array([1.5]), 3, copies, draws=40_000)
    np.testing.assert_allclose(found[0, 0], one_period(mass, q, 1.5, 3, copies), atol=0.02)


def test_reference_of_large_support_sets_is_the_law():
    actions = np.linspace(-1, 1, 41)
    mass = np.exp(-2 * (actions[None] - np.array([[0.1], [-0.3]])) ** 2)
    mass /= mass.sum(1, keepdims=True)
    q = -2 * (actions[None] - np.array([[0.5], [0.2]])) ** 2
    betas = np.array([1.0, 1.0, 0.5])
    keep = np.ones_like(q)

    def slopes(size, copies):
        found = reference_log_ratios(mass, q, betas, size, copies, draws=4000)
        return np.array([within_regression(ratio, q, keep).slope for ratio in found])

    np.testing.assert_allclose(slopes(400, 1e-3), np.cumsum(betas), rtol=0.03)
    small, held = slopes(8, 1e-3), slopes(8, 8.0)
    assert (held < small).all()
    assert (small < np.cumsum(betas)).all()
    # One action and no data action: nothing to choose from.
    np.testing.assert_allclose(slopes(1, 1e-9), 0, atol=1e-6)
