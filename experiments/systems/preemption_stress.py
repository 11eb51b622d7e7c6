"""Does a run that is killed again and again end as one that was left alone?

    python -m experiments.systems.preemption_stress [--kills=30] [--seed=0] [--smoke] [--workdir=DIR]

Trains the built-in data once without interruption; then in rounds, each in a work directory of its
own, in which the process is killed at random moments, by SIGKILL or SIGTERM, and started again,
until it is done. A moment is a time since the start, some progress of metrics.csv, or a renewal and
evaluation of the policy phase; some SIGKILLs wait for a save to be in progress.  Every start must
continue from the newest complete checkpoint.  After every round the last checkpoint must be the
same bit for bit, and metrics.csv (but for the speed) and returns.csv the same rows.  Prints a line
for every kill and a last line of JSON; exit status 1 where anything differs or a SIGTERM took
longer than 30 s.
"""

import argparse
import contextlib
import csv
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp


class Settings(NamedTuple):
    """How long a run is, and at which kinds of moments it is killed."""

    steps: int = 400  # of each phase
    renewal: int = 100  # steps between renewals of the support set, and between evaluations
    rows: int = 0  # of the dataset; 0 is all
    moments: tuple[str, ...] = ("time", "progress", "renewal")  # and, by SIGKILL, in a save


SMOKE = Settings(steps=80, renewal=40, rows=4096, moments=("progress",))
CHECKPOINT_EVERY = 20
# A save goes on while the next steps run, and the next save waits for it.
MOST_LOST = 2 * CHECKPOINT_EVERY
LONGEST_EXIT = 30.0  # seconds from SIGTERM
# Printed once the work directory is open and SIGTERM is listened for.
MARK = "--- a start ---"
READY = "memory of each device"


def start(workdir: pathlib.Path, cache: pathlib.Path, settings: Settings) -> subprocess.Popen:
    """The launcher, in a process that compiles nothing twice."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    flags = [
        "--config=experiments/configs/quick.py",
        "--config.hidden_dims=(32,)", "--config.critic_hidden_dims=(32,)", "--config.support_size=4",
        "--config.batch_size=64", f"--config.renew_every={settings.renewal}", "--config.log_every=10",
        f"--config.checkpoint_every={CHECKPOINT_EVERY}", f"--config.eval_every={settings.renewal}",
        "--config.eval_episodes=2", f"--config.max_transitions={settings.rows}",
        *(f"--config.{phase}_steps={settings.steps}" for phase in ("behavior", "critic", "policy")),
    ]  # fmt: skip
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir.parent / f"{workdir.name}.log", "a") as log:
        print(MARK, file=log, flush=True)
        return subprocess.Popen(
            [sys.executable, "-m", "launch.train", *flags, f"--workdir={workdir}"],
            stdout=log, stderr=log, env=environment,
        )  # fmt: skip


def log_of(workdir: pathlib.Path) -> str:
    """What all processes of a work directory printed."""
    return (workdir.parent / f"{workdir.name}.log").read_text()


def continued(workdir: pathlib.Path) -> int:
    """The checkpoint that the last process continued from; -1 where it did not come so far."""
    own = log_of(workdir).rpartition(MARK)[2]
    found = re.findall(r"continuing \S+ from step (\d+)", own)
    return int(found[-1]) if found else 0 if READY in own else -1


def unfinished(workdir: pathlib.Path) -> set[str]:
    """Checkpoints that Orbax has begun and not completed, also those of processes that were killed."""
    return {path.name for path in (workdir / "checkpoints").glob("*orbax-checkpoint-tmp*")}


def reached(workdir: pathlib.Path) -> int:
    """Steps of all phases that metrics.csv has seen."""
    rows = table(workdir / "metrics.csv")
    return int(rows[-1]["total_step"]) if rows else 0


def saved(workdir: pathlib.Path) -> int:
    """The newest complete checkpoint."""
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=0)


def table(path: pathlib.Path) -> list[dict[str, str]]:
    """Rows of a CSV file, without the speed; an unfinished last line does not count."""
    if not path.exists():
        return []
    text = path.read_text()
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return [
        {name: value for name, value in row.items() if name != "steps_per_second"} for row in rows
    ]


def arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, read without our code."""
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore((workdir / "checkpoints" / str(saved(workdir)) / "state").resolve())
    return {"/".join(map(str, k)): np.asarray(v) for k, v in ocp.tree.to_flat_dict(tree).items()}


