"""Train on every dataset with every preset, seed and value of a field: python -m launch.sweep

A job is one process of launch.train with the work directory ROOT/NAME; it is done once result.json
is there.  The same command again runs what is left, and a job that was interrupted continues where
it stopped.

  --datasets=A,B --configs=X.py,Y.py --seeds=0,1,2   the jobs: every combination
  --grid config.beta=1,3,10                          times these values; it may be given again
  --train_flags="--num_seeds=2 --config.beta=5"      flags of launch.train for all of them
  --workers=4                                        how many jobs run at a time
  --jobs=FILE                                        only write the commands left, one a line
  --collect                                          only write the tables of what is done

The output of a job goes to ROOT/logs/NAME.log.  ROOT/results.csv has a row per job and a column per
field of the grid, ROOT/results.md also a row per dataset, preset and values, over the seeds.  The
last line printed is JSON.
Exit status: 0 done, 1 a job failed, 2 bad flags, 130 or 143 stopped by ctrl-C or SIGTERM, jobs
saved.
"""

import itertools
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from efm_jax.data import BUILTIN_DATASET
from efm_jax.envs import mean_and_interval
from efm_jax.rl.config import describe
from efm_jax.runs.reader import read_result

from . import cli, jobs
from .jobs import Job

_PRESET = "experiments/configs/qipo_ot.py"
_PRESETS = cli.ROOT / "experiments" / "configs"
_OWN_FLAGS = ("dataset", "config", "seed", "workdir")
# What a row holds of result.json, beside the intervals.
_RESULT = (
    *("algorithm", "seeds", "steps", "dataset_return", "behavior_return", "behavior_score"),
    *("policy_return", "policy_score", "seconds", "workdir"),
)
_INTERVALS = {"behavior_interval", "policy_interval"}
_BOUNDS = ("behavior_low", "behavior_high", "policy_low", "policy_high")
# Shares of episodes; not of runs of earlier versions, nor where the environment tells of none.
_RATES = ("behavior_success", "policy_success")
# The names of the evaluations that the numbers are from; see evaluations.csv of the work directory.
_EVALUATIONS = ("behavior_evaluation", "policy_evaluation")
_COLUMNS = ("job", "dataset", "config", "seed", *_RESULT, *_RATES, *_BOUNDS, *_EVALUATIONS)
_MEASURES = ("dataset_return", "behavior_return", "policy_return", "behavior_score", "policy_score")
_NOTE = """\
Mean (95% interval over jobs, or over the seeds of a single job). Score: 0 random, 100 expert.
"""

FLAGS = cli.Flags(jobs.FLAGS)
_DATASETS = FLAGS.list("datasets", [BUILTIN_DATASET], "Values of launch.train's --dataset.")
_CONFIGS = FLAGS.list("configs", [_PRESET], "Values of launch.train's --config.")
_SEEDS = FLAGS.list("seeds", ["0"], "Values of launch.train's --seed.")
_GRID_HELP = "Values of a field, as config.beta=1,3,10 or config.hidden_dims=(64,64),(32,)."
_GRID = FLAGS.multi_string("grid", [], _GRID_HELP)


def main(_: list[str]) -> int:
    """List the jobs; write the commands, or run them and write the tables."""
    columns = (*_COLUMNS[:4], *_fields(), *_COLUMNS[4:])
    return jobs.run_and_collect(_read_jobs, columns, _read_row, _markdown)


def _fields() -> list[str]:
    """Name the fields of the grid."""
    return [text.partition("=")[0] for text in _GRID.value]


def _read_grid() -> dict[str, list[str]]:
    """Read the values of each field of the grid; what they are is for the jobs to check."""
    grid: dict[str, list[str]] = {}
    for text in _GRID.value:
        name, _, values = text.partition("=")
        field = name.removeprefix("config.")
        known = field in {known for known, *_ in describe()}
        if field == name or not (known or "." in field):  # NAME.FIELD may be a plugin's
            raise ValueError(f"--grid={text}: {cli.unknown_field(field)}")
        if name in grid:
            raise ValueError(f"--grid={text}: {name} is given twice")
        grid[name] = re.findall(r"(?:\([^)]*\)|[^,(])+", values)  # a tuple's commas are its own
        if not grid[name]:
            raise ValueError(f"--grid={text}: expected values with commas between; got none")
    return grid


