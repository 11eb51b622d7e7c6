import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from efm_jax.data import REWARD_TRANSFORMS, DataError, fit_normalizer, preprocess
from efm_jax.data.dataset import Dataset
from efm_jax.types import Transitions


def make_dataset(n=500, returns=(10.0, 30.0), **changes):
    rng = np.random.default_rng(0)
    observations = rng.normal([5, -100, 0], [2, 0.01, 30], (n, 3))
    arrays = {
        "observations": observations,
        "actions": rng.uniform([-2, 0], [2, 10], (n, 2)),
        "rewards": rng.normal(size=n),
        "next_observations": observations + 1,
        "terminated": np.zeros(n),
    } | changes
    return Dataset(
        name="made up",
        transitions=Transitions(
            **{name: np.asarray(array, np.float32) for name, array in arrays.items()}
        ),
        episode_returns=np.array(returns),
        episode_lengths=np.array([n] * len(returns)),
        action_low=np.array([-2, 0], np.float32),
        action_high=np.array([2, 10], np.float32),
        env_spec=None,
        reference_scores=None,
    )


def test_standardized_and_scaled():
    dataset = make_dataset()
    normalizer = fit_normalizer(dataset)
    data = preprocess(dataset, normalizer)
    assert all(array.dtype == np.float32 for array in (*data, *normalizer))
    assert_allclose(data.observations.mean(0, dtype=np.float64), 0, atol=1e-3)
    assert_allclose(data.observations.std(0, dtype=np.float64), 1, rtol=1e-3)
    exact = dataset.transitions.observations.astype(np.float64)
    assert_allclose(normalizer.observation_mean, exact.mean(0), rtol=1e-6)
    assert_allclose(normalizer.observation_std, exact.std(0), rtol=1e-6)
    # Next observations with the statistics of the observations.
    shift = 1 / normalizer.observation_std
    moved = data.next_observations - data.observations
    assert_allclose(moved, np.tile(shift, (500, 1)), rtol=2e-3)
    actions = dataset.transitions.actions
    assert_allclose(data.actions, actions / [2, 5] - [0, 1], atol=1e-6)
    assert np.abs(data.actions).max() <= 1
    assert_allclose(normalizer.unscale_actions(data.actions), actions, atol=1e-5)
    assert_array_equal(data.rewards, dataset.transitions.rewards)


def test_bounds_become_exactly_one():
    low, high = np.float32(-0.1), np.float32(0.3)
    dataset = make_dataset(2, actions=[[low, low], [high, high]])
    dataset = dataset._replace(action_low=np.array([low] * 2), action_high=np.array([high] * 2))
    assert_array_equal(preprocess(dataset, fit_normalizer(dataset)).actions, [[-1, -1], [1, 1]])


def test_dimensions_that_hardly_vary_are_scaled_by_their_farthest_value():
    rng = np.random.default_rng(0)
    observations = rng.normal(0, [1, 2e-4, 1], (50_000, 3))
    observations[7, 1] = 0.02  # a hundred deviations
    observations[7, 2] = -40
    dataset = make_dataset(50_000, observations=observations, rewards=np.zeros(50_000))
    notes = []
    normalizer = fit_normalizer(dataset, notes=notes)
    exact = dataset.transitions.observations.astype(np.float64)
    far = np.abs(exact - exact.mean(0)).max(0)
    expected = [exact[:, 0].std(), far[1] / 10, exact[:, 2].std()]
    np.testing.assert_allclose(normalizer.observation_std, expected, rtol=1e-6)
    assert np.abs(preprocess(dataset, normalizer).observations[:, 1]).max() <= 10.0001
    assert len(notes) == 1
    assert notes[0].startswith("observation dimensions 1 hardly vary")


def test_dates_are_scaled_and_said_to_be_coarse():
    time = 1.7e9 + np.arange(500) * 10.0
    observations = np.stack([np.sin(time), time, np.cos(time)], axis=1)
    dataset = make_dataset(observations=observations, next_observations=observations)
    notes = []
    normalizer = fit_normalizer(dataset, notes=notes)
    assert np.abs(preprocess(dataset, normalizer).observations).max() < 10.5
    assert "dimensions 1 lie so far from 0 that float32 loses more than 1%" in notes[-1]


