"""Train on every dataset with every preset and seed: python -m launch.sweep [--flags]

A job is one process of launch.train with the work directory ROOT/NAME; it is done once result.json
is there.  The same command again runs what is left, and a job that was interrupted continues where
it stopped.

  --datasets=A,B --configs=X.py,Y.py --seeds=0,1,2   the jobs: every combination
  --train_flags="--num_seeds=2 --config.beta=5"      flags of launch.train for all of them
  --workers=4                                        how many jobs run at a time
  --jobs=FILE                                        run nothing; write the commands left, one a line
  --collect                                          run nothing; write the tables of what is done

The output of a job goes to ROOT/logs/NAME.log.  ROOT/results.csv has a row per job, ROOT/results.md
also one per dataset and preset, over the seeds.  The last line printed is JSON.
Exit status: 0 done, 1 a job failed, 2 bad flags, 130 or 143 stopped by ctrl-C or SIGTERM, jobs
saved.
"""

import collections
import csv
import io
import itertools
import re
from collections.abc import Sequence
from typing import Any

from absl import flags

from efm_jax.data import BUILTIN_DATASET
from efm_jax.envs import mean_and_interval
from launch import cli, jobs
from launch.jobs import Job, head, row

_PRESET = "experiments/configs/qipo_ot.py"
_OWN_FLAGS = ("dataset", "config", "seed", "workdir")
# What a row holds of result.json, beside the intervals.
_COLUMNS = ("algorithm", "seeds", "steps", "dataset_return", "behavior_return", "behavior_score",
            "policy_return", "policy_score", "seconds", "workdir")  # fmt: skip
_INTERVALS = ("behavior_interval", "policy_interval")
_MEASURES = ("dataset_return", "behavior_return", "policy_return", "behavior_score", "policy_score")

_DATASETS = flags.DEFINE_list("datasets", [BUILTIN_DATASET], "Values of launch.train's --dataset.")
_CONFIGS = flags.DEFINE_list("configs", [_PRESET], "Values of launch.train's --config.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Values of launch.train's --seed.")
_TRAIN_FLAGS = flags.DEFINE_string("train_flags", "", "More flags of launch.train, as in a shell.")
_ROOT = flags.DEFINE_string(
    "root", "runs/sweep", "Folder of the work directories, logs and tables."
)
_WORKERS = flags.DEFINE_integer(
    "workers",
    1,
    "Jobs at a time. A TPU host has room for one; jobs share a GPU's memory as JAX is told.",
    1,
)
_JOBS = flags.DEFINE_string(
    "jobs", None, "Only write the commands of jobs that are not done to this file."
)
_COLLECT = flags.DEFINE_bool("collect", False, "Only write the tables of the jobs that are done.")


def main(_: list[str]) -> int:
    """List the jobs; write the commands, or run them and write the tables."""
    with cli.usage_errors():
        listed = _read_jobs()
    return jobs.run_and_collect(
        "launch.sweep",
        listed,
        _tables,
        workers=_WORKERS.value,
        commands=_JOBS.value,
        collect=_COLLECT.value,
    )


def _tables(listed: Sequence[Job]) -> jobs.Tables:
    results = {job: job.result((*_COLUMNS, *_INTERVALS)) for job in listed}
    return jobs.Tables(_csv(results), _markdown(results))


def _read_jobs() -> list[Job]:
    """The jobs that the flags ask for; a ``ValueError`` if they cannot be run as asked."""
    for flag in (_DATASETS, _CONFIGS, _SEEDS):
        if not flag.value or not all(flag.value):
            raise ValueError(
                f"--{flag.name}: expected values with commas between; got {flag.value}"
            )
    if _JOBS.value is not None and _COLLECT.value:
        raise ValueError("--jobs, --collect: give one of them")
    runs_here = _JOBS.value is None and not _COLLECT.value
    root = jobs.read_root(_ROOT.value, runs_here=runs_here, collect=_COLLECT.value)
    for config in _CONFIGS.value:
        jobs.check_preset("configs", config)
    train_flags = jobs.read_train_flags(_TRAIN_FLAGS.value, _OWN_FLAGS)
    seeds = _read_seeds(train_flags)
    combinations = itertools.product(_DATASETS.value, _CONFIGS.value, seeds)
    listed = [Job(*combination, tuple(train_flags), root) for combination in combinations]
    name, count = collections.Counter(job.name for job in listed).most_common(1)[0]
    if count > 1:
        twice = [f"({job.dataset}, {job.config}, {job.seed})" for job in listed if job.name == name]
        raise ValueError(f"jobs {' and '.join(twice)}: all of them would be named {name}")
    return listed


def _read_seeds(train_flags: Sequence[str]) -> list[int]:
    """Root seeds of the jobs; refuses jobs that would repeat one another's training runs."""
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


def _csv(results: dict[Job, dict[str, Any] | None]) -> str:
    """A row per job; what it does not have yet is empty."""
    bounds = [f"{name}_{end}" for name in ("behavior", "policy") for end in ("low", "high")]
    text = io.StringIO()
    writer = csv.DictWriter(
        text,
        ["job", "dataset", "config", "seed", *_COLUMNS, *bounds],
        restval="",
        lineterminator="\n",
    )
    writer.writeheader()
    for job, result in results.items():
        cells = {"job": job.name, "dataset": job.dataset, "config": job.config, "seed": job.seed}
        if result is not None:
            ends = [end for name in _INTERVALS for end in result[name]]
            cells |= {name: result[name] for name in _COLUMNS} | dict(
                zip(bounds, ends, strict=True)
            )
        writer.writerow(cells)
    return text.getvalue()


def _markdown(results: dict[Job, dict[str, Any] | None]) -> str:
    """Means over the seeds of each dataset and preset, then the jobs."""
    groups = collections.defaultdict(list)
    for job, result in results.items():
        groups[job.dataset, job.config].append(result)
    measures = [name.replace("_", " ") for name in _MEASURES]
    lines = head("dataset", "config", "jobs", "seeds", *measures)
    for (dataset, config), group in groups.items():
        done = [result for result in group if result is not None]
        counts = (f"{len(done)} of {len(group)}", str(sum(result["seeds"] for result in done)))
        lines.append(row(dataset, config, *counts, *(_mean(done, name) for name in _MEASURES)))
    interval = "95% interval over jobs, or over the seeds of a single job"
    lines += ["", f"Mean ({interval}). Score: 0 random, 100 expert.", ""]
    lines += head("job", *measures)
    for job, result in results.items():
        done = [] if result is None else [result]
        lines.append(row(job.name, *(_mean(done, name) for name in _MEASURES)))
    return "\n".join(lines) + "\n"


def _mean(results: Sequence[dict[str, Any]], name: str) -> str:
    """Mean of a measure over jobs and its interval; of a single job the interval over its own seeds."""
    values = [result[name] for result in results]
    if not values or None in values:
        return ""
    mean, *interval = mean_and_interval(values)
    if len(values) == 1:
        own = results[0].get(f"{name.removesuffix('_return')}_interval")
        interval = own if results[0]["seeds"] > 1 else None
    return f"{mean:.1f}" + (f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else "")


if __name__ == "__main__":
    cli.run(main)
