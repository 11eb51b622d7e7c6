"""Tables and figures of :mod:`experiments.rl.offline_rl`, from every episode's return.

A run's score is the mean over the episodes of its last evaluation ("last"), or of the evaluation
with the largest mean ("best": chosen on the episodes it is reported on, so too high; published
tables often do that).  Aggregates are over runs (datasets x seeds) with rliable, which resamples
seeds within each dataset.
"""

import json
import pathlib
from typing import NamedTuple

import numpy as np
import pandas as pd

from efm_jax.envs import mean_and_interval
from efm_jax.files import write_whole
from experiments import figures

BOOTSTRAP = 2000
REFERENCE = "qipo-ot"  # compared with every other method
_RUN = ["dataset", "method", "seed"]
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


class Scores(NamedTuple):
    """Mean scores of runs, indexed by dataset, method and seed."""

    last: pd.Series
    best: pd.Series
    episodes: int


def collect(rows: pd.DataFrame) -> Scores:
    """Find the runs that are finished, from the rows of returns.csv."""
    means = rows.groupby([*_RUN, "step", "final"], sort=False)["score"].agg(["mean", "size"])
    means = means.reset_index(["step", "final"])
    last = means.loc[means["final"] == 1, "mean"]
    best = means.groupby(_RUN, sort=False)["mean"].max().reindex(last.index)
    return Scores(last, best, means["size"].max())


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

    def intervals(runs: dict, *names: str) -> Aggregates:
        def estimate(*x: np.ndarray) -> np.ndarray:
            return np.array([functions[name](*x) for name in names])

        points, ends = library.get_interval_estimates(runs, estimate, reps=BOOTSTRAP)
        return {
            method: {
                name: [float(points[method][i]), *map(float, ends[method][:, i])]
                for i, name in enumerate(names)
            }
            for method in runs
        }

    functions = {"iqm": metrics.aggregate_iqm, "median": metrics.aggregate_median}
    functions |= {"mean": metrics.aggregate_mean}
    functions |= {"reference_better": metrics.probability_of_improvement}
    found = intervals(runs, "iqm", "median", "mean")
    others = [method for method in runs if method != REFERENCE]
    if REFERENCE in runs and others:
        pairs = {method: (runs[REFERENCE], runs[method]) for method in others}
        for method, values in intervals(pairs, "reference_better").items():
            found[method] |= values
    return found


def plot_aggregates(found: Aggregates, path: pathlib.Path) -> None:
    """Draw IQM and probability of improvement of every method, with their intervals."""
    titles = {"iqm": "Interquartile mean of scores"}
    titles |= {"reference_better": f"P({REFERENCE} better than this row)"}
    with figures.drawn(path, 10, 0.42 * len(found) + 1.4) as figure:
        panels = figure.subplots(1, 2)
        for axes, (key, title) in zip(panels, titles.items(), strict=True):
            for i, (method, values) in enumerate(found.items()):
                if key in values:
                    value, low, high = values[key]
                    color = figures.METHODS.get(method)
                    axes.barh(i, high - low, left=low, height=0.6, color=color, alpha=0.35)
                    axes.vlines(value, i - 0.3, i + 0.3, color=color, linewidth=2)
            axes.set_yticks(range(len(found)), found)
            axes.set(title=title, ylim=(len(found) - 0.5, -0.5))
            axes.grid(visible=False, axis="y")
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
            style = {"color": figures.METHODS.get(method), "label": method, "marker": ""}
            figures.banded(axes, taus, profiles[method], *intervals[method], **style)
        axes.set(xlabel="normalized score tau", ylabel="share of runs above tau")
        axes.set_ylim(-0.02, 1.02)
        axes.legend(ncols=2)


def write(rows: pd.DataFrame, out: pathlib.Path) -> None:
    """Write table.md, summary.json, aggregates.png and profiles.png of what is finished."""
    scores = collect(rows)
    if scores.last.empty:
        print("no method is finished yet")
        return
    text = _TEXT.format(episodes=scores.episodes, last=table(scores.last), best=table(scores.best))
    summary = {"scores": {name: {} for name in scores.last.index.unique("dataset")}}
    for (name, method), values in scores.last.groupby(["dataset", "method"], sort=False):
        summary["scores"][name][method] = mean_and_interval(values)
    runs = matrices(scores.last)
    if min(map(len, runs.values()), default=0) > 1:
        np.random.seed(0)  # rliable draws from the global generator, whatever random_state is
        found = summary["aggregates"] = aggregates(runs)
        cells = (
            pd.DataFrame(found)
            .T.rename_axis("method")
            .reindex(columns=["iqm", "mean", "reference_better"])
        )
        cells = cells.map(lambda cell: "{:.2f} [{:.2f}, {:.2f}]".format(*cell), na_action="ignore")
        cells.columns = ["IQM", "mean", f"P({REFERENCE} better)"]
        text += _AGGREGATES.format(table=cells.fillna("").to_markdown(disable_numparse=True))
        plot_aggregates(found, out / "aggregates.png")
        plot_profiles(runs, out / "profiles.png")
    write_whole(out / "table.md", text)
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(text, end="")