@pytest.mark.parametrize(
    ("seconds", "coarse"), [(0.0, False), (0.3, True), (50.0, True), (1e7, False)]
)
def test_dates_are_said_to_be_coarse_where_float32_keeps_little(seconds, coarse):
    """Of ``seconds`` between rows, float32 keeps 128: nothing is said of a constant."""
    # 1699999936 is a float32, and the rows go to the next one.
    time = 1_699_999_936 + np.arange(500) * seconds
    observations = np.stack([np.sin(time), time], axis=1)
    dataset = make_dataset(observations=observations, next_observations=observations)
    notes = []
    fit_normalizer(dataset, notes=notes)
    assert any("dimensions 1 lie so far from 0" in note for note in notes) == coarse


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"observations": np.full((500, 3), np.nan)}, "observations[0][0] is not finite"),
        ({"rewards": np.full(500, np.inf)}, "rewards[0] is not finite"),
        ({"rewards": np.zeros((500, 1))}, "rewards: expected 1 axes"),
        ({"terminated": np.full(500, 0.5)}, "terminated[0]: expected 0 or 1"),
        ({"terminated": np.zeros(499)}, "lengths disagree"),
        ({"next_observations": np.zeros((500, 4))}, "next_observations (500, 4)"),
        ({"actions": np.full((500, 2), 2.5)}, "actions[0][0] is outside its bounds"),
        ({"actions": np.zeros((500, 3))}, "actions have shape (500, 3), their bounds (2,)"),
        ({"observations": np.zeros((500, 4, 4))}, "images"),
    ],
)
def test_arrays_given_in_python_are_checked_as_files_are(changes, words):
    good = make_dataset()
    with pytest.raises(DataError) as caught:
        fit_normalizer(make_dataset(**changes))
    assert words in str(caught.value)
    with pytest.raises(DataError):
        preprocess(make_dataset(**changes), fit_normalizer(good))
    for low, high in (
        ([0, 0], [0, 1]),
        ([-np.inf, 0], [1, 1]),
        ([-3e38, 0], [3e38, 10]),
        ([0], [9]),
    ):
        bounds = np.array(low, np.float32), np.array(high, np.float32)
        with pytest.raises(DataError):
            fit_normalizer(good._replace(action_low=bounds[0], action_high=bounds[1]))


def test_constant_dimensions_are_only_centered():
    # 0, a value that float32 cannot hold, a large one; and small variations that are real.
    observations = np.tile(np.array([0, 0.1, 1e6], np.float32), (500, 1))
    dataset = make_dataset(
        observations=observations, next_observations=observations + np.float32(1)
    )
    normalizer = fit_normalizer(dataset)
    assert_array_equal(normalizer.observation_std, [1, 1, 1])
    data = preprocess(dataset, normalizer)
    assert_allclose(data.observations, 0, atol=1e-6)
    assert_allclose(data.next_observations, 1, atol=1e-6)
    small = np.random.default_rng(0).normal(0, 1e-4, (500, 3))
    assert np.all(fit_normalizer(make_dataset(observations=small)).observation_std < 2e-4)


def test_reward_transforms():
    assert set(REWARD_TRANSFORMS) == {"none", "locomotion", "antmaze"}
    dataset = make_dataset(returns=(10.0, 30.0, 20.0))
    normalizer = fit_normalizer(dataset)
    rewards = dataset.transitions.rewards
    locomotion = preprocess(dataset, normalizer, "locomotion").rewards
    assert_allclose(locomotion, rewards * 1000 / 20, rtol=1e-6)
    assert_allclose(preprocess(dataset, normalizer, "antmaze").rewards, rewards - 1, atol=1e-6)
    assert locomotion.dtype == np.float32
    with pytest.raises(ValueError, match="reward_transform"):
        preprocess(dataset, normalizer, "other")


def test_locomotion_refuses():
    for returns, word in (((5.0, 5.0), "every episode"), ((5.0,), "2 episodes")):
        dataset = make_dataset(returns=returns)
        with pytest.raises(DataError, match=word):
            preprocess(dataset, fit_normalizer(dataset), "locomotion")


def test_normalizer_of_another_dataset():
    dataset = make_dataset()
    normalizer = fit_normalizer(dataset)
    with pytest.raises(ValueError, match="observation_mean"):
        preprocess(dataset, normalizer._replace(observation_mean=np.zeros(2)))
    with pytest.raises(ValueError, match="action_low"):
        preprocess(dataset, normalizer._replace(action_low=np.zeros(3)))
