"""Does a run that is killed again and again end as one that was left alone?

    python -m experiments.systems.preemption_stress [--kills=30] [--seed=0] [--smoke]

Trains the built-in data once without interruption; then in rounds, each in a work directory of its
own, in which the process is killed at random moments, by SIGKILL or SIGTERM, and started again,
until it is done. A moment is a time since the start, some progress of metrics.csv, or a renewal and
evaluation of the policy phase; some SIGKILLs wait for a save to be in progress.  Every start must
continue from the newest complete checkpoint.  After every round the last checkpoint must be the
same bit for bit, and metrics.csv (but for the speed) and returns.csv the same rows.  Prints a line
for every kill, a table and a last line of JSON; exit status 1 where anything differs or a SIGTERM
took longer than 30 s.
"""

import argparse
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pandas as pd

from experiments.systems.benchmarks.timing import compiled_once

PHASES = ("behavior", "critic", "policy")
CHECKPOINT_EVERY = 20
# A save goes on while the next steps run, and the next save waits for it.
MOST_LOST = 2 * CHECKPOINT_EVERY
LONGEST_EXIT = 30.0  # seconds from SIGTERM
READY = "memory of each device"  # printed once SIGTERM is listened for


class Settings(NamedTuple):
    """How long a run is, and at which kinds of moments it is killed."""

    steps: int = 400  # of each phase
    renewal: int = 100  # steps between renewals of the support set, and between evaluations
    rows: int = 0  # of the dataset; 0 is all
    moments: tuple[str, ...] = ("time", "progress", "renewal")  # and, by SIGKILL, in a save


SMOKE = Settings(steps=80, renewal=40, rows=4096, moments=("progress",))


