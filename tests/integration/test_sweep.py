"""`launch.sweep` as a process: once with the real trainer, else with a stand-in for it."""

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
from tests.integration.runs import CONFIG, table
from tests.markdown import cells

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


@pytest.fixture
def root(tmp_path):
    return tmp_path / "a sweep"


@pytest.fixture
def sweep(launcher, fake, root):
    """Run a sweep in `root` with the stand-in for the trainer."""
    return lambda *flags: launcher.run("sweep", f"--root={root}", *flags, env=fake)


def rows(root):
    return table(root / "results.csv")


def calls(workdir):
    """The flags of every start of a job."""
    path = workdir / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def row(root, first):
    """Find the row of results.md that begins with `first`."""
    [found] = [row for row in cells((root / "results.md").read_text()) if row[0] == first]
    return found


def test_sweep_with_the_real_trainer(launcher, dataset, root):
    config = CONFIG | {"policy": "bc"}  # fast to compile
    fields = " ".join(f"--config.{name}='{value}'" for name, value in config.items())
    flags = [f"--datasets={dataset}", "--configs=experiments/configs/quick.py", "--seeds=3,5"]
    flags += [f"--root={root}", f"--train_flags={fields}", "--workers=2"]
    first = launcher.run("sweep", *flags)
    assert (first.status, first.complaints) == (0, []), first.err
    assert first.line == {"jobs": 2, "done": 2, "failed": 0, "results": str(root / "results.csv")}
    found = rows(root)
    assert [job["seed"] for job in found] == ["3", "5"]
    for job in found:
        assert job["job"].startswith(f"small-quick-seed{job['seed']}")
        workdir = root / job["job"]
        saved = json.loads((workdir / "config.json").read_text())
        assert (saved["seed"], saved["config"]["batch_size"]) == (int(job["seed"]), 32)
        result = json.loads((workdir / "result.json").read_text())
        printed = json.loads((root / "logs" / f"{job['job']}.log").read_text().splitlines()[-1])
        assert result == printed
        assert float(job["policy_return"]) == result["policy_return"]
        assert [float(job["policy_low"]), float(job["policy_high"])] == result["policy_interval"]
    mean = np.mean([float(job["policy_return"]) for job in found])
    assert row(root, str(dataset))[6].startswith(f"{mean:.1f} (")
    logs = {path: path.stat() for path in (root / "logs").iterdir()}
    second = launcher.run("sweep", *flags)
    assert (second.status, second.out) == (0, first.out)
    assert {path: path.stat() for path in (root / "logs").iterdir()} == logs


def test_tables_and_no_more_than_so_many_workers(sweep, root):
    result = sweep("--datasets=one,takes", "--seeds=0,1,2", "--workers=2")
    assert result.status == 0, result.err
    assert result.out == f"\n{(root / 'results.md').read_text()}\n{json.dumps(result.line)}\n"
    # Returns 10, 11, 14: standard deviation 2.0817, and 4.3027 is Student's t of 97.5% with 2
    # degrees.
    low, high = 35 / 3 - 4.3027 * 2.0817 / 3**0.5, 35 / 3 + 4.3027 * 2.0817 / 3**0.5
    expected = [
        *("experiments/configs/qipo_ot.py", "3 of 3", "3", "-3.0 (-3.0 to -3.0)"),
        *("-2.0 (-2.0 to -2.0)", f"11.7 ({low:.1f} to {high:.1f})", "", "51.0 (48.5 to 53.5)"),
    ]
    assert row(root, "one")[1:] == row(root, "takes")[1:] == expected
    job = "takes-qipo_ot-seed2"
    assert row(root, job) == [job, "-3.0", "-2.0", "14.0", "", "52.0"]
    found = rows(root)
    asked = [(dataset, seed) for dataset in ("one", "takes") for seed in "012"]
    assert [(job["dataset"], job["seed"]) for job in found] == asked
    expected = {"job": job, "policy_low": "11.0", "policy_high": "14.0", "behavior_score": ""}
    assert found[5].items() >= (expected | {"steps": "7", "workdir": str(root / job)}).items()
    events = []
    for workdir in root.glob("*-seed?"):
        events += [(calls(workdir)[0]["at"], 1), (float((workdir / "ended").read_text()), -1)]
    assert np.cumsum([change for _, change in sorted(events)]).max() == 2


