import shutil
import warnings

import gymnasium
import h5py
import numpy as np
import pytest

from efm_jax.data import DataError, load_dataset
from efm_jax.envs import environments as environments_module
from tests.unit import data_fixtures
from tests.unit.data_fixtures import SHARED_DATA, d4rl_arrays, write_d4rl

# rows:      0  1  2  3  4  5  6  7    episodes: 0-2 terminal, 3-5 timeout, 6-7 unfinished
TERMINALS = [0, 0, 1, 0, 0, 0, 0, 0]
TIMEOUTS = [0, 0, 0, 0, 0, 1, 0, 0]


def load(tmp_path, arrays, name="data.hdf5", env=None, **attributes):
    return load_dataset(write_d4rl(tmp_path / name, arrays, **attributes), env=env)


def fails(tmp_path, arrays, *words, name="data.hdf5", env=None, **attributes):
    data_fixtures.fails(write_d4rl(tmp_path / name, arrays, **attributes), *words, env=env)


def test_with_next_observations_keeps_every_row(tmp_path):
    arrays = d4rl_arrays(TERMINALS, TIMEOUTS)
    arrays["next_observations"] = arrays["observations"] + 100
    dataset = load(tmp_path, arrays)
    data = dataset.transitions
    np.testing.assert_array_equal(data.observations, arrays["observations"])
    np.testing.assert_array_equal(data.next_observations, arrays["observations"] + 100)
    np.testing.assert_array_equal(data.actions, arrays["actions"])
    np.testing.assert_array_equal(data.rewards, arrays["rewards"])
    np.testing.assert_array_equal(data.terminated, TERMINALS)
    assert all(array.dtype == np.float32 for array in data)


def test_without_next_observations_drops_timeouts_and_the_unfinished_last_row(tmp_path):
    arrays = d4rl_arrays(TERMINALS, TIMEOUTS)
    data = load(tmp_path, arrays).transitions
    rows = [0, 1, 2, 3, 4, 6]  # 5 timed out, 7 is last: their next observations are not in the file
    following = [
        1,
        2,
        2,
        4,
        5,
        7,
    ]  # the terminal row 2 has its own in the place of one that is never used
    np.testing.assert_array_equal(data.observations, arrays["observations"][rows])
    np.testing.assert_array_equal(data.next_observations, arrays["observations"][following])
    np.testing.assert_array_equal(data.actions, arrays["actions"][rows])
    np.testing.assert_array_equal(data.rewards, arrays["rewards"][rows])
    np.testing.assert_array_equal(data.terminated, [0, 0, 1, 0, 0, 0])


def test_last_terminal_row_is_kept(tmp_path):
    data = load(tmp_path, d4rl_arrays([0, 0, 1], [0, 0, 0])).transitions
    np.testing.assert_array_equal(data.terminated, [0, 0, 1])
    assert np.isfinite(data.next_observations).all()


def test_row_both_terminal_and_timeout_is_terminal(tmp_path):
    data = load(tmp_path, d4rl_arrays([0, 1, 0, 0], [0, 1, 0, 1])).transitions
    np.testing.assert_array_equal(data.terminated, [0, 1, 0])
    np.testing.assert_array_equal(data.rewards, [1, 2, 4])


def test_episodes_count_dropped_rows_but_not_the_unfinished_episode(tmp_path):
    dataset = load(tmp_path, d4rl_arrays(TERMINALS, TIMEOUTS))
    np.testing.assert_array_equal(dataset.episode_returns, [1 + 2 + 4, 8 + 16 + 32])
    np.testing.assert_array_equal(dataset.episode_lengths, [3, 3])
    assert dataset.episode_returns.dtype == np.float64
    assert dataset.episode_lengths.dtype == np.int64


def test_unfinished_episode_counts_when_it_is_the_only_one(tmp_path):
    dataset = load(tmp_path, d4rl_arrays([0, 0, 0], [0, 0, 0]))
    np.testing.assert_array_equal(dataset.episode_returns, [7])
    np.testing.assert_array_equal(dataset.episode_lengths, [3])
    assert dataset.transitions.size == 2


