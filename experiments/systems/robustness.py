"""Is whatever is broken answered in one line, with the status that the entry points document?

    python -m experiments.systems.robustness [--quick] [--seed=0] [--cases=300]

Trains a tiny run, then breaks a copy of it or of its dataset in a random way, or the situation that
an entry point is started in: flags, bytes of data, arrays, config.json, result.json, the tables,
checkpoints, names of folders, a second process, signals, environments, devices, a disk that takes
no more.  Every answer must have a documented exit status, no traceback, at most three lines on
standard error, each of the entry point's own, and come within a minute.  Prints what was not
answered so, a table of kinds, and a line of JSON; exit status 1 where anything was not.

It runs from a checkout of the repository: the processes are those of its tests, which fork from
one that has imported everything.
"""

import argparse
import collections
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tests.integration.helpers import Launcher
from tests.integration.runs import CONFIG, arrays, train_flags
from tests.programs import share
from tests.unit.data_fixtures import write_d4rl

STATUSES = {"train": {0, 1, 2, 129, 130, 143}, "evaluate": {0, 1, 2}, "sweep": {0, 1, 2}}
USUAL = {0, 2}
SHORT = CONFIG | {"behavior_steps": 10, "critic_steps": 10, "policy_steps": 20, "eval_every": 10}
JSON_VALUES = (
    *(None, True, -1, 0, 2**70, 10**400, 0.5, float("nan"), "", "x", "\n", [], [1], {}, {"a": 1}),
    json.loads("[" * 400 + "]" * 400),
)
CELLS = ("", "x", "nan", "-1", "1e999", "9" * 400, "1_0", "\0", '"', "a,b", "\u0663", "2.5", " 1")
BAD_FLAGS = ("--nosuch=1", "positional", "--workdir=", "--seed=-1", "--seed=x", "--config=no.py",
             "--config.beta=nan", "--config.nosuch=1", "--dataset=no.hdf5", "--env=No-v0",
             "--episodes=0", "--solver=x", "--out=", "--jobs=\0", "--policy=x", "--num_seeds=0",
             "--plugins=os.path.", "--plugins=nosuch", "--platforms=abacus", "--seeds=1,1",
             "--sample_steps=1e3", "--video=x.avi", "--plot=x.jpg", "--steps=0")  # fmt: skip
NAMES = ("a[b]", "a]", "a\\b", "gs:x", "$x^{", "a*", "a?b", "a b", "\u00fc", "a\nb", "%s{}", "-a",
         "x" * 300, "x" * 200, "gs:/x", "~nosuchuser/x", "a#b", "'\"")  # fmt: skip
# A module that --plugins imports, in the process of the entry point.
PLUGIN = """
import os, resource
import gymnasium, jax, numpy as np
from gymnasium.envs.classic_control.pendulum import PendulumEnv

how = os.environ.get("BREAK", "")

class Broken(PendulumEnv):
    def step(self, action):
        observation, reward, *ends = super().step(action)
        self.count = getattr(self, "count", 0) + 1
        if self.count == 3 and how == "raises":
            raise RuntimeError("the simulator\\nfell over")
        if self.count == 3 and how == "nan":
            observation = observation * np.nan
        if self.count == 3 and how == "shape":
            observation = observation[:2]
        return observation, {"reward": np.nan, "type": None}.get(how, reward), *ends

gymnasium.register("Broken-v0", entry_point=Broken, max_episode_steps=5)
if how == "file size":
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
if how == "devices":
    jax.config.update("jax_platforms", "nosuch")
if how == "user" and os.getuid() == 0:
    os.setuid(65534)
"""


class Case(NamedTuple):
    """One broken thing: what to start, after what has been done to a copy of the run."""

    kind: str
    name: str
    module: str
    flags: list[str]
    env: dict[str, str] = {}  # noqa: RUF012
    signal: int = 0
    second: bool = False  # the same command twice at once


