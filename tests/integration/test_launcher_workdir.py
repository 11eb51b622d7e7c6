"""Interrupted processes, and work directories that were damaged or are another run's."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from etils import epath

from efm_jax.runs.lock import Lock
from tests.integration.helpers import contents, refused
from tests.integration.runs import (
    CHEAP,
    ROWS,
    SEEDS,
    STEPS,
    TOTAL,
    arrays,
    arrays_of,
    saved_steps,
    table,
    train_flags,
)
from tests.unit.data_fixtures import write_d4rl


def damage(workdir, step):
    """Cut the largest file of a checkpoint in half."""
    files = [path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def cut(workdir, step):
    """Leave ten bytes of every file of a checkpoint: Orbax logs an error of its own about some."""
    for path in (workdir / "checkpoints" / str(step)).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])


def interrupt(process, workdir, moment, number):
    """Send a signal once a checkpoint of this step or later, or these words, are there."""
    end = time.monotonic() + 200
    while process.running and not (
        moment in process.err
        if isinstance(moment, str)
        else any(saved >= moment for saved in saved_steps(workdir))
    ):
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send(number)
    return process.wait()


# Of each phase the first checkpoint, which a SIGKILL follows, and the process that continues from
# it: stopped before its first step at the earliest, in the policy phase within a renewal period.
INTERRUPTIONS = [
    (10, signal.SIGKILL), ("continuing", signal.SIGINT),
    (50, signal.SIGKILL), ("continuing", signal.SIGTERM),
    (90, signal.SIGKILL), ("continuing", signal.SIGHUP),
]  # fmt: skip


def test_interrupted_run_ends_with_the_same_bits(launcher, dataset, finished, tmp_path):
    workdir = tmp_path / "run"
    flags = train_flags(dataset, workdir, *SEEDS)
    for moment, number in INTERRUPTIONS:
        result = interrupt(launcher.start("train", *flags), workdir, moment, number)
        if number == signal.SIGKILL:
            assert result.status == -signal.SIGKILL
        else:
            assert result.status == 128 + number, result.err
            assert f"stopped by {number.name}, saved in {workdir}" in result.complaints[-1]
            assert "Traceback" not in result.err
    result = launcher.run("train", *flags)
    assert result.status == 0, result.err
    assert f"continuing {workdir} from step" in result.err
    expected, found = arrays_of(finished[0], TOTAL), arrays_of(workdir, TOTAL)
    assert expected.keys() == found.keys()
    assert any("policy" in name and "params" in name for name in found)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert result.line["policy_return"] == finished[1].line["policy_return"]
    # What was logged is the same too, but for the clock.
    logs = []
    for place in (finished[0], workdir):
        rows = table(place / "metrics.csv")
        logs.append([{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows])
    assert logs[0] == logs[1]


def test_workdir_that_is_a_file(launcher, dataset, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    refused(launcher.run("train", *train_flags(dataset, path)), f"--workdir={path}: is a file")
    refused(launcher.run("evaluate", f"--workdir={path}"), f"--workdir={path}: is a file")
    assert path.read_text() == "mine"


def test_checkpoints_without_the_config_file(launcher, dataset, copy):
    (copy / "config.json").unlink()
    before = contents(copy)
    words = str(copy), "checkpoints are there", "config.json is missing"
    refused(launcher.run("train", *train_flags(dataset, copy, *SEEDS)), *words)
    refused(launcher.run("evaluate", f"--workdir={copy}"), "config.json is missing")
    assert contents(copy) == before


def test_workdir_of_another_run(launcher, dataset, finished):
    workdir = finished[0]
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    flags = train_flags(dataset, workdir, *SEEDS, beta=3)
    refused(launcher.run("train", *flags), "beta", str(workdir))
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def test_a_second_process_is_refused(launcher, dataset, copy):
    lock = Lock(epath.Path(copy), print)
    before = contents(copy)
    words = str(copy), f"process {os.getpid()} on", "writes in it"
    refused(launcher.run("train", *train_flags(dataset, copy, *SEEDS)), *words)
    assert contents(copy) == before
    lock.close()


def test_a_full_disk_and_failed_evaluations_are_no_errors_of_the_user(launcher, dataset, tmp_path):
    """Status 1, because clusters give up at 2; mended, the same command goes on."""
    workdir, broken = tmp_path / "run", {"BREAK": "raises"}
    flags = "--plugins=tests.extension.faulty", "--env=Broken-v0"
    flags = train_flags(dataset, workdir, *flags, **CHEAP)
    full = launcher.run("train", *flags, env={"BREAK": "file size"})
    [complaint] = full.complaints
    assert (full.status, "cannot be written" in complaint) == (1, True), full.err
    stopped = launcher.run("train", *flags, "--stop_on_failed_evaluation", env=broken)
    assert (stopped.status, saved_steps(workdir)[-1]) == (1, TOTAL - 30), stopped.err
    result = launcher.run("train", *flags, env=broken)
    assert (result.status, saved_steps(workdir)[-1]) == (1, TOTAL), result.err
    cause = (
        "environment Broken-v0 failed at step 2 of the episode with seed 1000000: RuntimeError: "
    )
    assert cause + "the simulator fell over" in result.complaints[1]
    assert [line.split(" ", 2)[1] for line in result.complaints] == [
        "continuing",
        "failed:",
        "failed:",
    ]
    found = [(row["evaluation"], row["status"]) for row in table(workdir / "evaluations.csv")]
    names = [f"policy-{TOTAL - 30}", f"behavior-{STEPS['behavior']}", f"policy-{TOTAL}"]
    assert found == [(f"train-{name}", "failed") for name in names]
    assert not (workdir / "result.json").exists()
    mended = launcher.run("train", *flags)
    assert mended.status == 0, mended.err
    found = [(row["evaluation"], row["status"]) for row in table(workdir / "evaluations.csv")]
    statuses = ["failed", "done", "done"]
    assert found == [(f"train-{n}", s) for n, s in zip(names, statuses, strict=True)]


def test_same_file_with_other_contents_is_another_dataset(launcher, finished, copy, tmp_path):
    changed = tmp_path / "small.hdf5"
    write_d4rl(changed, arrays() | {"rewards": np.ones(ROWS)}, env_id="Pendulum-v1")
    info = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(info | {"dataset": str(changed)}))
    refused(launcher.run("train", *train_flags(changed, copy, *SEEDS)), "fingerprint")


def test_damaged_config_file(launcher, dataset, copy):
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text[: len(text) // 2])
    refused(launcher.run("train", *train_flags(dataset, copy, *SEEDS)), "config.json")
    refused(launcher.run("evaluate", f"--workdir={copy}"), "config.json")


def test_two_damaged_checkpoints_are_two_lines(launcher, dataset, finished, copy):
    """The newest that can be read is used, and continued to the same bits."""
    damage(copy, TOTAL)
    cut(copy, TOTAL - 10)
    results = {
        "evaluate": launcher.run("evaluate", f"--workdir={copy}"),
        "train": launcher.run("train", *train_flags(dataset, copy, *SEEDS)),
    }
    for name, result in results.items():
        assert result.status == 0, result.err
        assert len(result.complaints) == (3 if name == "train" else 2), result.err
        for step, line in zip((TOTAL, TOTAL - 10), result.complaints, strict=False):
            assert f"checkpoints/{step} cannot be read" in line
    trained = results["train"]
    assert trained.complaints[2].endswith(f"continuing {copy} from step {TOTAL - 20}")
    assert trained.line["policy_return"] == finished[1].line["policy_return"]
    expected, found = arrays_of(finished[0], TOTAL), arrays_of(copy, TOTAL)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("how", [damage, cut])
def test_all_checkpoints_damaged(launcher, dataset, copy, how):
    for step in saved_steps(copy):
        how(copy, step)
    before = contents(copy / "checkpoints")
    refused(launcher.run("evaluate", f"--workdir={copy}"), f"checkpoints/{TOTAL} cannot")
    refused(
        launcher.run("train", *train_flags(dataset, copy, *SEEDS)), f"checkpoints/{TOTAL} cannot"
    )
    # Nothing may have been deleted, nor training begun anew: a second time finds the same.
    assert contents(copy / "checkpoints") == before


def test_evaluate_refuses(launcher, finished, copy, tmp_path):
    refused(launcher.run("evaluate"), "--workdir")
    refused(launcher.run("evaluate", f"--workdir={tmp_path / 'nosuch'}"), "nosuch")
    assert not (tmp_path / "nosuch").exists()
    refused(launcher.run("evaluate", f"--workdir={finished[0]}", "--episodes=0"), "episodes")
    shutil.rmtree(copy / "checkpoints")
    before = contents(copy)
    refused(launcher.run("evaluate", f"--workdir={copy}"), "checkpoint")
    assert contents(copy) == before


def test_non_finite_loss_stops_and_keeps_the_last_checkpoint(launcher, dataset, tmp_path):
    workdir = tmp_path / "run"
    flags = train_flags(dataset, workdir, critic_learning_rate=1e30, **CHEAP)
    for _ in range(2):
        result = launcher.run("train", *flags)
        assert result.status == 1, result.err
        assert "Traceback" not in result.err
        assert "critic" in result.complaints[-1]
        assert "step 2" in result.complaints[-1] or "step 3" in result.complaints[-1]
        assert saved_steps(workdir) == [20, 30, 40]
        assert all(np.isfinite(value).all() for value in arrays_of(workdir, 40).values())
    assert f"continuing {workdir} from step 40" in result.err
    assert "the checkpoint of step 40 is kept" in result.complaints[-1]
    flags = train_flags(dataset, tmp_path / "early", behavior_learning_rate=1e38, **CHEAP)
    early = launcher.run("train", *flags)
    assert (early.status, saved_steps(tmp_path / "early")) == (1, [])
    assert "no checkpoint had been saved yet" in early.complaints[-1]
