"""Many runs of ``launch.train``: their flags, running what is left of them, and their tables.

A job is one process with a work directory of its own; it is done once its result file is there.
Threads of the standard library wait for the processes, because joblib and submitit do not hand
SIGTERM on to running jobs and pip cannot install GNU parallel.
"""

import collections
import dataclasses
import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any

import pandas as pd
from etils import epath
from tqdm import tqdm

from efm_jax.files import write_whole
from efm_jax.runs.reader import read_result
from efm_jax.runs.workdir import RESULT_FILE, check_name

from . import cli

FLAGS = cli.Flags()
_ROOT_HELP = "Folder of the work directories, logs and tables; default: runs/COMMAND."
_ROOT = FLAGS.string("root", None, _ROOT_HELP)
_TRAIN_FLAGS = FLAGS.string("train_flags", "", "More flags of launch.train, as in a shell.")
_ROOM = "Jobs at a time. A TPU host has room for one; jobs share a GPU's memory as JAX is told."
_WORKERS = FLAGS.integer("workers", 1, _ROOM, 1)
_JOBS = FLAGS.string("jobs", None, "Only write the commands that are left to this file.")
_COLLECT = FLAGS.bool("collect", False, "Only write the tables of the jobs that are done.")


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One run of ``launch.train``, in a folder of ``root``."""

    name: str  # of its work directory
    root: epath.Path
    labels: Mapping[str, Any]  # cells that tell its row of the tables from the others
    flags: Sequence[str]  # all but --workdir

    @property
    def workdir(self) -> epath.Path:
        return self.root / self.name

    @property
    def log(self) -> epath.Path:
        return self.root / "logs" / f"{self.name}.log"

    @property
    def done(self) -> bool:
        return (self.workdir / RESULT_FILE).exists()

    def row(self, fields: Iterable[str]) -> dict[str, Any]:
        """Read the labels and, of a job that is done, ``fields`` of its result.

        Raises:
          ValueError: the result cannot be read, or lacks a field.
        """
        result = read_result(self.workdir)
        if result is None:
            return dict(self.labels)
        try:
            return {**self.labels, **{name: result[name] for name in fields}}
        except KeyError as error:
            raise ValueError(f"{self.workdir / RESULT_FILE}: no field {error}") from error

    def command(self) -> list[str]:
        """Build the command line that runs the job, or continues it."""
        return ["python", "-m", f"{__package__}.train", *self.flags, f"--workdir={self.workdir}"]


def join_name(*parts: str, unlike: Sequence[str]) -> str:
    """Make a folder's name of ``parts``, and of a digest of what they leave out.

    Args:
      *parts: words that a reader knows.
      unlike: all else that makes the job another one, such as whole paths and flags.
    """
    words = [re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-.")[:80] for part in parts]
    unlike = [*unlike, *(part for part, word in zip(parts, words, strict=True) if part != word)]
    if unlike:
        words.append(hashlib.sha256("\0".join(unlike).encode()).hexdigest()[:8])
    return "-".join(words)


def read_root(default: str) -> epath.Path:
    """Read --root; a ``ValueError`` if that folder does not allow what --jobs, --collect ask."""
    name = _ROOT.value or default
    if _JOBS.value is not None and _COLLECT.value:
        raise ValueError("--jobs, --collect: give one of them")
    root = epath.Path(name).expanduser()
    check_name(root)
    if "://" in name and _JOBS.value is None and not _COLLECT.value:
        raise ValueError(
            f"--root={root}: expected a local or shared folder to run in; see --jobs, --collect"
        )
    if root.exists() and not root.is_dir():
        raise ValueError(f"--root={root}: is a file; expected a folder")
    if _COLLECT.value and not root.exists():
        raise ValueError(f"--root={root}: no such folder")
    return root


def read_train_flags(own: Collection[str]) -> list[str]:
    """Split --train_flags as a shell does; a ``ValueError`` if a flag of ``own`` is among them."""
    try:
        train_flags = shlex.split(_TRAIN_FLAGS.value)
    except ValueError as error:
        raise ValueError(f"--train_flags={_TRAIN_FLAGS.value}: {error}") from error
    for flag in train_flags:
        if not re.match("--?[A-Za-z]", flag):
            raise ValueError(f"--train_flags: flags are written --name=value; got {flag!r}")
        if flag.lstrip("-").split("=")[0] in own:
            raise ValueError(f"--train_flags: {flag}: every job has its own")
    return train_flags


def run_and_collect(
    read_jobs: Callable[[], Sequence[Job]],
    columns: Sequence[str],
    read_row: Callable[[Job], Mapping[str, Any]],
    markdown: Callable[[pd.DataFrame], str],
) -> int:
    """Do what the flags ask of many jobs: run or list what is left of them, write their tables.

    Args:
      read_jobs: reads the jobs, at least one, from the flags.
      columns: of results.csv, the integers ``seeds`` and ``steps`` among them.
      read_row: reads a job's cells; those that are missing stay empty.
      markdown: makes results.md of the table.

    Returns:
      The exit status.
    """
    with cli.usage_errors():
        jobs = read_jobs()
        for name, count in collections.Counter(job.name for job in jobs).items():
            if count > 1:
                same = [str(tuple(job.labels.values())) for job in jobs if job.name == name]
                raise ValueError(f"jobs {' and '.join(same)}: all of them would be named {name}")
        left = [job for job in jobs if not job.done]
        line = {"jobs": len(jobs), "done": len(jobs) - len(left)}
        if _JOBS.value is not None:
            commands = [shlex.join(job.command()) for job in left]
            for command in commands:
                if len(command.splitlines()) > 1:  # a task of an array runs one line
                    raise ValueError(f"--jobs: expected a command without line breaks; {command!r}")
            text = "".join(f"{command}\n" for command in commands)
            write_whole(epath.Path(_JOBS.value).expanduser(), text)
            print(json.dumps(line | {"list": _JOBS.value}))
            return 0
        failed, stopped_by = _run(left) if left and not _COLLECT.value else ({}, None)
        table = pd.DataFrame([read_row(job) for job in jobs], columns=pd.Index(columns))
        table = table.astype({"seeds": "Int64", "steps": "Int64"})
        root, text = jobs[0].root, markdown(table)
        write_whole(root / "results.csv", table.to_csv(index=False))
        write_whole(root / "results.md", text)
    for job, status in failed.items():
        log = job.log.read_bytes().decode(errors="replace").strip()
        last = log.splitlines()[-1] if log else "no output"
        cli.say(f"failed with exit status {status}: {job.log}: {last}")
    done = sum(job.done for job in jobs)
    line |= {"done": done, "failed": len(failed), "results": str(root / "results.csv")}
    print(f"\n{text}\n{json.dumps(line)}")
    if stopped_by is not None:
        name = signal.Signals(stopped_by).name
        cli.say(f"stopped by {name}; the same command continues")
        return 128 + stopped_by
    return cli.EXIT_FAILED if failed else 0


def _run(jobs: Sequence[Job]) -> tuple[dict[Job, int], int | None]:
    """Run jobs, at most --workers at a time, to the end or to a signal.

    Returns:
      The exit statuses of jobs that ended without a result, and the signal that stopped all others.
    """
    running: set[subprocess.Popen] = set()
    failed: dict[Job, int] = {}
    signals: list[int] = []

    def stop(number: int, _: Any) -> None:
        if not signals:
            signals.append(number)
            for process in list(running):
                process.terminate()

    def run(job: Job) -> None:
        if signals:
            return
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *job.command()[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # because ctrl-C is for the sweep, which sends SIGTERM: launch.train saves at that
                process_group=0,
            )
        running.add(process)
        if signals:  # again, because ``stop`` may not have seen this process
            process.terminate()
        status = process.wait()
        running.remove(process)
        if not signals and not job.done:
            failed[job] = status
        bar.set_postfix(failed=len(failed), refresh=False)
        bar.update()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    bar = tqdm(total=len(jobs), desc="jobs", unit="job", disable=None)
    with bar, futures.ThreadPoolExecutor(_WORKERS.value) as pool:
        list(pool.map(run, jobs))  # a list, because that raises what a thread raised
    return failed, signals[0] if signals else None


def estimate(mean: float, *interval: float) -> str:
    """Show a mean and the ends of its interval, if there is one; nothing of a missing mean."""
    if pd.isna(mean):
        return ""
    return f"{mean:.1f}" + (" ({:.1f} to {:.1f})".format(*interval) if interval else "")


def to_markdown(table: pd.DataFrame) -> str:
    """Write a table of texts in Markdown."""
    return str(table.to_markdown(index=False, disable_numparse=True))
