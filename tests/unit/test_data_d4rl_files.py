import json

import gymnasium
import numpy as np
import pytest

from efm_jax.data import BUILTIN_DATASET, DataError, Folders, d4rl_files, load_dataset
from efm_jax.envs import environments as environments_module
from efm_jax.envs import specs
from tests.unit.data_fixtures import (
    box,
    d4rl_arrays,
    episode,
    serving_files,
    write_d4rl,
    write_minari,
)

ANTMAZE = "Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse"
# rows:      0  1  2  3  4  5  6  7  8  9     trajectories: 0-5, 6-9
TERMINALS = [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
TIMEOUTS = [0, 0, 0, 0, 0, 1, 0, 0, 0, 1]


def antmaze_arrays():
    arrays = d4rl_arrays(TERMINALS, TIMEOUTS, observation_size=29, action_size=8)
    arrays["observations"] *= np.float32(0.1)  # an ant that walks, without jumps
    arrays["rewards"] = np.array(TERMINALS, np.float32)
    return arrays


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("hopper-medium-v2", "gym_mujoco_v2/hopper_medium-v2.hdf5"),
        ("ant-full-replay-v1", "gym_mujoco_v1/ant_full_replay-v1.hdf5"),
        ("walker2d-medium-replay-v0", "gym_mujoco/walker_mixed.hdf5"),
        ("hopper-medium-replay-v0", "gym_mujoco/hopper_mixed.hdf5"),
        ("halfcheetah-medium-expert-v0", "gym_mujoco/halfcheetah_medium_expert.hdf5"),
        (
            "antmaze-umaze-v0",
            "ant_maze_new/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse.hdf5",
        ),
        (
            "antmaze-large-diverse-v2",
            "ant_maze_v2/Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
        ),
        (
            "antmaze-medium-play-v1",
            "ant_maze_v1/Ant_maze_medium_noisy_multistart_True_multigoal_False_sparse.hdf5",
        ),
        ("pen-human-v0", "hand_dapg/pen-v0_demos_clipped.hdf5"),
        ("door-cloned-v0", "hand_dapg/door-demos-v0-bc-combined.hdf5"),
        ("relocate-expert-v1", "hand_dapg_v1/relocate-expert-v1.hdf5"),
        ("kitchen-mixed-v0", "kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5"),
        ("maze2d-umaze-v1", "maze2d/maze2d-umaze-sparse-v1.hdf5"),
        ("maze2d-eval-large-dense-v1", "maze2d/maze2d-eval-large-dense-v1.hdf5"),
        ("maze2d-open-v0", "maze2d/maze2d-open-sparse.hdf5"),
    ],
)
def test_files_of_names(name, file):
    assert d4rl_files.D4RL_FILES[name] == file
    assert d4rl_files.task_of_file(f"/some/where/{file}") == name


def test_every_name_has_a_file_of_its_own():
    names = [file.rsplit("/")[-1] for file in d4rl_files.D4RL_FILES.values()]
    assert len(set(names)) == len(names) == 21 + 48 + 18 + 24 + 3 + 14


def test_reads_a_name_from_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(environments_module, "make_spaces", lambda spec: None)
    arrays = d4rl_arrays([0, 1, 0, 0], [0, 0, 0, 1], observation_size=11, action_size=3)
    write_d4rl(tmp_path / "hopper_medium-v2.hdf5", arrays)
    dataset = load_dataset("hopper-medium-v2", folders=Folders(d4rl=str(tmp_path)))
    assert dataset.name == "hopper-medium-v2"
    assert '"Hopper-v5"' in dataset.env_spec
    np.testing.assert_array_equal(dataset.transitions.rewards, [1, 2, 4])


def test_downloads_what_is_not_in_the_folder(tmp_path, monkeypatch):
    remote = tmp_path / "remote" / "gym_mujoco_v2"
    remote.mkdir(parents=True)
    arrays = d4rl_arrays([0, 1], [0, 0], observation_size=17, action_size=6)
    write_d4rl(remote / "walker2d_random-v2.hdf5", arrays, env_id="Walker2d-v5")
    monkeypatch.setattr(environments_module, "make_spaces", lambda spec: None)
    folders = Folders(d4rl=str(tmp_path / "local"))
    with serving_files(tmp_path / "remote") as url:
        monkeypatch.setattr(d4rl_files, "URL", url)
        assert load_dataset("walker2d-random-v2", folders=folders).transitions.size == 2
        assert [path.name for path in (tmp_path / "local").iterdir()] == ["walker2d_random-v2.hdf5"]
        with pytest.raises(DataError) as caught:
            load_dataset("walker2d-expert-v2", folders=folders)
    assert str(caught.value).startswith("walker2d-expert-v2: no such file")
    assert "gym_mujoco_v2/walker2d_expert-v2.hdf5" in str(caught.value)


