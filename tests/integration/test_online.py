"""Fine-tuning: what a policy plays joins its data, and training goes on with both."""

import contextlib
import json

import chex
import jax
import numpy as np
import pytest

from efm_jax.data import load_dataset
from efm_jax.rl.trainer import Trainer
from efm_jax.runs.session import Session, prepare
from efm_jax.runs.workdir import resolve
from efm_jax.training.parallel import Layout
from tests.integration.helpers import refused
from tests.integration.runs import CHEAP, ROWS, arrays_of, saved_steps, table, train_flags
from tests.tiny import config

ONLINE = ("--online_steps=500", "--online_rounds=2")
MEAN = "normalizer/observation_mean"


def test_rounds_go_on_from_each_other(launcher, dataset, tmp_path):
    workdir = tmp_path / "run"
    flags = train_flags(dataset, workdir, *ONLINE, **CHEAP, eval_every=0)
    first = launcher.run("train", *flags)
    assert first.status == 0, first.err
    rounds = [workdir / "online" / name for name in "12"]
    rows = ROWS
    for folder in rounds:
        with np.load(folder / "played.npz") as played:
            assert played["observations"].shape == (300, 3)  # whole episodes, of 100 as the data's
            assert np.abs(played["actions"]).max() <= 2.0
            followed = ~played["truncated"][:-1]
            ends = played["next_observations"][:-1][followed]
            np.testing.assert_array_equal(ends, played["observations"][1:][followed])
            rows += 300
        info = json.loads((folder / "config.json").read_text())
        assert info["transitions"] == rows
        assert info["phase_steps"] == {"behavior": 20, "critic": 20, "policy": 30}
        # In the units of states in which the models were trained.
        last, ended = (arrays_of(run, saved_steps(run)[-1]) for run in (folder, workdir))
        np.testing.assert_array_equal(last[MEAN], ended[MEAN])
    result = json.loads(first.out.splitlines()[-1])
    assert result["workdir"] == str(rounds[-1])
    # The same command again plays nothing anew.
    again = launcher.run("train", *flags)
    assert again.status == 0, again.err
    assert json.loads(again.out.splitlines()[-1])["policy_return"] == result["policy_return"]
    assert len(table(rounds[-1] / "returns.csv")) == 4
    (rounds[0] / "played.npz").write_bytes(b"PK\x03\x04 cut")
    damaged = launcher.run("train", *flags)
    assert damaged.status == 2
    assert "played.npz: cannot be read as an npz file" in damaged.complaints[-1]


def test_fine_tuning_is_of_one_seed(launcher, dataset, tmp_path):
    result = launcher.run(
        "train", *train_flags(dataset, tmp_path / "run", *ONLINE, "--num_seeds=2")
    )
    refused(result, "--online_steps: expected one seed and one host")
    assert not (tmp_path / "run").exists()


def test_a_run_begins_with_the_models_of_another(dataset, tmp_path):
    found, layout = load_dataset(str(dataset)), Layout.create(devices=jax.devices()[:1])
    data = prepare(config(), found, layout, seed=0, num_rows=ROWS, note=print)
    trainer = data.trainer()
    other = Trainer(config(), data.transitions, [5], layout).init_state()
    session = Session(data, trainer, resolve(tmp_path), print, 0.0, warm=other)
    with contextlib.closing(session):
        state = session.start()
    for name in ("behavior", "critic"):
        ours, theirs = getattr(state, name), getattr(other, name)
        chex.assert_trees_all_equal((ours.params, ours.average), (theirs.params, theirs.average))
    fresh = trainer.init_state()
    chex.assert_trees_all_equal(state.policy.params, fresh.policy.params)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(fresh.behavior.params, other.behavior.params)
