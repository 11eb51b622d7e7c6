"""Train QIPO on D4RL's tasks, and put its scores beside the published: python -m launch.reproduce
[--flags]

For every task and algorithm one process of launch.train trains all seeds in one program, with the
settings of experiments/configs/d4rl/ and the work directory ROOT/NAME.  The same command again runs
what is left, and a job that was interrupted continues where it stopped.  All of it is work for
accelerators, and for days.

  --tasks=locomotion,antmaze-umaze-v2    tasks, or the groups locomotion (nine) and antmaze (six)
  --algorithms=qipo_ot,qipo_diff --seeds=8
  --files=DIR                            D4RL's locomotion files are here; by default they are downloaded
  --train_flags="--parallel=seeds --config.estimator=resample"   flags of launch.train for all jobs
  --workers=4 --jobs=FILE --collect      as in launch.sweep

AntMaze is trained on Minari's D4RL/antmaze/*-v1 (MINARI_DATASETS_PATH, else downloaded): D4RL's own
AntMaze files cannot be evaluated, for no environment has their observations.  ROOT/results.csv and
ROOT/results.md have a row per task and algorithm.  The last line printed is JSON.
Exit status: 0 done, 1 a job failed, 2 bad flags, 130 or 143 stopped by ctrl-C or SIGTERM, jobs
saved.
"""

import collections
import csv
import dataclasses
import io
import itertools
import pathlib
import posixpath
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from efm_jax.data.d4rl_files import D4RL_FILES
from efm_jax.envs import mean_and_interval, normalized_score, reference_scores
from launch import cli, jobs
from launch.jobs import Job, head, join_name, row
from launch.report.runs import load_runs

LOCOMOTION = tuple(
    f"{body}-{data}-v2"
    for body in ("halfcheetah", "hopper", "walker2d")
    for data in ("medium-expert", "medium", "medium-replay")
)
ANTMAZE = tuple(
    f"antmaze-{maze}-v2"
    for maze in (
        "umaze",
        "umaze-diverse",
        "medium-play",
        "medium-diverse",
        "large-play",
        "large-diverse",
    )
)
_GROUPS = {"locomotion": LOCOMOTION, "antmaze": ANTMAZE}
_ALGORITHMS = {"qipo_ot": "--config.path=ot", "qipo_diff": "--config.path=vp"}
# Mean scores of Zhang et al. 2025 (arXiv 2503.04975, Table 2) as a public index of results lists
# them, https://www.wizwand.com/paper/68fa77471e209131cea722ef: of these six tasks only, and without
# saying whether they are QIPO-OT's or QIPO-Diff's.
PUBLISHED = {
    "halfcheetah-medium-v2": 54.2,
    "halfcheetah-medium-replay-v2": 48.0,
    "walker2d-medium-v2": 87.6,
    "walker2d-medium-replay-v2": 90.1,
    "hopper-medium-replay-v2": 101.2,
    "antmaze-umaze-diverse-v2": 76.1,
}
_OWN_FLAGS = ("dataset", "config", "seed", "num_seeds", "workdir", "config.path", "config.policy")
_COLUMNS = (
    "task", "algorithm", "dataset", "seeds", "steps", "behavior", "last", "last_low", "last_high",
    "best", "best_low", "best_high", "published", "last_difference", "best_difference", "seconds", "workdir",
)  # fmt: skip
_NOTES = """\
Normalized scores: 0 random, 100 expert; mean over training seeds (95% interval over them).

- *last* is the policy at the end of training; *best* takes of every seed its best evaluation, and so gains
  from the luck of the episodes that it is chosen by, as published scores that are chosen so do.
- *published* are the means that a public index lists for arXiv 2503.04975; it has six of the fifteen tasks,
  and does not say which of the two algorithms they are of.  Both are compared with them.
- Locomotion is evaluated in Gymnasium's v5 environments unless the data or --env names others; the published
  scores are of v2, and references (0 and 100) are D4RL's.
- AntMaze is trained on Minari's recordings and evaluated in Gymnasium Robotics; the published scores are of
  D4RL's files and environments.  A score is the share of episodes that reach the goal.
"""