def test_names_of_one_file_name_in_two_folders(sweep, root, tmp_path):
    presets = tmp_path / "presets"
    presets.mkdir()
    (presets / "qipo_ot.py").write_text("")
    own = "experiments/configs"
    for data, config in (("x", own), ("y", own), ("x", presets)):
        result = sweep(f"--datasets={data}/small.hdf5", f"--configs={config}/qipo_ot.py")
        assert (result.status, result.line["done"]) == (0, 1), result.err
        assert [row["dataset"] for row in rows(root)] == [f"{data}/small.hdf5"]
    names = {path.name for path in root.iterdir() if path.name.startswith("small-qipo_ot-seed0-")}
    assert len(names) == 3
    assert sweep("--datasets=x/small.hdf5,y/small.hdf5", "--collect").line["done"] == 2


def test_jobs_not_done_have_empty_rows(sweep, root):
    assert sweep("--datasets=one", "--seeds=1").status == 0
    result = sweep("--datasets=one,two", "--seeds=1,2", "--collect")
    assert (result.status, result.complaints) == (0, [])
    assert result.line == {"jobs": 4, "done": 1, "failed": 0, "results": str(root / "results.csv")}
    found = [(job["policy_return"], job["seeds"]) for job in rows(root)]
    assert found == [("11.0", "1"), *3 * [("", "")]]
    assert row(root, "one")[2:5] == ["1 of 2", "1", "-3.0"]
    assert row(root, "two")[2:] == ["0 of 2", "0", *5 * [""]]
    made = {"logs", "one-qipo_ot-seed1", "results.csv", "results.md"}
    assert {path.name for path in root.iterdir()} == made


def test_train_flags_reach_the_trainer_and_the_name(sweep, root):
    flags = ["--datasets=one", "--seeds=0,4"]
    assert sweep(*flags).status == 0
    result = sweep(*flags, "--train_flags=--num_seeds=3 --config.beta='5'")
    assert (result.status, result.line["done"]) == (0, 2)
    name = rows(root)[1]["job"]
    assert name.startswith("one-qipo_ot-seed4-")
    [call] = calls(root / name)
    own = {"dataset": "one", "config": "experiments/configs/qipo_ot.py", "seed": "4"}
    own |= {"workdir": str(root / name), "num_seeds": "3", "config.beta": "5"}
    assert {key: call[key] for key in call.keys() - {"at", "group"}} == own
    # A job of several seeds has an interval over seeds of its own.
    assert row(root, name)[3] == "26.0 (13.0 to 16.0)"
    assert row(root, "one")[2:4] == ["2 of 2", "6"]


def test_grid_of_fields(sweep, root):
    grid = ["--grid=config.beta=1,3", "--grid", "config.hidden_dims=(8,),(16, 16)"]
    result = sweep("--datasets=one", "--seeds=0,1", *grid)
    assert (result.status, result.line["done"]) == (0, 8), result.err
    found = rows(root)
    names = ["job", "dataset", "config", "seed", "config.beta", "config.hidden_dims"]
    assert list(found[0])[:6] == names
    points = [(job["config.beta"], job["config.hidden_dims"], job["seed"]) for job in found]
    assert points == [(b, h, s) for b in "13" for h in ("(8,)", "(16, 16)") for s in "01"]
    for job in found:
        [call] = calls(root / job["job"])
        assert all(call[name] == job[name] for name in ("config.beta", "config.hidden_dims"))
    # A row for each point, over the seeds.
    means = [each for each in cells((root / "results.md").read_text()) if each[0] == "one"]
    assert [each[2:5] for each in means] == [
        [beta, dims, "2 of 2"] for beta in "13" for dims in ("(8,)", "(16, 16)")
    ]


def test_failed_job(sweep, root):
    result = sweep("--datasets=one,fails,forgets,two")
    assert result.status == 1
    assert result.line == {"jobs": 4, "done": 2, "failed": 2, "results": str(root / "results.csv")}
    log, silent = (root / f"logs/{name}-qipo_ot-seed0.log" for name in ("fails", "forgets"))
    assert result.complaints == [
        f"launch.sweep: failed with exit status 3: {log}: no such dataset",
        f"launch.sweep: failed with exit status 0: {silent}: no output",
    ]
    assert [bool(job["policy_return"]) for job in rows(root)] == [True, False, False, True]
    (root / "mended").touch()
    again = sweep("--datasets=one,fails,two")
    assert (again.status, again.line["done"], again.complaints) == (0, 3, [])
    starts = [len(calls(root / f"{name}-qipo_ot-seed0")) for name in ("one", "fails", "two")]
    assert starts == [1, 2, 1]


