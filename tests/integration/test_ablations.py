"""The studies of offline RL, as small as they go: they run, share and resume."""

import functools

import jax
import numpy as np
import pandas as pd
import pytest

from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.trainer import Trainer
from efm_jax.training.parallel import Layout
from experiments.rl import ablations, guidance_scale, offline_rl, offline_rl_report, study
from experiments.rl.study import SMOKE, Progress, Study


@pytest.fixture
def small(monkeypatch):
    """Few steps, on one of the tests' devices."""
    layout = Layout.create(devices=jax.devices()[:1])
    monkeypatch.setattr(study, "Trainer", functools.partial(Trainer, layout=layout))
    steps = {"behavior_steps": 20, "critic_steps": 20, "policy_steps": 20, "eval_every": 0}
    steps |= {"renew_every": 10, "log_every": 10, "checkpoint_every": 20, "eval_episodes": 1}
    for name, value in steps.items():
        monkeypatch.setitem(SMOKE, name, value)


def cells(text):
    """Cells of a Markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_arm_changes_what_it_says():
    base = QIPOConfig()
    configs, labels = ablations.plan(base, ablations.ABLATIONS)
    assert {method for _, _, method in labels} == set(configs)
    # Every ablation has the preset among its arms (renewals twice); it is run once.
    alike = [name for name, _, method in labels if method == "base"]
    assert alike == sorted([*ablations.ABLATIONS, "renewals"], key=ablations.ABLATIONS.index)
    totals = {
        ablations.total_beta(configs[m]) for _, arm, m in labels if arm.endswith("same total")
    }
    assert totals == {ablations.total_beta(base)}
    assert {configs[m].policy_steps for _, _, m in labels} == {base.policy_steps}
    steps = {arm: configs[m].critic_steps for name, arm, m in labels if name == "critic"}
    assert steps == {"1%": 100, "10%": 1000, "30%": 3000, "100%": 10_000}
    following, _ = ablations.plan(QIPOConfig(target_ess=0.5), ["beta", "renewals"])
    assert {c.target_ess for c in following.values()} == {0.9, 0.7, 0.5, 0.3}


def test_ablations(small, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "CRITIC_FRACTIONS", (0.1,))
    arguments = [f"--dataset=small={dataset}", "--seeds=1", f"--out={tmp_path}", "--smoke"]
    assert ablations.main([*arguments, "--only=critic"]) == 0
    assert ablations.main([*arguments, "--only=critic,normalizer"]) == 0
    rows, renewals = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("returns", "renewals"))
    assert list(rows["method"]) == ["base", "critic=10%", "normalizer=batch"]  # each once
    logged = renewals[renewals["method"] == "normalizer=batch"]
    assert {*logged["name"]} >= {"ess", "ess_share"}
    q = renewals.query("name == 'q_data' and step == 0").set_index("method")["value"]
    assert q["base"] == q["normalizer=batch"] != q["critic=10%"]
    assert [row[:2] for row in cells((tmp_path / "table.md").read_text())] == [
        ["critic", "10%"],
        ["", "**100%**"],
        ["normalizer", "**state**"],
        ["", "batch"],
    ]
    assert (tmp_path / "ablations.png").stat().st_size > 5000
    assert len(pd.read_csv(tmp_path / "ablations.csv")) == 4
    # The early critic is a checkpoint of the base's run: continued, it ends as the base's did.
    folder = Study(tmp_path, 1, SMOKE)
    problem, hooks = folder.load("small", str(dataset)), Progress("small", "again")
    again = folder.trained(problem, problem.config, hooks, "-again", after="-2")
    (whole,) = tmp_path.glob("stages/small-softmax_q-ot-x1.npz")
    for found, expected in zip(jax.tree.leaves(again.critic), np.load(whole).values(), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("policy", ["qipo_dataset", "reweight_batch"])
def test_normalizers_of_several_states_train(small, dataset, tmp_path, policy):
    folder = Study(tmp_path, 1, SMOKE | {"policy": policy})
    problem = folder.load("small", str(dataset))
    folder.run(problem, policy, problem.config)
    assert list(folder.rows()["final"]) == [1]


def test_offline_rl(small, dataset, tmp_path):
    arguments = [f"--datasets=small={dataset}", "--seeds=1", f"--out={tmp_path}", "--smoke"]
    assert offline_rl.main([*arguments, "--methods=bc", "--shard=1/2"]) == 0  # another's dataset
    assert not (tmp_path / "returns.csv").exists()
    for _ in range(2):  # what is finished is not run again
        assert offline_rl.main([*arguments, "--methods=bc,reweight"]) == 0
        rows = pd.read_csv(tmp_path / "returns.csv")
        assert list(rows["method"]) == ["bc", "reweight"]
    scores = rows.set_index("method")["score"]
    table = [f"**{s:.1f} ± 0.0**" if s == scores.max() else f"{s:.1f} ± 0.0" for s in scores]
    for part in (tmp_path / "table.md").read_text().split("Best evaluated"):
        assert cells(part) == [["small", *table]]


def test_the_table_of_offline_rl_has_a_place_for_every_run():
    names = [("b", "second"), ("b", "first"), ("a", "first")]
    runs = [(*name, seed, 0, 1, 10.0 * i + seed) for i, name in enumerate(names) for seed in (0, 2)]
    columns = ["dataset", "method", "seed", "step", "final", "score"]
    scores = offline_rl_report.collect(pd.DataFrame(runs, columns=columns))
    text = offline_rl_report.table(scores.last)
    assert text.split()[1:6:2] == ["dataset", "second", "first"]
    assert cells(text) == [["b", "1.0 ± 1.4", "**11.0 ± 1.4**"], ["a", "", "**21.0 ± 1.4**"]]
    (only,) = offline_rl_report.matrices(scores.last).items()
    assert only[0] == "first"
    np.testing.assert_array_equal(only[1], [[10, 20], [12, 22]])


def test_ablations_refuse_what_they_do_not_know(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        ablations.main([f"--out={tmp_path}", "--only=m,moons"])
    assert error.value.code == 2
    assert "unknown 'moons'" in capsys.readouterr().err


def test_guidance_scale(small, tmp_path, monkeypatch):
    arguments = ["--problems=bandit", "--seeds=1", "--periods=2", f"--out={tmp_path}", "--smoke"]
    assert guidance_scale.main([*arguments, "--arms=preset,8 data copies"]) == 0
    rows = pd.read_csv(tmp_path / "slopes.csv")
    assert len(rows) == 2 * 2 * 5  # arms, renewals, measures
    assert {*zip(rows["renewals"], rows["total_beta"], strict=True)} == {(0, 1.0), (1, 2.0)}
    assert (rows.loc[rows["measure"] == "reference", "slope"] > 0.1).all()
    assert (tmp_path / "guidance_scale.png").stat().st_size > 10_000
    table = cells((tmp_path / "table.md").read_text())
    assert [row[:4] for row in table[::2]] == [
        ["bandit", "preset", "0", "1"],
        ["bandit", "8 data copies", "0", "1"],
    ]
    assert len(table) == 2 * 2
    monkeypatch.setattr(study, "Trainer", None)  # what is finished is not run again
    assert guidance_scale.main([*arguments, "--arms=preset"]) == 0
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "slopes.csv"), rows)
