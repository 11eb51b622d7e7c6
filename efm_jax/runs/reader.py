"""Everything that a work directory tells of its run, as far as the run has come."""

import csv
import dataclasses
import io
import re
from collections.abc import Collection, Sequence
from typing import Any

from etils import epath

from efm_jax.runs.workdir import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    RESULT_FILE,
    RETURNS_FILE,
    SECONDS_FILE,
    RunInfo,
    read_json,
    read_text,
    resolve,
)

# Columns that every table has; the others are numbers, each where a phase logs it.
METRIC_INDEX = ("total_step", "step", "phase", "seed")
RETURN_COLUMNS = ("total_step", "policy", "seed", "episode_seed", "return", "length", "evaluation")
SUCCESS = "success"  # of an episode, 0 or 1; empty, or no column in older runs: nothing known
# What was played: one policy at one step, by one sampler.  A row is written when its episodes are
# in returns.csv, or when it has failed, with the problem.
EVALUATION_COLUMNS = (
    *("evaluation", "started_by", "policy", "total_step", "environment", "max_episode_steps"),
    *("solver", "sample_steps", "action_selection", "num_candidates"),
    *("episodes", "first_episode_seed", "status", "problem"),
)
STARTED_BY = ("train", "evaluate")
_CHOICES = {"started_by": STARTED_BY, "status": ("done", "failed")}
_NAMES = ("phase", "policy", "evaluation", "environment", "solver", "action_selection")
_NAMES += ("problem", *_CHOICES)
_INTEGERS = (
    *("total_step", "step", "seed", "episode_seed", "length"),
    *("max_episode_steps", "sample_steps", "num_candidates", "episodes", "first_episode_seed"),
)

_NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf)"  # as Python and pandas read it

Rows = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One work directory.  Cells of its tables are texts: names, integers, numbers or nothing."""

    path: epath.Path
    info: RunInfo  # config.json
    metrics: Rows  # metrics.csv: a row per logged point and training seed
    evaluations: Rows  # evaluations.csv: a row per evaluation, done or failed
    returns: Rows  # returns.csv: a row per episode of those done, with a number as its return
    result: dict[str, Any] | None  # result.json; None until the run is done

    @classmethod
    def read(cls, path: epath.PathLike) -> "Run":
        """Read the folder ``path``, local or ``gs://``; a table that is not yet there has no rows.

        Raises:
          ValueError: no such folder, no run in it, or a file that cannot be understood.
        """
        path = resolve(path)
        info = RunInfo.read(path)
        seeds = set(map(str, info.seeds))
        metrics = _read_rows(path / METRICS_FILE, METRIC_INDEX, METRIC_INDEX, seeds)
        # Before the returns, because a row comes after its episodes.
        evaluations = read_evaluations(path)
        done = {row["evaluation"]: row for row in evaluations if row["status"] == "done"}
        key = ("evaluation", "seed", "episode_seed")
        returns = _read_rows(path / RETURNS_FILE, RETURN_COLUMNS, key, seeds)
        for row in returns:
            name, step = row["evaluation"], row["total_step"]
            if not row["return"]:
                raise ValueError(f"{path / RETURNS_FILE}: an empty return at step {step}")
            played = done.get(name, row)
            if (played["policy"], played["total_step"]) != (row["policy"], step):
                raise ValueError(
                    f"{path / RETURNS_FILE}: rows of evaluation {name!r} are of another policy or "
                    f"step than {EVALUATIONS_FILE} says"
                )
        # The others are of an evaluation that goes on, or was killed while it wrote.
        returns = [row for row in returns if row["evaluation"] in done]
        for name in done.keys() - {row["evaluation"] for row in returns}:
            raise ValueError(
                f"{path / RETURNS_FILE}: no rows of evaluation {name!r}, which is done"
            )
        return cls(path, info, metrics, evaluations, returns, read_result(path))

    @property
    def own_returns(self) -> Rows:
        """Select the returns that training measured, without those of later evaluations."""
        own = {row["evaluation"] for row in self.evaluations if row["started_by"] == "train"}
        return [row for row in self.returns if row["evaluation"] in own]


def read_evaluations(path: epath.PathLike) -> Rows:
    """Read the evaluations of a work directory, local or ``gs://``, in the order they ended."""
    return _read_rows(epath.Path(path) / EVALUATIONS_FILE, EVALUATION_COLUMNS, ("evaluation",))


