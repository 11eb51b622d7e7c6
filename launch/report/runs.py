"""Runs as a report shows them: curves and evaluations, aggregated from the tables of each run."""

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from etils import epath

from efm_jax.envs import mean_and_interval, normalized_score, score, specs
from efm_jax.runs.reader import METRIC_INDEX, SUCCESS, Run
from efm_jax.runs.workdir import CONFIG_FILE, RunInfo, read_json

_VIDEO_TYPES = {".mp4": "video/mp4", ".gif": "image/gif"}
# A file is a third larger inside the page, and browsers get slow.
_MAX_VIDEO_BYTES = 50_000_000


@dataclasses.dataclass(frozen=True)
class Curve:
    """One metric of one phase."""

    values: pd.DataFrame  # a row per step, a column per training seed; NaN: nothing finite logged
    non_finite: int  # logged values that are NaN or infinite

    @property
    def mean(self) -> pd.Series:
        """Average over the seeds that have a finite value; NaN where none has."""
        return pd.Series(self.values.mean(axis="columns"))

    @property
    def drawable(self) -> bool:
        """Tell whether anything is finite."""
        return bool(self.values.notna().any(axis=None))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One row of ``evaluations.csv`` with its episodes; numbers of one that failed are NaN."""

    row: Mapping[str, str]
    policy: str
    step: int  # gradient steps of all phases
    returns: list[np.ndarray]  # for each training seed [E]
    interval: tuple[float, float, float]  # mean, low, high: of 95%
    over: str | None  # what the interval is over; None where one episode has no interval
    score: float | None  # of the mean, normalized to 0-100
    mean_length: float
    success: float | None  # share of its episodes, in percent; None where nothing is known

    @property
    def own(self) -> bool:
        """Tell whether training measured it, and it came to numbers."""
        return self.row["started_by"] == "train" and self.row["status"] == "done"

    @property
    def sampler(self) -> str:
        """Say how actions were made."""
        row = self.row
        rule = row["action_selection"]
        chosen = "" if rule == "sample" else f", {rule} of {row['num_candidates']}"
        return f"{row['solver']}, {row['sample_steps']} steps{chosen}"

    @property
    def episodes(self) -> int:
        """Count the episodes of all seeds."""
        return sum(map(len, self.returns))


@dataclasses.dataclass(frozen=True)
class Video:
    """A recording in the work directory."""

    name: str
    kind: str  # as in "video/mp4"
    megabytes: float
    uri: str | None  # the content; None where it is too large for a page


@dataclasses.dataclass(frozen=True, eq=False)
class ReportRun:
    """One run of a report."""

    index: int  # its place in the report, which its color follows
    name: str  # short, unlike that of any other run of the report
    run: Run
    environment: str
    curves: dict[tuple[str, str], Curve]  # by phase and metric, in the order they were logged
    evaluations: list[Evaluation]  # by policy, then step, then name
    videos: list[Video]

    @property
    def info(self) -> RunInfo:
        """Return the run's record."""
        return self.run.info

    @property
    def own(self) -> list[Evaluation]:
        """Select the evaluations of training, without those that failed."""
        return [each for each in self.evaluations if each.own]

    @property
    def last(self) -> dict[str, Evaluation]:
        """Find training's latest evaluation of every policy."""
        return {each.policy: each for each in self.own}

    @property
    def data(self) -> tuple:
        """Identify the data and the environment; returns of runs that share both are comparable."""
        return self.info.fingerprint, self.info.transitions, self.environment

    @property
    def steps(self) -> int | None:
        """Count the gradient steps of all phases so far; None where nothing is logged."""
        if self.run.result is not None:
            return sum(self.info.phase_steps.values())
        return int(self.run.metrics[-1]["total_step"]) if self.run.metrics else None

    @property
    def seconds(self) -> float | None:
        """Return how long all starts of the run took together; None before its end."""
        return None if self.run.result is None else self.run.result.get("seconds")

    @property
    def fields(self) -> dict[str, str]:
        """Write every field of the configuration as text, options of an agent as NAME.FIELD."""
        values = {
            "version": read_json(self.run.path / CONFIG_FILE)["version"],
            "plugins": self.info.plugins,
            "seed": self.info.seed,
            "num_seeds": self.info.num_seeds,
            **self.info.config.to_dict(),
        }
        [flat] = pd.json_normalize(values).to_dict("records")
        return {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in flat.items()}

    def score(self, value: float) -> float | None:
        """Normalize a return to 0-100; None where nobody has measured references."""
        return normalized_score(value, self.info.reference_scores)


