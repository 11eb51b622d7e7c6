"""The tables and figures of experiments/paper/weight_study.py: a figure is drawn from its table's rows."""

import csv
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image

Rows = list[dict[str, float | str]]

_STYLE = {
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
}
_STYLE |= {"grid.alpha": 0.25, "legend.fontsize": 8, "legend.frameon": False, "lines.markersize": 4}
_COLORS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#777777",
    "#994f00",
    "#222222",
)
_REFERENCE = {"color": "#999999", "linestyle": "--", "linewidth": 1, "zorder": 0}
_HOLLOW = {"marker": "o", "markersize": 5, "markerfacecolor": "white", "linestyle": ""}
_KINDS = {"independent": "independent noise", "smooth": "smooth error"}
_WEIGHTS = {"softmax": "softmax of the batch", "dataset": "normalizer of the dataset"}


def write(path: Path, rows: Rows) -> None:
    """Write the rows as CSV, and beside it the figure of what the file says."""
    rounded = [
        {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, rows[0].keys(), quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rounded)
    draw, size, title, label = _FIGURES[path.stem]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure, read(path))
        figure.suptitle(title.format(**rows[0]), fontsize=12)
        handles, _ = figure.axes[-1].get_legend_handles_labels()
        figure.legend(handles=handles, loc="outside lower center", ncols=6)
        for axes in figure.axes:
            _log_numbers(axes)
            axes.set_xlabel(label if axes.get_subplotspec().is_last_row() else "")
        canvas.draw()
    # A palette makes the file a third of the size.
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    image.quantize(128).save(path.with_suffix(".png"), optimize=True)


def read(path: Path) -> Rows:
    """The rows of a CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file, quoting=csv.QUOTE_NONNUMERIC))


def select(rows: Rows, **where: float | str) -> Rows:
    """The rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def columns(rows: Rows, *names: str) -> list[np.ndarray]:
    """Columns as arrays."""
    return [np.array([row[name] for row in rows]) for name in names]


def _groups(rows: Rows, name: str) -> list[tuple]:
    """Each value of a column, the rows that have it, and a color."""
    values = dict.fromkeys(row[name] for row in rows)
    return [
        (v, select(rows, **{name: v}), color) for v, color in zip(values, _COLORS, strict=False)
    ]


