"""Tables that grow."""

import numpy as np
import pytest
from etils import epath

from efm_jax.envs import Rollouts
from efm_jax.runs.metrics import CsvTable, MetricsWriter, write_evaluation
from efm_jax.runs.reader import EVALUATION_COLUMNS, read_table

SEEDS = [3, 4]


def evaluation(policy, step, episodes=1, started_by="train", problem="", name=None):
    """A row of evaluations.csv."""
    name = name or f"{started_by}-{policy}-{step}"
    how = "Pendulum-v1", 200, "midpoint", 10, "sample", 1, episodes, 7
    how += "failed" if problem else "done", problem
    return dict(zip(EVALUATION_COLUMNS, (name, started_by, policy, step, *how), strict=True))


def add_returns(
    workdir, step, policy, returns, seeds=SEEDS, first_episode=7, successes=np.nan, **row
):
    returns = np.asarray(returns)
    successes = np.broadcast_to(successes, returns.shape)
    rollouts = Rollouts(returns, np.full(returns.shape, 3), successes)
    episodes = range(first_episode, first_episode + returns.shape[1])
    row = evaluation(policy, step, len(episodes), **row)
    write_evaluation(workdir, row, rollouts, seeds, episodes)


def test_header_is_the_union_and_missing_cells_are_empty(tmp_path):
    writer = MetricsWriter(epath.Path(tmp_path), SEEDS, None)
    writer.write(10, "behavior", 10, {"loss": [0.5, 0.25], "steps_per_second": 100.0})
    writer.write(20, "critic", 10, {"loss": np.float32([0.1, np.nan]), "q_data": [-1.0, 2]})
    writer.write(30, "critic", 20, {"loss": [1.0, 2.0]})
    text = (tmp_path / "metrics.csv").read_text()
    assert text == (
        "total_step,step,phase,seed,loss,steps_per_second,q_data\n"
        "10,10,behavior,3,0.5,100.0,\n"
        "10,10,behavior,4,0.25,100.0,\n"
        "20,10,critic,3,0.1,,-1.0\n"
        "20,10,critic,4,nan,,2.0\n"
        "30,20,critic,3,1.0,,\n"
        "30,20,critic,4,2.0,,\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv"]


def test_resume_drops_what_lies_beyond_the_checkpoint(tmp_path):
    def log(writer, steps):
        for step in steps:
            later = {"q": 1.0} if step > 20 else {}
            writer.write(step, "policy", step, {"loss": [float(step), 0.0]} | later)
            add_returns(tmp_path, step, "policy", np.full((2, 1), step))

    writer = MetricsWriter(tmp_path, SEEDS, None)
    log(writer, [10, 20, 30, 40])
    expected = [(tmp_path / name).read_text() for name in ("metrics.csv", "returns.csv")]
    # A process killed while it wrote: half a line, whose cut total step (4 of 40) must not pass for
    # an earlier one.
    for name in ("metrics.csv", "returns.csv"):
        with (tmp_path / name).open("a") as file:
            file.write("4")
    writer = MetricsWriter(tmp_path, SEEDS, 20)
    for name in ("metrics.csv", "returns.csv"):
        assert [int(row["total_step"]) for row in read_table(tmp_path / name)] == [10, 10, 20, 20]
    log(writer, [30, 40])
    assert [(tmp_path / name).read_text() for name in ("metrics.csv", "returns.csv")] == expected


def test_a_run_without_checkpoint_starts_anew(tmp_path):
    for _ in range(2):
        writer = MetricsWriter(tmp_path, SEEDS, None)
        writer.write(1, "behavior", 1, {"loss": [1.0, 2.0]})
        add_returns(tmp_path, 1, "behavior", [[1.0], [2.0]])
    assert len(read_table(tmp_path / "metrics.csv")) == 2
    assert len(read_table(tmp_path / "returns.csv")) == 2