def test_missing_timeouts_come_from_the_step_limit(tmp_path):
    terminals = np.zeros(450, bool)
    terminals[219] = True  # 0-199 timeout, 200-219 terminal, 220-419 timeout, 420-449 unfinished
    arrays = d4rl_arrays(terminals, observation_size=3, action_size=1)
    arrays["rewards"] = np.ones(450, np.float32)
    dataset = load(tmp_path, arrays, env_id="Pendulum-v1")
    np.testing.assert_array_equal(dataset.episode_lengths, [200, 20, 200])
    dropped = sorted(set(range(450)) - set(dataset.transitions.observations[:, 0].astype(int)))
    assert dropped == [199, 419, 449]


def test_missing_timeouts_and_no_environment(tmp_path):
    fails(tmp_path, d4rl_arrays([0, 0, 1]), "timeouts")


def test_environment_argument_before_attribute_before_file_name(tmp_path):
    arrays = d4rl_arrays([0, 0, 1], [0, 0, 0], action_size=1)

    def spec(**options):
        text = load(tmp_path, arrays, **options).env_spec
        return None if text is None else gymnasium.envs.registration.EnvSpec.from_json(text).id

    assert spec() is None
    assert spec(env_id="Pendulum-v1") == "Pendulum-v1"
    assert spec(env="Pendulum-v1", env_id="Hopper-v5") == "Pendulum-v1"
    assert spec(name="hopper.hdf5", env_id="Pendulum-v1") == "Pendulum-v1"


@pytest.mark.parametrize(
    ("name", "env_id", "sizes", "expert"),
    [
        ("halfcheetah_medium-v2.hdf5", "HalfCheetah-v5", (17, 6), 12135.0),
        ("hopper-medium-replay-v2.hdf5", "Hopper-v5", (11, 3), 3234.3),
        ("walker2d_expert.h5", "Walker2d-v5", (17, 6), 4592.3),
        ("Ant_random.hdf5", "Ant-v5", (105, 8), 3879.7),
        ("antmaze-umaze-v2.hdf5", None, (29, 8), 1.0),
        ("maze2d-umaze-sparse-v1.hdf5", None, (4, 2), 161.86),
        ("pen-human-v1.hdf5", "AdroitHandPen-v1", (45, 24), 3076.8331017826877),
    ],
)
def test_classic_file_names_without_simulator(tmp_path, monkeypatch, name, env_id, sizes, expert):
    monkeypatch.setattr(environments_module, "make_spaces", lambda spec: None)
    arrays = d4rl_arrays([0, 1], [0, 0], observation_size=sizes[0], action_size=sizes[1])
    dataset = load(tmp_path, arrays, name=name)
    assert (dataset.env_spec is None) if env_id is None else (f'"{env_id}"' in dataset.env_spec)
    np.testing.assert_array_equal(dataset.action_low, -np.ones(sizes[1]))
    np.testing.assert_array_equal(dataset.action_high, np.ones(sizes[1]))
    assert dataset.reference_scores[1] == expert


def test_environment_without_simulator_and_without_documented_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(environments_module, "make_spaces", lambda spec: None)
    fails(tmp_path, d4rl_arrays([0, 1], [0, 0]), "Pendulum-v1", "bounds", env="Pendulum-v1")


def test_simulator_that_is_not_installed(monkeypatch):
    def not_installed(spec):
        raise gymnasium.error.DependencyNotInstalled("mujoco")

    monkeypatch.setattr(gymnasium, "make", not_installed)
    assert environments_module.make_spaces(gymnasium.spec("Hopper-v5")) is None


