"""`launch.sweep` as a process: once with the real trainer, else with a stand-in for it."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.integration.helpers import REPOSITORY
from tests.integration.runs import CONFIG

# Takes the place of launch/train.py; the first word of --dataset says what the job does.
TRAINER = """
import json, os, pathlib, signal, sys, time

flags = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
workdir, seed = pathlib.Path(flags["workdir"]), int(flags["seed"])
workdir.mkdir(parents=True, exist_ok=True)
with open(workdir / "calls", "a") as calls:
    calls.write(json.dumps({"at": time.time(), "group": os.getpgrp(), **flags}) + "\\n")

def save(*_):
    time.sleep(0.4 * seed)  # the first job ends while the second one runs
    (workdir / "saved").touch()
    print("stopped and saved", flush=True)
    sys.exit(143)

kind = flags["dataset"].split()[0]
if kind == "fails" and not (workdir.parent / "mended").exists():
    print("reading", "no such dataset\\n\\n", sep="\\n", flush=True)
    sys.exit(3)
if kind == "forgets":
    sys.exit(0)
if kind == "waits" and not (workdir / "saved").exists():
    signal.signal(signal.SIGTERM, save)
    (workdir / "started").touch()
    time.sleep(100)
if kind == "takes":
    time.sleep(0.5)
result = {
    "dataset": flags["dataset"], "algorithm": "qipo_ot", "seeds": int(flags.get("num_seeds", 1)),
    "steps": 7, "dataset_return": -3.0, "behavior_return": -2.0, "behavior_interval": [-2.5, -1.5],
    "behavior_score": None, "policy_return": 10.0 + seed**2, "policy_score": 50.0 + seed,
    "policy_interval": [9.0 + seed, 12.0 + seed], "seconds": 0.1, "workdir": str(workdir),
    "more": 1,
}
(workdir / "result.json").write_text(json.dumps(result))
(workdir / "ended").write_text(str(time.time()))
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """Environment in which `python -m launch.train` is `TRAINER`."""
    folder = tmp_path_factory.mktemp("fake")
    (folder / "launch").mkdir()
    (folder / "launch" / "__init__.py").touch()
    (folder / "launch" / "train.py").write_text(TRAINER)
    # Safe: without the working directory.
    return {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}