class Run(NamedTuple):
    """A work directory, and what its processes printed."""

    workdir: Path
    settings: Settings

    def start(self) -> subprocess.Popen:
        """The launcher, in a process that compiles nothing twice."""
        environment = os.environ | compiled_once(self.workdir.parent / "cache")
        steps, renewal, rows, _ = self.settings
        fields = {
            "hidden_dims": "(32,)", "critic_hidden_dims": "(32,)", "support_size": 4,
            "batch_size": 64, "renew_every": renewal, "log_every": 10, "eval_every": renewal,
            "checkpoint_every": CHECKPOINT_EVERY, "eval_episodes": 2, "max_transitions": rows,
        } | {f"{phase}_steps": steps for phase in PHASES}  # fmt: skip
        flags = [f"--workdir={self.workdir}", "--config=experiments/configs/quick.py"]
        flags += [f"--config.{name}={value}" for name, value in fields.items()]
        command = [sys.executable, "-m", "launch.train", *flags]
        with self.log.open("w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    @property
    def log(self) -> Path:
        """The output of the last process."""
        return self.workdir.with_suffix(".log")

    def continued(self) -> int:
        """The checkpoint that the last process continued from; -1 where it did not come so far."""
        found = re.findall(r"continuing \S+ from step (\d+)", self.log.read_text())
        return int(found[-1]) if found else 0 if READY in self.log.read_text() else -1

    def unfinished(self) -> set[str]:
        """Checkpoints that Orbax has begun and not completed, those of killed processes too."""
        return {path.name for path in self.workdir.glob("checkpoints/*orbax-checkpoint-tmp*")}

    def saved(self) -> int:
        """The newest complete checkpoint."""
        names = [path.name for path in self.workdir.glob("checkpoints/*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def reached(self) -> int:
        """Steps of all phases in metrics.csv; an unfinished last line does not count."""
        path = self.workdir / "metrics.csv"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return max((int(row["total_step"]) for row in csv.DictReader(lines)), default=0)

    def result(self) -> tuple[dict[tuple, bytes], pd.DataFrame, pd.DataFrame]:
        """What must not differ: the last checkpoint, read without our code, and both tables."""
        with ocp.StandardCheckpointer() as reader:
            path = self.workdir / "checkpoints" / str(self.saved()) / "state"
            tree = ocp.tree.to_flat_dict(reader.restore(path.resolve()))
        bits = {key: np.asarray(leaf).tobytes() for key, leaf in tree.items()}
        names = ("metrics.csv", "returns.csv")
        metrics, returns = (pd.read_csv(self.workdir / name, dtype=str) for name in names)
        return bits, metrics.drop(columns="steps_per_second"), returns

    def same_as(self, other: "Run") -> bool:
        """Whether two finished runs left the same bits and rows."""
        (bits, *tables), (expected, *others) = self.result(), other.result()
        rows = all(a.equals(b) for a, b in zip(tables, others, strict=True))
        return self.saved() == other.saved() and bits == expected and rows


def await_moment(how: str, process: subprocess.Popen, run: Run, rng: random.Random) -> None:
    """Wait for a random moment of one kind, at most 14 s, or the end of the process."""
    stale, first, (steps, renewal, *_) = run.unfinished(), run.reached(), run.settings
    delay, after = rng.uniform(0.5, 14.0), rng.randrange(10, steps, 10)
    end = time.monotonic() + (delay if how == "time" else 14)
    while time.monotonic() < end and process.poll() is None:
        step = run.reached()
        due = {
            "save": run.unfinished() - stale and step >= first + after // 4,
            "progress": step >= first + after,
            "renewal": step >= max(first + 1, 2 * steps) and step % renewal == 0,
        }
        if due.get(how):
            # Of a save, which is short, any moment; a renewal and an evaluation take longer.
            time.sleep(rng.uniform(0, 0.02 if how == "save" else 0.4))
            return
        time.sleep(0.002)


def kill_once(
    process: subprocess.Popen, run: Run, number: signal.Signals, rng: random.Random
) -> dict[str, Any] | None:
    """Let the process live until a random moment and kill it; None if it was done before."""
    kill = number == signal.SIGKILL
    how = rng.choice([*run.settings.moments, *["save"] * (2 * kill)])
    begin, stale = time.monotonic(), run.unfinished()
    await_moment(how, process, run, rng)
    if process.poll() is not None:
        return None
    process.send_signal(number)
    sent = time.monotonic()
    # What SIGKILL leaves is exact; a process that has SIGTERM completes its save.
    saving = bool(run.unfinished() - stale)
    status = process.wait(120)
    seconds = time.monotonic() - sent
    if status == 0:
        return None  # it finished as the signal came
    if kill:
        saving = bool(run.unfinished() - stale)
    step, kept, ready = run.reached(), run.saved(), READY in run.log.read_text()
    phase = PHASES[max(0, step - 1) // run.settings.steps] if ready else "start-up"
    # Before it listens, SIGTERM ends the process as the system does.
    expected = [-number] if kill else [143] if ready else [143, -number]
    lost = 0 if ready and not kill else MOST_LOST
    good = status in expected and step - kept <= lost and (kill or seconds <= LONGEST_EXIT)
    return {
        "signal": number.name, "at": how, "after": round(sent - begin, 1), "phase": phase,
        "step": step, "checkpoint": kept, "status": status, "exit_s": round(seconds, 2),
        "saving": saving, "good": good,
    }  # fmt: skip


def table(kills: list[dict[str, Any]]) -> str:
    """A row for each signal and phase in Markdown: kills, and the worst that each did."""
    rows = pd.DataFrame(kills)
    rows["lost"] = rows["step"] - rows["checkpoint"]
    found = rows.groupby(["signal", "phase"], as_index=False).agg(
        kills=("good", "size"), in_a_save=("saving", "sum"), as_expected=("good", "sum"),
        most_steps_lost=("lost", "max"), longest_exit_s=("exit_s", "max"),
    )  # fmt: skip
    return found.to_markdown(index=False)


def main() -> int:
    """Kill, continue, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--smoke", action="store_true", help="2 kills of a short run")
    args = parser.parse_args()
    settings = SMOKE if args.smoke else Settings()
    wanted, rng = 2 if args.smoke else args.kills, random.Random(args.seed)
    numbers = [signal.SIGKILL, signal.SIGTERM] * (wanted // 2 + 1)
    rng.shuffle(numbers := numbers[:wanted])
    kills, identical, newest, rounds = [], True, True, 0
    with tempfile.TemporaryDirectory() as name:
        whole = Run(Path(name) / "whole", settings)
        if whole.start().wait() != 0:
            print(whole.log.read_text(), file=sys.stderr)
            return 1
        while len(kills) < wanted:
            rounds += 1
            run, record = Run(Path(name) / f"round{rounds}", settings), {}
            while record is not None:
                kept, process, record = run.saved(), run.start(), None
                if len(kills) < wanted:
                    record = kill_once(process, run, numbers[len(kills)], rng)
                if record is not None:
                    record["from"] = run.continued()
                    newest &= record["from"] in (kept, -1)
                    kills.append(record)
                    print(len(kills), json.dumps(record), flush=True)
            done = process.wait() == 0 and run.same_as(whole)
            newest &= run.continued() == kept
            verdict = "the same bits and rows" if done else "DIFFERENT"
            print(f"round {rounds}: {verdict}", flush=True)
            if not done:
                print(run.log.read_text(), file=sys.stderr)
            identical &= done
    good = all(record["good"] for record in kills)
    terms = [record["exit_s"] for record in kills if record["signal"] == "SIGTERM"]
    print(table(kills))
    print(json.dumps({
        "kills": len(kills), "sigkill": len(kills) - len(terms), "sigterm": len(terms),
        "rounds": rounds, "during_save": sum(record["saving"] for record in kills),
        "longest_sigterm_exit_s": max(terms, default=None),
        "most_steps_lost": max(record["step"] - record["checkpoint"] for record in kills),
        "newest_checkpoint": newest, "as_expected": good, "identical": identical,
    }))  # fmt: skip
    return int(not (good and newest and identical))


if __name__ == "__main__":
    sys.exit(main())
