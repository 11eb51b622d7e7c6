"""Is whatever is broken answered in one line, with a status that the entry point documents?

    python -m experiments.systems.robustness [--quick] [--seed=0] [--cases=300]

Trains a tiny run, then breaks a copy of it or of its data in a random way, or the situation that
an entry point is started in.  An answer must have a documented exit status, at most three lines on
standard error, each of the entry point's own, and come within two minutes.  Prints what was not
answered so, a table, and a line of JSON; exit status 1 where anything was not.  It runs from a
checkout: its processes are those of the tests, which fork from one that has imported everything.
"""

import argparse
import csv
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests.integration.helpers import Launcher
from tests.integration.runs import CONFIG, arrays, train_flags
from tests.programs import share
from tests.unit.data_fixtures import write_d4rl

SHORT = CONFIG | {"behavior_steps": 10, "critic_steps": 10, "policy_steps": 20, "eval_every": 10}
STATUSES = {"train": {0, 1, 2, 129, 130, 143}, "evaluate": {0, 1, 2}}
JSON_VALUES = (None, True, -1, 0, 2**70, 10**400, 0.5, float("nan"), "", "x", "\n", [], [1], {})
CELLS = ("", "x", "nan", "-1", "1e999", "9" * 400, "1_0", "\0", '"', "a,b", "\u0663", "2.5", " 1")
MODULES = ("train", "evaluate", "report", "inspect", "export", "collect", "sweep")
FLAGS = ("--nosuch=1", "positional", "--workdir=", "--seed=-1", "--seed=x", "--config=no.py",
         "--config.beta=nan", "--config.nosuch=1", "--dataset=no.hdf5", "--env=No-v0", "--root=",
         "--episodes=0", "--solver=x", "--out=", "--policy=x", "--num_seeds=0", "--seeds=1,1",
         "--plugins=os.path.", "--plugins=nosuch", "--platforms=abacus", "--steps=0", "--jobs=",
         "--sample_steps=1e3", "--video=x.avi", "--plot=x.jpg", "--train_flags=x")  # fmt: skip
NAMES = ("a[b]", "a]", "a\\b", "gs:x", "$x^{", "a*", "a?b", "\u00fc", "%s{}", "gs:/x", "a#b", "-a",
         "~nosuchuser/x", "'\"", "a\nb", "a b", "x" * 300, "x" * 200)  # fmt: skip
ENVIRONMENTS = ("raises", "nan", "shape", "reward", "type")  # see tests/extension/faulty.py


# What is broken and the command that meets it: (what, module, flags, keywords of Bench.answer).
Case = tuple[Any, ...]