def load_runs(workdirs: Sequence[str]) -> list[ReportRun]:
    """Read the runs of some work directories.

    Raises:
      ValueError: a folder that is missing, given twice or holds no run, or a file that cannot be
        understood.
    """
    runs = [Run.read(workdir) for workdir in workdirs]
    paths = [run.path for run in runs]
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise ValueError(f"--workdir={workdirs[index]}: given twice")
    return [
        ReportRun(
            index=index,
            name=name,
            run=run,
            environment=specs.id_of(run.info.env_spec) or "",
            curves=_curves(run),
            evaluations=_evaluations(run),
            videos=_videos(run.path),
        )
        for index, (run, name) in enumerate(zip(runs, _names(paths), strict=True))
    ]


def _names(paths: Sequence[epath.Path]) -> list[str]:
    """Take the last parts of the paths, as many as tell them apart."""
    for count in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _curves(run: Run) -> dict[tuple[str, str], Curve]:
    rows = pd.DataFrame(
        [
            (row["phase"], metric, int(row["step"]), row["seed"], float(cell))
            for row in run.metrics
            for metric, cell in row.items()
            if cell and metric not in METRIC_INDEX
        ],
        columns=pd.Index(["phase", "metric", "step", "seed", "value"]),
    )
    rows["value"] = rows["value"].replace([np.inf, -np.inf], np.nan)
    curves = {}
    for _, group in rows.groupby(["phase", "metric"], sort=False):
        values = group.pivot_table("value", "step", "seed", dropna=False)
        phase, metric = group[["phase", "metric"]].iloc[0]
        curves[phase, metric] = Curve(values, non_finite=int(group["value"].isna().sum()))
    return curves


def _evaluations(run: Run) -> list[Evaluation]:
    episodes = {row["evaluation"]: [] for row in run.evaluations}
    for row in run.returns:
        episodes[row["evaluation"]].append(row)
    found = []
    for row in run.evaluations:
        rows = episodes[row["evaluation"]]
        returns = [
            np.array([float(each["return"]) for each in rows if int(each["seed"]) == seed])
            for seed in run.info.seeds
        ]
        returns = [values for values in returns if len(values)] or [np.array([np.nan])]
        if len(returns) > 1:
            values, over = [each.mean() for each in returns], f"over {len(returns)} seeds"
        else:
            [values] = returns
            over = f"over {len(values)} episodes" if len(values) > 1 else None
        interval = mean_and_interval(values)
        known = [int(each[SUCCESS]) for each in rows if each.get(SUCCESS)]
        rate = float(np.mean(known)) if known else np.nan
        env_id = specs.id_of(run.info.env_spec) or ""
        scored = score(interval[0], rate, run.info.reference_scores, env_id)
        success = 100 * rate if known else None
        length = float(np.mean([int(each["length"]) for each in rows] or np.nan))
        step = int(row["total_step"])
        of = row["policy"], step, returns, interval, over, scored, length, success
        found.append(Evaluation(row, *of))
    # In order of their names: the behavior model comes before what is compared with it.
    return sorted(found, key=lambda each: (each.policy, each.step, each.row["evaluation"]))


def _videos(workdir: epath.Path) -> list[Video]:
    """Read the recordings, first the one that launch.evaluate makes by default."""
    found = []
    for path in sorted(workdir.iterdir(), key=lambda path: (path.stem != "video", path.name)):
        kind = _VIDEO_TYPES.get(path.suffix)
        if kind is not None:
            uri, size = None, path.stat().length
            if size <= _MAX_VIDEO_BYTES:
                uri = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
            found.append(Video(path.name, kind, size / 1e6, uri))
    return found
