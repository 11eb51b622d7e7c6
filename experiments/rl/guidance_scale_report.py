"""Table and figure of :mod:`experiments.rl.guidance_scale`: slopes.csv and points of seed 0."""

import pathlib

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from efm_jax.files import write_whole
from experiments import figures

_MEASURES = {"mu": "over mu", "pi": "over pi", "reference": "reference"}
_MEASURES |= {"reference pi": "its over pi"}
_NUMBERS = {"r2": "{:.2f}", "pooled": "{:.3g}", "kept": "{:.2f}"}


def points_file(out: pathlib.Path, problem: str, arm: str) -> pathlib.Path:
    """Name the file of the points of seed 0 at the end of an arm."""
    return out / f"points-{problem}-{arm.replace(' ', '').replace('/', 'over')}.npz"


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarize seeds: a row for each problem, arm, renewal and measure.

    Means of all columns; ``least`` and ``most`` are the range of slopes over seeds, or where there
    is one seed the bootstrap interval over states; ``low`` and ``high`` the ends of all intervals.
    """
    seeds = rows.groupby(["problem", "arm", "renewals", "measure"], sort=False)
    found = seeds.mean()
    found["low"], found["high"] = seeds["low"].min(), seeds["high"].max()
    several = seeds.size() > 1
    found["least"] = seeds["slope"].min().where(several, found["low"])
    found["most"] = seeds["slope"].max().where(several, found["high"])
    return found


def table(found: pd.DataFrame) -> str:
    """Lay out a row for each problem, arm and renewal: slopes of every measure."""
    both = found.xs("both", level="measure")
    cells = both[["total_beta"]].map("{:.3g}".format).set_axis(["(l + 1) beta"], axis=1)
    ends = zip(both["slope"], both["least"], both["most"], strict=True)
    cells["slope"] = ["{:.3g} [{:.3g}, {:.3g}]".format(*each) for each in ends]
    for measure, name in _MEASURES.items():
        slopes = found.loc[found.index.get_level_values("measure") == measure, "slope"]
        cells[name] = slopes.droplevel("measure").map("{:.3g}".format)
    for column, form in _NUMBERS.items():
        cells[{"r2": "R2"}.get(column, column)] = both[column].map(form.format)
    cells = cells.fillna("").reset_index().rename(columns={"renewals": "l"})
    return cells.to_markdown(index=False, disable_numparse=True)


def _plot_slopes(axes: Axes, found: pd.DataFrame) -> None:
    furthest = found["total_beta"].max()
    slopes = found[found.index.isin(["both", "reference"], level="measure")]
    for arm, here in slopes.groupby("arm", sort=False):
        both = here.xs("both", level="measure")
        line = both["total_beta"], both["slope"], both["low"], both["high"]
        figures.banded(axes, *line, label=arm)
        reference = here[here.index.get_level_values("measure") == "reference"]
        color = axes.lines[-1].get_color()
        axes.plot(reference["total_beta"], reference["slope"], "--", color=color, linewidth=1)
    axes.plot([0, furthest], [0, furthest], color="black", linewidth=0.8, label="(l + 1) beta")
    axes.plot([], [], "--", color="gray", linewidth=1, label="reference: perfect models")
    axes.set_ylim(0, 1.1 * slopes["high"].max())  # the law may leave the figure
    axes.set(xlabel="(l + 1) beta", ylabel="median slope of log pi - log mu on Q")
    axes.legend()


def _plot_r2(axes: Axes, found: pd.DataFrame) -> None:
    for _, here in found.xs("both", level="measure").groupby("arm", sort=False):
        axes.plot(here["total_beta"], here["r2"], "o-")
    axes.set(xlabel="(l + 1) beta", ylabel="median R2 within states", ylim=(-0.02, 1.02))


def _plot_points(axes: Axes, last: pd.Series, file: pathlib.Path) -> None:
    """Draw the points of seed 0 at the end, each less its state's mean; ``last`` is its row."""
    with np.load(file, allow_pickle=False) as points:
        keep, of_pi = points["keep"], points["of_pi"]
        used = [np.ma.masked_array(points[name], ~keep) for name in ("q", "log_ratio")]
    x, y = ((v - v.mean(axis=1, keepdims=True)).data for v in used)
    for name, chosen, color in (("mu", keep & ~of_pi, "gray"), ("pi", keep & of_pi, "blue")):
        style = {"markersize": 2, "alpha": 0.4, "color": figures.COLORS[color]}
        axes.plot(x[chosen], y[chosen], ".", label=f"actions of {name}", **style)
    ends = np.quantile(x[keep], [0.02, 0.98])  # a few states reach far beyond
    label = f"median slope {last['slope']:.3g}"
    axes.plot(ends, last["slope"] * ends, color=figures.COLORS["red"], label=label)
    label = f"(l + 1) beta = {last['total_beta']:.3g}"
    axes.plot(ends, last["total_beta"] * ends, color="black", linewidth=0.8, label=label)
    axes.set(xlabel="Q less its mean in the state", ylabel="log pi - log mu, likewise")
    axes.set(xlim=ends, ylim=np.quantile(y[keep], [0.02, 0.98]) + np.array([-1, 1]))
    axes.legend(markerscale=4)


def write(rows: pd.DataFrame, out: pathlib.Path) -> None:
    """Write table.md and guidance_scale.png of what is finished."""
    if rows.empty:
        print("no arm is finished yet")
        return
    found = curves(rows)
    text = (
        "Slopes: medians over states, means over seeds; brackets: range over seeds, of one 95%.\n\n"
        f"{table(found)}\n"
    )
    write_whole(out / "table.md", text)
    first = rows.query("seed == 0 and measure == 'both'").groupby("problem", sort=False)
    with figures.drawn(out / "guidance_scale.png", 14, 4.2 * len(first)) as figure:
        panels = figure.subplots(len(first), 3, squeeze=False)
        for (left, middle, right), (problem, seed0) in zip(panels, first, strict=True):
            here, arm = found.loc[[problem]], seed0["arm"].iloc[0]
            _plot_slopes(left, here)
            _plot_r2(middle, here)
            file = points_file(out, problem, arm)
            if file.exists():
                _plot_points(right, seed0[seed0["arm"] == arm].iloc[-1], file)
            else:  # slopes.csv was copied alone
                right.set_axis_off()
            left.set_title(problem)
            middle.set_title(f"{problem}: fit")
            right.set_title(f"{problem}: {arm}, seed 0, at the end")
    print(text, end="")
