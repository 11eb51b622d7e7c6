"""A path, a loss, a critic and an agent of a user: trained, evaluated, resumed, exported."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from efm_jax.runs.plugins import load_plugins
from tests.integration.helpers import refused
from tests.integration.runs import arrays_of, train_flags

PLUGINS = [f"tests.extension.my_{kind}" for kind in ("path", "loss", "critic", "agent")]
CONFIG = {
    "path": "slow", "loss": "early", "critic": "best_q", "best_q.pessimism": 0.25,
    "policy": "greedy", "behavior_steps": 3, "critic_steps": 3, "policy_steps": 3,
    "checkpoint_every": 1, "log_every": 1, "eval_every": 0, "eval_episodes": 1,
}  # fmt: skip


def test_a_users_parts_train_evaluate_resume_and_export(launcher, dataset, tmp_path):
    workdir = tmp_path / "run"
    train = train_flags(dataset, workdir, f"--plugins={','.join(PLUGINS)}", **CONFIG)
    first = launcher.run("train", *train)
    assert first.status == 0, first.err
    assert (first.line["algorithm"], first.line["steps"]) == ("greedy_slow", 9)
    config = json.loads((workdir / "config.json").read_text())
    assert config["plugins"] == PLUGINS
    assert config["config"]["best_q"] == {"pessimism": 0.25}
    # The other commands are told of the plugins: a file does not choose code to run.
    evaluated = launcher.run("evaluate", f"--workdir={workdir}")
    refused(evaluated, f"give --plugins={','.join(PLUGINS)}")
    again = launcher.run("evaluate", f"--workdir={workdir}", train[-1])
    assert again.line["policy_return"] == first.line["policy_return"]
    exported = launcher.run("export", f"--workdir={workdir}", train[-1]).line["file"]
    policy = jax.export.deserialize(bytearray(pathlib.Path(exported).read_bytes()))
    actions = policy.call(np.zeros((4, 3), np.float32), np.uint32(0))
    assert actions.shape == (4, 1)
    assert np.isfinite(actions).all()
    # Continued from step 8 of 9, the last step is the same.
    last = arrays_of(workdir, 9)
    shutil.rmtree(workdir / "checkpoints" / "9")
    resumed = launcher.run("train", *train)
    assert "continuing" in resumed.err
    assert resumed.line["policy_return"] == first.line["policy_return"]
    jax.tree.map(np.testing.assert_array_equal, arrays_of(workdir, 9), last)


def test_without_its_plugin_a_field_is_refused(launcher, dataset, tmp_path):
    flags = train_flags(dataset, tmp_path / "run", **CONFIG)
    refused(launcher.run("train", *flags), "unknown field 'best_q'")
    assert not (tmp_path / "run").exists()


def test_a_plugin_that_cannot_be_imported_ends_with_one_line(launcher, dataset, tmp_path):
    flags = train_flags(dataset, tmp_path / "run", "--plugins=tests.extension.nosuch")
    words = "plugins: tests.extension.nosuch cannot be imported: ModuleNotFoundError"
    refused(launcher.run("train", *flags), words)


@pytest.mark.parametrize("name", ["tests.extension.nosuch", "../evil", "os.path;x"])
def test_a_module_that_cannot_be_imported_is_named(name):
    with pytest.raises(ValueError, match=r"^plugins: "):
        load_plugins([name])
