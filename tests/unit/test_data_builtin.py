import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

from efm_jax.data import BUILTIN_DATASET, DataError, builtin, load_dataset
from efm_jax.data.controllers import BEST

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """Fewer episodes behind the reference scores."""
    monkeypatch.setattr(builtin, "REFERENCE_EPISODES", 3)


def files(folder):
    """Every file under `folder` with its bytes, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def folders(folder):
    return sorted(path.name for path in folder.iterdir())


def test_whole_default_dataset(folder):
    dataset = load_dataset(BUILTIN_DATASET)
    assert dataset.transitions.size == 40_000
    assert len(dataset.episode_returns) == 200
    returns = dataset.episode_returns
    assert -450 < returns.mean() < -350
    low, high = dataset.reference_scores
    assert low < -1000
    assert -200 < high < -100
    # Good and bad episodes, and an expert that the average of the data is far from.
    assert (returns < -700).mean() > 0.1
    assert (returns > -200).mean() > 0.1
    assert dataset.name == BUILTIN_DATASET
    assert dataset.transitions.terminated.sum() == 0
    assert set(dataset.episode_lengths) == {200}
    np.testing.assert_array_equal((dataset.action_low, dataset.action_high), [[-2], [2]])
    assert EnvSpec.from_json(dataset.env_spec).id == "Pendulum-v1"
    metadata = json.loads((folder / BUILTIN_DATASET / "data" / "metadata.json").read_text())
    assert metadata["dataset_id"] == BUILTIN_DATASET
    assert folders(folder) == ["efm"]

    import minari

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
    for few, many in zip(*data, strict=True):
        np.testing.assert_array_equal(few, many[:400])


def test_two_processes_at_once(folder):
    code = (
        "from efm_jax.data import BUILTIN_DATASET, builtin, load_dataset\n"
        "builtin.REFERENCE_EPISODES = 3\n"
        "import minari, sys\n"
        "print('ready', flush=True); sys.stdin.readline()\n"  # both start recording together
        "builtin.record(num_episodes=20)\n"
        "print(load_dataset(BUILTIN_DATASET).fingerprint())\n"
    )
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), **options)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    results = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0] == load_dataset(BUILTIN_DATASET).fingerprint() + "\n"
    assert [error for _, error in results] == ["", ""]  # no progress bar where nobody looks
    assert folders(folder) == ["efm"]
    assert folders(folder / "efm" / "pendulum") == ["namespace_metadata.json", "scripted-v0"]


def test_loser_of_the_race_uses_the_winners(quick, folder, monkeypatch):
    record_episodes = builtin._record

    def slow(*arguments):
        record_episodes(*arguments)
        monkeypatch.setattr(builtin, "_record", record_episodes)
        builtin.record(seed=1, num_episodes=1)  # another process, done just before

    monkeypatch.setattr(builtin, "_record", slow)
    builtin.record(seed=0, num_episodes=2)
    assert load_dataset(BUILTIN_DATASET).transitions.size == 200
    assert folders(folder) == ["efm"]


@pytest.mark.parametrize("stage", ["_play", "_set_dataset_id", "_publish"])
def test_killed_recording_is_never_loaded(quick, folder, monkeypatch, stage):
    class Killed(BaseException):
        pass

    def kill(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(builtin, stage, kill)
        patch.setattr(builtin.shutil, "rmtree", lambda *a, **k: None)  # a killed process tidies nothing up
        with pytest.raises(Killed):
            builtin.record(num_episodes=2)
    assert not (folder / BUILTIN_DATASET).exists()
    builtin.record(num_episodes=1)
    assert load_dataset(BUILTIN_DATASET).transitions.size == 200


def test_failed_recording_leaves_nothing(quick, folder, monkeypatch):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(builtin, "_set_dataset_id", full)
    with pytest.raises(DataError, match="No space left") as caught:
        builtin.record(num_episodes=1)
    assert BUILTIN_DATASET in str(caught.value)
    assert folders(folder) == []


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
