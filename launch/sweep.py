"""Train on every dataset with every preset and seed: python -m launch.sweep [--flags]

A job is one process of launch.train with the work directory ROOT/NAME; it is done once result.json is
there.  The same command again runs what is left, and a job that was interrupted continues where it stopped.

  --datasets=A,B --configs=X.py,Y.py --seeds=0,1,2   the jobs: every combination
  --train_flags="--num_seeds=2 --config.beta=5"      flags of launch.train for all of them
  --workers=4                                        how many jobs run at a time
  --jobs=FILE                                        run nothing; write the commands left, one a line
  --collect                                          run nothing; write the tables of what is done

The output of a job goes to ROOT/logs/NAME.log.  ROOT/results.csv has a row per job, ROOT/results.md also
one per dataset and preset, over the seeds.  The last line printed is JSON.
Exit status: 0 done, 1 a job failed, 2 bad flags, 130 or 143 stopped by ctrl-C or SIGTERM, jobs saved.
"""

import collections
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags
from etils import epath
from tqdm import tqdm

from efm_jax.data import BUILTIN_DATASET
from efm_jax.evaluation import mean_and_interval
from efm_jax.training.files import write_whole
from launch import cli
from launch.workdir import RESULT_FILE

_PRESET = "experiments/configs/qipo_ot.py"
_POLL_SECONDS = 0.1
_OWN_FLAGS = ("dataset", "config", "seed", "workdir")
# What a row holds of result.json, beside the intervals.
_COLUMNS = ("algorithm", "seeds", "steps", "dataset_return", "behavior_return", "behavior_score",
            "policy_return", "policy_score", "seconds", "workdir")  # fmt: skip
_MEASURES = ("dataset_return", "behavior_return", "policy_return", "behavior_score", "policy_score")

