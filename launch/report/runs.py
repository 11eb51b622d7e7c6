"""What a work directory holds of its run, as far as it has come: the data of a report.

``config.json`` is read as plain JSON and the tables column by column, because a report also shows
runs that are unfinished and runs of versions with other fields, phases and metrics.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from efm_jax.envs import mean_and_interval, normalized_score
from efm_jax.runs.workdir import CONFIG_FILE, METRICS_FILE, RESULT_FILE, RETURNS_FILE, resolve

VIDEO_SUFFIXES = {".mp4": "video/mp4", ".gif": "image/gif"}

_NUMBER = (int, float)
# Fields of config.json that the report uses: their type, and whether it makes no sense without
# them.
_FIELDS: dict[str, tuple[type | tuple[type, ...], bool]] = {
    "config": (dict, True),
    "dataset": (str, True),
    "seed": (int, True),
    "num_seeds": (int, True),
    "fingerprint": (str, False),
    "transitions": (int, False),
    "dataset_return": (_NUMBER, False),
    "observation_size": (int, False),
    "action_size": (int, False),
    "env_spec": (str, False),
    "reference_scores": (list, False),
}
_METRIC_INDEX = ("total_step", "step", "phase", "seed")
_RETURN_COLUMNS = ("total_step", "policy", "seed", "return", "length")


@dataclasses.dataclass(frozen=True)
class Curve:
    """One metric of one phase."""

    steps: np.ndarray  # [P] in order, counted within the phase
    values: np.ndarray  # [P, K] a column per training seed; NaN where nothing finite was logged
    non_finite: int  # logged values that are NaN or infinite


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The episodes of one policy at one training step."""

    policy: str
    total_step: int
    returns: dict[int, np.ndarray]  # by training seed: [E] raw returns
    mean_length: float
    score: float | None  # of the mean, normalized to 0-100

    @property
    def episodes(self) -> int:
        return sum(map(len, self.returns.values()))

    @property
    def interval(self) -> tuple[float, float, float]:
        """Mean, low, high: over training seeds where there are several, otherwise over episodes."""
        by_seed = list(self.returns.values())
        return mean_and_interval(
            [each.mean() for each in by_seed] if len(by_seed) > 1 else by_seed[0]
        )

    @property
    def interval_of(self) -> str | None:
        """What the 95% interval is over; None where one value has no interval."""
        if len(self.returns) > 1:
            return f"over {len(self.returns)} seeds"
        return f"over {self.episodes} episodes" if self.episodes > 1 else None


@dataclasses.dataclass(frozen=True)
class Run:
    """One work directory."""

    name: str  # short, unlike that of any other run of the report
    workdir: str
    info: dict[str, Any]  # config.json
    result: dict[str, Any] | None  # result.json; None until training is done
    phases: dict[str, dict[str, Curve]]  # by phase and metric, in the order they were logged
    progress: (
        tuple[str, int, int] | None
    )  # phase, step in it and in all phases, of the last logged point
    evaluations: list[Evaluation]  # by policy, then step
    videos: dict[str, bytes]  # by file name

    @property
    def config(self) -> dict[str, Any]:
        return self.info["config"]

    @property
    def algorithm(self) -> str:
        """As the run said at its end; before, what its configuration says of it."""
        if self.result is not None and "algorithm" in self.result:
            return str(self.result["algorithm"])
        named = [f"{key} {self.config[key]}" for key in ("policy", "path") if key in self.config]
        return ", ".join(named) or "unknown"

    @property
    def environment(self) -> str:
        try:
            return str(json.loads(self.info["env_spec"])["id"])
        except (KeyError, TypeError, ValueError):
            return "unknown"

    @property
    def steps(self) -> int | None:
        """Gradient steps of all phases so far."""
        if self.result is not None and isinstance(self.result.get("steps"), int):
            return self.result["steps"]
        return None if self.progress is None else self.progress[2]

    def last(self, policy: str) -> Evaluation | None:
        """The latest evaluation of a policy."""
        found = [evaluation for evaluation in self.evaluations if evaluation.policy == policy]
        return found[-1] if found else None

    def score(self, value: float) -> float | None:
        return _score(self.info, value)