def read_result(path: epath.PathLike) -> dict[str, Any] | None:
    """Read the last line that ``launch.train`` printed from a work directory; None before its end.

    Raises:
      ValueError: a file that is no JSON object, or a field of another kind than runs write.
    """
    file = epath.Path(path) / RESULT_FILE
    if not file.exists():
        return None
    result = read_json(file)
    for name, value in result.items():
        kind = name.rpartition("_")[2]
        if kind in ("return", "score", "success", "seconds"):
            fits = _is_number(value)
        elif kind == "interval":
            fits = isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
        elif name in ("seeds", "steps"):
            fits = type(value) is int and 0 <= value < 2**53
        elif name == "evaluations":
            fits = isinstance(value, dict) and all(isinstance(id, str) for id in value.values())
        else:
            fits = name not in ("dataset", "algorithm", "workdir") or isinstance(value, str)
        if not fits:
            raise ValueError(f"{file}: field {name!r}: got {value!r}, which no run writes")
    return result


def read_seconds(path: epath.PathLike) -> float:
    """Read how long the earlier starts of a run took together; 0 where there were none.

    Raises:
      ValueError: a file that no run writes.
    """
    file = epath.Path(path) / SECONDS_FILE
    if not file.exists():
        return 0.0
    seconds = read_json(file).get("seconds")
    if seconds is None or not _is_number(seconds) or seconds < 0:
        raise ValueError(f"{file}: field 'seconds': got {seconds!r:.100}, which no run writes")
    return float(seconds)


def _is_number(value: Any) -> bool:
    return value is None or (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    )


def read_table(path: epath.PathLike) -> Rows:
    """Read a CSV file, without the unfinished last line of a process that writes or died."""
    text = read_text(epath.Path(path))
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]), strict=True))


def _read_rows(
    path: epath.Path, columns: Sequence[str], key: Sequence[str], seeds: Collection[str] = ()
) -> Rows:
    """Read and check the rows of a table; none where there is no file yet.

    Args:
      path: the table.
      columns: those that it has at least.
      key: columns that tell every row from the others.
      seeds: what may be in the column ``seed``.
    """
    if not path.exists():
        return []
    try:
        rows, keys = read_table(path), set()
        for line, row in enumerate(rows, start=2):
            missing = [column for column in columns if column not in row]
            if missing:
                raise ValueError(f"no column {missing[0]!r}")
            if None in row or None in row.values():
                raise ValueError(f"line {line}: another number of cells than the header")
            for column, cell in row.items():
                _check_cell(line, column, cell)
            if "seed" in columns and row["seed"] not in seeds:
                raise ValueError(f"line {line}: seed {row['seed']} is none of this run's")
            keys.add(tuple(row[column] for column in key))
            if len(keys) < line - 1:
                raise ValueError(f"line {line}: repeats an earlier one's {', '.join(key)}")
    except (ValueError, csv.Error) as error:
        text = str(error)
        raise ValueError(
            text if str(path) in text else f"{path}: cannot be read: {text}"
        ) from error
    return rows


def _check_cell(line: int, column: str, cell: str) -> None:
    expected = "a number"
    if column in _INTEGERS:
        fits = cell.isascii() and cell.isdigit() and int(cell[:20]) < 2**53
    elif column in _NAMES:
        choices = _CHOICES.get(column)
        expected = f"one of {', '.join(choices)}" if choices else "a name"
        fits = cell in choices if choices else bool(cell) or column == "problem"
    else:
        fits = not cell or re.fullmatch(_NUMBER, cell) is not None
    if not fits:
        raise ValueError(f"line {line}, {column}: expected {expected}; got {cell[:60]!r}")