def _log_numbers(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers; within two decades the powers of ten alone are too few."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    low, high = axes.dataLim.intervaly
    axes.yaxis.set_minor_formatter(
        StrMethodFormatter("{x:g}") if high < 100 * low else NullFormatter()
    )


def _gradient(figure: Figure, rows: Rows) -> None:
    """Bias above, root-mean-square error below; a column per beta."""
    betas = _groups(rows, "beta")
    grid = figure.subplots(2, len(betas), sharex=True, sharey="row")
    for (above, below), (beta, of_beta, _) in zip(grid.T, betas, strict=True):
        for name, here, color in _groups(of_beta, "weights"):
            size, bias, noise, rms = columns(here, "batch_size", "bias", "bias_noise", "rms_error")
            seen, middle = columns(here, "resolved")[0] > 0, len(size) // 2
            above.errorbar(size[seen], bias[seen], noise[seen], color=color, marker="o")
            # What cannot be told from zero is an upper limit, not a point.
            above.plot(size[~seen], 3 * noise[~seen], "v", color=color, fillstyle="none")
            below.plot(size, rms, "o-", color=color, label=_WEIGHTS[name])
            if name == "softmax":
                above.plot(size, bias[middle] * size[middle] / size, **_REFERENCE)
                below.plot(size, rms[middle] * (size[middle] / size) ** 0.5, **_REFERENCE)
        above.set_title(f"beta = {beta:g} (ESS {of_beta[0]['ess_fraction']:.2f} of n)")
    below.set_xscale("log", base=2)
    grid[0, 0].set_ylabel("relative bias\n" + r"$\|E\,g_B - g\|\,/\,\|g\|$")
    grid[1, 0].set_ylabel("relative error\n" + r"$\sqrt{E\|g_B - g\|^2}\,/\,\|g\|$")
    below.plot(
        [], [], "v", color="#555555", fillstyle="none", label="less than this (3 std errors)"
    )
    below.plot([], [], **_REFERENCE, label="slopes -1 (above) and -1/2 (below)")


def _ess(figure: Figure, rows: Rows) -> None:
    """One line per problem; crosses are closed forms."""
    axes = figure.subplots()
    for name, here, color in _groups(rows, "problem"):
        beta, fraction, exact, uniform = columns(here, "beta", "ess_fraction", "exact", "uniform")
        axes.plot(beta, fraction, color=color, label=name)
        axes.plot(beta, exact, "x", color=color)
    axes.plot(beta, uniform, "k--", linewidth=2, label="uniform energies")
    axes.plot([], [], "x", color="#555555", label="closed form")
    axes.set(xscale="log", ylabel="effective sample size / n")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _fraction(figure: Figure, rows: Rows) -> None:
    """The mean and the spread over batches against their size; the largest is that of the fit."""
    means, spreads = figure.subplots(1, 2, sharex=True)
    for asked, of_asked, color in _groups(rows, "fraction"):
        groups = _groups(of_asked, "batch_size")
        sizes = np.array([size for size, _, _ in groups])
        mean, std = np.moveaxis([columns(here, "mean", "std") for _, here, _ in groups], 1, 0)
        for axes, found in ((means, mean / asked), (spreads, std / mean)):  # [sizes, problems]
            axes.plot(sizes, np.median(found, 1), "o-", color=color, label=f"{asked:g} asked for")
            axes.fill_between(
                sizes, found.min(1), found.max(1), color=color, alpha=0.18, linewidth=0
            )
    means.axhline(1, **_REFERENCE)
    spreads.plot(sizes, 2 / np.sqrt(sizes), **_REFERENCE, label="slope -1/2")
    means.set(ylabel="mean fraction / asked for", title="Mean over fresh batches")
    spreads.set(ylabel="std of the fraction / its mean", title="Spread over fresh batches")
    means.set_xscale("log", base=2)


def _errors(figure: Figure, rows: Rows, line: str, x: str, each: str) -> Axes:
    """Distance over floor against column x: panels by one column and the kind of error, lines by another."""
    groups = _groups(rows, line)
    grid = figure.subplots(len(groups), len(_KINDS), sharex=True, sharey=True, squeeze=False)
    panels = [(*group, kind) for group in groups for kind in _KINDS]
    for axes, (value, of_value, _, kind) in zip(grid.flat, panels, strict=True):
        for of_each, here, color in _groups(select(of_value, error=kind), each):
            at, ratio, std, ess, samples = columns(here, x, "ratio", "ratio_std", "ess", "samples")
            few = ess < samples
            axes.plot(at, ratio, "o-", color=color, label=f"{each} = {of_each:g}")
            axes.plot(at[few], ratio[few], color=color, **_HOLLOW)
            axes.fill_between(at, ratio - std, ratio + std, color=color, alpha=0.18, linewidth=0)
        axes.axhline(1, **_REFERENCE)
        axes.set_title(f"{_KINDS[kind]}, {line} {value}".removesuffix(".0"))
    axes.plot([], [], color="#555555", label=f"ESS below {samples[0]:g}", **_HOLLOW)
    figure.supylabel("distance to the true target / distance of two samples of it", fontsize=10)
    return axes


def _noise(figure: Figure, rows: Rows) -> None:
    axes = _errors(figure, rows, "problem", "sigma", "beta")
    sigmas = np.unique(columns(rows, "sigma")[0])
    axes.set_xscale("symlog", linthresh=0.03, linscale=0.4)
    axes.set_xticks(sigmas, [f"{value:g}" for value in sigmas])
    axes.set_xticks([], minor=True)


def _data(figure: Figure, rows: Rows) -> None:
    _errors(figure, rows, "beta", "data", "sigma").set_xscale("log", base=2)


_FIGURES = {  # drawn by, size in inches, title, x axis
    "gradient": (_gradient, (10, 5.6), "The CEFM gradient of a batch ({problem})", "batch size B"),
    "ess": (_ess, (8, 5), "How much of the data is left", "beta"),
    "fraction": (
        _fraction,
        (9, 4.2),
        "beta_for_ess (median of the problems, and their range)",
        "batch size",
    ),
    "noise": (
        _noise,
        (9, 7),
        "Energies with an error (band: std over draws)",
        "sigma, std of the error",
    ),
    "data": (
        _data,
        (9, 6.5),
        "Errors on finite data of {problem} (band: std over draws)",
        "dataset size n",
    ),
}