_TASKS = flags.DEFINE_list("tasks", list(_GROUPS), "Names of D4RL's tasks, or locomotion, antmaze.")
_ALGORITHM_NAMES = flags.DEFINE_list("algorithms", list(_ALGORITHMS), "Of qipo_ot and qipo_diff.")
_SEEDS = flags.DEFINE_integer("seeds", 8, "Training runs of each job, seeds 0, 1, ...", 1)
_FILES = flags.DEFINE_string(
    "files", None, "Folder of locomotion files, with the names that D4RL gave them or TASK.hdf5."
)
_TRAIN_FLAGS = flags.DEFINE_string("train_flags", "", "More flags of launch.train, as in a shell.")
_ROOT = flags.DEFINE_string(
    "root", "runs/reproduce", "Folder of the work directories, logs and tables."
)
_WORKERS = flags.DEFINE_integer("workers", 1, "Jobs at a time.", 1)
_JOBS = flags.DEFINE_string(
    "jobs", None, "Only write the commands of jobs that are not done to this file."
)
_COLLECT = flags.DEFINE_bool("collect", False, "Only write the tables of the jobs that are done.")


@dataclasses.dataclass(frozen=True)
class TaskJob(Job):
    """All seeds of an algorithm on a task."""

    task: str
    algorithm: str
    num_seeds: int

    @property
    def name(self) -> str:
        """Says what the job is; more ``train_flags`` than its own give another name."""
        own = (f"--num_seeds={self.num_seeds}", _ALGORITHMS[self.algorithm])
        more = [flag for flag in self.train_flags if flag not in own]
        return join_name(self.task, self.algorithm, f"{self.num_seeds}seeds", train_flags=more)


def main(_: list[str]) -> int:
    """List the jobs; write the commands, or run them and write the tables."""
    with cli.usage_errors():
        listed = _read_jobs()
    return jobs.run_and_collect(
        "launch.reproduce",
        listed,
        _tables,
        workers=_WORKERS.value,
        commands=_JOBS.value,
        collect=_COLLECT.value,
    )


def _tables(listed: Sequence[TaskJob]) -> jobs.Tables:
    rows = [_result(job) for job in listed]
    return jobs.Tables(_csv(rows), _markdown(rows))


def _read_jobs() -> list[TaskJob]:
    """The jobs that the flags ask for; a ``ValueError`` if they cannot be run as asked."""
    tasks = [task for name in _TASKS.value for task in _GROUPS.get(name, (name,))]
    _check_names("tasks", tasks, (*LOCOMOTION, *ANTMAZE), also=tuple(_GROUPS))
    _check_names("algorithms", _ALGORITHM_NAMES.value, tuple(_ALGORITHMS))
    if _JOBS.value is not None and _COLLECT.value:
        raise ValueError("--jobs, --collect: give one of them")
    runs_here = _JOBS.value is None and not _COLLECT.value
    root = jobs.read_root(_ROOT.value, runs_here=runs_here, collect=_COLLECT.value)
    train_flags = jobs.read_train_flags(_TRAIN_FLAGS.value, _OWN_FLAGS)
    return [
        TaskJob(
            dataset=_dataset(task, _FILES.value),
            config=f"experiments/configs/d4rl/{'antmaze' if task in ANTMAZE else 'locomotion'}.py",
            seed=0,
            train_flags=(f"--num_seeds={_SEEDS.value}", _ALGORITHMS[algorithm], *train_flags),
            root=root,
            task=task,
            algorithm=algorithm,
            num_seeds=_SEEDS.value,
        )
        for task, algorithm in itertools.product(tasks, _ALGORITHM_NAMES.value)
    ]


def _check_names(
    flag: str, names: Sequence[str], known: Sequence[str], also: Sequence[str] = ()
) -> None:
    if not names:
        raise ValueError(f"--{flag}: expected values with commas between; got none")
    for name in names:
        if name not in known:
            raise ValueError(
                f"--{flag}: expected some of {', '.join((*also, *known))}; got {name!r}"
            )
        if names.count(name) > 1:
            raise ValueError(f"--{flag}: {name} is asked for twice")


