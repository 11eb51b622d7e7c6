"""Many runs of ``launch.train``: what a job is, running what is left of them, and the tables' rows.

A job is one process with a work directory of its own; it is done once its result file is there.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from etils import epath
from tqdm import tqdm

from efm_jax.files import write_whole
from efm_jax.runs.workdir import RESULT_FILE
from launch import cli

_POLL_SECONDS = 0.1


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
        dataset = (
            pathlib.PurePath(self.dataset).stem if self.dataset.endswith(".hdf5") else self.dataset
        )
        parts = [dataset, pathlib.PurePath(self.config).stem, f"seed{self.seed}"]
        return join_name(*parts, train_flags=self.train_flags)

    @property
    def workdir(self) -> epath.Path:
        return self.root / self.name

    @property
    def log(self) -> epath.Path:
        return self.root / "logs" / f"{self.name}.log"

    @property
    def done(self) -> bool:
        return (self.workdir / RESULT_FILE).exists()

    def result(self, fields: Iterable[str]) -> dict[str, Any] | None:
        """These fields of what ``launch.train`` said at its end; None before."""
        if not self.done:
            return None
        path = self.workdir / RESULT_FILE
        try:
            values = json.loads(path.read_text())
            return {name: values[name] for name in fields}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: cannot be read: {error!r}") from error

    def command(self) -> list[str]:
        """The command line that runs the job, or continues it."""
        own = [f"--dataset={self.dataset}", f"--config={self.config}", f"--seed={self.seed}"]
        return [
            "python",
            "-m",
            "launch.train",
            *own,
            f"--workdir={self.workdir}",
            *self.train_flags,
        ]


def join_name(*parts: str, train_flags: Sequence[str]) -> str:
    """A folder's name made of ``parts``, and of a digest of ``train_flags`` where there are any."""
    if train_flags:
        parts = (*parts, hashlib.sha256("\0".join(train_flags).encode()).hexdigest()[:6])
    return "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-.") for part in parts)


def read_root(flag: str, *, runs_here: bool, collect: bool) -> epath.Path:
    """The folder that ``--root`` names; a ``ValueError`` if jobs cannot be run or collected in it."""
    root = epath.Path(flag).expanduser()
    if "://" in flag and runs_here:
        raise ValueError(
            f"--root={root}: expected a local or shared folder to run in; see --jobs, --collect"
        )
    exists = root.exists()
    if exists and not root.is_dir():
        raise ValueError(f"--root={root}: is a file; expected a folder")
    if collect and not exists:
        raise ValueError(f"--root={root}: no such folder")
    return root


def read_train_flags(text: str, own: Collection[str]) -> list[str]:
    """The flags in ``text``, as a shell splits it; a ``ValueError`` if one of ``own`` is among them."""
    try:
        train_flags = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"--train_flags={text}: {error}") from error
    for flag in train_flags:
        if not re.match("--?[A-Za-z]", flag):
            raise ValueError(f"--train_flags: flags are written --name=value; got {flag!r}")
        if flag.lstrip("-").split("=")[0] in own:
            raise ValueError(f"--train_flags: {flag}: every job has its own")
    return train_flags


def check_preset(flag: str, config: str) -> None:
    """Raise a ``ValueError`` unless ``launch.train`` will find the preset, here or where it is installed."""
    problem = cli.preset_problem(config) and cli.preset_problem(str(cli.ROOT / config))
    if problem is not None:
        raise ValueError(f"--{flag}={config}: {problem}")


class Tables(NamedTuple):
    """What is written of the jobs that are done."""

    csv: str
    markdown: str


def run_and_collect(
    program: str,
    jobs: Sequence[Job],
    tables: Callable[[Sequence[Any]], Tables],
    *,
    workers: int,
    commands: str | None,
    collect: bool,
) -> int:
    """What an entry point of many jobs does; its exit status.

    Args:
      program: its name.
      jobs: all of them, with one root folder.
      tables: made of what is done at the end, and written to results.csv and results.md.
      workers: jobs at a time.
      commands: a file; then the commands of jobs that are not done are written to it, and nothing
        is run.
      collect: run nothing, only write the tables.
    """
    if commands is not None:
        with cli.usage_errors():
            _write_commands(jobs, commands)
        return 0
    left = [] if collect else [job for job in jobs if not job.done]
    failed, stopped_by = _run(left, workers) if left else ({}, 0)
    with cli.usage_errors():
        written = tables(jobs)
        write_whole(jobs[0].root / "results.csv", written.csv)
        write_whole(jobs[0].root / "results.md", written.markdown)
    return _finish(program, jobs, failed, stopped_by, written.markdown)


def _write_commands(jobs: Sequence[Job], path: str) -> None:
    """Write the commands of the jobs that are not done, one a line; print how many there are."""
    left = [job for job in jobs if not job.done]
    lines = [shlex.join(job.command()) + "\n" for job in left]
    write_whole(epath.Path(path).expanduser(), "".join(lines))
    print(json.dumps({"jobs": len(jobs), "done": len(jobs) - len(left), "list": path}))


def _run(jobs: Iterable[Job], workers: int) -> tuple[dict[Job, int], int]:
    """Run jobs, at most ``workers`` at a time, to the end or to a signal.

    Returns:
      The exit statuses of jobs that ended without a result, and the signal that stopped all others,
      or 0.
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
            [sys.executable, *job.command()[1:]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # ctrl-C is for the caller, which sends SIGTERM: launch.train saves at that
            process_group=0,
        )


def _finish(
    program: str, jobs: Sequence[Job], failed: dict[Job, int], stopped_by: int, table: str
) -> int:
    """Print the table, a line of JSON and what went wrong; the exit status of the program."""

    def say(text: str) -> None:
        tqdm.write(f"{program}: {text}", file=sys.stderr)

    for job, status in failed.items():
        say(f"failed with exit status {status}: {job.log}: {_last_line(job.log)}")
    done = sum(job.done for job in jobs)
    results = str(jobs[0].root / "results.csv")
    line = {"jobs": len(jobs), "done": done, "failed": len(failed), "results": results}
    print(f"\n{table}\n{json.dumps(line)}")
    if stopped_by:
        say(f"stopped by {signal.Signals(stopped_by).name}; the same command continues")
        return 128 + stopped_by
    return cli.EXIT_FAILED if failed else 0


def _last_line(log: epath.Path) -> str:
    lines = log.read_bytes().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def head(*names: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [row(*names), row(*("---" for _ in names))]


def row(*cells: str) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