def test_the_default_folder_is_that_of_d4rl(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".d4rl" / "datasets"
    folder.mkdir(parents=True)
    arrays = d4rl_arrays([0, 1], [0, 0], observation_size=45, action_size=24)
    write_d4rl(folder / "pen-human-v1.hdf5", arrays)
    dataset = load_dataset("pen-human-v1")
    assert (dataset.name, dataset.transitions.size) == ("pen-human-v1", 2)
    assert '"AdroitHandPen-v1"' in dataset.env_spec


def limit_of(dataset):
    return json.loads(dataset.env_spec)["max_episode_steps"]


def test_evaluated_episodes_are_as_long_as_the_datas(tmp_path):
    long = [0] * 9 + [1]

    def load(name, timeouts, env_id="Pendulum-v1", **options):
        arrays = d4rl_arrays(np.zeros(len(timeouts)), timeouts, action_size=1)
        return load_dataset(write_d4rl(tmp_path / name, arrays, env_id=env_id), **options)

    dataset = load("a.hdf5", long * 3)
    assert limit_of(dataset) == 10
    assert "cut at 10 steps, as its timeouts say, not at 200" in dataset.notes[0]
    assert limit_of(load("a.hdf5", long * 3, max_episode_steps=50)) == 50
    assert limit_of(load("a.hdf5", long)) == 200  # a recording that stops
    assert limit_of(load("a.hdf5", [*long, 0, 1])) == 200
    assert limit_of(load("a.hdf5", [*long, *long, *[0] * 20, 1])) == 200
    # D4RL's name says it before the timeouts, for a path as for a name.
    arrays = d4rl_arrays([0] * 20, long * 2, observation_size=45, action_size=24)
    dataset = load_dataset(write_d4rl(tmp_path / "pen-human-v1.hdf5", arrays))
    assert limit_of(dataset) == 100
    assert dataset.reference_scores == (96.262799, 3076.8331017826877)
    path = write_d4rl(tmp_path / "pen-mine.hdf5", arrays)
    assert limit_of(load_dataset(path)) == 10
    assert load_dataset(path).reference_scores is None


def test_actions_normalized_for_an_environment_with_other_bounds(tmp_path):
    arrays = d4rl_arrays([0, 0, 1], [0, 0, 0], action_size=1)
    arrays["actions"][1] = 1
    dataset = load_dataset(write_d4rl(tmp_path / "a.hdf5", arrays, env_id="Pendulum-v1"))
    assert "actions reach 1, as those do that were normalized" in dataset.notes[0]
    arrays["actions"][1] = 1.3
    dataset = load_dataset(write_d4rl(tmp_path / "a.hdf5", arrays, env_id="Pendulum-v1"))
    assert dataset.notes == ()


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("pen-human-v1", "AdroitHandPen-v1"),
        ("door-cloned-v0", "AdroitHandDoor-v1"),
        ("kitchen-mixed-v0", "FrankaKitchen-v1"),
        ("antmaze-umaze-diverse-v2", "AntMaze_UMaze-v5"),
        ("maze2d-large-dense-v1", "PointMaze_Large-v3"),
        ("maze2d-open-v0", "PointMaze_Open-v3"),
        ("mine", None),
        ("antmaze", None),
    ],
)
def test_environments_of_names(name, environment):
    assert d4rl_files.environment_of(name) == environment
    assert environment is None or gymnasium.spec(specs.named("test", environment).id)