def test_bounds_of_the_environment(tmp_path):
    arrays = d4rl_arrays([0, 0, 1], [0, 0, 0], action_size=1)
    arrays["actions"][1] = 2 + 1e-6  # rounding
    dataset = load(tmp_path, arrays, env_id="Pendulum-v1")
    np.testing.assert_array_equal((dataset.action_low, dataset.action_high), [[-2], [2]])
    assert dataset.transitions.actions.max() == 2
    arrays["actions"][1] = 2.1
    fails(tmp_path, arrays, "actions[1][0]", "[-2.0, 2.0]", "2.1", env_id="Pendulum-v1")


def test_unknown_environments(tmp_path):
    arrays = d4rl_arrays([0, 0, 1], [0, 0, 0])
    fails(tmp_path, arrays, "Nothing-v3", env="Nothing-v3")
    fails(tmp_path, arrays, "Nothing-v3", env_id="Nothing-v3")
    fails(tmp_path, arrays, "bad id", env="bad id")
    fails(tmp_path, arrays, "nomodule:Nothing-v3", env="nomodule:Nothing-v3")


@pytest.mark.parametrize(
    "value", [7, np.array([b"Pendulum-v1"]), np.bytes_(b"\xff\xfe"), h5py.Empty("S1")], ids=repr
)
def test_environment_attribute_that_is_no_text(tmp_path, value):
    arrays = d4rl_arrays([0, 0, 1], [0, 0, 0], action_size=1)
    fails(tmp_path, arrays, "attribute 'env_id'", "expected text", env_id=value)
    # One that is given takes its place, whatever it is.
    assert "Pendulum-v1" in load(tmp_path, arrays, env="Pendulum-v1", env_id=value).env_spec


def test_environment_attribute_in_bytes(tmp_path):
    arrays = d4rl_arrays([0, 0, 1], [0, 0, 0], action_size=1)
    assert "Pendulum-v1" in load(tmp_path, arrays, env_id=np.bytes_(b"Pendulum-v1")).env_spec


def test_environment_of_other_sizes(tmp_path):
    arrays = d4rl_arrays([0, 0, 1], [0, 0, 0], observation_size=4, action_size=1)
    fails(tmp_path, arrays, "Pendulum-v1", "3", "4", env="Pendulum-v1")
    fails(tmp_path, arrays, "discrete", env="CartPole-v1")


def test_environment_of_other_sizes_that_only_the_name_suggests(tmp_path, monkeypatch):
    pendulum = gymnasium.make("Pendulum-v1")
    other = pendulum.observation_space, pendulum.action_space
    monkeypatch.setattr(environments_module, "make_spaces", lambda spec: other)
    arrays = d4rl_arrays([0, 0, 1], [0, 0, 0], observation_size=111, action_size=8)
    dataset = load(tmp_path, arrays, name="ant_medium.hdf5")
    assert dataset.env_spec is None
    assert "Ant-v5 has 3 observation dimensions" in dataset.notes[0]


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "next_observations"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite(tmp_path, name, value):
    arrays = d4rl_arrays(TERMINALS, TIMEOUTS)
    arrays["next_observations"] = arrays["observations"].copy()
    arrays[name][4] = value
    arrays[name][6] = value
    fails(tmp_path, arrays, f" {name}[4]", str(value))


def test_beyond_float32_is_not_finite(tmp_path):
    arrays = d4rl_arrays(TERMINALS, TIMEOUTS)
    arrays["rewards"] = arrays["rewards"].astype(np.float64)
    arrays["rewards"][3] = 1e300
    fails(tmp_path, arrays, "rewards[3]")


@pytest.mark.parametrize(
    "name", ["actions", "rewards", "terminals", "timeouts", "next_observations"]
)
def test_lengths_that_disagree(tmp_path, name):
    arrays = d4rl_arrays(TERMINALS, TIMEOUTS)
    arrays["next_observations"] = arrays["observations"].copy()
    arrays[name] = arrays[name][:-1]
    fails(tmp_path, arrays, name, "7", "8")


