import json
from collections import OrderedDict

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces

from efm_jax.data import DataError, load_dataset
from efm_jax.envs import dataset_references, specs
from efm_jax.envs.flatten import flat_size, flatten_observation
from tests.unit.data_fixtures import (
    SHARED_DATA,
    box,
    d4rl_arrays,
    episode,
    fails,
    write_d4rl,
    write_minari,
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def rows(first, steps, size=3):
    """Observations that name themselves, `[steps + 1, size]`."""
    return (first + np.arange(steps + 1)[:, None] + 0.1 * np.arange(size)).astype(np.float32)


def corrupt(folder, name, change):
    with h5py.File(folder / name / "data" / "main_data.hdf5", "a") as file:
        change(file)


def test_episodes_to_transitions():
    first, second = rows(0, 3), rows(10, 2)
    write_minari("test/two-v0", [episode(3, first, terminated=True), episode(2, second)])
    dataset = load_dataset("test/two-v0")
    data = dataset.transitions
    np.testing.assert_array_equal(data.observations, np.concatenate([first[:-1], second[:-1]]))
    # The truncated episode keeps its last step, with its real next observation and no termination.
    np.testing.assert_array_equal(data.next_observations, np.concatenate([first[1:], second[1:]]))
    np.testing.assert_array_equal(data.terminated, [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(data.rewards, [0, 1, 2, 0, 1])
    assert all(array.dtype == np.float32 for array in data)
    np.testing.assert_array_equal(dataset.episode_returns, [3, 1])
    np.testing.assert_array_equal(dataset.episode_lengths, [3, 2])
    assert dataset.episode_lengths.dtype == np.int64
    assert dataset.name == "test/two-v0"
    assert dataset.env_spec is None
    assert dataset.reference_scores is None


@pytest.mark.parametrize("kind", ["minari", "hdf5", "npz"])
def test_a_time_that_is_one_number_in_float32_is_refused(folder, kind):
    """What would be learned from is a constant; an epoch of its own, or a constant, is fine."""

    def load(name, column):
        observations = np.stack([np.linspace(0, 1, 31), column], axis=1)
        if kind == "minari":
            steps = [episode(30, observations)]
            write_minari(f"test/{name}-v0", steps, box(2, np.inf, np.float64))
            return load_dataset(f"test/{name}-v0")
        arrays = d4rl_arrays([0] * 30 + [1], [0] * 31)
        arrays |= {"observations": observations, "masks": np.ones(31)}
        if kind == "hdf5":
            return load_dataset(write_d4rl(folder / f"{name}.hdf5", arrays))
        np.savez(folder / f"{name}.npz", **arrays)
        return load_dataset(str(folder / f"{name}.npz"))

    start = 1_699_999_936 + 5.0  # 59 from where float32 would go on to the next number
    with pytest.raises(DataError, match=r"observations\[:, 1\] varies from 1699999941.0 to"):
        load("epoch", start + np.arange(31))
    found = load("moved", np.arange(31.0)).transitions.observations[:, 1]
    np.testing.assert_array_equal(found, np.arange(len(found)))
    for name, column in {
        "constant": np.full(31, start),
        "jitter": 1 + 1e-9 * np.arange(31),
    }.items():
        assert np.ptp(load(name, column).transitions.observations[:, 1]) == 0


def test_environment_and_reference_scores(folder):
    options = {"observation_space": box(3, np.inf), "action_space": box(1)}
    steps = [episode(2, rows(0, 2), actions=np.zeros((2, 1), np.float32))]

    def spec(name, **arguments):
        return json.loads(load_dataset(name, **arguments).env_spec)["id"]

    scores = {"ref_min_score": -10.0, "ref_max_score": 5.0}
    write_minari(
        "test/a-v0",
        steps,
        **options,
        env="Pendulum-v1",
        eval_env="MountainCarContinuous-v0",
        **scores,
    )
    assert spec("test/a-v0") == "MountainCarContinuous-v0"
    assert spec("test/a-v0", env="Pendulum-v1") == "Pendulum-v1"
    assert load_dataset("test/a-v0").reference_scores == (-10.0, 5.0)
    write_minari("test/b-v0", steps, **options, env="Pendulum-v1")
    assert spec("test/b-v0") == "Pendulum-v1"
    assert load_dataset("test/b-v0").reference_scores is None
    fails("test/b-v0", "MountainCarContinuous-v0", env="MountainCarContinuous-v0")
    fails("test/b-v0", "Nothing-v0", env="Nothing-v0")
    fails("test/b-v0", "Hopper-v2", env="Hopper-v2")

    # A spec written by an older Gymnasium still reads; a lone reference score is none.
    path = folder / "test/b-v0/data/metadata.json"
    metadata = json.loads(path.read_text())
    old = {"apply_api_compatibility": False, "autoreset": False} | json.loads(metadata["env_spec"])
    path.write_text(json.dumps(metadata | {"env_spec": json.dumps(old), "ref_max_score": 1.0}))
    assert spec("test/b-v0") == "Pendulum-v1"
    assert load_dataset("test/b-v0").reference_scores is None


GOAL_SPACE = spaces.Dict(
    {
        "observation": box(4, np.inf, np.float64),
        "desired_goal": box(2, np.inf, np.float64),
        "achieved_goal": box(2, np.inf, np.float64),
        "nested": spaces.Dict({"z": spaces.Box(-1, 1, (2, 3)), "a": spaces.Box(-1, 1, ())}),
        "pair": spaces.Tuple([box(1), box(2)]),
    }
)


def test_flatten_is_gymnasiums():
    GOAL_SPACE.seed(0)
    samples = [GOAL_SPACE.sample() for _ in range(5)]
    expected = np.stack([spaces.flatten(GOAL_SPACE, sample) for sample in samples]).astype(
        np.float32
    )
    one = flatten_observation(GOAL_SPACE, samples[0], 0)
    assert one.dtype == np.float32
    np.testing.assert_array_equal(one, expected[0])
    batch = gymnasium.vector.utils.concatenate(
        GOAL_SPACE, samples, gymnasium.vector.utils.create_empty_array(GOAL_SPACE, 5)
    )
    np.testing.assert_array_equal(flatten_observation(GOAL_SPACE, batch, 1), expected)
    assert flat_size(GOAL_SPACE) == expected.shape[1]
    structure = {"b": box(1), "a": box(2)}
    flat = flatten_observation(structure, {"b": np.array([3.0]), "a": np.array([1.0, 2.0])}, 0)
    np.testing.assert_array_equal(flat, [1, 2, 3])


def test_flatten_sorts_keys_whatever_the_order_of_the_space():
    space = spaces.Dict(OrderedDict(b=box(1), a=box(1)))
    np.testing.assert_array_equal(
        flatten_observation(space, {"b": [[2.0]], "a": [[1.0]]}, 1), [[1, 2]]
    )


@pytest.mark.parametrize(
    ("space", "observation", "word"),
    [
        (box(2), np.zeros((5, 3)), "(5, 3)"),
        (box(2), np.zeros(2), "(2,)"),
        (spaces.Dict(a=box(2)), {"b": np.zeros((5, 2))}, "['a']"),
        (spaces.Dict(a=box(2)), np.zeros((5, 2)), "ndarray"),
        (spaces.Tuple([box(2)]), (), "keys [0]; got []"),
        (spaces.Tuple([box(2)]), np.zeros((5, 2)), "ndarray"),
        (spaces.Dict(a=spaces.Discrete(2)), {"a": np.zeros(5)}, "Discrete"),
    ],
)
def test_flatten_refuses(space, observation, word):
    with pytest.raises(DataError) as caught:
        flatten_observation(space, observation, 1)
    assert word in str(caught.value)


def test_dict_observations():
    space = spaces.Dict(
        observation=box(2, np.inf), desired_goal=box(1, np.inf), achieved_goal=box(1, np.inf)
    )
    observations = {
        "observation": rows(0, 2, 2),
        "desired_goal": rows(20, 2, 1),
        "achieved_goal": rows(10, 2, 1),
    }
    write_minari("test/goal-v0", [episode(2, observations)], space)
    data = load_dataset("test/goal-v0").transitions
    order = ["achieved_goal", "desired_goal", "observation"]
    expected = np.concatenate([observations[key] for key in order], axis=1)
    np.testing.assert_array_equal(data.observations, expected[:-1])
    np.testing.assert_array_equal(data.next_observations, expected[1:])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite(folder, value):
    steps = [episode(3, rows(0, 3)), episode(3, rows(10, 3))]
    write_minari("test/bad-v0", steps)
    path = "episode_1/"

    def put(array, index):
        before = array[index]
        array[index] = value
        return before

    for key, name, index, row in [
        ("observations", "observations", 1, 4),
        ("observations", "next_observations", 3, 5),  # the last one is nobody's observation
        ("actions", "actions", 2, 5),
        ("rewards", "rewards", 0, 3),
    ]:
        with h5py.File(folder / "test/bad-v0/data/main_data.hdf5", "a") as file:
            before = put(file[path + key], index)
        fails("test/bad-v0", f" {name}[{row}]", f"(episode 1, step {row - 3})", str(value))
        with h5py.File(folder / "test/bad-v0/data/main_data.hdf5", "a") as file:
            file[path + key][index] = before
    assert load_dataset("test/bad-v0").transitions.size == 6


def test_lengths_that_disagree(folder):
    for name, key in [
        ("test/a-v0", "rewards"),
        ("test/b-v0", "observations"),
        ("test/c-v0", "terminations"),
    ]:
        write_minari(name, [episode(3, rows(0, 3)), episode(3, rows(0, 3))])

        def shorten(file, key=key):
            file[f"episode_1/{key}"].resize(len(file[f"episode_1/{key}"]) - 1, axis=0)

        corrupt(folder, name, shorten)
        fails(name, "episode 1", key, "lengths disagree")


def test_empty():
    minari_folder = write_minari("test/none-v0", [])
    assert minari_folder.total_episodes == 0
    fails("test/none-v0", "empty")


def test_actions_outside_bounds_are_clipped_only_if_rounding():
    actions = np.zeros((3, 2), np.float32)
    actions[1, 1] = 1 + 5e-6
    write_minari("test/in-v0", [episode(3, rows(0, 3), actions=actions)])
    assert load_dataset("test/in-v0").transitions.actions.max() == 1
    actions[1, 1] = -1.01
    write_minari("test/out-v0", [episode(3, rows(0, 3)), episode(3, rows(0, 3), actions=actions)])
    fails("test/out-v0", "actions[4][1]", "[-1.0, 1.0]", "-1.01", "episode 1, step 1")


@pytest.mark.parametrize(
    ("space", "word"),
    [
        (spaces.Discrete(3), "discrete"),
        (spaces.MultiDiscrete([2, 2]), "discrete"),
        (spaces.MultiBinary(2), "discrete"),
        (spaces.Box(0, 3, (2,), np.int64), "discrete"),
        (spaces.Box(-1, 1, (2, 2)), "one axis"),
        (spaces.Dict(a=box(1)), "one axis"),
        (spaces.Box(np.array([-1, -np.inf]), np.array([1, 1]), dtype=np.float32), "infinite"),
        (spaces.Box(-np.finfo("f4").max, np.finfo("f4").max, (2,), np.float32), "infinite"),
        (spaces.Box(-np.finfo("f8").max, np.finfo("f8").max, (2,), np.float64), "infinite"),
        (spaces.Box(np.array([-1, 1]), np.array([1, 1]), dtype=np.float32), "low 1.0 >= high 1.0"),
    ],
)
def test_action_spaces_that_are_refused(space, word):
    write_minari("test/space-v0", [], action_space=space)
    fails("test/space-v0", word)


def test_bounds_too_wide_to_scale_by():
    write_minari("test/wide-v0", [episode(3, rows(0, 3))], action_space=box(2, 1e7))
    fails("test/wide-v0", "action dimension 0", "[-1e+07, 1e+07]", "too wide")
    # A dimension that hardly moves within bounds of its own size is no reason to refuse the others.
    actions = np.linspace(0, 1e-6, 6, dtype=np.float32).reshape(3, 2)
    write_minari("test/still-v0", [episode(3, rows(0, 3), actions=actions)], action_space=box(2))
    assert load_dataset("test/still-v0").transitions.size == 3


@pytest.mark.parametrize("pair", [(1, 1), (2, 1), (np.nan, 1), ("a", 1), ("1", "2"), (0, np.inf)])
def test_reference_scores_that_are_none(folder, pair):
    write_minari("test/a-v0", [episode(3, rows(0, 3))])
    path = folder / "test/a-v0/data/metadata.json"
    scores = dict(zip(("ref_min_score", "ref_max_score"), pair, strict=True))
    path.write_text(json.dumps(json.loads(path.read_text()) | scores))
    fails("test/a-v0", "ref_min_score, ref_max_score: expected finite numbers")


def test_pen_ends_where_d4rls_does():
    specs.named("test", "AdroitHandPen-v1")  # registers it
    options = {"observation_space": box(45, np.inf), "action_space": box(24)}
    steps = [episode(3, rows(0, 3, 45), actions=np.zeros((3, 24), np.float32))]
    write_minari("D4RL/pen/human-v2", steps, **options, env="AdroitHandPen-v1")
    dataset = load_dataset("D4RL/pen/human-v2")
    assert json.loads(dataset.env_spec)["max_episode_steps"] == 100
    assert "cut at 100 steps, as D4RL's D4RL/pen/human-v2, not at 200" in dataset.notes[0]
    longer = load_dataset("D4RL/pen/human-v2", max_episode_steps=200)
    assert json.loads(longer.env_spec)["max_episode_steps"] == 200
    assert longer.notes == ()
    # D4RL's references are of 100 steps.
    names = "D4RL/pen/human-v2", "AdroitHandPen-v1"
    assert dataset_references(None, names[0], dataset.env_spec) == (96.262799, 3076.8331017826877)
    assert dataset_references(None, names[0], longer.env_spec) is None
    assert dataset_references(None, "mine", longer.env_spec) is None
    assert dataset_references(None, *names) == (96.262799, 3076.8331017826877)


@pytest.mark.parametrize(
    ("space", "word"),
    [
        (spaces.Box(0, 255, (64, 64, 3), np.uint8), "image"),
        (spaces.Box(0, 1, (8, 8)), "image"),
        (spaces.Dict(view=spaces.Box(0, 255, (64, 64, 3), np.uint8), state=box(2)), "image"),
        (spaces.Dict(view=spaces.Box(0, 255, (64, 64), np.uint8)), "image"),
        (spaces.Discrete(4), "Discrete"),
    ],
)
def test_observation_spaces_that_are_refused(space, word):
    write_minari("test/space-v0", [], space)
    fails("test/space-v0", word)


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nto host"), ValueError("Couldn't find any version")]
)
def test_download_that_fails(monkeypatch, error):
    def download(name):
        raise error

    monkeypatch.setattr(minari, "download_dataset", download)
    fails("D4RL/door/human-v2", str(error).split()[0], "downloaded")


def test_download_that_works(monkeypatch):
    asked = []

    def download(name):
        asked.append(name)
        write_minari(name, [episode(2, rows(0, 2))])

    monkeypatch.setattr(minari, "download_dataset", download)
    assert load_dataset("far/away-v1").transitions.size == 2
    assert load_dataset("far/away-v1").transitions.size == 2
    assert asked == ["far/away-v1"]


@pytest.mark.parametrize("name", ["pendulum", "a b-v0", "", "what?", "foo/bar"])
def test_names_that_are_nothing(monkeypatch, name):
    monkeypatch.setattr(minari, "download_dataset", pytest.fail)
    fails(name, "unknown dataset")


def test_damaged_datasets(folder):
    write_minari("test/a-v0", [episode(2, rows(0, 2))])
    data = folder / "test/a-v0/data"
    whole = (data / "main_data.hdf5").read_bytes()
    (data / "main_data.hdf5").write_bytes(whole[: len(whole) // 2])
    fails("test/a-v0", "truncated file")
    (data / "main_data.hdf5").unlink()
    fails("test/a-v0", "no such file")
    (data / "metadata.json").write_text("{")
    fails("test/a-v0", "cannot read")
    (data / "metadata.json").unlink()
    fails("test/a-v0", "cannot read")
    write_minari("test/b-v0", [episode(2, rows(0, 2))])
    corrupt(folder, "test/b-v0", lambda file: file.pop("episode_0/rewards"))
    fails("test/b-v0", "episode 0")


def test_folder_that_cannot_be_made(folder, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / "file" / "under"))
    fails("test/a-v0", "folder")


def test_shared_hopper(monkeypatch):
    if not (SHARED_DATA / "minari").exists():
        pytest.skip(f"no {SHARED_DATA}")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(SHARED_DATA / "minari"))
    dataset = load_dataset("rlzoo/hopper/medium-expert-v0")
    assert dataset.transitions.size == 100_475
    assert len(dataset.episode_returns) == 173
    assert dataset.episode_returns.mean() == pytest.approx(2103, abs=1)
    assert dataset.reference_scores == (-20.272305, 3234.3)
    assert 0 < dataset.transitions.terminated.sum() < 173
    assert json.loads(dataset.env_spec)["id"] == "Hopper-v5"