_DATASETS = flags.DEFINE_list("datasets", [BUILTIN_DATASET], "Values of launch.train's --dataset.")
_CONFIGS = flags.DEFINE_list("configs", [_PRESET], "Values of launch.train's --config.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Values of launch.train's --seed.")
_TRAIN_FLAGS = flags.DEFINE_string("train_flags", "", "More flags of launch.train, as in a shell.")
_ROOT = flags.DEFINE_string("root", "runs/sweep", "Folder of the work directories, logs and tables.")
_WORKERS = flags.DEFINE_integer(
    "workers", 1, "Jobs at a time. A TPU host has room for one; jobs share a GPU's memory as JAX is told.", 1
)
_JOBS = flags.DEFINE_string("jobs", None, "Only write the commands of jobs that are not done to this file.")
_COLLECT = flags.DEFINE_bool("collect", False, "Only write the tables of the jobs that are done.")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of ``launch.train``."""

    dataset: str
    config: str
    seed: int
    train_flags: tuple[str, ...]
    root: epath.Path

    @property
    def name(self) -> str:
        """Names the work directory; other ``train_flags`` give another name."""
        dataset = pathlib.PurePath(self.dataset).stem if self.dataset.endswith(".hdf5") else self.dataset
        parts = [dataset, pathlib.PurePath(self.config).stem, f"seed{self.seed}"]
        if self.train_flags:
            parts.append(hashlib.sha256("\0".join(self.train_flags).encode()).hexdigest()[:6])
        return "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-.") for part in parts)

    @property
    def workdir(self) -> epath.Path:
        return self.root / self.name

    @property
    def log(self) -> epath.Path:
        return self.root / "logs" / f"{self.name}.log"

    @property
    def done(self) -> bool:
        return (self.workdir / RESULT_FILE).exists()

    def result(self) -> dict[str, Any] | None:
        """What ``launch.train`` said at its end; None before."""
        if not self.done:
            return None
        path = self.workdir / RESULT_FILE
        try:
            values = json.loads(path.read_text())
            return {name: values[name] for name in (*_COLUMNS, "behavior_interval", "policy_interval")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: cannot be read: {error!r}") from error


def command(job: Job) -> list[str]:
    """The command line that runs a job, or continues it."""
    own = [f"--dataset={job.dataset}", f"--config={job.config}", f"--seed={job.seed}"]
    return ["python", "-m", "launch.train", *own, f"--workdir={job.workdir}", *job.train_flags]


def main(_: list[str]) -> int:
    """List the jobs; write the commands, or run them and write the tables."""
    with cli.usage_errors():
        jobs = _read_jobs()
        left = [job for job in jobs if not job.done]
        if _JOBS.value is not None:
            lines = [shlex.join(command(job)) + "\n" for job in left]
            write_whole(epath.Path(_JOBS.value).expanduser(), "".join(lines))
            print(json.dumps({"jobs": len(jobs), "done": len(jobs) - len(left), "list": _JOBS.value}))
            return 0
    failed, stopped_by = ({}, 0) if _COLLECT.value else _run(left, _WORKERS.value)
    with cli.usage_errors():
        results = {job: job.result() for job in jobs}
        root = jobs[0].root
        table = _markdown(results)
        write_whole(root / "results.csv", _csv(results))
        write_whole(root / "results.md", table)
    for job, status in failed.items():
        _say(f"failed with exit status {status}: {job.log}: {_last_line(job.log)}")
    done = sum(result is not None for result in results.values())
    line = {"jobs": len(jobs), "done": done, "failed": len(failed), "results": str(root / "results.csv")}
    print(f"\n{table}\n{json.dumps(line)}")
    if stopped_by:
        _say(f"stopped by {signal.Signals(stopped_by).name}; the same command continues")
        return 128 + stopped_by
    return cli.EXIT_FAILED if failed else 0


def _read_jobs() -> list[Job]:
    """The jobs that the flags ask for; a ``ValueError`` if they cannot be run as asked."""
    for flag in (_DATASETS, _CONFIGS, _SEEDS):
        if not flag.value or not all(flag.value):
            raise ValueError(f"--{flag.name}: expected values with commas between; got {flag.value}")
    if _JOBS.value is not None and _COLLECT.value:
        raise ValueError("--jobs, --collect: give one of them")
    root = _read_root()
    for config in _CONFIGS.value:
        # launch.train looks for a preset in both places too.
        problem = cli.preset_problem(config) and cli.preset_problem(str(cli.ROOT / config))
        if problem is not None:
            raise ValueError(f"--configs={config}: {problem}")
    train_flags = _read_train_flags()
    seeds = _read_seeds(train_flags)
    combinations = itertools.product(_DATASETS.value, _CONFIGS.value, seeds)
    jobs = [Job(*combination, tuple(train_flags), root) for combination in combinations]
    name, count = collections.Counter(job.name for job in jobs).most_common(1)[0]
    if count > 1:
        twice = [f"({job.dataset}, {job.config}, {job.seed})" for job in jobs if job.name == name]
        raise ValueError(f"jobs {' and '.join(twice)}: all of them would be named {name}")
    return jobs


def _read_root() -> epath.Path:
    root = epath.Path(_ROOT.value).expanduser()
    remote = "://" in _ROOT.value
    if remote and _JOBS.value is None and not _COLLECT.value:
        raise ValueError(f"--root={root}: expected a local or shared folder to run in; see --jobs, --collect")
    exists = root.exists()
    if exists and not root.is_dir():
        raise ValueError(f"--root={root}: is a file; expected a folder")
    if _COLLECT.value and not exists:
        raise ValueError(f"--root={root}: no such folder")
    return root


def _read_train_flags() -> list[str]:
    try:
        train_flags = shlex.split(_TRAIN_FLAGS.value)
    except ValueError as error:
        raise ValueError(f"--train_flags={_TRAIN_FLAGS.value}: {error}") from error
    for flag in train_flags:
        if not re.match("--?[A-Za-z]", flag):
            raise ValueError(f"--train_flags: flags are written --name=value; got {flag!r}")
        if flag.lstrip("-").split("=")[0] in _OWN_FLAGS:
            raise ValueError(f"--train_flags: {flag}: every job has its own")
    return train_flags


def _read_seeds(train_flags: Sequence[str]) -> list[int]:
    """Root seeds of the jobs; refuses jobs that would repeat one another's training runs."""
    try:
        seeds = [int(text) for text in _SEEDS.value]
        sizes = [int(flag.partition("=")[2]) for flag in train_flags if re.match("--?num_seeds=", flag)]
    except ValueError as error:
        raise ValueError(f"--seeds, num_seeds: expected integers: {error}") from error
    size = sizes[-1] if sizes else 1
    ordered = sorted(seeds)
    for first, second in itertools.pairwise(ordered):
        if first != second and second - first < size:
            raise ValueError(f"--seeds: {first} and {second} share runs with --num_seeds={size}")
    if ordered[0] < 0:
        raise ValueError(f"--seeds: expected at least 0; got {ordered[0]}")
    return seeds


