"""`launch.train` and `launch.evaluate` as processes: what they print and leave."""

import json
import shutil

import matplotlib.image
import numpy as np
import pytest
from etils import epath
from PIL import Image

from efm_jax.runs.lock import Lock
from tests.integration.helpers import contents
from tests.integration.runs import (
    CONFIG,
    ROWS,
    SEEDS,
    STEPS,
    TOTAL,
    arrays,
    saved_steps,
    table,
    train_flags,
)


def test_train_prints_the_contract_line(finished):
    result = finished[1]
    line = result.line
    for name in (
        "dataset",
        "algorithm",
        "seeds",
        "steps",
        "dataset_return",
        "behavior_return",
        "policy_return",
        "behavior_score",
        "policy_score",
        "seconds",
    ):
        assert name in line
    assert (line["algorithm"], line["seeds"], line["steps"]) == ("qipo_ot", 2, TOTAL)
    assert json.loads((finished[0] / "result.json").read_text()) == line
    # 300 x 9 numbers; 300 x 2 seeds x (3 + 1) actions and Q-values.
    what = f"{finished[0]}: qipo_ot on {line['dataset']}, {ROWS} transitions; "
    assert f"\n{what}memory of each device: " in result.out
    assert "(dataset 10.8 kB, tables 19.2 kB, state " in result.out
    expected = np.mean([arrays()["rewards"][i : i + 100].sum() for i in (0, 100, 200)])
    assert line["dataset_return"] == pytest.approx(expected, rel=1e-5)
    assert line["behavior_score"] is None  # Pendulum has no reference scores
    assert line["policy_score"] is None
    assert result.complaints == []


def test_train_leaves_the_promised_files(finished):
    workdir = finished[0]
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["config"]["batch_size"] == 32
    assert saved["config"]["hidden_dims"] == [16]
    rows = table(workdir / "metrics.csv")
    for phase, steps in STEPS.items():
        found = [(int(row["step"]), int(row["seed"])) for row in rows if row["phase"] == phase]
        assert found == [(step, seed) for step in range(10, steps + 1, 10) for seed in (3, 4)]
    for row in rows:
        assert np.isfinite(float(row["loss"]))
        assert float(row["steps_per_second"]) > 0
    policy = [row for row in rows if row["phase"] == "policy"]
    assert all(1 <= float(row["ess"]) <= 4 and float(row["top_weight"]) <= 1 for row in policy)
    assert all(row["q_data"] and row["q_support"] for row in policy)
    for seed in (3, 4):
        [events] = (workdir / "tensorboard" / f"seed{seed}").iterdir()
        assert events.stat().st_size > 1000
    picture = matplotlib.image.imread(workdir / "learning_curve.png")
    assert picture.shape[0] > 100
    assert picture[..., :3].std() > 0.02  # not blank
    assert saved_steps(workdir) == [TOTAL - 20, TOTAL - 10, TOTAL]
    assert not list(workdir.glob("*.tmp"))


def test_returns_file_explains_the_printed_returns(finished):
    workdir, result = finished
    rows = table(workdir / "returns.csv")
    for name, step in (("behavior", STEPS["behavior"]), ("policy", TOTAL)):
        found = [row for row in rows if (row["policy"], int(row["total_step"])) == (name, step)]
        assert len(found) == 2 * CONFIG["eval_episodes"]
        assert {row["seed"] for row in found} == {"3", "4"}
        assert len({row["return"] for row in found}) == len(found)
        mean = np.mean([float(row["return"]) for row in found])
        assert mean == pytest.approx(result.line[f"{name}_return"], rel=1e-9)
    seeds = {
        name: {r["episode_seed"] for r in rows if r["policy"] == name}
        for name in ("behavior", "policy")
    }
    assert seeds["behavior"] == seeds["policy"]
    assert {int(row["total_step"]) for row in rows if row["policy"] == "policy"} == {110, TOTAL}


