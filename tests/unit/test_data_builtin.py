import json

import chex
import jax
import minari
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from numpy.testing import assert_array_equal

from efm_jax.data import BUILTIN_DATASET, builtin, load_dataset, recording
from efm_jax.envs.pendulum import BEST


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """Fewer episodes behind the reference scores."""
    monkeypatch.setattr(recording, "REFERENCE_EPISODES", 3)


def files(folder):
    """Every file under `folder` with its bytes, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_whole_default_dataset(folder):
    dataset = load_dataset(BUILTIN_DATASET)
    returns, (low, high) = dataset.episode_returns, dataset.reference_scores
    assert (dataset.name, dataset.transitions.size, len(returns)) == (BUILTIN_DATASET, 40_000, 200)
    # Good and bad episodes, and an expert that the average of the data is far from.
    assert -450 < returns.mean() < -350
    assert (returns < -700).mean() > 0.1
    assert (returns > -200).mean() > 0.1
    assert low < -1000
    assert -200 < high < -100
    assert dataset.transitions.terminated.sum() == 0
    assert set(dataset.episode_lengths) == {200}
    assert_array_equal((dataset.action_low, dataset.action_high), [[-2], [2]])
    assert EnvSpec.from_json(dataset.env_spec).id == "Pendulum-v1"
    metadata = json.loads((folder / BUILTIN_DATASET / "data" / "metadata.json").read_text())
    assert metadata["dataset_id"] == BUILTIN_DATASET
    assert [path.name for path in folder.iterdir()] == ["efm"]
    assert BUILTIN_DATASET in minari.list_local_datasets()
    assert "efm/pendulum" in minari.namespace.list_local_namespaces()


def test_recorded_once(quick, monkeypatch):
    builtin.record(num_episodes=2)
    monkeypatch.setattr(builtin, "record", pytest.fail)
    assert load_dataset(BUILTIN_DATASET).transitions.size == 400


def test_same_bytes_for_the_same_seed(quick, folder, monkeypatch):
    found, prints = [], []
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / name))
        np.random.seed(len(found))  # the global state must not matter
        builtin.record(seed=seed, num_episodes=3)
        found.append(files(folder / name))
        prints.append(load_dataset(BUILTIN_DATASET).fingerprint())
    assert found[0] == found[1]
    assert prints[0] == prints[1] != prints[2]


def test_more_episodes_begin_with_the_same_ones(quick, folder, monkeypatch):
    data = []
    for count in (2, 3):
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / str(count)))
        builtin.record(num_episodes=count)
        data.append(load_dataset(BUILTIN_DATASET).transitions)
    chex.assert_trees_all_equal(data[0], jax.tree.map(lambda leaf: leaf[:400], data[1]))


def test_arguments():
    with pytest.raises(ValueError, match="num_episodes"):
        builtin.record(num_episodes=0)
    with pytest.raises(ValueError, match="seed"):
        builtin.record(seed=-1)


def test_controller_holds_the_top_and_pumps_below():
    assert BEST.torque(np.array([1.0, 0.0, 0.0])) == 0
    assert BEST.torque(np.array([np.cos(0.1), np.sin(0.1), 0.0])) < 0
    assert BEST.torque(np.array([-1.0, 0.0, 1.0])) > 0
    assert BEST.torque(np.array([-1.0, 0.0, -1.0])) < 0
