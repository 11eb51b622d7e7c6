"""Tables and figures of :mod:`experiments.rl.offline_rl`, from every episode's return.

A run's score is the mean over the episodes of its last evaluation ("last"), or of the evaluation
with the largest mean ("best": chosen on the episodes it is reported on, so too high; published
tables often do that). Aggregates are over runs (datasets x seeds) with rliable, which resamples
seeds within each dataset.
"""

import collections
import json
import pathlib
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from efm_jax.envs import mean_and_interval

BOOTSTRAP = 2000
REFERENCE = "qipo-ot"  # compared with every other method


class Scores(NamedTuple):
    """Mean scores of runs: ``{dataset: {method: [seeds]}}``."""

    last: dict[str, dict[str, np.ndarray]]
    best: dict[str, dict[str, np.ndarray]]
    episodes: int


def collect(rows: list[dict[str, str]]) -> Scores:
    """Runs that are finished, from the rows of returns.csv."""
    episodes: dict[tuple, list[float]] = collections.defaultdict(list)
    for row in rows:
        key = row["dataset"], row["method"], int(row["seed"]), int(row["step"]), int(row["final"])
        episodes[key].append(float(row["score"]))
    finished = {key[:3] for key in episodes if key[4]}
    last: dict = collections.defaultdict(lambda: collections.defaultdict(dict))
    best: dict = collections.defaultdict(lambda: collections.defaultdict(dict))
    for (dataset, method, seed, _, final), scores in episodes.items():
        if (dataset, method, seed) not in finished:
            continue
        mean = float(np.mean(scores))
        best[dataset][method][seed] = max(mean, best[dataset][method].get(seed, -np.inf))
        if final:
            last[dataset][method][seed] = mean

    def arrays(found: dict) -> dict[str, dict[str, np.ndarray]]:
        return {
            dataset: {
                method: np.array([runs[s] for s in sorted(runs)])
                for method, runs in methods.items()
            }
            for dataset, methods in found.items()
        }

    count = max((len(scores) for scores in episodes.values()), default=0)
    return Scores(arrays(last), arrays(best), count)


def table(scores: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """Datasets down, methods across: mean and standard deviation over seeds, the best mean in bold."""
    methods = list(dict.fromkeys(method for runs in scores.values() for method in runs))
    lines = ["| dataset | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    for dataset, runs in scores.items():
        top = max(values.mean() for values in runs.values())
        cells = []
        for method in methods:
            if method not in runs:
                cells.append("")
                continue
            values = runs[method]
            mean, std = values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0
            cell = f"{mean:.1f} ± {std:.1f}"
            cells.append(f"**{cell}**" if mean == top else cell)
        lines.append(f"| {dataset} | " + " | ".join(cells) + " |")
    return lines


def matrices(scores: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """``{method: [seeds, datasets]}`` of the methods that were run on every dataset, with as many seeds."""
    methods = set.intersection(*(set(runs) for runs in scores.values()))
    order = [method for method in next(iter(scores.values())) if method in methods]
    seeds = min(len(values) for runs in scores.values() for values in runs.values())
    return {
        method: np.stack([runs[method][:seeds] for runs in scores.values()], axis=1)
        for method in order
    }


def aggregates(scores: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """IQM, median and mean with 95% stratified bootstrap intervals; probability that REFERENCE is better."""
    from rliable import library, metrics

    runs = matrices(scores)

    def estimate(x: np.ndarray) -> np.ndarray:
        return np.array(
            [metrics.aggregate_iqm(x), metrics.aggregate_median(x), metrics.aggregate_mean(x)]
        )

    points, intervals = library.get_interval_estimates(
        runs, estimate, reps=BOOTSTRAP, random_state=np.random.RandomState(0)
    )
    found: dict[str, Any] = {
        method: {
            name: [float(points[method][i]), *map(float, intervals[method][:, i])]
            for i, name in enumerate(("iqm", "median", "mean"))
        }
        for method in runs
    }
    others = [method for method in runs if method != REFERENCE]
    if REFERENCE in runs and others:
        pairs = {method: (runs[REFERENCE], runs[method]) for method in others}
        points, intervals = library.get_interval_estimates(
            pairs,
            metrics.probability_of_improvement,
            reps=BOOTSTRAP,
            random_state=np.random.RandomState(0),
        )
        for method in others:
            low, high = np.ravel(intervals[method])
            found[method]["reference_better"] = [float(points[method]), float(low), float(high)]
    return found


def plot_aggregates(found: dict[str, Any], path: pathlib.Path) -> None:
    """IQM and probability of improvement of every method, with their intervals."""
    methods = list(found)
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.42 * len(methods) + 1.4), layout="constrained")
    for axis, key, title in (
        (axes[0], "iqm", "Interquartile mean of scores"),
        (axes[1], "reference_better", f"P({REFERENCE} better than this row)"),
    ):
        for i, method in enumerate(methods):
            if key not in found[method]:
                continue
            value, low, high = found[method][key]
            axis.barh(i, high - low, left=low, height=0.6, color="C0", alpha=0.35)
            axis.vlines(value, i - 0.3, i + 0.3, color="C0", linewidth=2)
        axis.set_yticks(range(len(methods)), methods)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=11)
        axis.grid(axis="x", alpha=0.3)
    axes[1].axvline(0.5, color="black", linewidth=0.8)
    axes[1].set_xlim(0, 1)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_profiles(scores: dict[str, dict[str, np.ndarray]], path: pathlib.Path) -> None:
    """Performance profiles: the share of runs with a score above tau."""
    from rliable import library

    runs = matrices(scores)
    taus = np.linspace(0, 115, 116)
    profiles, intervals = library.create_performance_profile(runs, taus, reps=BOOTSTRAP)
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for i, method in enumerate(runs):
        axis.plot(
            taus, profiles[method], label=method, color=f"C{i}", linestyle=("-", "--")[i >= 10]
        )
        axis.fill_between(taus, *intervals[method], color=f"C{i}", alpha=0.08)
    axis.set(xlabel="normalized score tau", ylabel="share of runs above tau", ylim=(-0.02, 1.02))
    axis.legend(fontsize=8, ncols=2)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(rows: list[dict[str, str]], out: pathlib.Path) -> None:
    """table.md, summary.json, aggregates.png and profiles.png; a line where there is nothing yet."""
    scores = collect(rows)
    if not scores.last:
        print("no method is finished yet")
        return
    lines = [f"Mean scores over {scores.episodes} episodes, ± standard deviation over seeds.", ""]
    lines += ["Last checkpoint:", ""]
    lines += [*table(scores.last), "", "Best evaluated checkpoint:", "", *table(scores.best)]
    summary: dict[str, Any] = {
        "scores": {
            d: {m: mean_and_interval(v) for m, v in runs.items()} for d, runs in scores.last.items()
        }
    }
    if min(len(v) for runs in scores.last.values() for v in runs.values()) > 1:
        found = summary["aggregates"] = aggregates(scores.last)
        lines += [
            "",
            "Over all datasets, last checkpoint, with 95% stratified bootstrap intervals:",
            "",
        ]
        lines += [f"| method | IQM | mean | P({REFERENCE} better) |", "|---|---|---|---|"]
        for method, values in found.items():
            cells = [
                f"{values[key][0]:.2f} [{values[key][1]:.2f}, {values[key][2]:.2f}]"
                if key in values
                else ""
                for key in ("iqm", "mean", "reference_better")
            ]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        plot_aggregates(found, out / "aggregates.png")
        plot_profiles(scores.last, out / "profiles.png")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print("\n".join(lines))
