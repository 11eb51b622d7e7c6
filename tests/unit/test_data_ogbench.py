import json
import sys
import types

import chex
import gymnasium
import jax
import numpy as np
import pytest
from gymnasium import spaces
from numpy.testing import assert_array_equal

from efm_jax.data import Folders, load_dataset, ogbench
from tests.unit.data_fixtures import fails, serving_files

# rows:      0  1  2  3  4  5  6    trajectories of states: 0-3, 4-6
TERMINALS = [0, 0, 0, 1, 0, 0, 1]
STEPS = [0, 1, 2, 4, 5]  # rows that are transitions, each to the next row
REWARDS = np.array([-1, 0, -1, -7, -1, -1, -7], np.float32)
MASKS = np.array([1, 0, 1, 1, 1, 1, 1], np.float32)


def arrays(**more):
    rng = np.random.default_rng(0)
    n = len(TERMINALS)
    return {
        "observations": (np.arange(n)[:, None] + 0.1 * np.arange(3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        "terminals": np.array(TERMINALS, np.float32),
        **more,
    }


def labeled():
    return arrays(rewards=REWARDS, masks=MASKS)


def assert_same(found, expected):
    """Transitions and episodes, number by number."""
    chex.assert_trees_all_equal(found.transitions, expected.transitions)
    assert_array_equal(found.episode_returns, expected.episode_returns)
    assert_array_equal(found.episode_lengths, expected.episode_lengths)


def write(path, content):
    np.savez_compressed(path, **content)
    return str(path)


class Goal(gymnasium.Env):
    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, goal):
        self.goal = goal


@pytest.fixture
def ogbench_package(monkeypatch):
    """A package that labels as `ogbench` does: done where a row's qpos is the goal."""

    def relabel_dataset(env_name, env, dataset):
        assert env_name == env.spec.id
        done = dataset["qpos"][:, 0] == env.unwrapped.goal
        dataset["rewards"] = done.astype(np.float32) - 1
        dataset["masks"] = 1 - done.astype(np.float32)

    module = types.ModuleType("ogbench")
    module.relabel_utils = types.ModuleType("ogbench.relabel_utils")
    module.relabel_utils.relabel_dataset = relabel_dataset
    monkeypatch.setitem(sys.modules, "ogbench", module)
    monkeypatch.setitem(sys.modules, "ogbench.relabel_utils", module.relabel_utils)
    for name, goal in (("box-single-singletask-v0", 1), ("box-single-singletask-task4-v0", 5)):
        gymnasium.register(name, entry_point=Goal, kwargs={"goal": goal}, max_episode_steps=9)
    yield module
    for name in ("box-single-singletask-v0", "box-single-singletask-task4-v0"):
        gymnasium.registry.pop(name)


@pytest.fixture
def without_ogbench(monkeypatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)


def test_rows_are_states(tmp_path, without_ogbench):
    content = labeled()
    dataset = load_dataset(write(tmp_path / "a.npz", content))
    data = dataset.transitions
    assert_array_equal(data.observations, content["observations"][STEPS])
    assert_array_equal(data.next_observations, content["observations"][np.array(STEPS) + 1])
    assert_array_equal(data.actions, content["actions"][STEPS])
    assert_array_equal(data.rewards, REWARDS[STEPS])
    assert_array_equal(data.terminated, [0, 1, 0, 0, 0])  # masks, never terminals
    assert all(array.dtype == np.float32 for array in data)
    # Up to the first row where the task is done; the second trajectory never gets there.
    assert_array_equal(dataset.episode_returns, [-1, -2])
    assert_array_equal(dataset.episode_lengths, [2, 2])
    assert_array_equal((dataset.action_low, dataset.action_high), [[-1, -1], [1, 1]])
    assert dataset.env_spec is None
    assert dataset.reference_scores is None


def test_forms_that_ogbench_returns_are_the_same_data(tmp_path):
    content = labeled()
    states = load_dataset(write(tmp_path / "a.npz", content))
    # compact_dataset=True: the last step of a trajectory is marked too, and `valids` says what is a
    # step.
    compact = content | {
        "terminals": np.array([0, 0, 1, 1, 0, 1, 1], np.float32),
        "valids": 1 - content["terminals"],
    }
    regular = {name: array[STEPS] for name, array in content.items()} | {
        "next_observations": content["observations"][np.array(STEPS) + 1],
        "terminals": np.array([0, 0, 1, 0, 1], np.float32),
    }
    for form in (compact, regular):
        assert_same(load_dataset(write(tmp_path / "b.npz", form)), states)


def test_parts_are_the_whole(tmp_path):
    path = write(tmp_path / "a.npz", labeled())
    whole = load_dataset(path)
    parts = [load_dataset(path, rows=lambda n, i=i: slice(i, min(i + 2, n))) for i in (0, 2, 4)]
    joined = jax.tree.map(lambda *a: np.concatenate(a), *[part.transitions for part in parts])
    chex.assert_trees_all_equal(joined, whole.transitions)
    assert_array_equal(np.concatenate([p.episode_returns for p in parts]), whole.episode_returns)
    assert [part.first_row for part in parts] == [0, 2, 4]


def test_names():
    for name, file, env in (
        ("cube-single-play-singletask-v0", "cube-single-play", "cube-single-singletask-v0"),
        ("ogbench:puzzle-3x3-noisy-singletask-task5-v0", "puzzle-3x3-noisy",
         "puzzle-3x3-singletask-task5-v0"),
        ("antmaze-large-navigate-singletask-v0", "antmaze-large-navigate",
         "antmaze-large-singletask-v0"),
        ("scene-play-singletask-task1-v0", "scene-play", "scene-singletask-task1-v0"),
    ):  # fmt: skip
        assert ogbench.parse_name(name) == (f"{file}-v0.npz", env)


def test_names_of_other_things(without_ogbench):
    for name, *words in (
        ("ogbench:cube-single-play-v0", "single task", "cube-single-play-singletask-v0"),
        ("cube-single-play-singletask-task6-v0", "unknown dataset"),
        ("ogbench:visual-cube-single-play-singletask-v0", "images"),
        ("ogbench:nonsense", "unknown dataset"),
    ):
        fails(name, *words)


def test_a_name_needs_ogbench_before_a_download(tmp_path, without_ogbench, monkeypatch):
    monkeypatch.setattr(ogbench, "URL", "http://127.0.0.1:9/")
    folders = Folders(ogbench=str(tmp_path / "x"))
    fails("box-single-play-singletask-v0", "pip install 'efm-jax[ogbench]'", folders=folders)
    assert not (tmp_path / "x").exists()


def test_rewards_of_the_task_in_the_name(tmp_path, ogbench_package, monkeypatch):
    qpos = np.arange(7, dtype=np.float64)[:, None]
    remote = tmp_path / "remote"
    remote.mkdir()
    write(remote / "box-single-play-v0.npz", arrays(qpos=qpos))
    folders = Folders(ogbench=str(tmp_path / "local"))
    with serving_files(remote) as url:
        monkeypatch.setattr(ogbench, "URL", url)
        tasks = {"box-single-play-singletask-v0": 1, "box-single-play-singletask-task4-v0": 5}
        for name, done in tasks.items():
            dataset = load_dataset(f"ogbench:{name}", folders=folders)
            assert dataset.name == f"ogbench:{name}"
            transitions = dataset.transitions
            assert_array_equal(transitions.terminated, np.array(STEPS) == done)
            assert_array_equal(transitions.rewards, (np.array(STEPS) == done) - 1.0)
            assert json.loads(dataset.env_spec)["id"] == name.replace("-play", "")
    assert [path.name for path in (tmp_path / "local").iterdir()] == ["box-single-play-v0.npz"]


def test_rewards_of_the_task_of_the_environment(tmp_path, ogbench_package):
    path = write(tmp_path / "mine.npz", arrays(qpos=np.arange(7.0)[:, None]))
    dataset = load_dataset(path, env="box-single-singletask-task4-v0")
    assert_array_equal(dataset.transitions.terminated, np.array(STEPS) == 5)
    assert_array_equal(dataset.episode_returns, [-3, -1])
    # A file's own labels are not computed again.
    path = write(tmp_path / "labeled.npz", labeled())
    dataset = load_dataset(path, env="box-single-singletask-task4-v0")
    assert_array_equal(dataset.transitions.rewards, REWARDS[STEPS])


def test_files_without_rewards(tmp_path, ogbench_package):
    path = write(tmp_path / "a.npz", arrays())
    fails(path, "no 'rewards'", "singletask", "pip install 'efm-jax[ogbench]'")
    fails(path, "neither 'rewards' nor 'qpos'", env="box-single-singletask-v0")
    path = write(tmp_path / "c.npz", arrays(actions=np.zeros((7, 1), np.float32)))
    fails(path, "no 'rewards'", "not Pendulum-v1", env="Pendulum-v1")
    fails(write(tmp_path / "b.npz", arrays(rewards=REWARDS)), "no 'masks'")


def test_task_needs_ogbench(tmp_path, without_ogbench):
    path = write(tmp_path / "a.npz", arrays(qpos=np.zeros((7, 1))))
    fails(path, "pip install 'efm-jax[ogbench]'", env="box-single-singletask-v0")


def test_environments_that_do_not_fit(tmp_path, ogbench_package):
    path = write(tmp_path / "a.npz", labeled())
    fails(path, "Nothing-v3", env="Nothing-v3")
    fails(path, "Pendulum-v1", "(1,)", "(2,)", env="Pendulum-v1")


def test_unusable_data(tmp_path):
    def bad(*words, **changes):
        fails(write(tmp_path / "a.npz", labeled() | changes), *words)

    broken = labeled()["observations"].copy()
    broken[4, 1] = np.nan
    bad("observations[4][1]", observations=broken)
    outside = labeled()["actions"].copy()
    outside[5, 1] = 1.5
    bad("actions[5][1]", "1.5", "[-1.0, 1.0]", actions=outside)
    bad("discrete", actions=np.zeros((7, 2), np.int32))
    bad("images", observations=np.zeros((7, 4, 4, 3), np.uint8))
    bad("lengths disagree", rewards=REWARDS[:-1])
    bad("terminals[2]", "0.5", terminals=np.array([0, 0, 0.5, 1, 0, 0, 1]))
    bad("last row, 6", terminals=np.array([0, 0, 0, 1, 0, 0, 0], np.float32))
    bad("empty", terminals=np.ones(7, np.float32))
    bad("(7, 3)", "(7, 2)", next_observations=np.zeros((7, 2), np.float32))
    content = labeled()
    del content["actions"]
    fails(write(tmp_path / "a.npz", content), "no array 'actions'")


def test_action_of_a_last_state_is_not_looked_at(tmp_path):
    content = labeled()
    content["actions"][3] = np.nan
    assert load_dataset(write(tmp_path / "a.npz", content)).transitions.size == 5


def test_files_that_are_not_npz(tmp_path):
    whole = (tmp_path / "good.npz", labeled())
    write(*whole)
    (tmp_path / "cut.npz").write_bytes(whole[0].read_bytes()[:300])
    (tmp_path / "text.npz").write_text("not npz")
    (tmp_path / "nothing.npz").write_bytes(b"")
    (tmp_path / "folder.npz").mkdir()
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    np.savez(tmp_path / "objects.npz", observations=np.array([{}], object))
    for name in ("cut", "text", "nothing", "folder", "array", "objects", "absent"):
        fails(str(tmp_path / f"{name}.npz"))
