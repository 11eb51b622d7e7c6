"""Tables that a run leaves: ``metrics.csv``, ``evaluations.csv`` and ``returns.csv``."""

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from efm_jax import checks
from efm_jax.envs import Rollouts
from efm_jax.files import write_whole
from efm_jax.runs.reader import (
    EVALUATION_COLUMNS,
    METRIC_INDEX,
    RETURN_COLUMNS,
    SUCCESS,
    read_table,
)
from efm_jax.runs.workdir import EVALUATIONS_FILE, GUARD_FILE, METRICS_FILE, RETURNS_FILE
from efm_jax.types import Array

Row = Mapping[str, Any]


class CsvTable:
    """A CSV file that grows by rows and, when a row brings a new key, by columns.

    Rows are appended and flushed; every other change writes a temporary file and renames it, so a
    killed process leaves either the old table or the new one, plus at most one unfinished last
    line, which the next opening removes. One process writes a table at a time.

    Args:
      path: the file; made, with its folder, when the first row comes.
      columns: the first columns of the header, in this order.
      keep: given a row of the file as texts, whether it stays; the others are removed.

    Raises:
      ValueError: the file exists and its header lacks one of ``columns``.
    """

    def __init__(
        self,
        path: epath.PathLike,
        columns: Sequence[str],
        keep: Callable[[dict[str, str]], bool] = lambda row: True,
    ) -> None:
        self._path, self._columns = epath.Path(path), list(columns)
        if not self._path.exists():
            return
        text = self._path.read_text()
        header, newline, _ = text.partition("\n")
        if newline:
            self._columns = next(csv.reader([header]))
        missing = [column for column in columns if column not in self._columns]
        if missing:
            raise ValueError(
                f"{self._path}: expected a table with a column {missing[0]!r}; got {self._columns}"
            )
        if not text.endswith("\n") or not all(map(keep, read_table(self._path))):
            self.append([], keep)

    def append(
        self, rows: Iterable[Row], keep: Callable[[dict[str, str]], bool] | None = None
    ) -> None:
        """Add rows, and with ``keep`` remove in the same moment those that do not stay.

        An absent key gives an empty cell, NaN is written as ``nan``.
        """
        rows = list(rows)
        keys = dict.fromkeys(key for row in rows for key in row)
        new = [key for key in keys if key not in self._columns]
        exists = self._path.exists()
        # An object of a bucket cannot grow.
        if new or not exists or keep or "://" in os.fspath(self._path):
            self._columns += new
            earlier = read_table(self._path) if exists else []
            self._rewrite([*filter(keep or (lambda row: True), earlier), *rows])
        else:
            try:
                with self._path.open("a") as file:
                    file.write(self._text(rows, header=False))
            except OSError as error:
                raise OSError(f"{self._path}: cannot be written: {error.strerror}") from error

    def _rewrite(self, rows: Iterable[Row]) -> None:
        write_whole(self._path, self._text(rows, header=True))

    def _text(self, rows: Iterable[Row], *, header: bool) -> str:
        """Write rows as text, a number as the shortest that reads back as the same of its type."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self._columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()


class MetricsWriter:
    """Writes ``metrics.csv``, a row per logged point and training seed, and ``guard.csv``.

    ``step`` counts within the phase, ``total_step`` across phases.

    Args:
      workdir: the run's folder.
      seeds: the ``K`` training seeds.
      resume_from: total step of the checkpoint this run continues from. What the tables hold
        beyond it is removed, because the resumed run will write it again. None for a run that
        starts at the beginning: all tables start anew.
    """

    def __init__(
        self, workdir: epath.PathLike, seeds: Sequence[int], resume_from: int | None
    ) -> None:
        workdir, self._seeds = epath.Path(workdir), list(seeds)
        if resume_from is None:
            for name in (METRICS_FILE, GUARD_FILE, EVALUATIONS_FILE, RETURNS_FILE):
                (workdir / name).unlink(missing_ok=True)
            resume_from = -1

        def keep(row: dict[str, str]) -> bool:
            return int(row["total_step"]) <= resume_from

        columns = (*METRIC_INDEX, "loss", "steps_per_second")
        self._table = CsvTable(workdir / METRICS_FILE, columns, keep)
        self._guard = CsvTable(workdir / GUARD_FILE, METRIC_INDEX, keep)
        # Before the returns, so that no evaluation is there without its episodes.
        CsvTable(workdir / EVALUATIONS_FILE, EVALUATION_COLUMNS, keep)
        CsvTable(workdir / RETURNS_FILE, RETURN_COLUMNS, keep)

    def write(self, total_step: int, phase: str, step: int, values: Mapping[str, Array]) -> None:
        """Log one point, on disk when this returns.

        Args:
          total_step: gradient steps so far in all phases together.
          phase: ``behavior``, ``critic`` or ``policy``.
          step: gradient steps so far in this phase.
          values: by metric ``[K]``, or one number that holds for all seeds; NaN is kept and seen.

        Raises:
          ValueError: another number of values, or a metric named like an index column.
        """
        self._append(self._table, total_step, phase, step, values)

    def guard(self, total_step: int, step: int, values: Mapping[str, Array]) -> None:
        """Log a decision of the guard, as :meth:`write` does."""
        self._append(self._guard, total_step, "policy", step, values)

    def _append(
        self, table: CsvTable, total_step: int, phase: str, step: int, values: Mapping[str, Array]
    ) -> None:
        count = len(self._seeds)
        for name, value in values.items():
            if name in METRIC_INDEX:
                raise ValueError(f"values: {name!r} is an index column, not a metric")
            if np.shape(value) not in ((), (count,)):
                shape = np.shape(value)
                raise ValueError(f"{name}: expected one value per seed, ({count},); got {shape}")
        columns = {name: np.broadcast_to(value, count) for name, value in values.items()}
        table.append(
            {"total_step": total_step, "step": step, "phase": phase, "seed": seed}
            | {name: column[index] for name, column in columns.items()}
            for index, seed in enumerate(self._seeds)
        )


def write_evaluation(
    workdir: epath.PathLike,
    evaluation: Row,
    rollouts: Rollouts | None,
    seeds: Sequence[int],
    episode_seeds: Sequence[int],
) -> None:
    """Add an evaluation to ``evaluations.csv``, after every episode of it to ``returns.csv``.

    What is there under the same name is replaced: an evaluation that a resumed run repeats does
    not count twice.

    Args:
      workdir: the run's folder.
      evaluation: its row, of ``EVALUATION_COLUMNS``.
      rollouts: what every episode gave, ``[K, E]``; None of one that failed.
      seeds: the ``K`` training seeds.
      episode_seeds: of the ``E`` episodes.

    Raises:
      ValueError: shapes that disagree, or tables of an earlier version.
    """
    workdir, name = epath.Path(workdir), evaluation["evaluation"]
    records = CsvTable(workdir / EVALUATIONS_FILE, EVALUATION_COLUMNS)
    if rollouts is not None:
        for field, values in zip(rollouts._fields, rollouts, strict=True):
            checks.check_shape(field, values, (len(seeds), len(episode_seeds)))
        of = evaluation["total_step"], evaluation["policy"]
        rows: list[Row] = [
            dict(zip(RETURN_COLUMNS, (*of, seed, episode_seed, *values, name), strict=True))
            | {SUCCESS: "" if np.isnan(success) else int(success)}
            for seed, *of_seed in zip(seeds, *rollouts, strict=True)
            for episode_seed, *values, success in zip(episode_seeds, *of_seed, strict=True)
        ]
        returns = CsvTable(workdir / RETURNS_FILE, RETURN_COLUMNS)
        returns.append(rows, keep=lambda row: row["evaluation"] != name)
    records.append([evaluation], keep=lambda row: row["evaluation"] != name)
