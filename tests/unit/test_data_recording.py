"""Recording a Minari dataset: whole or not at all, the same bytes, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from efm_jax.data import BUILTIN_DATASET, DataError, builtin, load_dataset, recording
from efm_jax.envs import play

ROOT = Path(__file__).parents[2]
NAME = "efm/test/some-v0"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(recording, "REFERENCE_EPISODES", 3)
    # A recording names it, and files may only name what is registered.
    monkeypatch.setitem(gymnasium.registry, "Walk-v0", EnvSpec("Walk-v0", entry_point=Walk))
    return tmp_path


class Walk(gymnasium.Env):
    """One number that actions move; ends at 3 or after the limit; observations nest."""

    observation_space = spaces.Dict({"b": spaces.Box(-9, 9, (1,)), "a": spaces.Box(-9, 9, (2,))})
    action_space = spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = np.float32(self.np_random.uniform(-1, 1))
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.place = np.float32(np.clip(self.place + action[0], -9, 9))
        return self.observe(), float(self.place), bool(self.place >= 3), False, {}

    def observe(self):
        return {"a": np.array([self.place, 1], np.float32), "b": np.array([2], np.float32)}


def make_walk(limit=10, **changes):
    env = Walk()
    for name, value in changes.items():
        setattr(env, name, value)
    env.spec = EnvSpec("Walk-v0", entry_point=f"{__name__}:Walk", max_episode_steps=limit)
    return gymnasium.wrappers.TimeLimit(env, limit) if limit else env


def up(_):
    return np.array([7.0])  # clipped to 1


def record(name=NAME, env=None, begin=lambda episode: up, **arguments):
    defaults = {
        "seed": 0,
        "episodes": 4,
        "algorithm_name": "up",
        "code_permalink": "x",
        "description": "x",
    }
    return recording.record(name, env or make_walk(), begin, **defaults | arguments)


def files(folder):
    """Every file under `folder` with its bytes, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def folders(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_recorded_is_what_is_loaded(folder):
    recorded = record(expert=up)
    assert recorded.published
    dataset = load_dataset(NAME)
    np.testing.assert_allclose(dataset.episode_returns, recorded.returns, rtol=1e-6)
    np.testing.assert_array_equal(dataset.episode_lengths, recorded.lengths)
    assert dataset.transitions.observations.shape == (recorded.lengths.sum(), 3)  # a, then b
    assert (dataset.transitions.observations[:, 1:] == [1, 2]).all()
    np.testing.assert_array_equal(dataset.transitions.actions, 1)
    ends = np.flatnonzero(dataset.transitions.terminated)
    np.testing.assert_array_equal(ends, recorded.lengths.cumsum() - 1)
    spec = EnvSpec.from_json(dataset.env_spec)
    assert (spec.id, spec.max_episode_steps) == ("Walk-v0", 10)
    worst, best = dataset.reference_scores
    assert (worst, best) == recorded.reference_scores
    assert best > worst
    metadata = json.loads((folder / NAME / "data" / "metadata.json").read_text())
    assert metadata["dataset_id"] == NAME
    assert metadata["algorithm_name"] == "up"
    assert folders(folder) == ["efm"]


def test_references_are_means_on_the_same_starts():
    worst, best = record(env=make_walk(limit=1), expert=up).reference_scores
    resets = np.random.default_rng([0, 3])
    seeds = [int(resets.integers(2**31)) for _ in range(3)]
    rng = np.random.default_rng([0, 4])
    starts = [np.random.Generator(np.random.PCG64(seed)).uniform(-1, 1) for seed in seeds]
    assert best == pytest.approx(np.mean(starts) + 1, rel=1e-5)
    assert worst == pytest.approx(
        np.mean([start + rng.uniform(-1, 1) for start in starts]), rel=1e-5
    )


def test_steps_finish_their_episode():
    for version, steps in enumerate((14, 15)):
        arguments = {
            "env": make_walk(7),
            "begin": lambda _: lambda _: [-1],
            "steps": steps,
            "episodes": None,
        }
        recorded = record(f"efm/test/steps-v{version}", **arguments)
        assert recorded.lengths.tolist() == [7] * (2 + version)


def noisy(seed):
    return play.batched(
        make_walk(), lambda observations, key: observations[:, 1:2] / 2, seed, noise=0.5
    )


def test_same_bytes_for_the_same_arguments(folder, monkeypatch):
    found = []
    for name, seed, count in [("a", 0, 3), ("b", 0, 3), ("c", 1, 3), ("d", 0, 2)]:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / name))
        np.random.seed(len(found))  # the global state must not matter
        record(begin=noisy(seed), seed=seed, episodes=count, expert=up)
        found.append((files(folder / name), load_dataset(NAME).transitions))
    assert found[0][0] == found[1][0] != found[2][0]
    for many, few in zip(found[0][1], found[3][1], strict=True):
        np.testing.assert_array_equal(
            many[: len(few)], few
        )  # more episodes begin with the same ones


