"""Table and figure of :mod:`experiments.rl.guidance_scale`, from slopes.csv and the points of seed 0."""

import pathlib
from collections.abc import Iterable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

Rows = list[dict[str, str]]


def points_file(out: pathlib.Path, problem: str, arm: str) -> pathlib.Path:
    """Where the points of seed 0 at the end of an arm are."""
    return out / f"points-{problem}-{arm.replace(' ', '').replace('/', 'over')}.npz"


def curve(rows: Rows, measure: str, column: str = "slope") -> tuple[np.ndarray, np.ndarray]:
    """Total betas ``[L]``, mean over seeds, and a column ``[L, seeds]`` of one problem and arm."""
    here = [row for row in rows if row["measure"] == measure]
    periods, seeds = (sorted({int(row[name]) for row in here}) for name in ("renewals", "seed"))
    cells = {(int(row["renewals"]), int(row["seed"])): row for row in here}

    def values(name: str) -> np.ndarray:
        return np.array(
            [[float(cells[period, seed][name]) for seed in seeds] for period in periods]
        )

    return values("total_beta").mean(-1) if here else np.empty(0), values(column)


def table(rows: Rows) -> list[str]:
    """A row per problem, arm and renewal: slopes of every measure, means over seeds."""
    measures = ("both", "mu", "pi", "reference", "reference pi")
    names = "problem | arm | l | (l + 1) beta | slope | over mu | over pi | reference | its over pi"
    lines = [f"| {names} | R2 | pooled | kept |", "|---" * 12 + "|"]
    for problem, arm in _pairs(rows):
        here = _select(rows, problem, arm)
        betas, slopes = curve(here, "both")
        lows, highs, *rest = (
            curve(here, "both", name)[1] for name in ("low", "high", "r2", "pooled", "kept")
        )
        r2, pooled, kept = rest
        others = [curve(here, measure)[1] for measure in measures[1:]]
        for i, beta in enumerate(betas):
            # Over seeds where there are several; else the bootstrap over states.
            many = slopes.shape[1] > 1
            low, high = (slopes[i].min(), slopes[i].max()) if many else (lows[i, 0], highs[i, 0])
            cells = [f"{other[i].mean():.3g}" if len(other) else "" for other in others]
            lines.append(
                f"| {problem} | {arm} | {i} | {beta:.3g} | {slopes[i].mean():.3g} [{low:.3g}, "
                f"{high:.3g}] | "
                + " | ".join(cells)
                + f" | {r2[i].mean():.2f} | {pooled[i].mean():.3g} | {kept[i].mean():.2f} |"
            )
    return lines


def _pairs(rows: Rows) -> Iterable[tuple[str, str]]:
    return dict.fromkeys((row["problem"], row["arm"]) for row in rows)


def _select(rows: Rows, problem: str, arm: str) -> Rows:
    return [row for row in rows if (row["problem"], row["arm"]) == (problem, arm)]


def _plot_slopes(axis: Axes, rows: Rows, problem: str, arms: list[str]) -> None:
    furthest = highest = 0.0
    for color, arm in enumerate(arms):
        here = _select(rows, problem, arm)
        betas, slopes = curve(here, "both")
        lows, highs = curve(here, "both", "low")[1].min(1), curve(here, "both", "high")[1].max(1)
        axis.fill_between(betas, lows, highs, color=f"C{color}", alpha=0.15, linewidth=0)
        axis.plot(betas, slopes.mean(1), "o-", color=f"C{color}", markersize=4, label=arm)
        reference = curve(here, "reference")[1]
        if len(reference):
            axis.plot(betas, reference.mean(1), "--", color=f"C{color}", linewidth=1)
            highest = max(highest, reference.max())
        furthest, highest = max(furthest, betas.max()), max(highest, highs.max())
    axis.plot([0, furthest], [0, furthest], color="black", linewidth=0.8, label="(l + 1) beta")
    axis.plot([], [], "--", color="gray", linewidth=1, label="reference: perfect models")
    axis.set_ylim(0, 1.1 * highest)  # the law may leave the figure
    axis.set(xlabel="(l + 1) beta", ylabel="median slope of log pi - log mu on Q", title=problem)
    axis.legend(fontsize=7)


def _plot_r2(axis: Axes, rows: Rows, problem: str, arms: list[str]) -> None:
    for color, arm in enumerate(arms):
        betas, r2 = curve(_select(rows, problem, arm), "both", "r2")
        axis.plot(betas, r2.mean(1), "o-", color=f"C{color}", markersize=4)
    axis.set(
        xlabel="(l + 1) beta",
        ylabel="median R2 within states",
        ylim=(-0.02, 1.02),
        title=f"{problem}: fit",
    )


def _plot_points(axis: Axes, rows: Rows, problem: str, arm: str, out: pathlib.Path) -> None:
    """Points of seed 0 at the end, each less its state's mean."""
    with np.load(points_file(out, problem, arm)) as found:
        keep, of_pi = found["keep"], found["of_pi"]
        counts = np.maximum(keep.sum(1, keepdims=True), 1)
        x, y = (
            v - np.where(keep, v, 0).sum(1, keepdims=True) / counts
            for v in (found["q"], found["log_ratio"])
        )
    for name, chosen, color in (("mu", keep & ~of_pi, "C7"), ("pi", keep & of_pi, "C0")):
        axis.plot(
            x[chosen],
            y[chosen],
            ".",
            markersize=2,
            alpha=0.4,
            color=color,
            label=f"actions of {name}",
        )
    betas, slopes = curve(_select(rows, problem, arm), "both")
    ends = np.quantile(x[keep], [0.02, 0.98])  # a few states reach far beyond
    limits = np.quantile(y[keep], [0.02, 0.98])
    axis.plot(ends, slopes[-1, 0] * ends, color="C1", label=f"median slope {slopes[-1, 0]:.3g}")
    axis.plot(
        ends,
        betas[-1] * ends,
        color="black",
        linewidth=0.8,
        label=f"(l + 1) beta = {betas[-1]:.3g}",
    )
    axis.set(xlabel="Q less its mean in the state", ylabel="log pi - log mu, likewise")
    axis.set(
        title=f"{problem}: {arm}, seed 0, at the end", xlim=ends, ylim=limits + np.array([-1, 1])
    )
    axis.legend(fontsize=7, markerscale=4)


def write(rows: Rows, out: pathlib.Path) -> None:
    """table.md and guidance_scale.png."""
    if not rows:
        print("no arm is finished yet")
        return
    lines = [
        "Slopes: medians over states, means over seeds; brackets: range over seeds, of one 95%.",
        "",
    ]
    lines += table(rows)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    figure, axes = plt.subplots(
        len(problems), 3, figsize=(14, 4.2 * len(problems)), layout="constrained", squeeze=False
    )
    for problem, (left, middle, right) in zip(problems, axes, strict=True):
        arms = [arm for other, arm in _pairs(rows) if other == problem]
        _plot_slopes(left, rows, problem, arms)
        _plot_r2(middle, rows, problem, arms)
        _plot_points(right, rows, problem, arms[0], out)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(out / "guidance_scale.png", dpi=110)
    plt.close(figure)
    print("\n".join(lines))