def test_second_run_does_nothing_again(launcher, dataset, finished, copy, tmp_path):
    """Nor does one of the same contents under another path, which are the same dataset."""
    before = table(copy / "metrics.csv"), table(copy / "returns.csv")
    moved = shutil.copy(dataset, tmp_path / "moved.hdf5")
    result = launcher.run("train", *train_flags(moved, copy, *SEEDS))
    assert result.status == 0, result.err
    same = ("behavior_return", "policy_return", "dataset_return", "steps", "seeds")
    assert {k: result.line[k] for k in same} == {k: finished[1].line[k] for k in same}
    assert table(copy / "metrics.csv") == before[0]
    assert sorted(map(str, table(copy / "returns.csv"))) == sorted(map(str, before[1]))


def test_a_finished_run_is_extended(launcher, dataset, copy):
    flags = train_flags(dataset, copy, *SEEDS, policy_steps=STEPS["policy"] + 10)
    result = launcher.run("train", *flags)
    assert result.status == 2
    assert "asked for 70; give --extend" in result.complaints[0]
    result = launcher.run("train", *flags, "--extend")
    assert (result.status, result.line["steps"]) == (0, TOTAL + 10)
    assert int(table(copy / "metrics.csv")[-1]["total_step"]) == TOTAL + 10
    assert json.loads((copy / "config.json").read_text())["config"]["policy_steps"] == 70


def test_evaluations_keep_names_of_their_own_and_are_filmed(launcher, finished, copy, tmp_path):
    before = (copy / "returns.csv").read_text()
    result = launcher.run("evaluate", f"--workdir={copy}")
    assert result.status == 0, result.err
    for name in ("behavior_return", "policy_return"):
        assert result.line[name] == pytest.approx(finished[1].line[name], rel=1e-6)
    flags = [f"--workdir={copy}", "--episodes=3", "--solver=rk4", "--sample_steps=4"]
    flags += ["--action_selection=mean", "--num_candidates=2"]
    film = tmp_path / "film.gif"
    longer = launcher.run("evaluate", *flags, f"--video={film}")
    assert longer.status == 0, longer.err
    with Image.open(film) as frames:
        assert frames.n_frames > 20
        assert len(np.unique(np.asarray(frames.convert("L")))) > 1
    assert longer.line["episodes"] == 3
    assert longer.line["policy_return"] != result.line["policy_return"]
    # What training measured stays, and every number leads to the rows it is the mean of.
    assert (copy / "returns.csv").read_text().startswith(before)
    played = {row["evaluation"]: row for row in table(copy / "evaluations.csv")}
    for line, by in (
        (finished[1].line, "train"),
        (result.line, "evaluate"),
        (longer.line, "evaluate"),
    ):
        for policy in ("behavior", "policy"):
            row = played[line["evaluations"][policy]]
            rows = [r for r in table(copy / "returns.csv") if r["evaluation"] == row["evaluation"]]
            assert np.mean([float(r["return"]) for r in rows]) == pytest.approx(
                line[f"{policy}_return"]
            )
            assert len(rows) == 2 * int(row["episodes"])
            assert (row["policy"], row["started_by"], row["status"]) == (policy, by, "done")
    assert len(played) == 3 + 2 + 2
    assert longer.line["evaluations"]["policy"] == "evaluate-2-policy"
    how = ("solver", "sample_steps", "episodes", "total_step")
    assert [played["evaluate-2-policy"][name] for name in how] == ["rk4", "4", "3", str(TOTAL)]
    assert played[f"train-policy-{TOTAL}"]["solver"] == "midpoint"
    # Where another process writes, the episodes are played and printed.
    before = contents(copy)
    lock = Lock(epath.Path(copy), print)
    result = launcher.run("evaluate", *flags)
    lock.close()
    assert (result.status, result.line["evaluations"]) == (0, {})
    assert result.line["policy_return"] == longer.line["policy_return"]
    assert len(result.complaints) == 1
    assert "writes in it" in result.complaints[0]
    assert "printed, not written" in result.complaints[0]
    assert contents(copy) == before


HELP = {"train": ["--dataset", "--seed", "--config.expectile (float, 0.7): iql"]}

HELP["evaluate"] = ["--episodes"]


@pytest.mark.parametrize("module", HELP)
def test_help(launcher, module):
    result = launcher.run(module, "--help")
    assert (result.status, result.complaints) == (0, [])
    for words in ("--workdir", *HELP[module]):
        assert words in result.out
