"""Distances between samples against assignment problems, plain NumPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from efm_jax.distances import mmd, sliced_wasserstein


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def test_sliced_wasserstein_in_one_dimension_is_the_optimal_assignment(x64):
    x, y = normal(0, 40, 1), 0.5 + 2 * normal(1, 40, 1)
    cost = cdist(x, y) ** 2
    expected = np.sqrt(cost[linear_sum_assignment(cost)].mean())
    found = sliced_wasserstein(jax.random.key(0), x, y, num_projections=3)
    assert found.dtype == jnp.float64
    assert_allclose(found, expected, rtol=1e-12)


def test_sliced_wasserstein_of_a_shift_is_its_length_over_root_d(x64):
    # E (theta . v)^2 = |v|^2 / d for theta uniform on the sphere.
    x, shift = normal(0, 10, 3), np.array([3.0, -1.0, 2.0])
    found = sliced_wasserstein(jax.random.key(0), x, x + shift, num_projections=20_000)
    assert_allclose(found, np.linalg.norm(shift) / np.sqrt(3), rtol=0.02)


def test_mmd_matches_numpy(x64):
    x, y = normal(0, 30, 2), 0.3 + normal(1, 20, 2)

    def mean_kernel(a, b):
        squares = cdist(a, b) ** 2
        return np.mean(
            [np.exp(-squares / (2 * h**2)).mean() for h in np.sqrt(2) * np.array([0.25, 0.5, 1])]
        )

    expected = np.sqrt(mean_kernel(x, x) - 2 * mean_kernel(x, y) + mean_kernel(y, y))
    assert_allclose(mmd(x, y), expected, rtol=1e-10)


@pytest.mark.parametrize(
    "distance", [mmd, lambda x, y: sliced_wasserstein(jax.random.key(0), x, y)]
)
def test_distances_are_metrics_of_samples_and_compile(distance):
    x, y = normal(0, 500, 2).astype(np.float32), normal(1, 500, 2).astype(np.float32)
    assert float(distance(x, x[::-1])) < 1e-3  # the order of a sample does not matter
    near, far = jax.jit(distance)(x, y), jax.jit(distance)(x, y + 1)
    assert far > 2 * near > 0
    assert_allclose(distance(x, y), distance(y, x), rtol=1e-4)
    # Far from the origin the same numbers, up to the rounding of the shifted points.
    assert_allclose(distance(x + 100, y + 100), distance(x, y), rtol=1e-2)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((3, 2)), np.zeros((4, 2)), r"y: expected shape \(3, 2\); got \(4, 2\)"),
        (np.zeros((3, 2)), np.zeros((3, 1)), "y: expected shape"),
        (np.zeros(3), np.zeros(3), "x: expected at least 2 axes"),
    ],
)
def test_bad_shapes_are_named(x, y, message):
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(jax.random.key(0), x, y)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="x: expected a floating-point array"):
        mmd(np.zeros((3, 2), int), np.zeros((3, 2)))