def test_shapes_that_disagree(tmp_path):
    arrays = d4rl_arrays(TERMINALS, TIMEOUTS)
    fails(tmp_path, arrays | {"rewards": np.zeros((8, 2), np.float32)}, "rewards", "(8, 2)")
    fails(tmp_path, arrays | {"actions": arrays["actions"][:, 0]}, "actions", "(8,)")
    fails(
        tmp_path, arrays | {"next_observations": arrays["observations"][:, :2]}, "(8, 3)", "(8, 2)"
    )


def test_empty(tmp_path):
    fails(tmp_path, d4rl_arrays([], []), "empty")
    fails(tmp_path, d4rl_arrays([0], [0]), "empty")


def test_discrete_actions_and_images(tmp_path):
    arrays = d4rl_arrays(TERMINALS, TIMEOUTS)
    fails(tmp_path, arrays | {"actions": np.zeros(8, np.int64)}, "discrete")
    fails(tmp_path, arrays | {"actions": np.zeros((8, 2), np.int32)}, "discrete")
    fails(tmp_path, arrays | {"observations": np.zeros((8, 16, 16, 3), np.uint8)}, "images")


def test_text_and_odd_flags(tmp_path):
    arrays = d4rl_arrays(TERMINALS, TIMEOUTS)
    odd = arrays["timeouts"].astype(np.float32)
    assert load(tmp_path, arrays | {"timeouts": odd}).transitions.size == 6
    odd[3] = np.nan
    fails(tmp_path, arrays | {"timeouts": odd}, "timeouts[3]", "nan")
    fails(tmp_path, arrays | {"rewards": np.array([b"a"] * 8)}, "rewards", "numbers")


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminals"])
def test_missing_dataset(tmp_path, name):
    arrays = d4rl_arrays(TERMINALS, TIMEOUTS)
    del arrays[name]
    fails(tmp_path, arrays, name)


def test_group_in_place_of_a_dataset(tmp_path):
    path = write_d4rl(tmp_path / "a.hdf5", {})
    with h5py.File(path, "a") as file:
        file.create_group("observations")
    with pytest.raises(DataError, match="group"):
        load_dataset(path)


def test_files_that_are_not_hdf5(tmp_path):
    good = write_d4rl(tmp_path / "good.hdf5", d4rl_arrays([0] * 999 + [1], [0] * 1000))
    whole = (tmp_path / "good.hdf5").read_bytes()
    (tmp_path / "cut.hdf5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.hdf5").write_text("not HDF5")
    (tmp_path / "nothing.h5").write_bytes(b"")
    (tmp_path / "folder.h5").mkdir()
    assert load_dataset(good).transitions.size == 1000
    for name in ("cut.hdf5", "text.hdf5", "nothing.h5", "folder.h5", "absent.hdf5", "absent/x.h5"):
        with pytest.raises(DataError) as caught:
            load_dataset(str(tmp_path / name))
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_paths_relative_home_and_by_ending(tmp_path, monkeypatch):
    source = write_d4rl(tmp_path / "a.hdf5", d4rl_arrays([0, 1], [0, 0]))
    shutil.copy(source, tmp_path / "B.H5")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.hdf5", "./a.hdf5", "B.H5", "~/a.hdf5"):
        dataset = load_dataset(name)
        assert dataset.name == name
        assert dataset.transitions.size == 2
    for name in ("/x/y.csv", "./data", "gs://bucket/data"):
        with pytest.raises(DataError, match=r"\.hdf5"):
            load_dataset(name)


def test_shared_halfcheetah():
    path = SHARED_DATA / "d4rl" / "halfcheetah_medium_expert-rlzoo.hdf5"
    if not path.exists():
        pytest.skip(f"no {path}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        dataset = load_dataset(str(path))
    assert (
        dataset.transitions.size == 100_000 - 100
    )  # every episode times out, with no next observation
    assert len(dataset.episode_returns) == 100
    assert dataset.episode_returns.mean() == pytest.approx(8296, abs=1)
    assert (dataset.observation_size, dataset.action_size) == (17, 6)
    assert dataset.transitions.terminated.sum() == 0
    assert '"HalfCheetah-v5"' in dataset.env_spec
