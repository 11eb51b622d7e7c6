"""A path, a loss, a critic and an agent of a user: trained, evaluated, resumed, exported."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from efm_jax.runs.plugins import load_plugins
from tests.integration.helpers import run

PLUGINS = [f"tests.extension.my_{kind}" for kind in ("path", "loss", "critic", "agent")]
FLAGS = [
    f"--plugins={','.join(PLUGINS)}", "--config=experiments/configs/quick.py",
    "--config.path=slow", "--config.loss=early", "--config.critic=best_q",
    "--config.best_q.pessimism=0.25", "--config.policy=greedy", "--config.behavior_steps=3",
    "--config.critic_steps=3", "--config.policy_steps=3", "--config.checkpoint_every=1",
    "--config.log_every=1", "--config.eval_every=0", "--config.eval_episodes=1",
]  # fmt: skip


def result(command, *flags):
    done = run(command, *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_users_parts_train_evaluate_resume_and_export(tmp_path):
    workdir = tmp_path / "run"
    first = result("launch.train", *FLAGS, f"--workdir={workdir}")
    assert (first["algorithm"], first["steps"]) == ("greedy_slow", 9)
    config = json.loads((workdir / "config.json").read_text())
    assert config["plugins"] == PLUGINS
    assert config["config"]["best_q"] == {"pessimism": 0.25}
    # The others find the plugins in the run.
    again = result("launch.evaluate", f"--workdir={workdir}")
    assert again["policy_return"] == first["policy_return"]
    exported = result("launch.export", f"--workdir={workdir}")
    policy = jax.export.deserialize(bytearray(pathlib.Path(exported["file"]).read_bytes()))
    actions = policy.call(np.zeros((4, 3), np.float32), np.uint32(0))
    assert actions.shape == (4, 1)
    assert np.isfinite(actions).all()
    # Resumed from step 8 of 9, the last step is the same.
    shutil.rmtree(workdir / "checkpoints" / "9")
    (workdir / "result.json").unlink()
    resumed = result("launch.train", *FLAGS, f"--workdir={workdir}")
    assert resumed["policy_return"] == first["policy_return"]


def test_without_its_plugin_a_name_is_refused(tmp_path):
    done = run("launch.train", *FLAGS[1:], f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "unknown field 'best_q'" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tests.extension.nosuch", "../evil", "os.path;x"])
def test_a_module_that_cannot_be_imported_is_named(name):
    with pytest.raises(ValueError, match=r"^plugins: "):
        load_plugins([name])