def same(workdir: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether two finished runs left the same bits and rows."""
    found, expected = arrays(workdir), arrays(other)
    if saved(workdir) != saved(other) or found.keys() != expected.keys():
        return False
    bits = all(found[name].tobytes() == array.tobytes() for name, array in expected.items())
    rows = all(
        table(workdir / name) == table(other / name) for name in ("metrics.csv", "returns.csv")
    )
    return bits and rows


def moment(
    how: str,
    process: subprocess.Popen,
    workdir: pathlib.Path,
    rng: random.Random,
    settings: Settings,
) -> None:
    """Wait for a random moment of one kind, at most 14 s, or the end of the process."""
    begin, stale, first = time.monotonic(), unfinished(workdir), reached(workdir)
    delay, steps = rng.uniform(0.5, 14.0), rng.randrange(10, settings.steps, 10)
    while time.monotonic() - begin < (delay if how == "time" else 14) and process.poll() is None:
        step = reached(workdir) if how in ("progress", "renewal") else 0
        if (
            (
                how == "save"
                and unfinished(workdir) - stale
                and reached(workdir) >= first + steps // 4
            )
            or (how == "progress" and step >= first + steps)
            or (
                how == "renewal"
                and step >= max(first + 1, 2 * settings.steps)
                and step % settings.renewal == 0
            )
        ):
            # Of a save, which is short, any moment; a renewal and an evaluation take longer.
            time.sleep(rng.uniform(0, 0.02 if how == "save" else 0.4))
            return
        time.sleep(0.002)


def kill_once(
    process: subprocess.Popen,
    workdir: pathlib.Path,
    number: int,
    rng: random.Random,
    settings: Settings,
) -> dict | None:
    """Let the process live until a random moment and kill it; None if it was done before."""
    how = rng.choice([*settings.moments, *["save"] * (2 * (number == signal.SIGKILL))])
    begin, stale = time.monotonic(), unfinished(workdir)
    moment(how, process, workdir, rng, settings)
    if process.poll() is not None:
        return None
    process.send_signal(number)
    sent = time.monotonic()
    # What SIGKILL leaves is exact; a process that has SIGTERM completes its save.
    saving = bool(unfinished(workdir) - stale)
    status = process.wait(120)
    seconds = time.monotonic() - sent
    if status == 0:
        return None  # it finished as the signal came
    if number == signal.SIGKILL:
        saving = bool(unfinished(workdir) - stale)
    before, kept, rows = reached(workdir), saved(workdir), table(workdir / "metrics.csv")
    ready = READY in log_of(workdir).rpartition(MARK)[2]
    if number == signal.SIGKILL:
        good = status == -signal.SIGKILL and before - kept <= MOST_LOST
    elif ready:
        good = status == 143 and before <= kept and seconds <= LONGEST_EXIT
    else:  # before it listens, the signal ends it as the system does
        good = (
            status in (143, -signal.SIGTERM)
            and before - kept <= MOST_LOST
            and seconds <= LONGEST_EXIT
        )
    return {
        "signal": number.name, "at": how, "after": round(sent - begin, 1),
        "phase": (rows[-1]["phase"] if rows else "behavior") if ready else "start-up", "step": before,
        "checkpoint": kept, "status": status, "exit_s": round(seconds, 2), "saving": saving, "good": good,
    }  # fmt: skip


def main() -> int:
    """Kill, continue, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--smoke", action="store_true", help="2 kills of a short run")
    parser.add_argument(
        "--workdir", type=pathlib.Path, help="new or empty; by default one that is removed"
    )
    args = parser.parse_args()
    settings = SMOKE if args.smoke else Settings()
    wanted, rng = 2 if args.smoke else args.kills, random.Random(args.seed)
    numbers = [signal.SIGKILL, signal.SIGTERM] * (wanted // 2 + 1)
    rng.shuffle(numbers := numbers[:wanted])
    if args.workdir is not None and args.workdir.exists() and any(args.workdir.iterdir()):
        parser.error(f"--workdir={args.workdir}: is not empty")
    kills, identical, newest, rounds = [], True, True, 0
    folder = contextlib.nullcontext(args.workdir) if args.workdir else tempfile.TemporaryDirectory()
    with folder as name:
        root = pathlib.Path(name)
        if start(root / "whole", root / "cache", settings).wait() != 0:
            print((root / "whole.log").read_text(), file=sys.stderr)
            return 1
        while len(kills) < wanted:
            rounds += 1
            workdir = root / f"round{rounds}"
            while True:
                kept = saved(workdir)
                process = start(workdir, root / "cache", settings)
                record = (
                    kill_once(process, workdir, numbers[len(kills)], rng, settings)
                    if len(kills) < wanted
                    else None
                )
                if record is None:
                    break
                record["from"] = continued(workdir)
                newest &= record["from"] in (kept, -1)
                kills.append(record)
                print(len(kills), json.dumps(record), flush=True)
            done = process.wait() == 0 and same(workdir, root / "whole")
            newest &= continued(workdir) == kept
            print(
                f"round {rounds}: {'the same bits and rows' if done else 'DIFFERENT'}", flush=True
            )
            if not done:
                print((root / f"round{rounds}.log").read_text(), file=sys.stderr)
            identical &= done
    good = all(record["good"] for record in kills)
    terms = [record["exit_s"] for record in kills if record["signal"] == "SIGTERM"]
    summary = {
        "kills": len(kills), "sigkill": len(kills) - len(terms), "sigterm": len(terms), "rounds": rounds,
        "during_save": sum(record["saving"] for record in kills),
        "longest_sigterm_exit_s": max(terms, default=None),
        "most_steps_lost": max(record["step"] - record["checkpoint"] for record in kills),
        "newest_checkpoint": newest, "as_expected": good, "identical": identical,
    }  # fmt: skip
    print(json.dumps(summary))
    return int(not (good and newest and identical))


if __name__ == "__main__":
    sys.exit(main())
