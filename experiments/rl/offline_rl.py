"""QIPO beside the policies it will be compared with, on the same behavior models and critics.

    python -m experiments.rl.offline_rl [--datasets=pendulum,hopper=ID_OR_FILE,...] [--methods=...]
        [--seeds=3] [--out=runs/offline_rl] [--stages=FOLDER] [--smoke] [--report]

Every dataset is of a family (its environment's), and every family has one preset; a method is that
preset with a few fields changed (``METHODS``).  For every dataset the behavior model of each path
and each critic are trained once, for all seeds in one program, and shared by the methods, which
differ in their policy phase alone.  All are evaluated on the same episodes, during the policy phase
and at its end.

``--out`` gets returns.csv (every episode of every evaluation), renewals.csv (what renewals and
guard log), stages/ (trained behavior models and critics) and, from ``--report`` or at the end,
table.md, summary.json and figures.  What is in returns.csv is not computed again; processes with
different ``--datasets`` may share the folder.

A run's score is the mean over the episodes of its last evaluation ("last"), or of the evaluation
with the largest mean ("best": chosen on the episodes it is reported on, so too high; published
tables often do that).  Aggregates are over runs (datasets x seeds) with rliable (the extra
``study``), which resamples seeds within each dataset: interquartile mean with stratified bootstrap
intervals, performance profiles, probability of improvement (Agarwal et al. 2021, arXiv 2108.13264).
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from efm_jax.envs import mean_and_interval
from efm_jax.files import write_whole
from efm_jax.rl.config import QIPOConfig
from experiments import figures
from experiments.results import parse_names
from experiments.rl.study import Study, make_parser, parse_datasets, total_beta

_VP = {"path": "vp", "solver": "dpmpp", "sample_steps": 20}  # docs/performance.md: 10 are too few
# Fields that a method changes in its family's preset.  Those that tilt once do it as far as QIPO in
# the end.
METHODS: dict[str, Callable[[QIPOConfig], dict[str, Any]]] = {
    "bc": lambda c: {"policy": "bc"},
    "bc-diff": lambda c: {"policy": "bc", **_VP},
    "best-of-n": lambda c: {"policy": "bc", "action_selection": "best"},
    "gaussian": lambda c: {"policy": "gaussian", "beta": 3.0},  # the temperature of IQL's authors
    "reweight": lambda c: {"policy": "reweight", "beta": total_beta(c)},
    "qgpo": lambda c: {"policy": "qgpo", "beta": total_beta(c), **_VP},
    "qipo-ot": lambda c: {},
    "qipo-diff": lambda c: dict(_VP),
}
BOOTSTRAP = 2000
REFERENCE = "qipo-ot"  # compared with every other method
# Of each method: value, low and high end of its interval.
Aggregates = dict[str, dict[str, list[float]]]

_TEXT = """Mean scores over {episodes} episodes, ± standard deviation over seeds.

Last checkpoint:

{last}

Best evaluated checkpoint:

{best}
"""
_AGGREGATES = """
Over all datasets, last checkpoint, with 95% stratified bootstrap intervals:

{table}
"""


def collect(rows: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Find last and best scores of finished runs, indexed by dataset, method and seed."""
    run = ["dataset", "method", "seed"]
    means = rows.groupby([*run, "step", "final"], sort=False)["score"].mean()
    last = means[means.index.get_level_values("final") == 1].droplevel(["step", "final"])
    return last, means.groupby(run, sort=False).max().reindex(last.index)


def table(scores: pd.Series) -> str:
    """Lay out datasets down, methods across: mean and deviation over seeds, the best in bold."""
    runs = scores.groupby(["dataset", "method"], sort=False)
    means = runs.mean()
    cells = means.map("{:.1f} ± ".format) + runs.std().fillna(0).map("{:.1f}".format)
    best = means == means.groupby("dataset").transform("max")
    cells = cells.mask(best, "**" + cells + "**").unstack("method", fill_value="")
    order = {"index": means.index.unique("dataset"), "columns": means.index.unique("method")}
    return cells.reindex(**order).to_markdown(disable_numparse=True)


def matrices(scores: pd.Series) -> dict[str, np.ndarray]:
    """Find ``{method: [seeds, datasets]}`` of the methods that ran on every dataset.

    The seeds are those that all runs have.
    """
    runs = scores.unstack("seed").reindex(scores.index.droplevel("seed").unique()).dropna(axis=1)
    datasets = runs.index.unique("dataset").size
    by_method = runs.groupby("method", sort=False)
    return {method: run.to_numpy().T for method, run in by_method if len(run) == datasets}


