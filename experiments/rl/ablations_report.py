"""Table and figure of :mod:`experiments.rl.ablations`, from every episode's return."""

import collections
import csv
import pathlib
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from efm_jax.envs import mean_and_interval
from experiments.rl.offline_rl_report import collect

BASE = "base"
FIELDS = (
    "ablation",
    "arm",
    "score",
    "std",
    "best",
    "difference",
    "difference_low",
    "difference_high",
    "seconds",
)


class Arm(NamedTuple):
    """What one arm scored; ``difference`` is from the base."""

    ablation: str
    name: str
    is_base: bool
    last: np.ndarray  # [seeds], mean scores of the last evaluation
    best: np.ndarray  # [seeds], of the best evaluation
    difference: tuple[float, float, float]  # mean over seeds with its 95% interval, seed by seed
    seconds: float  # until the last evaluation, of the policy phase


def arms(rows: list[dict[str, str]], dataset: str, labels: list[tuple[str, str, str]]) -> list[Arm]:
    """The arms that are finished, of ``(ablation, arm, method)`` in ``labels``."""
    scores = collect([row for row in rows if row["dataset"] == dataset])
    last, best = scores.last.get(dataset, {}), scores.best.get(dataset, {})
    seconds: dict[str, float] = collections.defaultdict(float)
    for row in rows:
        if row["dataset"] == dataset and row["final"] == "1":
            seconds[row["method"]] = max(seconds[row["method"]], float(row["seconds"]))
    return [
        Arm(
            ablation,
            name,
            method == BASE,
            last[method],
            best[method],
            mean_and_interval(last[method] - last[BASE]),
            seconds[method],
        )
        for ablation, name, method in labels
        if method in last and BASE in last
    ]


def table(found: list[Arm]) -> list[str]:
    """A row per arm; the preset's own in bold."""
    lines = ["| | arm | score | best checkpoint | less the base, 95% interval | seconds |"]
    lines.append("|---" * 6 + "|")
    previous = None
    for arm in found:
        name = f"**{arm.name}**" if arm.is_base else arm.name
        mean, low, high = arm.difference
        # One seed has no interval.
        interval = f" [{low:.1f}, {high:.1f}]" if len(arm.last) > 1 else ""
        difference = "" if arm.is_base else f"{mean:+.1f}{interval}"
        spread = f" ± {arm.last.std(ddof=1):.1f}" if len(arm.last) > 1 else ""
        lines.append(
            f"| {arm.ablation if arm.ablation != previous else ''} | {name} | "
            f"{arm.last.mean():.1f}{spread} "
            f"| {arm.best.mean():.1f} | {difference} | {arm.seconds:.0f} |"
        )
        previous = arm.ablation
    return lines


def plot(found: list[Arm], path: pathlib.Path) -> None:
    """A panel per ablation: every seed's score, their mean, and a line at the base's."""
    names = list(dict.fromkeys(arm.ablation for arm in found))
    base = next((arm.last.mean() for arm in found if arm.is_base), None)
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.4 * columns, 3.1 * rows),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for name, axis in zip(names, axes.flat, strict=False):
        here = [arm for arm in found if arm.ablation == name]
        for i, arm in enumerate(here):
            color = "C1" if arm.is_base else "C0"
            axis.plot([i] * len(arm.last), arm.last, ".", color=color, alpha=0.5)
            axis.plot(i, arm.last.mean(), "_", color=color, markersize=18, markeredgewidth=2.5)
        if base is not None:
            axis.axhline(base, color="C1", linewidth=0.8, zorder=0)
        axis.set_xticks(range(len(here)), [arm.name for arm in here])
        axis.tick_params(
            axis="x", labelrotation=40 if max(len(arm.name) for arm in here) > 4 else 0
        )
        for label in axis.get_xticklabels():
            label.set_horizontalalignment("right" if label.get_rotation() else "center")
        axis.set_xlim(-0.6, len(here) - 0.4)
        axis.set_title(name, fontsize=11)
        axis.grid(axis="y", alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("normalized score")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(
    rows: list[dict[str, str]], dataset: str, labels: list[tuple[str, str, str]], out: pathlib.Path
) -> None:
    """table.md, ablations.csv and ablations.png of what is finished."""
    found = arms(rows, dataset, labels)
    if not found:
        print("no arm is finished yet")
        return
    seeds = len(found[0].last)
    lines = [
        f"{dataset}: mean score of {seeds} seeds (± standard deviation) at the end; the preset is "
        "bold.",
        "",
        *table(found),
    ]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    with (out / "ablations.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(_row(arm) for arm in found)
    plot(found, out / "ablations.png")
    print("\n".join(lines))


def _row(arm: Arm) -> dict[str, Any]:
    std = arm.last.std(ddof=1) if len(arm.last) > 1 else 0.0
    values = (
        arm.ablation, arm.name, arm.last.mean(), std, arm.best.mean(), *arm.difference, arm.seconds,
    )  # fmt: skip
    return dict(zip(FIELDS, values, strict=True))
