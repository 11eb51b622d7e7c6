"""Does a run that is killed again and again end as one that was left alone?

    python -m experiments.preemption_stress [--kills=30] [--smoke]

Trains the built-in data once without interruption; then in rounds, each in a work directory of its own, in
which the process is killed at random moments, by SIGKILL or SIGTERM, and started again, until it is done.
Some SIGKILLs wait for a save to be in progress.  After every round the last checkpoint must be the same bit
for bit, and metrics.csv (but for the speed) and returns.csv the same rows.  Prints a line for every kill and
a last line of JSON; exit status 1 where anything differs or a SIGTERM took longer than 30 s.
"""

import argparse
import csv
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import orbax.checkpoint as ocp

STEPS = {"behavior_steps": 400, "critic_steps": 400, "policy_steps": 400}
FLAGS = [
    "--config=experiments/configs/quick.py",
    "--config.hidden_dims=(32,)", "--config.critic_hidden_dims=(32,)", "--config.support_size=4",
    "--config.batch_size=64", "--config.renew_every=100", "--config.log_every=10",
    "--config.checkpoint_every=20", "--config.eval_every=100", "--config.eval_episodes=2",
    *(f"--config.{name}={value}" for name, value in STEPS.items()),
]  # fmt: skip
CHECKPOINT_EVERY = 20
# A save goes on while the next steps run, and the next save waits for it.
MOST_LOST = 2 * CHECKPOINT_EVERY
LONGEST_EXIT = 30.0  # seconds from SIGTERM


def start(workdir: pathlib.Path, cache: pathlib.Path) -> subprocess.Popen:
    """The launcher, in a process that compiles nothing twice."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir.parent / f"{workdir.name}.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "launch.train", *FLAGS, f"--workdir={workdir}"],
            stdout=log, stderr=log, env=environment,
        )  # fmt: skip


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
    return [{name: value for name, value in row.items() if name != "steps_per_second"} for row in rows]


def arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, read without our code."""
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore((workdir / "checkpoints" / str(saved(workdir)) / "state").resolve())
    return {"/".join(map(str, k)): np.asarray(v) for k, v in ocp.tree.to_flat_dict(tree).items()}


def same(workdir: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether two finished runs left the same bits and rows."""
    found, expected = arrays(workdir), arrays(other)
    if saved(workdir) != sum(STEPS.values()) or found.keys() != expected.keys():
        return False
    bits = all(found[name].tobytes() == array.tobytes() for name, array in expected.items())
    rows = all(table(workdir / name) == table(other / name) for name in ("metrics.csv", "returns.csv"))
    return bits and rows


def kill_once(process: subprocess.Popen, workdir: pathlib.Path, rng: random.Random) -> dict | None:
    """Let the process live for a random time and kill it; None if it was done before."""
    number = rng.choice([signal.SIGKILL, signal.SIGTERM])
    wait_for_save = number == signal.SIGKILL and rng.random() < 0.5
    delay, begin = rng.uniform(0.5, 14.0), time.monotonic()
    stale = unfinished(workdir)
    while time.monotonic() - begin < delay and process.poll() is None:
        if wait_for_save and time.monotonic() - begin > 6 and unfinished(workdir) - stale:
            break
        time.sleep(0.002 if wait_for_save else 0.05)
    if process.poll() is not None:
        return None
    saving = bool(unfinished(workdir) - stale)
    process.send_signal(number)
    sent = time.monotonic()
    status = process.wait(120)
    seconds = time.monotonic() - sent
    if status == 0:
        return None  # it finished as the signal came
    before, kept = reached(workdir), saved(workdir)
    # A signal before Python listens for it ends the process as the system does.
    allowed = (-signal.SIGKILL,) if number == signal.SIGKILL else (143, -signal.SIGTERM)
    good = (
        status in allowed
        and before - kept <= MOST_LOST
        and (number == signal.SIGKILL or seconds <= LONGEST_EXIT)
    )
    return {
        "signal": number.name, "after": round(sent - begin, 1), "step": before, "checkpoint": kept,
        "status": status, "exit_s": round(seconds, 2), "saving": saving, "good": good,
    }  # fmt: skip


def main() -> int:
    """Kill, continue, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--smoke", action="store_true", help="2 kills")
    args = parser.parse_args()
    wanted, rng = 2 if args.smoke else args.kills, random.Random(args.seed)
    kills, identical, rounds = [], True, 0
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        if start(root / "whole", root / "cache").wait() != 0:
            print((root / "whole.log").read_text(), file=sys.stderr)
            return 1
        while len(kills) < wanted:
            rounds += 1
            workdir = root / f"round{rounds}"
            while True:
                process = start(workdir, root / "cache")
                record = kill_once(process, workdir, rng) if len(kills) < wanted else None
                if record is None:
                    break
                kills.append(record)
                print(len(kills), json.dumps(record), flush=True)
            done = process.wait() == 0 and same(workdir, root / "whole")
            print(f"round {rounds}: {'the same bits and rows' if done else 'DIFFERENT'}", flush=True)
            if not done:
                print((root / f"round{rounds}.log").read_text(), file=sys.stderr)
            identical &= done
    good = all(record["good"] for record in kills)
    terms = [record["exit_s"] for record in kills if record["signal"] == "SIGTERM"]
    summary = {
        "kills": len(kills), "sigkill": len(kills) - len(terms), "sigterm": len(terms), "rounds": rounds,
        "during_save": sum(record["saving"] for record in kills),
        "longest_sigterm_exit_s": max(terms, default=None), "as_expected": good, "identical": identical,
    }  # fmt: skip
    print(json.dumps(summary))
    return int(not (good and identical))


if __name__ == "__main__":
    sys.exit(main())
