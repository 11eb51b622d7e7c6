import io
import json

import numpy as np
import pytest
from matplotlib import image
from numpy.testing import assert_allclose

from efm_jax.data import load_dataset, summarize
from efm_jax.data.dataset import Dataset
from efm_jax.data.summary_plot import draw_summary
from efm_jax.types import Transitions
from tests.unit.data_fixtures import d4rl_arrays, episode, write_d4rl, write_minari

SPEC = '{"id": "Pendulum-v1"}'


def recording(
    lengths=(60, 50, 40), *, terminated=(True, False, False), observation_size=3, action_size=2
):
    """Episodes of random walks, without anything to complain about."""
    rng = np.random.default_rng(0)
    walks = [np.cumsum(rng.normal(size=(n + 1, observation_size)), axis=0) for n in lengths]
    last = np.cumsum(lengths) - 1
    total = sum(lengths)
    ends = np.zeros(total, np.float32)
    ends[last[list(terminated)]] = 1
    rewards = rng.normal(size=total)
    return Dataset(
        name="made/up-v0",
        transitions=Transitions(
            observations=np.concatenate([walk[:-1] for walk in walks]).astype(np.float32),
            actions=rng.uniform(-0.9, 0.9, (total, action_size)).astype(np.float32),
            rewards=rewards.astype(np.float32),
            next_observations=np.concatenate([walk[1:] for walk in walks]).astype(np.float32),
            terminated=ends,
        ),
        episode_returns=np.add.reduceat(rewards, np.cumsum((0, *lengths[:-1]))),
        episode_lengths=np.array(lengths),
        action_low=-np.ones(action_size, np.float32),
        action_high=np.ones(action_size, np.float32),
        env_spec=SPEC,
        reference_scores=None,
    )


def changed(dataset, **arrays):
    return dataset._replace(transitions=dataset.transitions._replace(**arrays))


def problems(dataset):
    return summarize(dataset)["problems"]


def test_numbers():
    dataset = recording()
    data, summary = dataset.transitions, json.loads(json.dumps(summarize(dataset)))
    lengths = {"min": 40, "q25": 45, "median": 50, "q75": 55, "max": 60, "mean": 50}
    ends = {"trajectories": 3, "terminated": 1, "truncated": 2, "terminated_steps": 1}
    assert summary["ends"].pop("terminated_share") == pytest.approx(1 / 3)
    assert summary.items() >= {
        "dataset": "made/up-v0", "environment": "Pendulum-v1", "transitions": 150, "episodes": 3,
        "lengths": lengths, "ends": ends, "copies": 0, "problems": [],
    }.items()  # fmt: skip
    assert summary["returns"]["mean"] == pytest.approx(dataset.episode_returns.mean())
    rewards, actions = summary["rewards"], summary["actions"]
    assert (rewards["values"], rewards["zero_share"]) == (None, 0)
    assert rewards["max"] == pytest.approx(float(data.rewards.max()))
    assert_allclose(summary["observations"]["std"], data.observations.std(0), rtol=1e-4)
    assert_allclose(actions["max"], data.actions.max(0))
    assert (actions["low"], actions["at_bounds"]) == ([-1, -1], [0, 0])


def test_use_of_actions():
    dataset = recording()
    actions = dataset.transitions.actions.copy()
    actions[:, 0] = np.where(np.arange(150) < 90, -1, 0.5)
    actions[80:, 1] = 0.9995
    summary = summarize(changed(dataset, actions=actions))
    assert_allclose(summary["actions"]["at_bounds"], [90 / 150, 70 / 150])
    assert summary["actions"]["any_at_bounds"] == 1.0
    assert summary["problems"] == ["action dimensions 0 are at a bound in more than 50% of steps"]
    actions[:, 0] = 1
    actions[:, 1] *= 0.05
    assert problems(changed(dataset, actions=actions)) == [
        "action dimensions 0 never change",
        "action dimensions 1 use less than 10% of their interval",
    ]