def test_repeated_evaluation_replaces_its_rows(tmp_path):
    add_returns(tmp_path, 10, "behavior", [[1.0, 2.0]], [5])
    add_returns(tmp_path, 10, "policy", [[5.0, 6.0]], [5])
    add_returns(tmp_path, 10, "behavior", [[1.5, 1 / 3]], [5])
    assert (tmp_path / "returns.csv").read_text() == (
        "total_step,policy,seed,episode_seed,return,length,evaluation,success\n"
        "10,policy,5,7,5.0,3,train-policy-10,\n"
        "10,policy,5,8,6.0,3,train-policy-10,\n"
        "10,behavior,5,7,1.5,3,train-behavior-10,\n"
        f"10,behavior,5,8,{1 / 3!r},3,train-behavior-10,\n"
    )
    names = [row["evaluation"] for row in read_table(tmp_path / "evaluations.csv")]
    assert names == ["train-policy-10", "train-behavior-10"]


def test_another_evaluation_of_the_same_policy_replaces_nothing(tmp_path):
    add_returns(tmp_path, 10, "policy", [[5.0, 6.0]], [5])
    before = (tmp_path / "returns.csv").read_text()
    add_returns(tmp_path, 10, "policy", [[9.0]], [5], started_by="evaluate")
    failed = evaluation("policy", 10, problem="boom", name="evaluate-2-policy")
    write_evaluation(tmp_path, failed, None, [5], [7])
    assert (
        tmp_path / "returns.csv"
    ).read_text() == before + "10,policy,5,7,9.0,3,evaluate-policy-10,\n"
    found = [
        (row["evaluation"], row["problem"]) for row in read_table(tmp_path / "evaluations.csv")
    ]
    names = ["train-policy-10", "evaluate-policy-10", "evaluate-2-policy"]
    assert found == list(zip(names, ["", "", "boom"], strict=True))


def test_a_failed_rewrite_leaves_the_old_table(tmp_path, monkeypatch):
    table = CsvTable(tmp_path / "t.csv", ["total_step"])
    table.append([{"total_step": 1}])

    def fail(path, content):
        with open(path, "wb") as file:
            file.write(content[:5])
        raise OSError("disk full")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        table.append([{"total_step": 2, "new": 1}])
    assert read_table(tmp_path / "t.csv") == [{"total_step": "1"}]


def test_an_unfinished_last_line_is_removed_before_the_next_row(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("total_step,loss\n10,0.5\n20,0.2")
    CsvTable(path, ["total_step"]).append([{"total_step": 20, "loss": 0.25}])
    assert path.read_text() == "total_step,loss\n10,0.5\n20,0.25\n"
    path.write_text("total_st")
    CsvTable(path, ["total_step"]).append([{"total_step": 1}])
    assert path.read_text() == "total_step\n1\n"


def test_bad_input_is_refused(tmp_path):
    writer = MetricsWriter(tmp_path / "run", SEEDS, None)
    with pytest.raises(ValueError, match=r"ess: expected one value per seed, \(2,\); got \(1,\)"):
        writer.write(1, "policy", 1, {"loss": [1.0, 2.0], "ess": [1.0]})
    with pytest.raises(ValueError, match="'seed' is an index column"):
        writer.write(1, "policy", 1, {"seed": [1.0, 2.0]})
    rollouts = Rollouts(np.ones((2, 1)), np.ones(2), np.ones((2, 1)))
    with pytest.raises(ValueError, match="lengths: expected shape"):
        write_evaluation(tmp_path, evaluation("policy", 1), rollouts, SEEDS, [0])
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        ValueError, match=r"metrics\.csv: expected a table with a column 'total_step'"
    ):
        MetricsWriter(tmp_path, SEEDS, 5)


def test_success_is_a_cell_that_is_empty_where_nothing_is_known(tmp_path):
    add_returns(tmp_path, 5, "behavior", [[-1.0], [-2.0]])
    table = tmp_path / "returns.csv"
    assert [row["success"] for row in read_table(table)] == ["", ""]
    # Of an earlier version, without the column.
    table.write_text(table.read_text().replace(",success", "").replace(",\n", "\n"))
    add_returns(tmp_path, 6, "policy", [[-1.0], [-2.0]], successes=[[1.0], [0.0]])
    assert [row["success"] for row in read_table(table)] == ["", "", "1", "0"]
