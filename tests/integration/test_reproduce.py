"""`launch.reproduce` as a process, on tiny files; test_sweep.py interrupts what runs the jobs."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from efm_jax.data.d4rl_files import D4RL_FILES
from efm_jax.envs import mean_and_interval, reference_scores
from efm_jax.rl.config import PHASES
from tests.integration.runs import CONFIG, table
from tests.markdown import cells

TASK = "halfcheetah-medium-v2"
# The settings of the paper, shrunken.
FIELDS = CONFIG | {"reward_transform": "none", "time_features": 4}
FIELDS |= {f"{phase}_batch_size": 0 for phase in PHASES}


@pytest.fixture(scope="module")
def files(dataset, tmp_path_factory):
    """A folder with the files of three tasks, under D4RL's name and under the tasks'."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copy(dataset, folder / D4RL_FILES[TASK].split("/")[-1])
    for task in ("hopper-medium-v2", "walker2d-medium-v2"):
        shutil.copy(dataset, folder / f"{task}.hdf5")
    return folder


def flags(files, root, *more, **config):
    fields = " ".join(f"--config.{name}='{value}'" for name, value in (FIELDS | config).items())
    return [f"--files={files}", f"--root={root}", "--seeds=2", f"--train_flags={fields}", *more]


def scores(workdir, task):
    """Scores [evaluations, seeds] of the policy, counted from the raw returns."""
    low, high = reference_scores(task)
    found = pd.read_csv(workdir / "returns.csv").query("policy == 'policy'")
    means = found.groupby(["total_step", "seed"])["return"].mean().unstack().to_numpy()
    return 100 * (means - low) / (high - low)


def test_tables_beside_the_published_numbers(launcher, files, tmp_path):
    root = tmp_path / "all"
    asked = flags(files, root, f"--tasks={TASK}", "--algorithms=qipo_diff")
    result = launcher.run("reproduce", *asked)
    assert (result.status, result.complaints) == (0, []), result.err
    assert result.line == {"jobs": 1, "done": 1, "failed": 0, "results": str(root / "results.csv")}
    [row] = table(root / "results.csv")
    assert (row["task"], row["algorithm"], row["published"]) == (TASK, "qipo_diff", "54.2")
    [workdir] = root.glob(f"{TASK}-qipo_diff-paper-2seeds-*")
    saved = json.loads((workdir / "config.json").read_text())
    assert (saved["num_seeds"], saved["seed"], saved["config"]["network"]) == (2, 0, "unet")
    assert saved["config"]["path"] == "vp"
    by_seed = scores(workdir, TASK)
    assert len(by_seed) == 2
    for name, values in (("last", by_seed[-1]), ("best", by_seed.max(axis=0))):
        numbers = [float(row[f"{name}{end}"]) for end in ("", "_low", "_high")]
        np.testing.assert_allclose(numbers, mean_and_interval(values), rtol=1e-9)
        assert float(row[f"{name}_difference"]) == pytest.approx(values.mean() - 54.2)
    text = (root / "results.md").read_text()
    [shown] = [row for row in cells(text) if row[:2] == [TASK, "qipo_diff"]]
    row = {name: float(row[name]) for name in row if name.startswith(("last", "best"))}
    expected = (
        "{last:.1f} ({last_low:.1f} to {last_high:.1f})|{best:.1f} ({best_low:.1f} to "
        "{best_high:.1f})|54.2|{last_difference:+.1f}|{best_difference:+.1f}"
    ).format(**row)
    assert shown[5:] == expected.split("|")
    assert "qipo_diff, paper: 1 of 1 tasks done, 1 of them published; mean difference " in text
    # Again: nothing is left to do.  More tasks, only collected: empty rows, one without a published
    # number.
    logs = {path: path.stat() for path in (root / "logs").iterdir()}
    assert launcher.run("reproduce", *asked).out == result.out
    assert {path: path.stat() for path in (root / "logs").iterdir()} == logs
    tasks = [TASK, "walker2d-medium-v2", "hopper-medium-v2"]
    more = flags(files, root, f"--tasks={','.join(tasks)}", "--algorithms=qipo_diff", "--collect")
    assert launcher.run("reproduce", *more).line["done"] == 1
    columns = ("task", "seeds", "published", "last", "last_difference")
    expected = [(tasks[1], "", "87.6", "", ""), (tasks[2], "", "", "", "")]
    found = table(root / "results.csv")[1:]
    assert [tuple(row[name] for name in columns) for row in found] == expected


def test_job_list_of_everything(launcher, tmp_path):
    path = tmp_path / "jobs.txt"
    result = launcher.run("reproduce", f"--root={tmp_path / 'root'}", f"--jobs={path}")
    assert result.line == {"jobs": 30, "done": 0, "list": str(path)}
    lines = path.read_text().splitlines()
    assert lines[0].startswith("python -m launch.train --dataset=halfcheetah-medium-expert-v2 ")
    flags = "--config=experiments/configs/d4rl/locomotion.py --seed=0 "
    assert f"{flags}--num_seeds=8 --config.path=ot --workdir=" in lines[0]
    assert lines[0].endswith("/halfcheetah-medium-expert-v2-qipo_ot-paper-8seeds")
    antmaze = [line for line in lines if "antmaze.py" in line]
    assert len(antmaze) == 12
    assert "--dataset=D4RL/antmaze/umaze-diverse-v1 " in antmaze[2]
    assert " --num_seeds=8 --config.path=vp --workdir=" in antmaze[3]
    assert antmaze[3].endswith("/antmaze-umaze-diverse-v2-qipo_diff-paper-8seeds")


BAD_FLAGS = {
    "task": (["--tasks=hopper-medium-v0"], ["--tasks", "hopper-medium-v2", "'hopper-medium-v0'"]),
    "no task": (["--tasks="], ["--tasks", "got ''"]),
    "twice": (["--tasks=locomotion,hopper-medium-v2"], ["named hopper-medium-v2-qipo_ot-paper-"]),
    "algorithm": (["--algorithms=qgpo"], ["--algorithms", "qipo_ot", "'qgpo'"]),
    "seeds": (["--seeds=0"], ["seeds", "0"]),
    "no file": (["--tasks=hopper-expert-v2", "--files=nosuch"], ["--tasks"]),
    "file": (["--files=nosuch"], ["--files=nosuch", "halfcheetah_medium_expert-v2.hdf5"]),
    "own flag": (["--train_flags=--config.path=vp"], ["--train_flags", "--config.path=vp"]),
    "seeds twice": (["--train_flags=--num_seeds=2"], ["--train_flags", "--num_seeds=2"]),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(launcher, tmp_path, case):
    bad, words = BAD_FLAGS[case]
    result = launcher.run("reproduce", f"--root={tmp_path / 'root'}", *bad)
    assert (result.status, result.out) == (2, "")
    [complaint] = result.complaints
    assert all(word in complaint for word in words)


def test_what_cannot_be_evaluated_fails_with_a_line(launcher, tmp_path):
    empty = {"MINARI_DATASETS_PATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    asked = [f"--root={tmp_path / 'root'}", "--tasks=antmaze-umaze-v2", "--algorithms=qipo_ot"]
    result = launcher.run("reproduce", *asked, env=empty)
    assert (result.status, result.line["failed"]) == (1, 1)
    assert len(result.complaints) == 1, result.err
    assert "D4RL/antmaze/umaze-v1: no such dataset at " in result.complaints[0]
