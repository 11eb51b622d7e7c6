"""Datasets of arrays: what a file of the same rows gives, and the same refusals."""

import gymnasium
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from efm_jax import Dataset
from efm_jax.data import DataError, load_dataset
from efm_jax.envs import evaluate
from tests.unit.data_fixtures import d4rl_arrays, write_d4rl

FLAGS = {"terminals": "terminated", "timeouts": "truncated"}


def given(terminals=(0, 0, 1, 0, 0, 0, 0), timeouts=(0, 0, 0, 0, 1, 0, 0), **changes):
    rows = d4rl_arrays(terminals, timeouts)
    return {FLAGS.get(name, name): array for name, array in rows.items()} | changes


@pytest.mark.parametrize("with_next", [False, True])
def test_arrays_are_read_as_a_file_of_them_is(tmp_path, with_next):
    rows = d4rl_arrays((0, 0, 1, 0, 0, 0, 0), (0, 0, 0, 0, 1, 0, 0))
    if with_next:
        rows["next_observations"] = rows["observations"] + 0.5
    file = load_dataset(write_d4rl(tmp_path / "rows.hdf5", rows))
    arrays = {FLAGS.get(name, name): np.asarray(array, float) for name, array in rows.items()}
    dataset = Dataset.from_arrays(**arrays)
    assert dataset.fingerprint() == file.fingerprint()
    assert dataset.transitions.size == (7 if with_next else 5)
    for mine, theirs in zip(dataset[2:6], file[2:6], strict=True):
        assert_array_equal(mine, theirs)
    arrays["observations"][:] = 0.0  # they were copied
    assert dataset.fingerprint() == file.fingerprint()


def own(limit=7):
    return gymnasium.make("Pendulum-v1", max_episode_steps=limit)


def test_bounds_are_the_environments_or_given():
    arrays = given(actions=np.full((7, 1), 1.5))
    for env, limit in (("Pendulum-v1", 200), ("gymnasium.envs:Pendulum-v1", 200), (own, 7)):
        dataset = Dataset.from_arrays(**arrays, env=env)
        assert (dataset.action_low, dataset.action_high) == (-2, 2)
        assert f'"max_episode_steps": {limit}' in dataset.env_spec
    lengths = evaluate(
        lambda observations, step: np.zeros((1, 1, 1)), dataset.own_env, episode_seeds=[0]
    ).lengths
    assert lengths == 7
    assert Dataset.from_arrays(**arrays, action_high=3).action_high == 3
    moved = dataset.in_environment("Pendulum-v1", 9)
    assert (moved.own_env, '"max_episode_steps": 9' in moved.env_spec) == (None, True)


def broken():
    raise RuntimeError("no\nsimulator")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards": np.zeros(6)}, "arrays: lengths disagree: observations have 7 rows, rewards 6"),
        ({"rewards": np.full(7, np.nan)}, r"arrays: rewards\[0\] is not finite: nan"),
        ({"observations": np.zeros((7, 2, 2, 3))}, "look like images"),
        ({"actions": np.zeros((7, 1), int)}, "discrete"),
        ({"actions": np.full((7, 1), 1.5)}, r"actions\[0\]\[0\] is outside its bounds \[-1.0, 1.0"),
        ({"truncated": np.arange(7)}, r"truncated\[2\]: expected 0 or 1; got 2"),
        ({"action_low": np.zeros(3)}, r"action_low: expected shape \(2,\); got \(3,\)"),
        ({"action_low": 1.0}, "empty bounds"),
        ({"env": "NoSuch-v0"}, "'NoSuch-v0' is not known"),
        ({"env": broken}, r"environment broken cannot be made \(RuntimeError: no simulator\)"),
        (
            {"env": own},
            "observation dimensions and actions of shape .1,.; the data has 3 and",
        ),
        (
            {"env": own, "action_low": -1, "action_high": 1, "max_episode_steps": 0},
            "max_episode_steps: expected an integer >= 1",
        ),
        (
            {"terminated": np.zeros(7), "truncated": np.ones(7)},
            "no row of 7 has a next",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        Dataset.from_arrays(**given() | changes)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, DataError) or "expected" in words