def test_sparse_and_useless_rewards():
    dataset = recording()
    sparse = (np.arange(150) % 50 == 0).astype(np.float32)
    rewards = summarize(changed(dataset, rewards=sparse))["rewards"]
    assert rewards["values"] == [0, 1]
    assert rewards["zero_share"] == pytest.approx(147 / 150)
    assert problems(changed(dataset, rewards=np.zeros(150, np.float32))) == [
        "every reward is 0: there is nothing to learn from"
    ]
    assert problems(dataset._replace(episode_returns=np.full(3, 7.0))) == [
        "every episode returned 7"
    ]


def test_copies_are_exact():
    dataset = recording()
    twice = Transitions(*(np.concatenate([array, array[10:20]]) for array in dataset.transitions))
    summary = summarize(dataset._replace(transitions=twice))
    assert summary["copies"] == 10
    assert "10 transitions (6.2%) are exact copies of earlier ones" in summary["problems"]
    twice.rewards[-1] += 1
    assert summarize(dataset._replace(transitions=twice))["copies"] == 9
    # Equal numbers with other bits, and columns that trade places.
    data = Transitions(*(np.zeros((2, 2) if i in (0, 1, 3) else 2, np.float32) for i in range(5)))
    data.observations[1] = -0.0
    data.actions[:] = [[0, 1], [0, 1]]
    assert summarize(dataset._replace(transitions=data))["copies"] == 1
    data.actions[1] = [1, 0]
    assert summarize(dataset._replace(transitions=data))["copies"] == 0


def test_observations_that_never_change_or_are_far_off():
    dataset = recording(lengths=(6000, 5000), terminated=(True, False))
    observations = dataset.transitions.observations.copy()
    observations[:, 1] = 5 + 1e-7 * np.arange(11_000) / 11_000
    observations[:, 2] = np.where(np.arange(11_000) == 0, 1e6, 0)
    following = np.roll(observations, -1, axis=0)
    found = summarize(changed(dataset, observations=observations, next_observations=following))
    assert found["observations"]["constant"] == [1]
    assert "observation dimensions 1 never change" in found["problems"]
    assert "dimensions 2 have values farther than 100" in " ".join(found["problems"])


def test_many_dimensions_are_not_all_named():
    dataset = recording(observation_size=12)
    observations = np.zeros((150, 12), np.float32)
    still = changed(dataset, observations=observations, next_observations=observations)
    named = "observation dimensions 0, 1, 2, 3, 4, 5, 6, 7 and 4 more never change"
    assert problems(still)[-1] == named


def test_ends_that_are_not_marked(tmp_path):
    # Two episodes by the file, four by its observations: rows 2 and 6 lead to what row 3 and 7 are
    # not.
    arrays = d4rl_arrays(np.zeros(9), [0, 0, 0, 0, 1, 0, 0, 0, 1])
    arrays["next_observations"] = np.roll(arrays["observations"], -1, axis=0)
    for row in (2, 4, 6, 8):
        arrays["next_observations"][row] += 0.5
    dataset = load_dataset(write_d4rl(tmp_path / "a.hdf5", arrays))
    summary = summarize(dataset)
    assert (summary["episodes"], summary["ends"]["trajectories"]) == (2, 4)
    # One more than the episodes may be a recording that stops.
    assert summary["problems"][:2] == [
        "names no environment: training needs one to evaluate in",
        "1 ends of trajectories are not marked: returns and lengths there are of several episodes "
        "together",
    ]


def test_ends_where_the_recording_went_on(tmp_path):
    arrays = d4rl_arrays(np.zeros(9), [0, 0, 0, 0, 1, 0, 0, 0, 1])
    arrays["next_observations"] = arrays["observations"] + 1  # the next row's, all along
    path = write_d4rl(tmp_path / "a.hdf5", arrays)
    expected = "1 episodes begin where the one before led: ends are marked where the data goes on"
    assert expected in problems(load_dataset(path))
    arrays["next_observations"][4] += 1
    assert expected not in problems(load_dataset(write_d4rl(tmp_path / "b.hdf5", arrays)))