def rows(root):
    with open(root / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def calls(workdir):
    """The flags of every start of a job."""
    path = workdir / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cells(table, first):
    """Find the row of a Markdown table that begins with `first`."""
    lines = [line.strip("|").split("|") for line in table.splitlines()]
    [found] = [line for line in lines if line[0].strip() == first]
    return [cell.strip() for cell in found]


def test_sweep_with_the_real_trainer(launcher, dataset, tmp_path):
    root = tmp_path / "sweep"
    fields = " ".join(f"--config.{name}='{value}'" for name, value in CONFIG.items())
    flags = [
        f"--datasets={dataset}",
        "--configs=experiments/configs/quick.py",
        "--seeds=3,5",
        f"--root={root}",
    ]
    flags += [f"--train_flags={fields}", "--workers=2"]
    first = launcher.run("sweep", *flags)
    assert first.status == 0, first.err
    assert first.complaints == []
    assert first.line == {"jobs": 2, "done": 2, "failed": 0, "results": str(root / "results.csv")}
    found = rows(root)
    assert [row["seed"] for row in found] == ["3", "5"]
    for row in found:
        assert row["job"].startswith(f"small-quick-seed{row['seed']}")
        workdir = root / row["job"]
        saved = json.loads((workdir / "config.json").read_text())
        assert (saved["seed"], saved["config"]["batch_size"]) == (int(row["seed"]), 32)
        result = json.loads((workdir / "result.json").read_text())
        printed = json.loads((root / "logs" / f"{row['job']}.log").read_text().splitlines()[-1])
        assert result == printed
        assert float(row["policy_return"]) == result["policy_return"]
        assert [float(row["policy_low"]), float(row["policy_high"])] == result["policy_interval"]
    mean = np.mean([float(row["policy_return"]) for row in found])
    text = (root / "results.md").read_text()
    assert cells(text, str(dataset))[6].startswith(f"{mean:.1f} (")
    logs = {path: path.stat() for path in (root / "logs").iterdir()}
    second = launcher.run("sweep", *flags)
    assert (second.status, second.line) == (0, first.line)
    assert second.out == first.out
    assert {path: path.stat() for path in (root / "logs").iterdir()} == logs


def test_tables(launcher, fake, tmp_path):
    root = tmp_path / "sweep"
    flags = ["--datasets=one,two", "--seeds=0,1,2", f"--root={root}", "--workers=3"]
    result = launcher.run("sweep", *flags, env=fake)
    assert result.status == 0, result.err
    table = (root / "results.md").read_text()
    assert result.out == f"\n{table}\n{json.dumps(result.line)}\n"
    # Returns 10, 11, 14: standard deviation 2.0817, and 4.3027 is Student's t of 97.5% with 2
    # degrees.
    low, high = 35 / 3 - 4.3027 * 2.0817 / 3**0.5, 35 / 3 + 4.3027 * 2.0817 / 3**0.5
    expected = [
        *("one", "experiments/configs/qipo_ot.py", "3 of 3", "3", "-3.0 (-3.0 to -3.0)"),
        *("-2.0 (-2.0 to -2.0)", f"11.7 ({low:.1f} to {high:.1f})", "", "51.0 (48.5 to 53.5)"),
    ]
    assert cells(table, "one") == expected
    assert cells(table, "two")[1:] == expected[1:]
    job = "two-qipo_ot-seed2"
    assert cells(table, job) == [job, "-3.0", "-2.0", "14.0", "", "52.0"]
    found = rows(root)
    asked = [(dataset, seed) for dataset in ("one", "two") for seed in "012"]
    assert [(row["dataset"], row["seed"]) for row in found] == asked
    expected = {"job": job, "policy_low": "11.0", "policy_high": "14.0", "behavior_score": ""}
    assert found[5].items() >= (expected | {"steps": "7", "workdir": str(root / job)}).items()


def test_names_of_one_file_name_in_two_folders(launcher, fake, tmp_path):
    root, presets = tmp_path / "sweep", tmp_path / "presets"
    presets.mkdir()
    (presets / "qipo_ot.py").write_text("")
    flags = [f"--root={root}", "--workers=2"]
    for data, config in (
        ("x", "experiments/configs"),
        ("y", "experiments/configs"),
        ("x", presets),
    ):
        more = [f"--datasets={data}/small.hdf5", f"--configs={config}/qipo_ot.py"]
        result = launcher.run("sweep", *flags, *more, env=fake)
        assert (result.status, result.line["done"]) == (0, 1), result.err
        assert [row["dataset"] for row in rows(root)] == [f"{data}/small.hdf5"]
    names = {path.name for path in root.iterdir() if path.name.startswith("small-qipo_ot-seed0-")}
    assert len(names) == 3
    both = launcher.run(
        "sweep", *flags, "--datasets=x/small.hdf5,y/small.hdf5", "--collect", env=fake
    )
    assert both.line["done"] == 2


def test_jobs_not_done_have_empty_rows(launcher, fake, tmp_path):
    root = tmp_path / "sweep"
    first = launcher.run("sweep", "--datasets=one", "--seeds=1", f"--root={root}", env=fake)
    assert first.status == 0
    more = ["--datasets=one,two", "--seeds=1,2", f"--root={root}", "--collect"]
    result = launcher.run("sweep", *more, env=fake)
    assert (result.status, result.complaints) == (0, [])
    assert result.line == {"jobs": 4, "done": 1, "failed": 0, "results": str(root / "results.csv")}
    assert [row["policy_return"] for row in rows(root)] == ["11.0", "", "", ""]
    assert cells((root / "results.md").read_text(), "one")[2:5] == ["1 of 2", "1", "-3.0"]
    assert [row["seeds"] for row in rows(root)] == ["1", "", "", ""]
    assert cells((root / "results.md").read_text(), "two")[2:] == ["0 of 2", "0", *5 * [""]]
    made = {"logs", "one-qipo_ot-seed1", "results.csv", "results.md"}
    assert {path.name for path in root.iterdir()} == made


def test_train_flags_reach_the_trainer_and_the_name(launcher, fake, tmp_path):
    root = tmp_path / "sweep"
    flags = ["--datasets=one", "--seeds=0,4", f"--root={root}"]
    assert launcher.run("sweep", *flags, env=fake).status == 0
    more = ["--train_flags=--num_seeds=3 --config.beta='5'"]
    result = launcher.run("sweep", *flags, *more, env=fake)
    assert (result.status, result.line["done"]) == (0, 2)
    names = [row["job"] for row in rows(root)]
    assert names[0].startswith("one-qipo_ot-seed0-")
    assert names[1].startswith("one-qipo_ot-seed4-")
    [call] = calls(root / names[1])
    del call["at"], call["group"]
    own = {"dataset": "one", "config": "experiments/configs/qipo_ot.py", "seed": "4"}
    more = {"workdir": str(root / names[1]), "num_seeds": "3", "config.beta": "5"}
    assert call == own | more
    # A job of several seeds has an interval over seeds of its own.
    table = (root / "results.md").read_text()
    assert cells(table, names[1])[3] == "26.0 (13.0 to 16.0)"
    assert cells(table, "one")[2:4] == ["2 of 2", "6"]


def test_failed_job(launcher, fake, tmp_path):
    root = tmp_path / "sweep"
    flags = ["--datasets=one,fails,forgets,two", f"--root={root}"]
    result = launcher.run("sweep", *flags, env=fake)
    assert result.status == 1
    assert result.line == {"jobs": 4, "done": 2, "failed": 2, "results": str(root / "results.csv")}
    log = root / "logs" / "fails-qipo_ot-seed0.log"
    silent = root / "logs" / "forgets-qipo_ot-seed0.log"
    assert result.complaints == [
        f"launch.sweep: failed with exit status 3: {log}: no such dataset",
        f"launch.sweep: failed with exit status 0: {silent}: no output",
    ]
    assert [bool(row["policy_return"]) for row in rows(root)] == [True, False, False, True]
    (root / "mended").touch()
    again = launcher.run("sweep", "--datasets=one,fails,two", f"--root={root}", env=fake)
    assert (again.status, again.line["done"], again.complaints) == (0, 3, [])
    starts = [len(calls(root / f"{name}-qipo_ot-seed0")) for name in ("one", "fails", "two")]
    assert starts == [1, 2, 1]


def test_at_most_so_many_workers(launcher, fake, tmp_path):
    root = tmp_path / "sweep"
    flags = ["--datasets=takes", "--seeds=0,1,2,3", f"--root={root}", "--workers=2"]
    assert launcher.run("sweep", *flags, env=fake).status == 0
    events = []
    for seed in range(4):
        workdir = root / f"takes-qipo_ot-seed{seed}"
        events += [(calls(workdir)[0]["at"], 1), (float((workdir / "ended").read_text()), -1)]
    running = np.cumsum([change for _, change in sorted(events)])
    assert running.max() == 2


def test_job_list(launcher, fake, tmp_path):
    root, path = tmp_path / "a sweep", tmp_path / "jobs.txt"
    assert launcher.run("sweep", "--datasets=one", f"--root={root}", env=fake).status == 0
    before = sorted(root.rglob("*"))
    flags = ["--datasets=one,two 'x'", "--seeds=0,1", f"--root={root}"]
    listing = launcher.run("sweep", *flags, f"--jobs={path}", env=fake)
    assert (listing.status, listing.complaints) == (0, [])
    assert listing.line == {"jobs": 4, "done": 1, "list": str(path)}
    assert sorted(root.rglob("*")) == before
    lines = path.read_text().splitlines()
    digest = re.search(r"two-x-qipo_ot-seed0-(\w{8})$", shlex.split(lines[1])[-1])[1]
    names = ["one-qipo_ot-seed1", *(f"two-x-qipo_ot-seed{seed}-{digest}" for seed in "01")]
    assert [shlex.split(line)[:3] for line in lines] == 3 * [["python", "-m", "launch.train"]]
    workdirs = [f"--workdir={root / name}" for name in names]
    assert [shlex.split(line)[-1] for line in lines] == workdirs
    path_of_python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | fake | {"PATH": path_of_python}
    for line in lines:
        subprocess.run(["bash", "-c", line], cwd=REPOSITORY, env=environment, check=True)
    assert calls(root / names[2])[0]["dataset"] == "two 'x'"
    result = launcher.run("sweep", *flags, env=fake)
    assert (result.status, result.line["done"]) == (0, 4)
    assert [len(calls(root / name)) for name in names] == [1, 1, 1]
    assert launcher.run("sweep", *flags, f"--jobs={path}", env=fake).status == 0
    assert path.read_text() == ""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal(launcher, fake, tmp_path, number, status):
    root = tmp_path / "sweep"
    flags = ["--datasets=waits", "--seeds=0,1,2", f"--root={root}", "--workers=2"]
    process = launcher.start("sweep", *flags, env=fake)
    workdirs = [root / f"waits-qipo_ot-seed{seed}" for seed in range(3)]
    end = time.monotonic() + 60
    while not all((workdir / "started").exists() for workdir in workdirs[:2]):
        assert process.running
        assert time.monotonic() < end
        time.sleep(0.02)
    # A terminal sends ctrl-C to the whole group of the sweep: the jobs are not in it.
    assert os.getpgid(process.pid) not in [calls(workdir)[0]["group"] for workdir in workdirs[:2]]
    process.send(number)
    result = process.wait(30)
    assert result.status == status
    assert [(workdir / "saved").exists() for workdir in workdirs] == [True, True, False]
    assert calls(workdirs[2]) == []
    assert result.line == {"jobs": 3, "done": 0, "failed": 0, "results": str(root / "results.csv")}
    assert len(result.complaints) == 1
    assert number.name in result.complaints[0]
    (workdirs[2] / "saved").parent.mkdir()
    (workdirs[2] / "saved").touch()
    again = launcher.run("sweep", *flags, env=fake)
    assert (again.status, again.line["done"], again.complaints) == (0, 3, [])
    assert [len(calls(workdir)) for workdir in workdirs] == [2, 2, 1]


BAD_FLAGS = {
    "unknown flag": (["--nosuch=1"], ["nosuch"]),
    "positional": (["positional"], ["positional"]),
    "workers": (["--workers=0"], ["workers", "0"]),
    "no workers": (["--workers=x"], ["workers", "x"]),
    "config": (
        ["--configs=experiments/configs/quick.py,nosuch.py"],
        ["--configs=nosuch.py", "no such file"],
    ),
    "config folder": (["--configs=experiments"], ["--configs=experiments", "folder"]),
    "no config": (["--configs="], ["--configs"]),
    "no dataset": (["--datasets=a,,b"], ["--datasets"]),
    "no seed": (["--seeds="], ["--seeds"]),
    "seed": (["--seeds=0,a"], ["--seeds", "'a'"]),
    "negative seed": (["--seeds=0,-1"], ["--seeds", "-1"]),
    "same seed": (["--seeds=1,0,1"], ["one-qipo_ot-seed1"]),
    "same dataset": (["--datasets=one,two,one"], ["one-qipo_ot-seed0"]),
    "same file": (
        ["--datasets=x/small.hdf5,./x/small.hdf5"],
        ["x/small.hdf5", "./x/small.hdf5", "named small-"],
    ),
    "line break": (["--train_flags=--env='a\nb'", "--jobs=jobs.txt"], ["--jobs", "line breaks"]),
    "shared seeds": (["--seeds=0,2,5", "--train_flags=--num_seeds=3"], ["0 and 2", "num_seeds=3"]),
    "own flag": (["--train_flags=--num_seeds=2 --seed=3"], ["--train_flags", "--seed=3"]),
    "quote": (["--train_flags=--config.path='ot"], ["--train_flags", "quotation"]),
    "value apart": (["--train_flags=--num_seeds 2"], ["--train_flags", "--name=value", "'2'"]),
    "remote root": (["--root=gs://bucket/sweep"], ["--root=gs://bucket/sweep", "--collect"]),
    "file as root": ([f"--root={REPOSITORY / 'setup.py'}"], ["setup.py", "is a file"]),
    "two modes": (["--jobs=jobs.txt", "--collect"], ["--jobs", "--collect"]),
    "nothing to collect": (["--collect"], ["sweep", "no such folder"]),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(launcher, fake, tmp_path, case):
    flags, words = BAD_FLAGS[case]
    root = tmp_path / "sweep"
    result = launcher.run("sweep", "--datasets=one", f"--root={root}", *flags, env=fake)
    assert result.status == 2, (result.status, result.err)
    assert result.out == ""
    assert len(result.complaints) == 1, result.err
    for word in words:
        assert word in result.complaints[0]
    assert not root.exists()


def test_damaged_result(launcher, fake, tmp_path):
    root = tmp_path / "sweep"
    flags = ["--datasets=one", f"--root={root}"]
    assert launcher.run("sweep", *flags, env=fake).status == 0
    path = root / "one-qipo_ot-seed0" / "result.json"
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        result = launcher.run("sweep", *flags, "--collect", env=fake)
        assert result.status == 2
        assert len(result.complaints) == 1
        assert str(path) in result.complaints[0]


def test_help(launcher):
    result = launcher.run("sweep", "--help")
    assert (result.status, result.complaints) == (0, [])
    assert set(re.findall(r"--(?:\[no\])?(\w+):", result.out)) >= {
        *("datasets", "configs", "seeds", "root", "workers", "train_flags", "jobs", "collect"),
    }
