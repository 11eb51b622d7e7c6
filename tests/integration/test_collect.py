"""`launch.collect` as a process: what it records, prints and refuses."""

import numpy as np
import pytest

from efm_jax.data import load_dataset
from tests.integration.helpers import refused
from tests.integration.runs import CHEAP, train_flags


@pytest.fixture
def minari(tmp_path, monkeypatch):
    """Minari's folder, for the processes and for this one."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return {"MINARI_DATASETS_PATH": str(tmp_path / "minari")}


def test_random_actions(launcher, minari):
    result = launcher.run(
        "collect", "--env=Pendulum-v1", "--policy=random", "--episodes=3", env=minari
    )
    assert result.status == 0, result.err
    assert result.complaints == []
    line = result.line
    assert (line["dataset"], line["env"]) == ("efm/pendulum/random-v0", "Pendulum-v1")
    assert (line["episodes"], line["steps"]) == (3, 600)
    dataset = load_dataset(line["dataset"])
    assert dataset.transitions.size == 600
    assert line["dataset_return"] == pytest.approx(dataset.episode_returns.mean(), rel=1e-5)
    assert abs(dataset.transitions.actions.mean()) < 0.2
    assert np.abs(dataset.transitions.actions).max() > 1.9
    assert line["reference_scores"] == list(dataset.reference_scores)
    assert abs(line["dataset_score"]) < 30


def test_two_at_once_leave_one_dataset(launcher, minari):
    flags = (
        "--env=Pendulum-v1",
        "--policy=random",
        "--dataset=mine/some-v3",
        "--steps=1000",
        "--seed=4",
    )
    processes = [launcher.start("collect", *flags, env=minari) for _ in range(2)]
    results = [process.wait() for process in processes]
    assert sorted(result.status for result in results) == [0, 2], results
    loser = max(results, key=lambda result: result.status)
    refused(loser, "mine/some-v3")
    assert load_dataset("mine/some-v3").transitions.size == 1000


def test_a_trained_policy(launcher, minari, finished):
    workdir = finished[0]
    flags = (f"--policy={workdir}", "--dataset=mine/policy-v0", "--episodes=2", "--noise=0.1")
    result = launcher.run("collect", *flags, env=minari)
    assert result.status == 0, result.err
    assert result.line["env"] == "Pendulum-v1"  # the run's
    actions = load_dataset("mine/policy-v0").transitions.actions
    assert actions.shape == (200, 1)  # episodes are as long as those of the run's dataset
    assert len(np.unique(actions)) > 100
    flags = (f"--policy={workdir}", "--env=MountainCarContinuous-v0")
    result = launcher.run("collect", *flags, env=minari)
    refused(result, "observations: expected shape (3,) or (..., 3)")


RANDOM = ("--env=Pendulum-v1", "--policy=random")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--env=Pendulum-v1",), "--policy: expected random, waypoints, ogbench or a "),
        (("--policy=random",), "--env: expected a Gymnasium id"),
        (("--env=NoSuch-v0", "--policy=random"), "'NoSuch-v0' is not known to Gymnasium"),
        (
            ("--env=Pendulum-v1", "--policy=waypoints"),
            "expected a PointMaze environment; got Pendulum-v1",
        ),
        (
            ("--env=Pendulum-v1", "--policy=no/such"),
            "--policy=no/such: expected random, waypoints, ogbench or",
        ),
        (("--env=Pendulum-v1", "--policy=efm_jax"), "holds no run"),
        (("--policy=efm_jax",), "holds no run"),
        (("--env=CartPole-v1", "--policy=random"), "actions are discrete"),
        ((*RANDOM, "--episodes=0"), "episodes"),
        ((*RANDOM, "--steps=x"), "steps"),
        ((*RANDOM, "--seed=-1"), "seed"),
        (
            (*RANDOM, "--steps=9", "--episodes=9"),
            "--episodes, --steps: expected one of them; got both",
        ),
        ((*RANDOM, "--noise=1"), "--noise: expected another policy than random"),
        (
            ("--env=Pendulum-v1", "--policy=efm_jax", "--noise=-1"),
            "--noise: expected a finite number in [0",
        ),
        ((*RANDOM, "--dataset=bad"), "expected a Minari id"),
        ((*RANDOM, "--dataset=efm/pendulum/scripted-v0"), "is the built-in dataset's"),
    ],
)
def test_bad_input_is_one_line_and_status_2(launcher, minari, flags, words):
    refused(launcher.run("collect", *flags, env=minari), words)


def test_an_existing_dataset_is_kept(launcher, minari):
    flags = ("--env=Pendulum-v1", "--policy=random", "--episodes=1")
    assert launcher.run("collect", *flags, env=minari).status == 0
    before = load_dataset("efm/pendulum/random-v0").fingerprint()
    result = launcher.run("collect", *flags, "--seed=1", env=minari)
    refused(result, "efm/pendulum/random-v0: expected a new id")
    assert load_dataset("efm/pendulum/random-v0").fingerprint() == before


def test_point_maze(launcher, minari):
    flags = ("--env=PointMaze_UMaze-v3", "--policy=waypoints", "--steps=1000")
    result = launcher.run("collect", *flags, env=minari)
    assert result.status == 0, result.err
    assert result.complaints == []
    assert result.line["dataset"] == "efm/pointmaze_umaze/waypoints-v0"
    assert (result.line["episodes"], result.line["steps"]) == (4, 1200)
    worst, best = result.line["reference_scores"]
    assert worst < 30 < 200 < best < 300
    again = launcher.run("collect", *flags, "--dataset=mine/again-v0", env=minari)
    assert again.status == 0, again.err
    datasets = [load_dataset(run.line["dataset"]).transitions for run in (result, again)]
    for first, second in zip(*datasets, strict=True):
        np.testing.assert_array_equal(first, second)


MODULE = """
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv
class Mine(PendulumEnv): pass
gymnasium.register("Mine-v3", entry_point=Mine)
"""


def test_an_environment_of_the_users_own_module(launcher, minari, tmp_path):
    """``--env=module:Name-v0`` as in ``gymnasium.make``, without a limit of its own."""
    (tmp_path / "mine.py").write_text(MODULE)
    env = {"env": minari, "cwd": tmp_path}
    collect = ("--env=mine:Mine-v3", "--policy=random", "--dataset=mine/any-v0", "--episodes=2")
    refused(launcher.run("collect", *collect, **env), "give --max_episode_steps")
    assert launcher.run("collect", *collect, "--max_episode_steps=30", **env).line["steps"] == 60

    # The recording names it, and that alone makes nobody import it.
    train = train_flags("mine/any-v0", tmp_path / "run", batch_size=16, **CHEAP)
    refused(launcher.run("train", *train, **env), "'mine:Mine'", "--allow_env=mine")
    unlimited = "no limit on the length of an episode", "--max_episode_steps"
    refused(launcher.run("train", *train, "--env=mine:Mine-v3", **env), *unlimited)
    trained = launcher.run("train", *train, "--allow_env=mine", **env)
    assert trained.status == 0, trained.err
    assert "note: episodes are evaluated in Mine-v3, of at most 30 steps" in trained.out

    # Nor does the run, which does not remember what was allowed.
    evaluate = ("evaluate", f"--workdir={tmp_path / 'run'}", "--episodes=1")
    refused(launcher.run(*evaluate, **env), "--allow_env=mine")
    again = launcher.run(*evaluate, "--allow_env=mine", **env)
    assert again.status == 0, again.err
    other = launcher.run(*evaluate, "--env=mine:Mine-v3", "--max_episode_steps=7", **env)
    assert "note: episodes are evaluated in Mine-v3, of at most 7 steps" in other.out
    assert launcher.run(*evaluate, "--env=Pendulum-v1", **env).status == 0
    refused(launcher.run(*evaluate, "--env=MountainCarContinuous-v0", **env), "has bounds")