def aggregates(runs: dict[str, np.ndarray]) -> Aggregates:
    """Estimate IQM, median and mean, and the probability that REFERENCE is better."""
    # Here, because the import takes seconds and needs the extra "study".
    from rliable import library, metrics

    def intervals(runs: dict, **functions: Callable) -> Aggregates:
        def estimate(*x: np.ndarray) -> np.ndarray:
            return np.array([function(*x) for function in functions.values()])

        points, ends = library.get_interval_estimates(runs, estimate, reps=BOOTSTRAP)
        found = {method: np.vstack([points[method], ends[method]]).T.tolist() for method in runs}
        return {method: dict(zip(functions, found[method], strict=True)) for method in runs}

    of_one = {name: getattr(metrics, f"aggregate_{name}") for name in ("iqm", "median", "mean")}
    found = intervals(runs, **of_one)
    others = [method for method in runs if method != REFERENCE]
    if REFERENCE in runs and others:
        pairs = {method: (runs[REFERENCE], runs[method]) for method in others}
        compared = intervals(pairs, reference_better=metrics.probability_of_improvement)
        for method, values in compared.items():
            found[method] |= values
    return found


def plot_aggregates(found: Aggregates, path: pathlib.Path) -> None:
    """Draw IQM and probability of improvement of every method, with their intervals."""
    titles = {"iqm": "Interquartile mean of scores"}
    titles |= {"reference_better": f"P({figures.WORDS[REFERENCE]} better than this row)"}
    with figures.drawn(path, 10, 0.42 * len(found) + 1.4) as figure:
        panels = figure.subplots(1, 2)
        for axes, (key, title) in zip(panels, titles.items(), strict=True):
            for i, (method, values) in enumerate(found.items()):
                if key in values:
                    value, low, high = values[key]
                    color = figures.METHODS.get(method)
                    axes.barh(i, high - low, left=low, height=0.6, color=color, alpha=0.35)
                    axes.vlines(value, i - 0.3, i + 0.3, color=color, linewidth=2)
            axes.set_yticks(range(len(found)), [figures.WORDS.get(name, name) for name in found])
            axes.set(title=title, ylim=(len(found) - 0.5, -0.5))
            axes.grid(visible=False, axis="y")
        panels[0].set_xlim(left=0)  # bars that start elsewhere look more different than they are
        panels[1].axvline(0.5, **figures.REFERENCE)
        panels[1].set_xlim(0, 1)


def plot_profiles(runs: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Draw performance profiles: the share of runs with a score above tau."""
    from rliable import library

    taus = np.linspace(0, 115, 116)
    profiles, intervals = library.create_performance_profile(runs, taus, reps=BOOTSTRAP)
    with figures.drawn(path, 7.5, 4.2) as figure:
        axes = figure.subplots()
        for method in runs:
            style = {"color": figures.METHODS.get(method), "marker": ""}
            style["label"] = figures.WORDS.get(method, method)
            figures.banded(axes, taus, profiles[method], *intervals[method], **style)
        axes.set(xlabel="normalized score tau", ylabel="share of runs above tau")
        axes.set_ylim(-0.02, 1.02)
        axes.legend(ncols=2)


def report(rows: pd.DataFrame, out: pathlib.Path) -> None:
    """Write table.md, summary.json, aggregates.png and profiles.png of what is finished."""
    if not (rows["final"] == 1).any():
        print("no method is finished yet")
        return
    last, best = collect(rows)
    text = _TEXT.format(episodes=rows["episode_seed"].nunique(), last=table(last), best=table(best))
    summary = {"scores": {name: {} for name in last.index.unique("dataset")}}
    for (name, method), values in last.groupby(["dataset", "method"], sort=False):
        summary["scores"][name][method] = mean_and_interval(values)
    runs = matrices(last)
    if min(map(len, runs.values()), default=0) > 1:
        np.random.seed(0)  # rliable draws from the global generator, whatever random_state is
        found = summary["aggregates"] = aggregates(runs)
        shown = {"iqm": "IQM", "mean": "mean", "reference_better": f"P({REFERENCE} better)"}
        cells = pd.DataFrame(found, index=[*shown]).T.rename_axis("method").rename(columns=shown)
        cells = cells.map(lambda cell: "{:.2f} [{:.2f}, {:.2f}]".format(*cell), na_action="ignore")
        text += _AGGREGATES.format(table=cells.fillna("").to_markdown(disable_numparse=True))
        plot_aggregates(found, out / "aggregates.png")
        plot_profiles(runs, out / "profiles.png")
    write_whole(out / "table.md", text)
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(text, end="")


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then the report."""
    parser = make_parser(__doc__, "runs/offline_rl")
    parser.add_argument("--datasets", default="pendulum", help="name=ID_OR_FILE,...")
    parser.add_argument("--methods", default=",".join(METHODS))
    args = parser.parse_args(argv)
    methods = parse_names(parser, "--methods", args.methods, METHODS)
    study = Study.from_args(args)
    for name, source in ({} if args.report else parse_datasets(args.datasets)).items():
        try:
            problem = study.load(name, source)
        except ValueError as error:
            parser.error(f"--datasets: {error}")
        for method in methods:
            changed = METHODS[method](problem.config)
            study.run(problem, method, dataclasses.replace(problem.config, **changed).validate())
    report(study.rows(), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