def _dataset(task: str, folder: str | None) -> str:
    """Value of ``launch.train``'s --dataset; a ``ValueError`` where ``folder`` lacks the task's file."""
    if task in ANTMAZE:
        return f"D4RL/antmaze/{task.removeprefix('antmaze-').removesuffix('-v2')}-v1"
    if folder is None:
        return task
    names = (posixpath.basename(D4RL_FILES[task]), f"{task}.hdf5")
    for name in names:
        path = pathlib.Path(folder).expanduser() / name
        if path.is_file():
            return str(path)
    raise ValueError(f"--files={folder}: has neither {names[0]} nor {names[1]}, of the task {task}")


def seed_scores(task: str, returns: dict[int, np.ndarray]) -> np.ndarray:
    """The score ``[K]`` of each seed on a task, of the returns of its episodes.

    In AntMaze an episode of D4RL's ends at the goal with return 1.  Where it goes on and collects
    more, it counts once all the same.
    """
    episodes = [np.minimum(each, 1.0) if task in ANTMAZE else each for each in returns.values()]
    return normalized_score(np.array([each.mean() for each in episodes]), reference_scores(task))


def _result(job: TaskJob) -> dict[str, Any]:
    """The job's row of the table; only what was asked for and what is published where it is not done."""
    published = PUBLISHED.get(job.task)
    cells = {
        "task": job.task,
        "algorithm": job.algorithm,
        "dataset": job.dataset,
        "published": published,
    }
    result = job.result(("seeds", "steps", "seconds", "workdir"))
    if result is None:
        return dict.fromkeys(_COLUMNS) | cells
    [run] = load_runs([str(job.workdir)])
    scores: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for evaluation in run.evaluations:
        scores[evaluation.policy].append(seed_scores(job.task, evaluation.returns))
    if not scores.keys() >= {"behavior", "policy"}:
        raise ValueError(
            f"{job.workdir}: the run is done, but its returns.csv has no evaluation of it"
        )
    cells |= result | {"behavior": float(scores["behavior"][-1].mean())}
    for name, values in (
        ("last", scores["policy"][-1]),
        ("best", np.max(scores["policy"], axis=0)),
    ):
        mean, low, high = mean_and_interval(values)
        cells |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        cells[f"{name}_difference"] = None if published is None else mean - published
    return dict.fromkeys(_COLUMNS) | cells


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A line per row, and the mean differences of each algorithm."""
    lines = head(
        "task", "algorithm", "seeds", "behavior", "last", "best", "published", "last - published",
        "best - published",
    )  # fmt: skip
    for cells in rows:
        seeds = "" if cells["seeds"] is None else str(cells["seeds"])
        differences = (_number(cells[f"{name}_difference"], "+.1f") for name in ("last", "best"))
        means = (_number(cells["behavior"]), _mean(cells, "last"), _mean(cells, "best"))
        lines.append(
            row(
                cells["task"],
                cells["algorithm"],
                seeds,
                *means,
                _number(cells["published"]),
                *differences,
            )
        )
    lines += ["", *_differences(rows), "", _NOTES.rstrip()]
    return "\n".join(lines) + "\n"


def _differences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence per algorithm, over the tasks that are done and published."""
    sentences = []
    for algorithm in dict.fromkeys(cells["algorithm"] for cells in rows):
        of_it = [cells for cells in rows if cells["algorithm"] == algorithm]
        both = [cells for cells in of_it if cells["last_difference"] is not None]
        done = sum(cells["seeds"] is not None for cells in of_it)
        text = f"{algorithm}: {done} of {len(of_it)} tasks done, {len(both)} of them published"
        if both:
            means = [
                np.mean([cells[f"{name}_difference"] for cells in both])
                for name in ("last", "best")
            ]
            text += f"; mean difference {means[0]:+.1f} (last), {means[1]:+.1f} (best)"
        sentences.append(f"{text}.  ")  # two spaces: a line of its own
    return sentences


def _mean(cells: dict[str, Any], name: str) -> str:
    if cells["seeds"] is None or cells["seeds"] == 1:
        return _number(cells[name])
    return f"{cells[name]:.1f} ({cells[f'{name}_low']:.1f} to {cells[f'{name}_high']:.1f})"


def _number(value: float | None, style: str = ".1f") -> str:
    return "" if value is None else format(value, style)


if __name__ == "__main__":
    cli.run(main)