class Bench:
    """A folder with a dataset, a finished run, and whatever is broken."""

    def __init__(self, folder: Path, launcher: Launcher, rng: random.Random):
        self.folder, self.launcher, self.rng = folder, launcher, rng
        self.data = write_d4rl(folder / "small.hdf5", arrays(), env_id="Pendulum-v1")
        np.savez(folder / "small.npz", **arrays())
        self.run = folder / "run"
        done = launcher.run("train", *self.train(self.run))
        if done.status:
            raise RuntimeError(done.err)

    def new(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def copy(self) -> Path:
        return shutil.copytree(self.run, self.new() / "run")

    def train(self, workdir: Path, *more: str) -> list[str]:
        return train_flags(self.data, workdir, *more, **SHORT)

    def reading(self, run: Path, *modules: str) -> tuple[str, list[str]]:
        """A command that reads a run."""
        module = self.rng.choice(modules or ("report", "evaluate"))
        return module, self.train(run) if module == "train" else [f"--workdir={run}"]

    def spoil(self, path: Path) -> None:
        """Cut, flip, repeat or replace some bytes of a file."""
        data, size = path.read_bytes(), self.rng.choice([1, 8, 100])
        at = self.rng.randrange(len(data) or 1)
        middle = self.rng.choice([b"", self.rng.randbytes(size), b"\0" * size, data[at:] * 2])
        path.write_bytes(self.rng.choice([data[:at], b"", data[:at] + middle + data[at + size :]]))

    def answer(self, module: str, flags: list[str], **options: Any) -> str | None:
        """Run a command, perhaps several at once; returns what is wrong with the answer."""
        start, env = self.launcher.start, {"BREAK": options.get("broken", "")}
        copies = range(options.get("copies", 1))
        processes = [start(module, *flags, cwd=self.folder, env=env) for _ in copies]
        if "number" in options:
            time.sleep(self.rng.uniform(0.1, 8.0))
            processes[0].send(options["number"])
        for process in processes:
            try:
                status, _, err = process.wait(120)
            except TimeoutError:
                return "no answer within two minutes"
            lines = [line for line in err.splitlines() if line.strip()]
            fits = len(lines) <= 3 and all(line.startswith("launch") for line in lines)
            fits &= status in STATUSES.get(module, {0, 2}) and (status == 0 or lines != [])
            if not fits:
                return f"status {status}, {len(lines)} lines: {' | '.join(lines)[-300:]}"
        return None

    # What is broken, by kind; each yields cases for ever or until it has no more.

    def flags(self) -> Iterator[Case]:
        pairs = [(flag, module) for flag in FLAGS for module in MODULES]
        for flag, module in self.rng.sample(pairs, len(pairs)):
            own = {"sweep": ["--datasets=a", "--collect"], "collect": ["--policy=nosuch"]}
            own |= {"train": self.train(self.folder / "r"), "inspect": [f"--dataset={self.data}"]}
            yield flag, module, [*own.get(module, [f"--workdir={self.run}"]), flag]

    def bytes_of_data(self) -> Iterator[Case]:
        while True:
            name = self.rng.choice(["small.hdf5", "small.npz"])
            path = Path(shutil.copy(self.folder / name, self.new()))
            self.spoil(path)
            yield path.name, "inspect", [f"--dataset={path}", "--env=Pendulum-v1"]

    def arrays(self) -> Iterator[Case]:
        while True:
            data, value = arrays(), self.rng.choice([np.nan, np.inf, -np.inf, 1e30, "wrong"])
            name = self.rng.choice(sorted(data))
            if value == "wrong":
                rows = data[name]
                wrong = (rows[:-1], rows[..., None], rows[:0], np.zeros(300, "S3"))
                data[name] = self.rng.choice(wrong)
            else:
                data[name] = data[name].astype(np.float32)
                data[name].flat[self.rng.randrange(data[name].size)] = value
            path = write_d4rl(self.new() / "bad.hdf5", data, env_id="Pendulum-v1")
            yield f"{name}: {value}", "inspect", [f"--dataset={path}"]

    def json_of_runs(self) -> Iterator[Case]:
        while True:
            path = self.copy() / self.rng.choice(["config.json", "config.json", "result.json"])
            values = json.loads(path.read_text())
            inner = self.rng.choice([values, values.get("config", values)])
            field, value = self.rng.choice(sorted(inner)), self.rng.choice(JSON_VALUES)
            inner[field] = value
            path.write_text(json.dumps(values))
            if self.rng.random() < 0.2:
                self.spoil(path)
            yield f"{path.name}: {field}={str(value)[:20]}", *self.reading(path.parent)

    def tables_of_runs(self) -> Iterator[Case]:
        while True:
            path = self.copy() / self.rng.choice(["metrics.csv", "returns.csv", "evaluations.csv"])
            rows, cell = list(csv.reader(path.read_text().splitlines())), self.rng.choice(CELLS)
            line, column = self.rng.randrange(len(rows)), self.rng.randrange(len(rows[0]))
            how = self.rng.choice(["cell", "cell", "cell", "twice", "gone", "raw"])
            rows[line : line + 1] = [list(rows[line])] * {"twice": 2, "gone": 0}.get(how, 1)
            if how in ("cell", "raw"):
                rows[line][column] = cell
            csv.writer(buffer := io.StringIO(), lineterminator="\n").writerows(rows)
            path.write_text("\n".join(map(",".join, rows)) if how == "raw" else buffer.getvalue())
            what = f"{path.name}, line {line + 1}: {how} {cell[:20]!r}"
            yield what, *self.reading(path.parent)

    def checkpoints(self) -> Iterator[Case]:
        while True:
            run = self.copy()
            files = sorted(path for path in (run / "checkpoints").rglob("*") if path.is_file())
            for path in self.rng.sample(files, count := self.rng.choice([1, 5, len(files)])):
                self.spoil(path)
            yield f"{count} files", *self.reading(run, "evaluate", "export", "train")

    def names_of_folders(self) -> Iterator[Case]:
        for name in NAMES:
            path = self.new() / name
            yield repr(name[:20]), "train", self.train(path)
            yield repr(name[:20]), *self.reading(path)

    def processes_and_signals(self) -> Iterator[Case]:
        yield "two at once", "train", self.train(self.new() / "r"), {"copies": 2}
        for text in ("{", "[1]", "", '{"pid": 1, "host": "x"}'):
            (run := self.copy()).joinpath("lock").write_text(text)
            yield f"lock: {text}", *self.reading(run, "train", "evaluate")
        while True:
            number = self.rng.choice([signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
            flags = self.train(self.new() / "r", "--config.policy_steps=300")
            yield number.name, "train", flags, {"number": number}

    def environments_disks_and_devices(self) -> Iterator[Case]:
        for how in (*ENVIRONMENTS, "file size", "devices", "user"):
            flags = self.train(self.new() / "r", "--plugins=tests.extension.faulty")
            flags += ["--env=Broken-v0"] * (how in ENVIRONMENTS)
            yield from [(how, "train", flags, {"broken": how})] * 2  # the same command again


def main(arguments: list[str] | None = None, launcher: Launcher | None = None) -> int:
    """Break, ask, count."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one case of each kind")
    args = parser.parse_args(arguments)
    begin, answered = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {} if launcher else share(Path(name) / "programs")
        own = launcher or Launcher(Path(name) / "out")
        bench = Bench(Path(name), own, random.Random(args.seed))
        kinds = [bench.flags(), bench.bytes_of_data(), bench.arrays(), bench.json_of_runs()]
        kinds += [bench.tables_of_runs(), bench.checkpoints(), bench.names_of_folders()]
        kinds += [bench.processes_and_signals(), bench.environments_disks_and_devices()]
        wanted = len(kinds) if args.quick else args.cases
        while kinds and len(answered) < wanted:
            kinds.append(kind := kinds.pop(0))
            if (case := next(kind, None)) is None:
                kinds.pop()
                continue
            what, module, flags, *more = case
            problem, of = (
                bench.answer(module, flags, **dict(*more)),
                kind.__name__.replace("_", " "),
            )
            answered.append({"kind": of, "answered": problem is None})
            if problem is not None:
                print(f"{of}: {what}: launch.{module}: {problem}", flush=True)
        if launcher is None:
            own.close()
    table = pd.DataFrame(answered).groupby("kind", sort=False)["answered"].agg(["count", "sum"])
    print(table.set_axis(["cases", "answered"], axis=1).to_markdown())
    cases, good = map(int, table.sum())
    line = {"cases": cases, "answered": good, "seconds": round(time.monotonic() - begin)}
    print(json.dumps(line))
    return int(good < cases)


if __name__ == "__main__":
    sys.exit(main())
