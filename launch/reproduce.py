"""Put QIPO's scores on D4RL's tasks beside the published: python -m launch.reproduce [--flags]

For every task and algorithm one process of launch.train trains all seeds in one program, with the
settings of experiments/configs/d4rl/ (the paper's, or those of code that is likely its authors')
and the work directory ROOT/NAME.  The same command again runs
what is left, and a job that was interrupted continues where it stopped.  All of it is work for
accelerators, and for days.

  --tasks=locomotion,antmaze-umaze-v2    tasks, or the groups locomotion (nine) and antmaze (six)
  --algorithms=qipo_ot,qipo_diff --settings=paper,code --seeds=8
  --files=DIR                            folder of D4RL's locomotion files; by default downloaded
  --train_flags="--parallel=seeds --config.estimator=resample"   flags of launch.train for all jobs
  --workers=4 --jobs=FILE --collect      as in launch.sweep

AntMaze is trained on Minari's D4RL/antmaze/*-v1 (MINARI_DATASETS_PATH, else downloaded): D4RL's own
AntMaze files cannot be evaluated, for no environment has their observations.  ROOT/results.csv and
ROOT/results.md have a row per task, algorithm and settings.  The last line printed is JSON.
Exit status: 0 done, 1 a job failed, 2 bad flags, 130 or 143 stopped by ctrl-C or SIGTERM, jobs
saved.
"""

import itertools
import math
import pathlib
import posixpath
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd

from efm_jax.data.d4rl_files import D4RL_FILES
from efm_jax.envs import dataset_references, mean_and_interval, normalized_score
from efm_jax.runs.reader import RETURN_COLUMNS, Run

from . import cli, jobs

LOCOMOTION = tuple(
    f"{body}-{data}-v2"
    for body in ("halfcheetah", "hopper", "walker2d")
    for data in ("medium-expert", "medium", "medium-replay")
)
_MAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
ANTMAZE = tuple(f"antmaze-{maze}-v2" for maze in _MAZES)
_GROUPS = {"locomotion": LOCOMOTION, "antmaze": ANTMAZE}
_SETTINGS = {"paper": "", "code": "_code"}  # how the presets' names end
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
    *("task", "algorithm", "settings", "dataset", "seeds", "steps", "behavior"),
    *("last", "last_low", "last_high", "best", "best_low", "best_high"),
    *("published", "last_difference", "best_difference", "seconds", "workdir"),
)
_NOTES = """\
Normalized scores: 0 random, 100 expert; mean over training seeds (95% interval over them).

- *last* is the policy at the end; *best* takes of every seed its best evaluation, and so gains from
  the luck of the episodes that it is chosen by, as published scores that are chosen so do.
- *published* are means that a public index lists for arXiv 2503.04975, of six of the fifteen tasks,
  without saying of which of the two algorithms: both are compared with them.  The other nine are
  unknown.
- Where the settings *paper* and *code* differ, neither is the truth: that the code, a public copy
  under the name of the method, is the authors' own is likely, not proven.
- Locomotion is evaluated in Gymnasium's v5 environments unless the data or --env names others; the
  published scores are of v2, and references (0 and 100) are D4RL's.
- AntMaze is trained on Minari's recordings and evaluated in Gymnasium Robotics; the published
  scores are of D4RL's own.  A score is the share of episodes that reach the goal.
"""

FLAGS = cli.Flags(jobs.FLAGS)
_TASKS = FLAGS.list("tasks", list(_GROUPS), "Names of D4RL's tasks, or locomotion, antmaze.")
_NAMES = FLAGS.list("algorithms", list(_ALGORITHMS), "Of qipo_ot and qipo_diff.")
_SETTINGS_FLAG = FLAGS.list("settings", ["paper"], "Of paper and code.")
_SEEDS = FLAGS.integer("seeds", 8, "Training runs of each job, seeds 0, 1, ...", 1)
_FILES = FLAGS.string(
    "files", None, "Folder of locomotion files, with the names that D4RL gave them or TASK.hdf5."
)


def main(_: list[str]) -> int:
    """List the jobs; write the commands, or run them and write the tables."""
    return jobs.run_and_collect(_read_jobs, _COLUMNS, _read_row, _markdown)