def test_job_list(sweep, root, fake, tmp_path):
    path, flags = tmp_path / "jobs.txt", ["--datasets=one,two 'x'", "--seeds=0,1"]
    assert sweep("--datasets=one").status == 0
    before = sorted(root.rglob("*"))
    listing = sweep(*flags, f"--jobs={path}")
    assert (listing.status, listing.complaints) == (0, [])
    assert listing.line == {"jobs": 4, "done": 1, "list": str(path)}
    assert sorted(root.rglob("*")) == before
    lines = path.read_text().splitlines()
    digest = re.search(r"two-x-qipo_ot-seed0-(\w{8})$", shlex.split(lines[1])[-1])[1]
    names = ["one-qipo_ot-seed1", *(f"two-x-qipo_ot-seed{seed}-{digest}" for seed in "01")]
    for line, name in zip(lines, names, strict=True):
        assert shlex.split(line)[:3] == ["python", "-m", "launch.train"]
        assert shlex.split(line)[-1] == f"--workdir={root / name}"
        environment = os.environ | fake
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        subprocess.run(["bash", "-c", line], cwd=REPOSITORY, env=environment, check=True)
    assert calls(root / names[2])[0]["dataset"] == "two 'x'"
    result = sweep(*flags)
    assert (result.status, result.line["done"]) == (0, 4)
    assert [len(calls(root / name)) for name in names] == [1, 1, 1]
    assert sweep(*flags, f"--jobs={path}").status == 0
    assert path.read_text() == ""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal(launcher, fake, root, number, status):
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
    [complaint] = result.complaints
    assert number.name in complaint
    (workdirs[2] / "saved").parent.mkdir()
    (workdirs[2] / "saved").touch()
    again = launcher.run("sweep", *flags, env=fake)
    assert (again.status, again.line["done"], again.complaints) == (0, 3, [])
    assert [len(calls(workdir)) for workdir in workdirs] == [2, 2, 1]


BAD_FLAGS = {  # and the words of the complaint
    "--nosuch=1": "nosuch",
    "positional": "positional",
    "--workers=0": "workers 0",
    "--grid=config.bta=1,2": "--grid 'bta' did+you+mean+beta",
    "--grid=beta=1,2": "--grid 'beta' did+you+mean",
    "--grid=config.beta=": "--grid=config.beta= got+none",
    "--grid=config.beta=1,1": "all+of+them+would+be+named",
    "--grid=config.beta=1,2 --train_flags=--config.beta=3": "--config.beta=3 its+own",
    "--workers=x": "workers x",
    "--configs=experiments/configs/quick.py,nosuch.py": "--configs=nosuch.py no+such+file",
    "--configs=experiments": "--configs=experiments folder",
    "--configs=": "--configs",
    "--datasets=a,,b": "--datasets",
    "--seeds=": "--seeds",
    "--seeds=0,a": "--seeds 'a'",
    "--seeds=0,-1": "--seeds -1",
    "--seeds=1,0,1": "one-qipo_ot-seed1",
    "--datasets=one,two,one": "one-qipo_ot-seed0",
    "--datasets=x/small.hdf5,./x/small.hdf5": "x/small.hdf5 ./x/small.hdf5 named+small-",
    "'--train_flags=--env=\"a\nb\"' --jobs=jobs.txt": "--jobs line+breaks",
    "--seeds=0,2,5 --train_flags=--num_seeds=3": "0+and+2 num_seeds=3",
    "'--train_flags=--num_seeds=2 --seed=3'": "--train_flags --seed=3",
    '"--train_flags=--config.path=\'ot"': "--train_flags quotation",
    "'--train_flags=--num_seeds 2'": "--train_flags --name=value '2'",
    "--root=gs://bucket/sweep": "--root=gs://bucket/sweep --collect",
    f"--root={REPOSITORY / 'setup.py'}": "setup.py is+a+file",
    "--jobs=jobs.txt --collect": "--jobs --collect",
    "--collect": "sweep no+such+folder",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags(sweep, root, flags):
    result = sweep("--datasets=one", *shlex.split(flags))
    assert (result.status, result.out) == (2, ""), result.err
    [complaint] = result.complaints
    assert all(words.replace("+", " ") in complaint for words in BAD_FLAGS[flags].split())
    assert not root.exists()


def test_damaged_result(sweep, root):
    assert sweep("--datasets=one").status == 0
    path = root / "one-qipo_ot-seed0" / "result.json"
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        result = sweep("--datasets=one", "--collect")
        [complaint] = result.complaints
        assert result.status == 2
        assert str(path) in complaint