def test_batched_policy_sees_flat_observations_and_a_key_of_its_own():
    seen = []

    def policy(observations, key):
        seen.append((np.asarray(observations), tuple(jax.random.key_data(key).tolist())))
        return observations[:, 2:] / 4

    env = make_walk()
    begin = play.batched(env, policy, seed=5)
    for episode in (0, 1):
        act = begin(episode)
        for _ in range(2):
            assert act(env.reset(seed=0)[0]) == [0.5]
    assert all(
        observations.shape == (1, 3) and observations.dtype == np.float32
        for observations, _ in seen
    )
    assert len({key for _, key in seen}) == 4
    again = play.batched(env, policy, seed=5)(1)
    again(env.reset(seed=0)[0])
    assert seen[4][1] == seen[2][1]


def test_noise_is_in_units_of_half_the_range():
    env = make_walk(action_space=spaces.Box(-3.0, 3.0, (1,)))
    act = play.batched(env, lambda observations, key: 0 * observations[:, :1], seed=0, noise=0.5)(0)
    observation = env.reset(seed=0)[0]
    assert np.std([act(observation) for _ in range(300)]) == pytest.approx(1.5, rel=0.1)


def test_two_processes_at_once(folder):
    code = (
        "from efm_jax.data import BUILTIN_DATASET, builtin, load_dataset, recording\n"
        "recording.REFERENCE_EPISODES = 3\n"
        "import minari, sys\n"
        "print('ready', flush=True); sys.stdin.readline()\n"  # both start recording together
        "builtin.record(num_episodes=20)\n"
        "print(load_dataset(BUILTIN_DATASET).fingerprint())\n"
    )
    options = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | {"text": True}
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


def test_loser_of_the_race_leaves_the_winners(folder):
    def begin(episode):
        if episode == 1:  # another process, done just before
            assert record(episodes=1).published
        return up

    assert not record(episodes=2, begin=begin).published
    assert len(load_dataset(NAME).episode_returns) == 1
    assert folders(folder) == ["efm"]


@pytest.mark.parametrize("killer", ["Walk.step", "os.replace", "os.rename"])
def test_killed_recording_is_never_loaded(folder, killer):
    """Killed in an episode, before the mark of the namespace, and before the last rename."""
    code = (
        "import os\n"
        "from tests.unit.test_data_recording import Walk, record\n"
        f"{killer} = lambda *_: os._exit(9)\n"
        "record()\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=100, check=False)
    assert killed.returncode == 9
    left = folders(folder)
    # Minari keeps the episodes elsewhere until a recording is complete.
    assert any(name.startswith("efm-recording-") for name in left) == (killer != "Walk.step")
    assert not (folder / NAME).exists()
    record(episodes=1)
    assert len(load_dataset(NAME).episode_returns) == 1
    assert set(folders(folder)) == {"efm", *left}


def test_failed_recording_leaves_nothing(folder, monkeypatch):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(DataError, match="No space left") as caught:
        builtin.record(num_episodes=1)
    assert BUILTIN_DATASET in str(caught.value)
    assert [path for path in folder.rglob("*") if path.is_file()] == [
        folder / "efm" / name / "namespace_metadata.json" for name in ("", "pendulum")
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seed": -1}, "seed: expected an integer >= 0"),
        ({"episodes": 0}, "episodes: expected an integer >= 1"),
        ({"episodes": None, "steps": 0}, "steps: expected an integer >= 1"),
        ({"steps": 3}, "expected one of them; got 4 and 3"),
        ({"episodes": None}, "expected one of them; got None and None"),
        ({"env": make_walk(None)}, "Walk-v0: expected a limit on the length"),
        ({"env": make_walk(action_space=spaces.Discrete(2))}, "Walk-v0: actions are discrete"),
        (
            {"env": make_walk(observation_space=spaces.Discrete(2))},
            "Walk-v0: observation: expected Box",
        ),
        (
            {"begin": lambda _: lambda _: np.zeros(2)},
            r"expected shape \(1,\), of Walk-v0; got \(2,\)",
        ),
        ({"begin": lambda _: lambda _: [np.nan]}, r"actions: expected finite numbers; got \[nan\]"),
        ({"expert": lambda _: [-1]}, "expected an expert that is better than random actions"),
    ],
)
def test_what_cannot_be_recorded_is_one_line(folder, arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        record(**arguments)
    assert "\n" not in str(caught.value)
    assert folders(folder) == []


def test_new_ids(folder):
    recording.check_new(NAME)
    record()
    with pytest.raises(DataError, match=f"{NAME}: expected a new id"):
        recording.check_new(NAME)
    for bad in ("efm/test/some", "no version", "../up-v0", ""):
        with pytest.raises(DataError, match="expected a Minari id"):
            recording.check_new(bad)