def test_misspelled_names(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    for name in ("hopper-mediun-v2", "antmaze-umaze-v7", "kitchen-v0"):
        with pytest.raises(DataError, match="D4RL has no such name; the nearest are") as caught:
            load_dataset(name)
        assert str(caught.value).startswith(f"{name}: unknown dataset")
    assert "hopper-medium-v2" in d4rl_files.misspelled("hopper-mediun-v2")
    assert d4rl_files.misspelled("hopper-medium-v2") is None
    assert d4rl_files.misspelled("mujoco/hopper/medium-v0") is None
    assert d4rl_files.misspelled("cartpole-v0") is None


def test_a_local_minari_dataset_whose_name_begins_like_one_of_d4rl(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    write_minari("hopper-mine-v0", [episode(3, np.zeros((4, 3), np.float32))], box(3, np.inf))
    assert load_dataset("hopper-mine-v0").transitions.size == 3
    for name, meant in (("hoper/mine", "hopper-mine-v0"), ("efm/pendulum", BUILTIN_DATASET)):
        with pytest.raises(DataError, match=f"^{name}: unknown dataset.*did you mean .*{meant}"):
            load_dataset(name)


def test_antmaze_terminals_do_not_end_episodes(tmp_path):
    arrays = antmaze_arrays()
    dataset = load_dataset(write_d4rl(tmp_path / f"{ANTMAZE}_fixed.hdf5", arrays))
    data = dataset.transitions
    # 5 and 9 timed out: their next observations are not in the file.
    rows = [0, 1, 2, 3, 4, 6, 7, 8]
    np.testing.assert_array_equal(data.observations, arrays["observations"][rows])
    np.testing.assert_array_equal(
        data.next_observations, arrays["observations"][np.array(rows) + 1]
    )
    np.testing.assert_array_equal(data.terminated, np.array(TERMINALS)[rows])
    # As the environment counts: the first reaches the goal in its third step, once; the second
    # never does.
    np.testing.assert_array_equal(dataset.episode_returns, [1, 0])
    np.testing.assert_array_equal(dataset.episode_lengths, [3, 4])
    assert dataset.env_spec is None  # not Ant-v5, though the file's name begins with Ant


def test_an_antmaze_file_of_another_name(tmp_path, monkeypatch):
    monkeypatch.setattr(environments_module, "make_spaces", lambda spec: None)
    dataset = load_dataset(write_d4rl(tmp_path / "Ant_maze_mine.hdf5", antmaze_arrays()))
    np.testing.assert_array_equal(dataset.episode_lengths, [3, 4])
    assert dataset.env_spec is None  # not Ant-v5, though the file's name begins with Ant


def test_terminals_end_episodes_in_other_files(tmp_path):
    dataset = load_dataset(write_d4rl(tmp_path / "other.hdf5", antmaze_arrays()))
    np.testing.assert_array_equal(dataset.episode_lengths, [3, 1, 2, 4])


@pytest.mark.parametrize(
    "name", [f"{ANTMAZE}.hdf5", "antmaze-medium-play-v1.hdf5", "antmaze-umaze-v2.hdf5"]
)
def test_jumps_end_episodes_of_early_antmaze_files(tmp_path, name):
    arrays = antmaze_arrays()
    arrays["observations"][8:, :2] += (
        5  # the file does not say that row 7 is the last before a reset
    )
    dataset = load_dataset(write_d4rl(tmp_path / name, arrays))
    marked = name.endswith("v2.hdf5")  # in v2, what the file says is believed
    np.testing.assert_array_equal(dataset.episode_lengths, [3, 4] if marked else [3, 2, 2])
    steps = np.abs(dataset.transitions.next_observations - dataset.transitions.observations).max()
    assert (steps > 1) == marked


def test_jumps_are_those_of_the_position(tmp_path):
    arrays = antmaze_arrays()
    arrays["observations"][8:, 2:] += 5
    dataset = load_dataset(write_d4rl(tmp_path / f"{ANTMAZE}.hdf5", arrays))
    np.testing.assert_array_equal(dataset.episode_lengths, [3, 4])


def test_kitchen_without_timeouts(tmp_path):
    terminals = np.zeros(600, bool)
    terminals[[299, 599]] = True  # longer than the environment's 280 steps
    arrays = d4rl_arrays(terminals, observation_size=60, action_size=9)
    file = "kitchen_microwave_kettle_light_slider-v0.hdf5"
    dataset = load_dataset(write_d4rl(tmp_path / file, arrays))
    np.testing.assert_array_equal(dataset.episode_lengths, [300, 300])
    assert dataset.transitions.size == 600
    assert dataset.transitions.terminated.sum() == 2


@pytest.mark.parametrize(
    ("file", "limit"), [("pen-v0_demos_clipped.hdf5", 100), ("door-human-v0.hdf5", 200)]
)
def test_adroit_without_timeouts(tmp_path, file, limit):
    arrays = d4rl_arrays(np.zeros(2 * limit + 5, bool), observation_size=4)
    dataset = load_dataset(write_d4rl(tmp_path / file, arrays))
    np.testing.assert_array_equal(dataset.episode_lengths, [limit, limit])


def test_columns_with_a_second_axis(tmp_path):
    arrays = d4rl_arrays([0, 1, 0, 0], [0, 0, 0, 1])
    plain = load_dataset(write_d4rl(tmp_path / "a.hdf5", arrays))
    for name in ("rewards", "terminals", "timeouts"):
        arrays[name] = arrays[name][:, None]
    columns = load_dataset(write_d4rl(tmp_path / "b.hdf5", arrays))
    for ours, theirs in zip(columns.transitions, plain.transitions, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_parts_of_an_antmaze_file_are_the_whole(tmp_path):
    path = write_d4rl(tmp_path / f"{ANTMAZE}_fixed.hdf5", antmaze_arrays())
    whole = load_dataset(path)
    parts = [load_dataset(path, rows=lambda n, i=i: slice(i, min(i + 3, n))) for i in (0, 3, 6)]
    for field in whole.transitions._fields:
        joined = np.concatenate([getattr(part.transitions, field) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole.transitions, field))
    np.testing.assert_array_equal(
        np.concatenate([p.episode_returns for p in parts]), whole.episode_returns
    )
