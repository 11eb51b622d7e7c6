"""The studies of offline RL, as small as they go: they run, share and resume."""

import functools

import jax
import numpy as np
import pandas as pd
import pytest

from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.trainer import Trainer
from efm_jax.training.parallel import Layout
from experiments.results import read_arrays
from experiments.rl import ablations, guidance_scale, offline_rl, study
from experiments.rl.study import SMOKE, Progress, Study
from tests.markdown import cells


@pytest.fixture
def small(monkeypatch):
    """Few steps, on one of the tests' devices."""
    layout = Layout.create(devices=jax.devices()[:1])
    monkeypatch.setattr(study, "Trainer", functools.partial(Trainer, layout=layout))
    steps = {"behavior_steps": 20, "critic_steps": 20, "policy_steps": 20, "eval_every": 0}
    steps |= {"renew_every": 10, "log_every": 10, "checkpoint_every": 20, "eval_episodes": 1}
    for name, value in steps.items():
        monkeypatch.setitem(SMOKE, name, value)


def test_every_arm_changes_what_it_says():
    base = QIPOConfig()
    configs, labels = ablations.plan(base, ablations.ABLATIONS)
    assert {method for _, _, method in labels} == set(configs)
    # Every ablation has the preset among its arms (renewals twice); it is run once.
    alike = [name for name, _, method in labels if method == "base"]
    assert alike == sorted([*ablations.ABLATIONS, "renewals"], key=ablations.ABLATIONS.index)
    totals = {study.total_beta(configs[m]) for _, arm, m in labels if arm.endswith("same total")}
    assert totals == {study.total_beta(base)}
    assert {configs[m].policy_steps for _, _, m in labels} == {base.policy_steps}
    steps = {arm: configs[m].critic_steps for name, arm, m in labels if name == "critic"}
    assert steps == {"1%": 100, "10%": 1000, "30%": 3000, "100%": 10_000}
    following, _ = ablations.plan(QIPOConfig(target_ess=0.5), ["beta", "renewals"])
    assert {c.target_ess for c in following.values()} == {0.9, 0.7, 0.5, 0.3}


def test_ablations(small, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "CRITIC_FRACTIONS", (0.1,))
    arguments = [f"--dataset=small={dataset}", "--seeds=1", f"--out={tmp_path}", "--smoke"]
    for names in ("critic", "critic,normalizer"):
        assert ablations.main([*arguments, f"--only={names}"]) == 0
    rows, renewals = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("returns", "renewals"))
    assert list(rows["method"]) == ["base", "critic=10%", "normalizer=batch"]  # each once
    logged = renewals[renewals["method"] == "normalizer=batch"]
    assert {*logged["name"]} >= {"ess", "ess_share"}
    q = renewals.query("name == 'q_data' and step == 0").set_index("method")["value"]
    assert q["base"] == q["normalizer=batch"] != q["critic=10%"]
    arms = [["critic", "10%"], ["", "**100%**"], ["normalizer", "**state**"], ["", "batch"]]
    assert [row[:2] for row in cells((tmp_path / "table.md").read_text())[1:]] == arms
    assert (tmp_path / "ablations.png").stat().st_size > 5000
    assert len(pd.read_csv(tmp_path / "ablations.csv")) == 4
    # The early critic is a checkpoint of the base's run: continued, it ends as the base's did.
    folder = Study(tmp_path, 1, SMOKE)
    problem, hooks = folder.load("small", str(dataset)), Progress("small", "again")
    again = folder.trained(problem, problem.config, hooks, "-again", after="-2")
    whole = read_arrays(tmp_path / "stages/small-softmax_q-ot-x1.npz").values()
    for found, expected in zip(jax.tree.leaves(again.critic), whole, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("policy", ["qipo_dataset", "reweight_batch"])
def test_normalizers_of_several_states_train(small, dataset, tmp_path, policy):
    folder = Study(tmp_path, 1, SMOKE | {"policy": policy})
    problem = folder.load("small", str(dataset))
    folder.run(problem, policy, problem.config)
    assert list(folder.rows()["final"]) == [1]


def test_offline_rl(small, dataset, tmp_path):
    arguments = [f"--datasets=small={dataset}", "--seeds=1", f"--out={tmp_path}", "--smoke"]
    for _ in range(2):  # what is finished is not run again
        assert offline_rl.main([*arguments, "--methods=bc,reweight"]) == 0
        rows = pd.read_csv(tmp_path / "returns.csv")
        assert list(rows["method"]) == ["bc", "reweight"]
    scores = rows.set_index("method")["score"]
    table = [f"**{s:.1f} ± 0.0**" if s == scores.max() else f"{s:.1f} ± 0.0" for s in scores]
    for part in (tmp_path / "table.md").read_text().split("Best evaluated"):
        assert cells(part)[1:] == [["small", *table]]


def test_the_table_of_offline_rl_has_a_place_for_every_run():
    names = [("b", "second"), ("b", "first"), ("a", "first")]
    runs = [(*name, seed, 0, 1, 10.0 * i + seed) for i, name in enumerate(names) for seed in (0, 2)]
    columns = ["dataset", "method", "seed", "step", "final", "score"]
    last, _ = offline_rl.collect(pd.DataFrame(runs, columns=columns))
    text = offline_rl.table(last)
    head = ["dataset", "second", "first"]
    assert cells(text) == [head, ["b", "1.0 ± 1.4", "**11.0 ± 1.4**"], ["a", "", "**21.0 ± 1.4**"]]
    (only,) = offline_rl.matrices(last).items()
    assert only[0] == "first"
    np.testing.assert_array_equal(only[1], [[10, 20], [12, 22]])


def test_guidance_scale(small, tmp_path, monkeypatch):
    arguments = ["--problems=bandit", "--seeds=1", "--periods=2", f"--out={tmp_path}", "--smoke"]
    assert guidance_scale.main([*arguments, "--arms=preset,8 data copies"]) == 0
    rows = pd.read_csv(tmp_path / "slopes.csv")
    assert len(rows) == 2 * 2 * 5  # arms, renewals, measures
    assert {*zip(rows["renewals"], rows["total_beta"], strict=True)} == {(0, 1.0), (1, 2.0)}
    assert (rows.loc[rows["measure"] == "reference", "slope"] > 0.1).all()
    assert (tmp_path / "guidance_scale.png").stat().st_size > 10_000
    table = cells((tmp_path / "table.md").read_text())[1:]
    arms = [["bandit", arm, period] for arm in ("preset", "8 data copies") for period in "01"]
    assert [row[:3] for row in table] == arms
    monkeypatch.setattr(study, "Trainer", None)  # what is finished is not run again
    assert guidance_scale.main([*arguments, "--arms=preset"]) == 0
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "slopes.csv"), rows)