def _read_jobs() -> list[jobs.Job]:
    """Read the jobs from the flags; a ``ValueError`` if they cannot be run as asked."""
    tasks = [task for name in _TASKS.value for task in _GROUPS.get(name, (name,))]
    _check_names("tasks", tasks, (*LOCOMOTION, *ANTMAZE), _GROUPS)
    _check_names("algorithms", _NAMES.value, _ALGORITHMS)
    _check_names("settings", _SETTINGS_FLAG.value, _SETTINGS)
    root, train_flags = jobs.read_root("runs/reproduce"), jobs.read_train_flags(_OWN_FLAGS)
    seeds, listed = _SEEDS.value, []
    of = itertools.product(tasks, _NAMES.value, _SETTINGS_FLAG.value)
    for task, algorithm, settings in of:
        preset = ("antmaze" if task in ANTMAZE else "locomotion") + _SETTINGS[settings]
        labels = {"task": task, "algorithm": algorithm, "settings": settings}
        labels["dataset"] = _dataset(task, _FILES.value)
        name = jobs.join_name(
            *(task, algorithm, settings, f"{seeds}seeds"),
            unlike=[*train_flags, *([labels["dataset"]] if _FILES.value else [])],
        )
        own = [
            *(f"--dataset={labels['dataset']}", f"--config=experiments/configs/d4rl/{preset}.py"),
            *("--seed=0", f"--num_seeds={seeds}", _ALGORITHMS[algorithm]),
        ]
        listed.append(jobs.Job(name, root, labels, [*own, *train_flags]))
    return listed


def _check_names(
    flag: str, names: Sequence[str], known: Collection[str], groups: Collection[str] = ()
) -> None:
    for name in names or [""]:
        if name not in known:
            some = ", ".join((*groups, *known))
            raise ValueError(f"--{flag}: expected some of {some}; got {name!r}")


def _dataset(task: str, folder: str | None) -> str:
    """Name a task's --dataset; a ``ValueError`` where its file is not in ``folder``."""
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


def seed_scores(task: str, returns: pd.DataFrame) -> pd.DataFrame:
    """Score every seed (column) at every evaluation (policy, total step), by its mean return.

    In AntMaze an episode of D4RL's ends at the goal with return 1.  Where it goes on and collects
    more, it counts once all the same.
    """
    values = returns["return"].astype(float).clip(upper=1.0 if task in ANTMAZE else None)
    scores = normalized_score(values.to_numpy(), dataset_references(None, task, None))
    scored = returns.assign(score=scores, total_step=returns["total_step"].astype(int))
    return scored.pivot_table("score", ["policy", "total_step"], "seed")


def _read_row(job: jobs.Job) -> dict[str, Any]:
    task = job.labels["task"]
    published = PUBLISHED.get(task, math.nan)
    row = job.row(("seeds", "steps", "seconds", "workdir")) | {"published": published}
    if "seeds" not in row:
        return row
    returns = pd.DataFrame(Run.read(job.workdir).own_returns, columns=pd.Index(RETURN_COLUMNS))
    scores = seed_scores(task, returns)
    if not {"behavior", "policy"} <= set(returns["policy"]) or scores.isna().to_numpy().any():
        raise ValueError(
            f"{job.workdir}: the run is done, but its returns.csv has no evaluation of it"
        )
    row["behavior"] = scores.loc["behavior"].iloc[-1].mean()
    policy = scores.loc["policy"].to_numpy()  # [evaluations, seeds]
    for name, values in (("last", policy[-1]), ("best", policy.max(axis=0))):
        row[name], row[f"{name}_low"], row[f"{name}_high"] = mean_and_interval(values)
        row[f"{name}_difference"] = row[name] - published
    return row


def _markdown(table: pd.DataFrame) -> str:
    """Show a line per job, and the mean differences of each algorithm and settings."""
    shown = table.filter(["task", "algorithm", "settings"])
    shown["seeds"] = table["seeds"].astype("string").fillna("")
    shown["behavior"] = table["behavior"].map(jobs.estimate)
    for name in ("last", "best"):
        cells = table[[name, f"{name}_low", f"{name}_high"]].to_numpy()
        ends = np.where(table["seeds"].fillna(0) > 1, 3, 1)  # because one seed has no interval
        shown[name] = [jobs.estimate(*row[:end]) for row, end in zip(cells, ends, strict=True)]
    shown["published"] = table["published"].map(jobs.estimate).replace("", "unknown")
    for name in ("last", "best"):
        differences = table[f"{name}_difference"]
        shown[f"{name} - published"] = ["" if pd.isna(x) else f"{x:+.1f}" for x in differences]
    lines = []
    for labels, rows in table.groupby(["algorithm", "settings"], sort=False):
        both = rows[["last_difference", "best_difference"]].dropna()
        done = f"{rows['seeds'].count()} of {len(rows)} tasks done"
        text = f"{', '.join(map(str, labels))}: {done}, {len(both)} of them published"
        if len(both):
            text += "; mean difference {:+.1f} (last), {:+.1f} (best)".format(
                *both.to_numpy().mean(axis=0)
            )
        lines.append(f"{text}.  \n")  # two spaces: a line of its own
    return f"{jobs.to_markdown(shown)}\n\n{''.join(lines)}\n{_NOTES}"


command = cli.command(main, FLAGS)

if __name__ == "__main__":
    command()
