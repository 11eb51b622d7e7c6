"""The tables of experiments/paper/weight_study.py as files, and the figure of each."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from efm_jax.files import write_whole
from experiments import figures
from experiments.figures import REFERENCE

_HOLLOW = {"marker": "o", "markersize": 5, "markerfacecolor": "white", "linestyle": ""}
_GRAY = "#555555"  # of entries of the legend that hold for all colors
_KINDS = {"independent": "independent noise", "smooth": "smooth error"}
_WEIGHTS = {"softmax": "softmax of the batch", "dataset": "normalizer of the dataset"}


def write(path: Path, table: pd.DataFrame) -> None:
    """Write the table as CSV, and beside it the figure of what the file says."""
    write_whole(path, table.to_csv(index=False, float_format="%.6g"))
    rows = pd.read_csv(path)
    draw, size, title, label = _FIGURES[path.stem]
    with figures.drawn(path.with_suffix(".png"), *size) as figure:
        draw(figure, rows)
        figure.suptitle(title.format(**rows.iloc[0]))
        handles, _ = figure.axes[-1].get_legend_handles_labels()
        figure.legend(handles=handles, loc="outside lower center", ncols=6)
        for axes in figure.axes:
            figures.log_numbers(axes)
            axes.set_xlabel(label if axes.get_subplotspec().is_last_row() else "")


def _gradient(figure: Figure, rows: pd.DataFrame) -> None:
    """Bias above, root-mean-square error below; a column for each beta."""
    grid = figure.subplots(2, rows["beta"].nunique(), sharex=True, sharey="row")
    for (above, below), (beta, of_beta) in zip(grid.T, rows.groupby("beta"), strict=True):
        for i, (name, here) in enumerate(of_beta.groupby("weights", sort=False)):
            size, rms = here["batch_size"], here["rms_error"]
            seen, hidden = here[here["resolved"] == 1], here[here["resolved"] == 0]
            above.errorbar("batch_size", "bias", "bias_noise", data=seen, color=f"C{i}", marker="o")
            # What cannot be told from zero is an upper limit, not a point.
            limits = hidden["batch_size"], 3 * hidden["bias_noise"]
            above.plot(*limits, "v", color=f"C{i}", fillstyle="none")
            below.plot(size, rms, "o-", color=f"C{i}", label=_WEIGHTS[name])
            if name == "softmax":
                middle = here.iloc[len(here) // 2]
                ratio = middle["batch_size"] / size
                above.plot(size, middle["bias"] * ratio, **REFERENCE)
                below.plot(size, middle["rms_error"] * ratio**0.5, **REFERENCE)
        above.set_title(f"beta = {beta:g} (ESS {of_beta['ess_fraction'].iloc[0]:.2f} of n)")
    below.set_xscale("log", base=2)
    grid[0, 0].set_ylabel("relative bias\n" + r"$\|E\,g_B - g\|\,/\,\|g\|$")
    grid[1, 0].set_ylabel("relative error\n" + r"$\sqrt{E\|g_B - g\|^2}\,/\,\|g\|$")
    below.plot([], [], "v", color=_GRAY, fillstyle="none", label="less than this (3 std errors)")
    below.plot([], [], **REFERENCE, label="slopes -1 (above) and -1/2 (below)")


def _ess(figure: Figure, rows: pd.DataFrame) -> None:
    """A line for each problem; crosses are closed forms."""
    axes = figure.subplots()
    for i, (name, here) in enumerate(rows.groupby("problem", sort=False)):
        axes.plot("beta", "ess_fraction", data=here, color=f"C{i}", label=name)
        axes.plot(here["beta"], here["exact"], "x", color=f"C{i}")
    axes.plot(here["beta"], here["uniform"], "k--", linewidth=2, label="uniform energies")
    axes.plot([], [], "x", color=_GRAY, label="closed form")
    axes.set(xscale="log", ylabel="effective sample size / n")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _fraction(figure: Figure, rows: pd.DataFrame) -> None:
    """The mean and the spread over batches against their size; the largest is that of the fit."""
    means, spreads = figure.subplots(1, 2, sharex=True)
    rows = rows.assign(found=rows["mean"] / rows["fraction"], spread=rows["std"] / rows["mean"])
    for asked, here in rows.groupby("fraction", sort=False):
        for axes, name in ((means, "found"), (spreads, "spread")):
            line = here.groupby("batch_size")[name].agg(["median", "min", "max"])
            figures.banded(axes, line.index, *line.to_numpy().T, label=f"{asked:g} asked for")
    means.axhline(1, **REFERENCE)
    spreads.plot(line.index, 2 / np.sqrt(line.index), **REFERENCE, label="slope -1/2")
    means.set(ylabel="mean fraction / asked for", title="Mean over fresh batches")
    spreads.set(ylabel="std of the fraction / its mean", title="Spread over fresh batches")
    means.set_xscale("log", base=2)


def _errors(figure: Figure, rows: pd.DataFrame, panel: str, x: str, each: str) -> Axes:
    """Distance over floor against column x: a panel for each kind of error and value of a column.

    A line for each value of another.
    """
    panels = rows.groupby([panel, "error"], sort=False)
    grid = figure.subplots(len(panels) // 2, 2, sharex=True, sharey=True, squeeze=False)
    for axes, ((value, kind), of_panel) in zip(grid.flat, panels, strict=True):
        for i, (of_each, here) in enumerate(of_panel.groupby(each)):
            ratio, std = here["ratio"], here["ratio_std"]
            label = f"{each} = {of_each:g}"
            figures.banded(axes, here[x], ratio, ratio - std, ratio + std, label=label)
            few = here[here["ess"] < here["samples"]]
            axes.plot(few[x], few["ratio"], color=f"C{i}", **_HOLLOW)
        axes.axhline(1, **REFERENCE)
        axes.set_title(f"{_KINDS[kind]}, {panel} {value}")
    axes.plot([], [], color=_GRAY, label=f"ESS below {rows['samples'].iloc[0]}", **_HOLLOW)
    figure.supylabel("distance to the true target / distance of two samples of it")
    return axes


def _noise(figure: Figure, rows: pd.DataFrame) -> None:
    axes = _errors(figure, rows, "problem", "sigma", "beta")
    axes.set_xscale("symlog", linthresh=0.03, linscale=0.4)
    axes.set_xticks(rows["sigma"].unique(), [f"{value:g}" for value in rows["sigma"].unique()])
    axes.set_xticks([], minor=True)


def _data(figure: Figure, rows: pd.DataFrame) -> None:
    _errors(figure, rows, "beta", "data", "sigma").set_xscale("log", base=2)


_BAND = "(band: std over draws)"
_FIGURES = {  # drawn by, size in inches, title, x axis
    "gradient": (_gradient, (10, 5.6), "The CEFM gradient of a batch ({problem})", "batch size B"),
    "ess": (_ess, (8, 5), "How much of the data is left", "beta"),
    "fraction": (_fraction, (9, 4.2), "beta_for_ess (problems: median, range)", "batch size"),
    "noise": (_noise, (9, 7), f"Energies with an error {_BAND}", "sigma, std of the error"),
    "data": (_data, (9, 6.5), f"Errors on finite data of {{problem}} {_BAND}", "dataset size n"),
}