class Bench:
    """A folder with a dataset, a finished run, and a new folder for each case."""

    def __init__(self, folder: Path, launcher: Launcher, rng: random.Random):
        self.folder, self.launcher, self.rng, self.count = folder, launcher, rng, 0
        self.data = write_d4rl(folder / "small.hdf5", arrays(), env_id="Pendulum-v1")
        np.savez(folder / "small.npz", **arrays())
        (folder / "broken_plugin.py").write_text(PLUGIN)
        self.run = folder / "run"
        done = launcher.run("train", *train_flags(self.data, self.run, **SHORT))
        assert done.status == 0, done.err

    def new(self) -> Path:
        self.count += 1
        (self.folder / str(self.count)).mkdir()
        return self.folder / str(self.count)

    def copy(self) -> Path:
        return shutil.copytree(self.run, self.new() / "run")

    def train(self, workdir: object, data: object = None, *more: str) -> list[str]:
        return train_flags(data or self.data, workdir, *more, **SHORT)

    def answer(self, case: Case) -> str | None:
        """Start the case; returns what is wrong with the answer, None where nothing is."""
        begin = time.monotonic()
        first = self.launcher.start(case.module, *case.flags, cwd=self.folder, env=case.env)
        processes = [first]
        if case.second:
            processes.append(self.launcher.start(case.module, *case.flags, cwd=self.folder))
        if case.signal:
            time.sleep(self.rng.uniform(0.1, 4.0))
            first.send(case.signal)
        allowed = STATUSES.get(case.module, USUAL)
        for process in processes:
            try:
                status, _, err = process.wait(60)
            except TimeoutError:
                return "no answer within a minute"
            lines = [line for line in err.splitlines() if line.strip()]
            own = all(line.startswith("launch") for line in lines)
            if status not in allowed or not own or len(lines) > 3 or (status and not lines):
                return f"status {status}, {len(lines)} lines: {' | '.join(lines)[-300:]}"
        shutil.rmtree(self.folder / str(self.count), ignore_errors=True)
        return None if time.monotonic() - begin < 60 else "too slow"

    # What is broken, by kind; each yields cases for ever or until it has no more.

    def flags(self) -> Iterator[Case]:
        for flag in BAD_FLAGS:
            for module in ("train", "evaluate", "report", "inspect", "export", "collect", "sweep"):
                own = {"train": self.train(self.new() / "r"), "inspect": [f"--dataset={self.data}"],
                       "sweep": [f"--root={self.new()}", "--collect", "--datasets=a"],
                       "collect": ["--policy=nosuch"]}  # fmt: skip
                yield Case(
                    "flags", flag, module, [*own.get(module, [f"--workdir={self.run}"]), flag]
                )

    def bytes(self) -> Iterator[Case]:
        while True:
            source = self.rng.choice(["small.hdf5", "small.npz"])
            path = self.new() / source
            path.write_bytes(self.spoil((self.folder / source).read_bytes()))
            yield Case(
                "bytes of data", source, "inspect", [f"--dataset={path}", "--env=Pendulum-v1"]
            )

    def arrays(self) -> Iterator[Case]:
        values = (np.nan, np.inf, -np.inf, 1e30, "text", None)
        while True:
            data, value = arrays(), self.rng.choice(values)
            name = self.rng.choice(sorted(data))
            if value is None:
                wrong = (
                    data[name][:-1],
                    data[name][..., None],
                    data[name][:0],
                    np.zeros(300, "S3"),
                )
                data[name] = self.rng.choice(wrong)
            elif value == "text":
                data[name] = np.full(len(data[name]), b"text")
            else:
                data[name] = data[name].astype(np.float32)
                data[name].flat[self.rng.randrange(data[name].size)] = value
            folder = self.new()
            path = write_d4rl(folder / "bad.hdf5", data, env_id="Pendulum-v1")
            module = self.rng.choice(["train", "inspect"])
            flags = self.train(folder / "r", path) if module == "train" else [f"--dataset={path}"]
            yield Case("arrays", f"{name}: {value}", module, flags)

    def json(self) -> Iterator[Case]:
        while True:
            name = self.rng.choice(["config.json", "config.json", "result.json"])
            run = self.copy()
            if self.rng.random() < 0.2:
                (run / name).write_bytes(self.spoil((run / name).read_bytes()))
                yield Case("JSON of a run", f"{name}: bytes", *self.reads(run))
                continue
            values = json.loads((run / name).read_text())
            inner = self.rng.choice([values, values.get("config", values)])
            field, value = self.rng.choice(sorted(inner)), self.rng.choice(JSON_VALUES)
            inner[field] = value
            (run / name).write_text(json.dumps(values))
            yield Case("JSON of a run", f"{name}: {field}={str(value)[:20]}", *self.reads(run))

    def tables(self) -> Iterator[Case]:
        while True:
            name = self.rng.choice(["metrics.csv", "returns.csv", "evaluations.csv"])
            run, cell = self.copy(), self.rng.choice(CELLS)
            rows = list(csv.reader(io.StringIO((run / name).read_text())))
            line, column = self.rng.randrange(len(rows)), self.rng.randrange(len(rows[0]))
            how = self.rng.choice(["cell", "cell", "cell", "twice", "gone", "short", "raw"])
            if how in ("cell", "raw"):
                rows[line][column] = cell
            elif how == "twice":
                rows.insert(line, list(rows[line]))
            elif how == "gone":
                del rows[line]
            else:
                rows[line].pop()
            csv.writer(buffer := io.StringIO(), lineterminator="\n").writerows(rows)
            text = "\n".join(map(",".join, rows)) if how == "raw" else buffer.getvalue()
            (run / name).write_text(text)
            what = f"{name}, line {line + 1}: {how} {cell[:20]!r}"
            yield Case("tables of a run", what, *self.reads(run))

    def checkpoints(self) -> Iterator[Case]:
        while True:
            run = self.copy()
            files = sorted(path for path in (run / "checkpoints").rglob("*") if path.is_file())
            for path in self.rng.sample(files, self.rng.choice([1, 5, len(files)])):
                path.write_bytes(self.spoil(path.read_bytes()))
            yield Case("checkpoints", "", *self.reads(run, "evaluate", "export", "train"))

    def names(self) -> Iterator[Case]:
        for name in NAMES:
            path = self.new() / name
            yield Case("names of folders", repr(name[:20]), "train", self.train(path))
            if path.exists():
                yield Case("names of folders", repr(name[:20]), *self.reads(path))

    def processes(self) -> Iterator[Case]:
        lives = {"garbage": "{", "a list": "[1]", "empty": "", "dead": '{"pid": 1, "host": "x"}'}
        yield Case("two processes", "at once", "train", self.train(self.new() / "r"), second=True)
        for name, text in list(lives.items())[:3]:
            (run := self.copy()).joinpath("lock").write_text(text)
            yield Case("two processes", f"lock: {name}", *self.reads(run, "train", "evaluate"))
        while True:
            number = self.rng.choice([signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
            flags = self.train(self.new() / "r", None, "--config.policy_steps=3000")
            yield Case("signals", number.name, "train", flags, signal=number)

    def situations(self) -> Iterator[Case]:
        environments = ("raises", "nan", "shape", "reward", "type")
        for how in (*environments, "file size", "devices", "user"):
            run = self.new() / "r"
            more = ["--plugins=broken_plugin"] + ["--env=Broken-v0"] * (how in environments)
            for _ in range(2):  # the same command again
                flags = self.train(run, None, *more)
                kind = "environments" if how in environments else "disk and devices"
                yield Case(kind, how, "train", flags, env={"BREAK": how})

    def reads(self, run: Path, *modules: str) -> tuple[str, list[str]]:
        """A command that reads a run."""
        module = self.rng.choice(modules or ("report", "evaluate"))
        return module, self.train(run) if module == "train" else [f"--workdir={run}"]

    def spoil(self, data: bytes) -> bytes:
        """Cut, flip, repeat or replace some bytes."""
        at, size = self.rng.randrange(len(data) or 1), self.rng.choice([1, 8, 100])
        middle = self.rng.choice([b"", self.rng.randbytes(size), b"\0" * size, data[at:] * 2])
        return self.rng.choice([data[:at], b"", data[:at] + middle + data[at + size :]])


def main(arguments: list[str] | None = None, launcher: Launcher | None = None) -> int:
    """Break, ask, count."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two cases of each kind")
    args = parser.parse_args(arguments)
    rng, table, begin = random.Random(args.seed), collections.defaultdict(list), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        os.environ |= share(Path(name) / "programs") if launcher is None else {}
        own = launcher or Launcher(Path(name) / "launcher")
        bench = Bench(Path(name), own, rng)
        sources: list[Callable[[], Iterator[Case]]] = [
            *(bench.flags, bench.bytes, bench.arrays, bench.json, bench.tables),
            *(bench.checkpoints, bench.names, bench.processes, bench.situations),
        ]
        running, asked = [source() for source in sources], 0
        while running and asked < (2 * len(sources) if args.quick else args.cases):
            cases = running[asked % len(running)]
            for _ in range(rng.randrange(40) if cases.__name__ == "flags" else 0):
                next(cases, None)
            case = next(cases, None)
            if case is None:
                running.remove(cases)
                continue
            asked += 1
            problem = bench.answer(case)
            table[case.kind].append(problem is None)
            if problem is not None:
                print(f"{case.kind}: {case.name}: launch.{case.module}: {problem}", flush=True)
        if launcher is None:
            own.close()
    rows = [
        {"kind": kind, "cases": len(good), "answered": sum(good)} for kind, good in table.items()
    ]
    print(pd.DataFrame(rows).to_markdown(index=False))
    total: dict[str, Any] = {"cases": asked, "answered": sum(row["answered"] for row in rows)}
    print(json.dumps(total | {"seconds": round(time.monotonic() - begin)}))
    return int(total["answered"] < asked)


if __name__ == "__main__":
    sys.exit(main())