def _run(jobs: Iterable[Job], workers: int) -> tuple[dict[Job, int], int]:
    """Run jobs, at most ``workers`` at a time, to the end or to a signal.

    Returns:
      The exit statuses of jobs that ended without a result, and the signal that stopped all others, or 0.
    """
    waiting = collections.deque(jobs)
    running: dict[Job, subprocess.Popen] = {}
    failed: dict[Job, int] = {}
    stopped_by = 0

    def stop(number: int, _: Any) -> None:
        nonlocal stopped_by
        stopped_by = number

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    told = False
    try:
        with tqdm(total=len(waiting), desc="jobs", unit="job", disable=None) as bar:
            while running or (waiting and not stopped_by):
                while waiting and len(running) < workers and not stopped_by:
                    job = waiting.popleft()
                    running[job] = _start(job)
                if stopped_by and not told:
                    told = True
                    for process in running.values():
                        process.terminate()
                time.sleep(_POLL_SECONDS)
                for job, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[job]
                    if not job.done and not stopped_by:
                        failed[job] = process.returncode
                    bar.set_postfix(failed=len(failed), refresh=False)
                    bar.update()
    finally:
        for process in running.values():
            process.terminate()
    return failed, stopped_by


def _start(job: Job) -> subprocess.Popen:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *command(job)[1:]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # ctrl-C is for the sweep, which sends SIGTERM: launch.train saves at that
        )


def _last_line(log: epath.Path) -> str:
    lines = log.read_bytes().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def _csv(results: dict[Job, dict[str, Any] | None]) -> str:
    """A row per job; what it does not have yet is empty."""
    bounds = [f"{name}_{end}" for name in ("behavior", "policy") for end in ("low", "high")]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, ["job", "dataset", "config", "seed", *_COLUMNS, *bounds], restval="", lineterminator="\n"
    )
    writer.writeheader()
    for job, result in results.items():
        row = {"job": job.name, "dataset": job.dataset, "config": job.config, "seed": job.seed}
        if result is not None:
            ends = [*result["behavior_interval"], *result["policy_interval"]]
            row |= {name: result[name] for name in _COLUMNS} | dict(zip(bounds, ends, strict=True))
        writer.writerow(row)
    return text.getvalue()


def _markdown(results: dict[Job, dict[str, Any] | None]) -> str:
    """Means over the seeds of each dataset and preset, then the jobs."""
    groups = collections.defaultdict(list)
    for job, result in results.items():
        groups[job.dataset, job.config].append(result)
    measures = [name.replace("_", " ") for name in _MEASURES]
    lines = _head("dataset", "config", "jobs", "seeds", *measures)
    for (dataset, config), group in groups.items():
        done = [result for result in group if result is not None]
        counts = (f"{len(done)} of {len(group)}", str(sum(result["seeds"] for result in done)))
        lines.append(_row(dataset, config, *counts, *(_mean(done, name) for name in _MEASURES)))
    interval = "95% interval over jobs, or over the seeds of a single job"
    lines += ["", f"Mean ({interval}). Score: 0 random, 100 expert.", ""]
    lines += _head("job", *measures)
    for job, result in results.items():
        done = [] if result is None else [result]
        lines.append(_row(job.name, *(_mean(done, name) for name in _MEASURES)))
    return "\n".join(lines) + "\n"


def _head(*names: str) -> list[str]:
    return [_row(*names), _row(*("---" for _ in names))]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(results: Sequence[dict[str, Any]], name: str) -> str:
    """Mean of a measure over jobs and its interval; of a single job the interval over its own seeds."""
    values = [result[name] for result in results]
    if not values or None in values:
        return ""
    mean, *interval = mean_and_interval(values)
    if len(values) == 1:
        own = results[0].get(f"{name.removesuffix('_return')}_interval")
        interval = own if results[0]["seeds"] > 1 else None
    return f"{mean:.1f}" + (f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else "")


def _say(text: str) -> None:
    tqdm.write(f"launch.sweep: {text}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