def _read_jobs() -> list[Job]:
    """Read the jobs from the flags; a ``ValueError`` if they cannot be run as asked."""
    for flag in (_DATASETS, _CONFIGS, _SEEDS):
        if not flag.value or not all(flag.value):
            raise ValueError(
                f"--{flag.name}: expected values with commas between; got {flag.value}"
            )
    root = jobs.read_root("runs/sweep")
    for config in _CONFIGS.value:
        problem = cli.preset_problem(cli.find_preset(config))
        if problem is not None:
            raise ValueError(f"--configs={config}: {problem}")
    grid = _read_grid()
    train_flags = jobs.read_train_flags((*_OWN_FLAGS, *grid))
    listed = []
    points, seeds = itertools.product(*grid.values()), _read_seeds(train_flags)
    for dataset, config, point, seed in itertools.product(
        _DATASETS.value, _CONFIGS.value, points, seeds
    ):
        file, preset = pathlib.Path(dataset), pathlib.Path(cli.find_preset(config)).resolve()
        fields = dict(zip(grid, point, strict=True))
        words = [f"{name.removeprefix('config.')}{value}" for name, value in fields.items()]
        parts, unlike = [dataset, preset.stem, *words, f"seed{seed}"], list(train_flags)
        # Datasets of one file name are told apart by the folder, and so are presets.
        if file.suffix in (".hdf5", ".h5", ".npz"):
            parts[0] = file.stem
            unlike.append(dataset if "://" in dataset else os.path.abspath(file.expanduser()))
        if preset.parent != _PRESETS.resolve():
            unlike.append(str(preset))
        labels = {"dataset": dataset, "config": config, "seed": seed, **fields}
        own = [f"--{name}={value}" for name, value in labels.items()]
        name = jobs.join_name(*parts, unlike=unlike)
        listed.append(Job(name, root, labels, [*own, *train_flags]))
    return listed


def _read_seeds(train_flags: Sequence[str]) -> list[int]:
    """Read root seeds of the jobs; refuse jobs that would repeat one another's training runs."""
    try:
        seeds = [int(text) for text in _SEEDS.value]
        sizes = [
            int(flag.partition("=")[2]) for flag in train_flags if re.match("--?num_seeds=", flag)
        ]
    except ValueError as error:
        raise ValueError(f"--seeds, num_seeds: expected integers: {error}") from error
    size = sizes[-1] if sizes else 1
    ordered = sorted(seeds)
    for first, second in itertools.pairwise(ordered):
        if first != second and second - first < size:
            raise ValueError(f"--seeds: {first} and {second} share runs with --num_seeds={size}")
    if ordered[0] < 0:
        raise ValueError(f"--seeds: expected at least 0; got {ordered[0]}")
    return seeds


def _read_row(job: Job) -> dict[str, Any]:
    row = {"job": job.name} | job.row((*_RESULT, *_INTERVALS))
    result = read_result(job.workdir) or {}
    row |= {name: result.get(name) for name in _RATES}
    # Runs of earlier versions gave evaluations no names.
    names = result.get("evaluations", {})
    row |= {f"{policy}_evaluation": name for policy, name in names.items()}
    for name in _INTERVALS & row.keys():
        policy, (low, high) = name.removesuffix("_interval"), row.pop(name)
        row |= {f"{policy}_low": low, f"{policy}_high": high}
    return row


def _markdown(table: pd.DataFrame) -> str:
    """Show means over the seeds of each dataset, preset and values, then the jobs."""
    by_job = _means(table, "job").drop(columns=["jobs", "seeds"])
    means = _means(table, "dataset", "config", *_fields())
    return f"{jobs.to_markdown(means)}\n\n{_NOTE}\n{jobs.to_markdown(by_job)}\n"


def _means(table: pd.DataFrame, *keys: str) -> pd.DataFrame:
    """Sum up the jobs that are alike in the columns ``keys``."""
    rows = []
    for _, group in table.groupby(list(keys), sort=False):
        labels = {key: group[key].iloc[0] for key in keys}
        done = group.dropna(subset="seeds")
        row = {"jobs": f"{len(done)} of {len(group)}", "seeds": done["seeds"].sum()}
        known = [name for name in _RATES if table[name].notna().any()]
        measures = {name.replace("_", " "): _mean(done, name) for name in _MEASURES}
        percent = done.assign(**{name: 100 * done[name].astype(float) for name in known})
        measures |= {f"{name.replace('_', ' ')} %": _mean(percent, name) for name in known}
        rows.append({**labels, **row, **measures})
    return pd.DataFrame(rows)


def _mean(done: pd.DataFrame, name: str) -> str:
    """Show a measure's mean and interval over jobs; of one job the interval over its own seeds."""
    values = done[name].to_numpy()
    if done.empty or pd.isna(values).any():
        return ""
    mean, *interval = mean_and_interval(values)
    if len(done) == 1:
        policy, seeds = name.removesuffix("_return"), done["seeds"].item()
        own = done.filter([f"{policy}_low", f"{policy}_high"]).iloc[0]
        interval = own if seeds > 1 else ()
    return jobs.estimate(mean, *interval)


command = cli.command(main, FLAGS)

if __name__ == "__main__":
    command()
