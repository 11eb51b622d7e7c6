"""Finding and making environments, with Gymnasium Robotics and without."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

from efm_jax.data import DataError
from efm_jax.envs import environments, evaluate, play, specs
from efm_jax.runs.evaluation import check_environment

ROOT = Path(__file__).parents[2]
MAZE = "PointMaze_UMaze-v3"


@pytest.fixture
def without_robotics(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    for name in [name for name in gymnasium.registry if name.startswith("PointMaze")]:
        monkeypatch.delitem(gymnasium.registry, name)


def still(observations, step):
    return np.zeros((1, 1, 2))


def test_a_found_spec_is_a_copy():
    specs.named("test", "Pendulum-v1").kwargs["g"] = 3.0
    assert specs.named("test", "Pendulum-v1").kwargs == {}


def test_missing_robotics_is_named(without_robotics):
    hint = r"pip install 'efm-jax\[robotics\]'"
    with pytest.raises(DataError, match=f"{MAZE}.*{hint}"):
        specs.named("some/data-v0", MAZE)
    with pytest.raises(ValueError, match=f"{MAZE}.*{hint}") as caught:
        evaluate(still, MAZE, episode_seeds=[0])
    assert "\n" not in str(caught.value)
    spec = EnvSpec(
        MAZE, "gymnasium_robotics.envs.maze.point_maze:PointMazeEnv", max_episode_steps=3
    )
    with pytest.raises(ValueError, match=f"not known.*PointMaze_UMaze.*{hint}") as caught:
        evaluate(still, spec.to_json(), episode_seeds=[0])
    assert "\n" not in str(caught.value)


def test_bounds_and_limits_are_checked_at_the_start():
    text = specs.to_json("test", specs.named("test", "Pendulum-v1"))
    two = np.full(1, 2, np.float32)
    check_environment(text, 3, 1, (-two, two))
    with pytest.raises(DataError, match=r"\[-1, 1\] in the data and \[-2, 2\] in Pendulum-v1"):
        check_environment(text, 3, 1, (-two / 2, two / 2))
    with pytest.raises(ValueError, match=r"no limit .*--max_episode_steps"):
        check_environment(text.replace("200", "null"), 3, 1)


def test_what_cannot_be_made_is_one_line():
    spec = gymnasium.spec("Pendulum-v1")
    with pytest.raises(DataError, match=r"Pendulum-v1 cannot be made: .*no_such") as caught:
        environments.make(spec, no_such=1)
    assert "\n" not in str(caught.value)


def test_an_environment_without_a_spec_or_a_box_of_actions_is_refused():
    env = gymnasium.make("CartPole-v1")
    with pytest.raises(DataError, match=r"environment CartPole-v1: expected actions in a Box"):
        play.play(env, 0, lambda observation: np.zeros(1))
    with pytest.raises(ValueError, match="env: expected an environment made from a spec; got"):
        environments.spec_of(type(env.unwrapped)())


def test_robotics_is_found_in_a_fresh_process_and_leaves_nothing(tmp_path):
    code = (
        "import numpy as np\n"
        "from efm_jax.envs import evaluate\n"
        f"rollouts = evaluate(lambda o, s: np.zeros((1, 2, 2)), '{MAZE}', episode_seeds=[0, 1])\n"
        "print(rollouts.lengths.tolist())\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    environ = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=100
    )
    assert list(tmp_path.glob("*.xml")) == []
    assert (done.returncode, done.stdout, done.stderr) == (0, "[[300, 300]]\n", "")
