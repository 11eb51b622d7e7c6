"""Everything that a work directory tells of its run, as far as the run has come."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

from etils import epath

from efm_jax.runs.workdir import (
    METRICS_FILE,
    RESULT_FILE,
    RETURNS_FILE,
    RunInfo,
    read_json,
    resolve,
)

# Columns that every table has; the others are numbers, each where a phase logs it.
METRIC_INDEX = ("total_step", "step", "phase", "seed")
RETURN_COLUMNS = ("total_step", "policy", "seed", "episode_seed", "return", "length")
_NAMES = ("phase", "policy")
_INTEGERS = ("total_step", "step", "seed", "episode_seed")

Rows = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One work directory.  Cells of its tables are texts: names, integers, numbers or nothing."""

    path: epath.Path
    info: RunInfo  # config.json
    metrics: Rows  # metrics.csv: a row per logged point and training seed
    returns: Rows  # returns.csv: a row per episode, with a number as its return
    result: dict[str, Any] | None  # result.json; None until the run is done

    @classmethod
    def read(cls, path: epath.PathLike) -> "Run":
        """Read the folder ``path``, local or ``gs://``; a table that is not yet there has no rows.

        Raises:
          ValueError: no such folder, no run in it, or a file that cannot be understood.
        """
        path = resolve(path)
        info = RunInfo.read(path)
        metrics = _read_rows(path / METRICS_FILE, METRIC_INDEX)
        returns = _read_rows(path / RETURNS_FILE, RETURN_COLUMNS)
        for row in returns:
            if not row["return"]:
                step = row["total_step"]
                raise ValueError(f"{path / RETURNS_FILE}: an empty return at step {step}")
        return cls(path, info, metrics, returns, read_result(path))


def read_result(path: epath.PathLike) -> dict[str, Any] | None:
    """Read the last line that ``launch.train`` printed from a work directory; None before its end.

    Raises:
      ValueError: a file that is no JSON object.
    """
    file = epath.Path(path) / RESULT_FILE
    return read_json(file) if file.exists() else None


def read_table(path: epath.PathLike) -> Rows:
    """Read a CSV file, without the unfinished last line of a process that writes or died."""
    text = epath.Path(path).read_text()
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]), strict=True))


def _read_rows(path: epath.Path, columns: Sequence[str]) -> Rows:
    """Read and check the rows of a table; none where there is no file yet."""
    if not path.exists():
        return []
    try:
        rows = read_table(path)
        for line, row in enumerate(rows, start=2):
            missing = [column for column in columns if column not in row]
            if missing:
                raise ValueError(f"no column {missing[0]!r}")
            if None in row or None in row.values():
                raise ValueError(f"line {line}: another number of cells than the header")
            for column, cell in row.items():
                _check_cell(line, column, cell)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    return rows


def _check_cell(line: int, column: str, cell: str) -> None:
    try:
        if column in _INTEGERS:
            int(cell)
        elif column not in _NAMES and cell:
            float(cell)
    except ValueError as error:
        raise ValueError(f"line {line}, {column}: expected a number; got {cell!r}") from error