def test_trajectories_of_files_without_next_observations_and_of_minari(tmp_path, monkeypatch):
    arrays = d4rl_arrays([0, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0])
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    walks = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    write_minari("test/a-v0", [episode(4, walks[0], terminated=True), episode(4, walks[1])])
    file = write_d4rl(tmp_path / "a.hdf5", arrays)
    for source, expected in ((file, [3, 1, 2]), ("test/a-v0", [2, 1, 1])):
        ends = summarize(load_dataset(source))["ends"]
        assert [ends[name] for name in ("trajectories", "terminated", "truncated")] == expected


def test_transitions_over_a_reset():
    dataset = recording(lengths=(200, 300), terminated=(False, False))
    following = dataset.transitions.next_observations.copy()
    following[199, 1] += 1000
    jump = changed(dataset, next_observations=following)
    assert "1 transitions lead 20 times as far" in " ".join(problems(jump))
    # A switch that hardly ever moves, and then all the way, is no jump.
    observations = dataset.transitions.observations.copy()
    observations[:, 1] = np.arange(500) > 250
    following = dataset.transitions.next_observations.copy()
    following[:, 1] = np.arange(1, 501) > 250
    switch = changed(dataset, observations=observations, next_observations=following)
    assert "as far" not in " ".join(problems(switch))


def test_episodes_of_one_step():
    dataset = recording()
    assert problems(dataset._replace(episode_lengths=np.array([1, 2, 3]))) == [
        "1 of 3 episodes have a single step"
    ]


def test_ogbenchs_own_layout_has_no_false_problems(tmp_path):
    """Quaternions that change their sign, and a task that is done where trajectories begin."""
    rng = np.random.default_rng(0)
    trajectories, steps, size = 40, 51, 16
    walks = rng.normal(size=(trajectories, 1, size))
    walks = walks + 0.02 * np.cumsum(rng.normal(size=(trajectories, steps, size)), axis=1)
    flips = rng.random((trajectories, steps, 1)) < 0.002
    walks[..., :4] *= np.where(np.cumsum(flips, axis=1) % 2, -1, 1)
    masks = np.ones((trajectories, steps), np.float32)
    masks[:8, 0] = 0
    path = tmp_path / "cube-single-play-v0.npz"
    np.savez(
        path,
        observations=walks.reshape(-1, size).astype(np.float32),
        actions=rng.uniform(-0.9, 0.9, (trajectories * steps, 2)).astype(np.float32),
        terminals=np.tile(np.arange(steps) == steps - 1, trajectories).astype(np.float32),
        rewards=masks.reshape(-1) - 1 + rng.normal(size=trajectories * steps).astype(np.float32),
        masks=masks.reshape(-1),
    )
    assert flips.sum() > 0
    dataset = load_dataset(str(path))
    assert (dataset.episode_lengths == 1).sum() == 8
    assert problems(dataset) == ["names no environment: training needs one to evaluate in"]
    # An end that is not marked is found all the same: 25 and 26 are of two trajectories.
    walks[3, 26:] = rng.normal(size=size)
    with np.load(path) as file:
        changed = dict(file) | {"observations": walks.reshape(-1, size).astype(np.float32)}
    np.savez(path, **changed)
    assert "1 transitions lead 20 times as far" in " ".join(problems(load_dataset(str(path))))


def panels(png):
    return image.imread(io.BytesIO(png), format="png")


@pytest.mark.parametrize("references", [None, (-20.0, 30.0)])
def test_picture(references):
    dataset = recording()
    picture = panels(draw_summary(dataset, summarize(dataset), references))
    assert picture.shape[0] > 500
    assert picture.shape[1] > 1000
    # Ink in each of the six panels.
    for half in np.array_split(picture, 2):
        for panel in np.array_split(half, 3, axis=1):
            assert (panel[..., 2] - panel[..., 0] > 0.2).sum() > 20


def test_picture_of_constants():
    dataset = recording(lengths=(50,), terminated=(True,))._replace(episode_returns=np.zeros(1))
    zeros, ones = np.zeros((50, 3), np.float32), np.ones((50, 2), np.float32)
    dataset = changed(dataset, rewards=zeros[:, 0], actions=ones, observations=zeros)
    assert panels(draw_summary(dataset, summarize(dataset), None)).shape[2] == 4