def load_runs(workdirs: Sequence[str]) -> list[Run]:
    """The runs of some work directories.

    Raises:
      ValueError: a folder that is missing, given twice or holds no run, or a file that cannot be
        understood.
    """
    folders = [resolve(workdir) for workdir in workdirs]
    for index, folder in enumerate(folders):
        if folder in folders[:index]:
            raise ValueError(f"--workdir={workdirs[index]}: given twice")
    return [_load(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[epath.Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    longest = max(len(folder.parts) for folder in folders)
    for count in range(1, longest + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _load(workdir: epath.Path, name: str) -> Run:
    if not (workdir / CONFIG_FILE).exists():
        what = f"holds no run (no {CONFIG_FILE})" if workdir.exists() else "no such folder"
        raise ValueError(f"--workdir={workdir}: {what}")
    info = _read_json(workdir / CONFIG_FILE)
    _check_info(workdir / CONFIG_FILE, info)
    metrics = _read_rows(workdir / METRICS_FILE, _METRIC_INDEX)
    returns = _read_rows(workdir / RETURNS_FILE, _RETURN_COLUMNS)
    files = sorted(workdir.iterdir(), key=lambda path: (path.stem != "video", path.name))
    return Run(
        name=name,
        workdir=str(workdir),
        info=info,
        result=_read_json(workdir / RESULT_FILE) if (workdir / RESULT_FILE).exists() else None,
        phases=_curves(metrics),
        progress=(metrics[-1]["phase"], metrics[-1]["step"], metrics[-1]["total_step"])
        if metrics
        else None,
        evaluations=_evaluations(returns, info, workdir / RETURNS_FILE),
        videos={path.name: path.read_bytes() for path in files if path.suffix in VIDEO_SUFFIXES},
    )


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object; got {type(values).__name__}")
    return values


def _check_info(path: epath.Path, info: dict[str, Any]) -> None:
    for name, (kind, required) in _FIELDS.items():
        value = info.get(name)
        if value is None and not required:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{path}: field {name!r}: got {value!r}, which no run writes")
    references = info.get("reference_scores")
    if references is not None:
        numbers = len(references) == 2 and all(isinstance(value, _NUMBER) for value in references)
        if not numbers or not references[0] < references[1]:
            raise ValueError(f"{path}: field 'reference_scores': expected two increasing numbers")


def _read_rows(path: epath.Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a table, cells as numbers (None where empty); no rows where there is no file yet."""
    if not path.exists():
        return []
    try:
        text = path.read_text()
        # A run that is writing, or was killed while it did, leaves an unfinished last line.
        table = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]), strict=True)
        missing = [column for column in columns if column not in (table.fieldnames or columns)]
        if missing:
            raise ValueError(f"no column {missing[0]!r}")
        return [_row(cells, table.line_num) for cells in table]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _row(cells: dict[str, str], line: int) -> dict[str, Any]:
    if None in cells or None in cells.values():
        raise ValueError(f"line {line}: another number of cells than the header")
    row: dict[str, Any] = {}
    for column, cell in cells.items():
        try:
            if column in ("phase", "policy"):
                row[column] = cell
            elif column in ("total_step", "step", "seed"):
                row[column] = int(cell)
            else:
                row[column] = float(cell) if cell else None
        except ValueError as error:
            raise ValueError(f"line {line}, {column}: expected a number; got {cell!r}") from error
    return row


def _curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, Curve]]:
    phases: dict[str, dict[str, dict[tuple[int, int], list[float]]]] = {}
    for row in rows:
        metrics = phases.setdefault(row["phase"], {})
        for name, value in row.items():
            if name not in _METRIC_INDEX and value is not None:
                metrics.setdefault(name, {}).setdefault((row["step"], row["seed"]), []).append(
                    value
                )
    return {
        phase: {name: _curve(points) for name, points in metrics.items()}
        for phase, metrics in phases.items()
    }


def _curve(points: dict[tuple[int, int], list[float]]) -> Curve:
    steps = sorted({step for step, _ in points})
    seeds = sorted({seed for _, seed in points})
    place = {step: index for index, step in enumerate(steps)}
    values = np.full((len(steps), len(seeds)), np.nan)
    non_finite = 0
    for (step, seed), numbers in points.items():
        finite = [number for number in numbers if math.isfinite(number)]
        non_finite += len(numbers) - len(finite)
        if finite:
            values[place[step], seeds.index(seed)] = np.mean(finite)
    return Curve(np.array(steps), values, non_finite)


def _evaluations(
    rows: list[dict[str, Any]], info: dict[str, Any], path: epath.Path
) -> list[Evaluation]:
    groups: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        if row["return"] is None:
            raise ValueError(f"{path}: an empty return at step {row['total_step']}")
        groups.setdefault(row["policy"], {}).setdefault(row["total_step"], []).append(row)
    evaluations = []
    # The behavior model first: what the others are compared with.
    for policy in sorted(groups, key=lambda name: name != "behavior"):
        for step, episodes in sorted(groups[policy].items()):
            returns = {
                seed: np.array([row["return"] for row in episodes if row["seed"] == seed])
                for seed in sorted({row["seed"] for row in episodes})
            }
            mean = float(np.mean([each.mean() for each in returns.values()]))
            lengths = [row["length"] for row in episodes if row["length"] is not None]
            mean_length = float(np.mean(lengths)) if lengths else math.nan
            evaluations.append(Evaluation(policy, step, returns, mean_length, _score(info, mean)))
    return evaluations


def _score(info: dict[str, Any], value: float) -> float | None:
    references = info.get("reference_scores")
    return None if references is None else normalized_score(value, tuple(references))
