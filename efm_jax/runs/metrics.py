"""What a run leaves to look at: ``metrics.csv``, ``returns.csv`` and TensorBoard events.

Columns that :mod:`efm_jax.runs.learning_curve` draws, where a phase logs them: ``loss``, ``ess``
(per-state effective sample size), ``top_weight``, ``q_data`` and ``q_support``.
"""

import csv
import io
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from efm_jax import checks
from efm_jax.files import write_whole
from efm_jax.runs.reader import METRIC_INDEX, RETURN_COLUMNS, read_table
from efm_jax.runs.workdir import METRICS_FILE, RETURNS_FILE, TENSORBOARD_FOLDER

_METRIC_COLUMNS = (*METRIC_INDEX, "loss", "steps_per_second")


class CsvTable:
    """A CSV file that grows by rows and, when a row brings a new key, by columns.

    Rows are appended and flushed; every other change writes a temporary file and renames it, so a
    killed process leaves either the old table or the new one, plus at most one unfinished last
    line, which the next opening removes. One process writes a table at a time.

    Args:
      path: the file; made, with its folder, when the first row comes.
      columns: the first columns of the header, in this order.

    Raises:
      ValueError: the file exists and its header lacks one of ``columns``.
    """

    def __init__(self, path: epath.PathLike, columns: Sequence[str]) -> None:
        self._path = epath.Path(path)
        self._columns = list(columns)
        if not self._path.exists():
            return
        text = self._path.read_text()
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            write_whole(self._path, complete)
        if complete:
            header = next(csv.reader(io.StringIO(complete)))
            missing = [column for column in columns if column not in header]
            if missing:
                raise ValueError(
                    f"{self._path}: expected a table with a column {missing[0]!r}; got {header}"
                )
            self._columns = header

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows; absent keys and None give empty cells, NaN is written as ``nan``."""
        rows = list(rows)
        new = [
            key
            for key in dict.fromkeys(key for row in rows for key in row)
            if key not in self._columns
        ]
        empty = not self._path.exists() or self._path.stat().length == 0
        # An object of a bucket cannot grow.
        if new or empty or "://" in os.fspath(self._path):
            old = [] if empty else read_table(self._path)
            self._columns += new
            self._write_all([*old, *rows])
            return
        with self._path.open("a") as file:
            file.write(self._lines(rows))
            file.flush()

    def discard(self, condition: Callable[[dict[str, str]], bool]) -> None:
        """Removes the rows for which ``condition(row)``, a dict of cell texts, is true."""
        if not self._path.exists():
            return
        rows = read_table(self._path)
        kept = [row for row in rows if not condition(row)]
        if len(kept) < len(rows):
            self._write_all(kept)

    def keep_until(self, total_step: int) -> None:
        """Removes the rows with a larger ``total_step``."""
        self.discard(lambda row: int(row["total_step"]) > total_step)

    def _lines(self, rows: Iterable[Mapping[str, Any]]) -> str:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerows([_cell(row.get(column)) for column in self._columns] for row in rows)
        return buffer.getvalue()

    def _write_all(self, rows: Iterable[Mapping[str, Any]]) -> None:
        header = dict(zip(self._columns, self._columns, strict=True))
        write_whole(self._path, self._lines([header, *rows]))


class MetricsWriter:
    """Writes ``metrics.csv`` (one row per logged point and training seed) and TensorBoard events.

    ``metrics.csv`` has at least the columns ``total_step, step, phase, seed, loss,
    steps_per_second``; ``step`` counts within the phase, ``total_step`` across phases, ``seed`` is
    the training seed's index. TensorBoard gets the mean over seeds as ``phase/metric`` at
    ``total_step``, under ``tensorboard/``.

    Args:
      workdir: the run's folder.
      resume_from: total step of the checkpoint this run continues from. What ``metrics.csv`` and
        ``returns.csv`` hold beyond it is removed, and hidden in TensorBoard, because the resumed
        run will write it again. None for a run that starts at the beginning: both files start anew.
    """

    def __init__(self, workdir: epath.PathLike, resume_from: int | None) -> None:
        workdir = epath.Path(workdir)
        if resume_from is None:
            (workdir / METRICS_FILE).unlink(missing_ok=True)
            (workdir / RETURNS_FILE).unlink(missing_ok=True)
        self._table = CsvTable(workdir / METRICS_FILE, _METRIC_COLUMNS)
        if resume_from is not None:
            self._table.keep_until(resume_from)
            CsvTable(workdir / RETURNS_FILE, RETURN_COLUMNS).keep_until(resume_from)
        folder = workdir / TENSORBOARD_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        # tensorboardX's SummaryWriter hands events to a thread: a killed run would lose those of
        # steps that it has checkpointed. Its EventsWriter writes at once; the count keeps names
        # apart within a second.
        count = len(list(folder.iterdir()))
        self._events = EventsWriter(os.fspath(folder / "events"), filename_suffix=f".{count:04d}")
        # A session start at a step makes TensorBoard hide what earlier files hold from there on.
        start = 0 if resume_from is None else resume_from + 1
        self._write_event(Event(step=start, session_log=SessionLog(status=SessionLog.START)))

    def write(
        self,
        total_step: int,
        phase: str,
        step: int,
        per_seed: Mapping[str, float | Sequence[float | None] | None],
    ) -> None:
        """Logs one point, on disk when this returns.

        Args:
          total_step: gradient steps so far in all phases together.
          phase: ``behavior``, ``critic`` or ``policy``.
          step: gradient steps so far in this phase.
          per_seed: a sequence of ``K`` numbers per metric, or one number that holds for all seeds.
            None gives an empty cell; NaN is kept and seen.

        Raises:
          ValueError: sequences of different lengths, or a metric named like an index column.
        """
        reserved = [name for name in per_seed if name in METRIC_INDEX]
        if reserved:
            raise ValueError(f"per_seed: {reserved[0]!r} is an index column, not a metric")
        values = {name: np.asarray(value) for name, value in per_seed.items()}
        sizes = {name: value.size for name, value in values.items() if value.ndim}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"per_seed: expected one value per seed in every metric; got {sizes}")
        count = next(iter(sizes.values()), 1)
        columns = {name: np.broadcast_to(value, count) for name, value in values.items()}
        self._table.append(
            {"total_step": total_step, "step": step, "phase": phase, "seed": seed}
            | {name: column[seed] for name, column in columns.items()}
            for seed in range(count)
        )
        known = {
            name: [float(v) for v in column if v is not None] for name, column in columns.items()
        }
        summary = Summary(
            value=[
                Summary.Value(tag=f"{phase}/{name}", simple_value=float(np.mean(numbers)))
                for name, numbers in known.items()
                if numbers
            ]
        )
        self._write_event(Event(step=total_step, summary=summary))

    def close(self) -> None:
        """Closes the event file."""
        self._events.close()

    def _write_event(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
        self._events.flush()


def return_rows(
    total_step: int,
    policy: str,
    returns: np.ndarray,
    lengths: np.ndarray,
    episode_seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """Rows for :func:`write_returns`, one per episode.

    Args:
      total_step: gradient steps in all phases when the policy was evaluated.
      policy: ``behavior`` or ``policy``.
      returns: ``[K, E]``.
      lengths: ``[K, E]``.
      episode_seeds: ``[E]``.

    Raises:
      ValueError: shapes that disagree.
    """
    returns, lengths = np.asarray(returns), np.asarray(lengths)
    expected = (len(returns), len(episode_seeds))
    checks.check_shape("returns", returns, expected)
    checks.check_shape("lengths", lengths, expected)
    return [
        {
            "total_step": total_step,
            "policy": policy,
            "seed": seed,
            "episode_seed": episode_seed,
            "return": returns[seed, episode],
            "length": lengths[seed, episode],
        }
        for seed in range(len(returns))
        for episode, episode_seed in enumerate(episode_seeds)
    ]


def write_returns(workdir: epath.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds raw episode returns to ``returns.csv``.

    Rows already there for the same total step and policy are replaced: an evaluation that a resumed
    run repeats does not count twice.

    Args:
      workdir: the run's folder.
      rows: as from :func:`return_rows`: ``total_step, policy, seed, episode_seed, return, length``.

    Raises:
      ValueError: a row with other keys.
    """
    for row in rows:
        if set(row) != set(RETURN_COLUMNS):
            raise ValueError(
                f"rows: expected the keys {', '.join(RETURN_COLUMNS)}; got {', '.join(row)}"
            )
    table = CsvTable(epath.Path(workdir) / RETURNS_FILE, RETURN_COLUMNS)
    written = {(int(row["total_step"]), str(row["policy"])) for row in rows}
    table.discard(lambda row: (int(row["total_step"]), row["policy"]) in written)
    table.append(rows)


def _cell(value: Any) -> str:
    """Shortest text that reads back as the same number; NumPy and JAX scalars as their own dtype."""
    return "" if value is None else str(np.asarray(value)[()])
