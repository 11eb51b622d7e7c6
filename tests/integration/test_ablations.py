"""The ablations and the effective guidance scale, as small as they go: run, share and resume."""

import csv
import functools
import pickle

import jax
import numpy as np
import pytest

from efm_jax.data import fit_normalizer, load_dataset, preprocess
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.trainer import Trainer
from efm_jax.training.parallel import Layout
from experiments.rl import ablations, ablations_normalizers, guidance_scale, study
from experiments.rl.study import SMOKE, Study


@pytest.fixture(scope="module", autouse=True)
def registered():
    ablations_normalizers.register()


@pytest.fixture
def small(monkeypatch):
    """Few steps, on one of the tests' devices."""
    layout = Layout.create(devices=jax.devices()[:1])
    for module in (study, guidance_scale):
        monkeypatch.setattr(module, "Trainer", functools.partial(Trainer, layout=layout))
    steps = {"behavior_steps": 20, "critic_steps": 20, "policy_steps": 20, "eval_every": 0}
    steps |= {"renew_every": 10, "log_every": 10, "checkpoint_every": 20, "eval_episodes": 1}
    for name, value in steps.items():
        monkeypatch.setitem(SMOKE, name, value)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_arm_changes_what_it_says():
    base = QIPOConfig()
    configs, labels = ablations.plan(base, list(ablations.ABLATIONS))
    assert {method for _, _, method in labels} == set(configs)
    # Every ablation has the preset among its arms (renewals twice); it is run once.
    assert [name for name, _, method in labels if method == "base"] == [
        "m", "renewals", "renewals", "beta", "estimator", "sampler", "critic", "copies",
        "normalizer",
    ]  # fmt: skip
    totals = {
        ablations.total_beta(configs[m]) for _, arm, m in labels if arm.endswith("same total")
    }
    assert totals == {ablations.total_beta(base)}
    assert {configs[m].policy_steps for _, _, m in labels} == {base.policy_steps}
    assert {arm: configs[m].critic_steps for name, arm, m in labels if name == "critic"} == {
        "1%": 100, "10%": 1000, "30%": 3000, "100%": 10_000,
    }  # fmt: skip
    following, _ = ablations.plan(QIPOConfig(target_ess=0.5), ["beta", "renewals"])
    assert {c.target_ess for c in following.values()} == {0.9, 0.7, 0.5, 0.3}


def test_ablations(small, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "CRITIC_FRACTIONS", (0.1,))
    arguments = [f"--dataset=small={dataset}", "--seeds=1", f"--out={tmp_path}", "--smoke"]
    assert ablations.main([*arguments, "--only=critic"]) == 0
    assert ablations.main([*arguments, "--only=critic,normalizer"]) == 0
    rows, renewals = read(tmp_path / "returns.csv"), read(tmp_path / "renewals.csv")
    assert [row["method"] for row in rows] == [
        "base",
        "critic=10%",
        "normalizer=batch",
    ]  # each once
    assert {row["name"] for row in renewals if row["method"] == "normalizer=batch"} >= {
        "ess",
        "ess_share",
    }
    q = {
        row["method"]: row["value"]
        for row in renewals
        if row["name"] == "q_data" and row["step"] == "0"
    }
    assert q["base"] == q["normalizer=batch"] != q["critic=10%"]
    assert "| normalizer | **state** |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "ablations.png").stat().st_size > 5000
    assert len(read(tmp_path / "ablations.csv")) == 4
    # The early critic is a checkpoint of the base's run: continued, it ends as the base's did.
    data, folder = load_dataset(str(dataset)), Study(tmp_path, 1, SMOKE)
    config, hooks = folder.config(data), guidance_scale.Capture("again")
    samples = preprocess(data, fit_normalizer(data), config.reward_transform)
    again = folder.trained("small", config, samples, hooks, "-again", after="-2")
    (whole,) = tmp_path.glob("stages/small-softmax_q-ot-x1.pkl")
    for found, expected in zip(
        jax.tree.leaves(again.critic), pickle.loads(whole.read_bytes()), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_ablations_refuse_what_they_do_not_know(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        ablations.main([f"--out={tmp_path}", "--only=m,moons"])
    assert error.value.code == 2
    assert "unknown 'moons'" in capsys.readouterr().err


def test_guidance_scale(small, tmp_path, monkeypatch):
    arguments = ["--problems=bandit", "--seeds=1", "--periods=2", f"--out={tmp_path}", "--smoke"]
    assert guidance_scale.main([*arguments, "--arms=preset,8 data copies"]) == 0
    rows = read(tmp_path / "slopes.csv")
    assert len(rows) == 2 * 2 * 5  # arms, renewals, measures
    assert {(row["renewals"], float(row["total_beta"])) for row in rows} == {("0", 1.0), ("1", 2.0)}
    reference = [float(row["slope"]) for row in rows if row["measure"] == "reference"]
    assert (np.array(reference) > 0.1).all()
    assert (tmp_path / "guidance_scale.png").stat().st_size > 10_000
    assert len((tmp_path / "table.md").read_text().splitlines()) == 4 + 2 * 2
    monkeypatch.setattr(guidance_scale, "train", None)  # what is finished is not run again
    assert guidance_scale.main([*arguments, "--arms=preset"]) == 0
    assert read(tmp_path / "slopes.csv") == rows
