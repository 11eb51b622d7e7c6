"""Figures of a report: SVG elements that take their colors from the page and follow dark mode."""

import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .runs import Curve, Evaluation, ReportRun

WEIGHTS = ("ess", "ess_low", "top_weight")
_COLORS = 8  # the style sheet defines --run-0 to --run-7
# With the color, so that runs also differ in print and for who does not see colors: lengths of
# lines and gaps, in points.
_DASHES = ((), (5, 1.5), (1.5, 1.2), (6, 1.5, 1.5, 1.5))
_SEED_MARKERS = "o^sDvPX*"
# matplotlib needs colors where the page has names; the SVG's text is searched for these.
_INK, _GRID, _RUN = "#010203", "#010204", "#0a0b{:02x}"
_PAGE_COLORS = {
    _INK: "currentColor",
    _GRID: "var(--grid)",
    **{_RUN.format(index): f"var(--run-{index})" for index in range(_COLORS)},
}
# A linear axis would show only the largest values where they are so many times the smallest.
_LOG_RATIO = 30.0
_BROAD = 12.0  # inches of a figure that fills the page
_ROUND = [1, 2, 2.5, 5, 10]  # steps between ticks
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "errorbar.capsize": 3,
}

FoundCurves = list[tuple[ReportRun, Curve]]


def page_color(index: int) -> str:
    """Return the style sheet's name of a run's color."""
    return _PAGE_COLORS[_color(index)]


def dashes(index: int) -> tuple[float, ...]:
    """Return a run's pattern, another one for every run that repeats a color."""
    return _DASHES[(index + index // _COLORS) % len(_DASHES)]


def _in_the_look_of_the_page(
    draw: Callable[..., tuple[Figure, str] | None],
) -> Callable[..., Markup | None]:
    """Make an element of the page of a figure and its description; None stays None."""

    @functools.wraps(draw)
    def element(*args: object) -> Markup | None:
        with style.context(_STYLE):
            drawn = draw(*args)
            if drawn is None:
                return None
            figure, alt = drawn
            # Parts are named by their content and the salt: figures must not share names.
            matplotlib.rcParams["svg.hashsalt"] = alt
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True)
        # What is before the content, and the metadata, only a file of its own needs.
        text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
        text = re.sub(r"^.*?<svg[^>]*>|</svg>\s*$", "", text, flags=re.DOTALL)
        # Groups are numbered alike in every figure; only names that something refers to matter.
        needed = set(re.findall(r"#([\w-]+)", text))
        text = re.sub(r' id="([^"]*)"', lambda found: found[0] * (found[1] in needed), text)
        text = re.sub("|".join(_PAGE_COLORS), lambda found: _PAGE_COLORS[found[0]], text)
        width, height = figure.get_size_inches() * 72
        opening = '<svg class="plot" role="img" viewBox="0 0 {:g} {:g}" aria-label="{}">'
        return Markup(opening).format(width, height, alt) + Markup(text + "</svg>")

    return element


@_in_the_look_of_the_page
def curves(metric: str, phase: str, found: FoundCurves) -> tuple[Figure, str] | None:
    """Draw a metric: a thick line per run, the mean over its seeds, and a thin one per seed.

    Returns:
      None where nothing finite was logged.
    """
    found = [(run, curve) for run, curve in found if curve.drawable]
    if not found:
        return None
    figure = Figure(figsize=(3.7, 2.4))
    axes = figure.subplots()
    for run, curve in found:
        _draw_curve(axes, run, curve)
    values = np.concatenate([curve.values.to_numpy().ravel() for _, curve in found])
    low, high = np.nanmin(values), np.nanmax(values)
    if low > 0 and high > _LOG_RATIO * low:
        axes.set_yscale("log")
        axes.set_ylabel("log scale")
        subs = (1.0, 3.0) if high < 1000 * low else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    _label_steps(axes, f"{phase} step")
    alt = "; ".join(_in_words(run, curve) for run, curve in found)
    return figure, f"{metric} against {phase} step. {alt}."


@_in_the_look_of_the_page
def weights(phase: str, metrics: Mapping[str, FoundCurves]) -> tuple[Figure, str] | None:
    """Draw effective sample size (mean over states, and its lowest tenth) and top weight.

    Args:
      phase: its name.
      metrics: those of ``WEIGHTS`` that runs have logged in the phase.

    Returns:
      None where nothing finite was logged.
    """
    figure, alt = Figure(figsize=(_BROAD, 3.3)), []
    left, right = figure.subplots(1, 2)
    for metric, found in metrics.items():
        axes = right if metric == "top_weight" else left
        width = 1.0 if metric == "ess_low" else 2.2
        for run, curve in found:
            if curve.drawable:
                # A row's value was made at the renewal before it.
                _draw_curve(axes, run, curve, drawstyle="steps-pre", width=width)
                alt.append(f"{metric}, {_in_words(run, curve)}")
    if not alt:
        return None
    left.set_ylabel("effective sample size")
    right.set_ylabel("top weight")
    left.set_ylim(bottom=min(1.0, left.get_ylim()[0]))
    right.set_ylim(0.0, 1.0)
    for axes in (left, right):
        _label_steps(axes, f"{phase} step")
    return figure, f"Weights of the support actions against {phase} step. {'; '.join(alt)}."


@_in_the_look_of_the_page
def returns_over_steps(runs: Sequence[ReportRun]) -> tuple[Figure, str]:
    """Draw the mean return of every evaluation with its 95% interval, and those of the data."""
    figure, alt = Figure(figsize=(_BROAD, 4.2)), []
    axes = figure.subplots()
    steps = [each.step for run in runs for each in run.own]
    # Runs are moved apart a little, so that their intervals do not hide each other.
    shift = 0.006 * (max(steps) - min(steps))
    for place, run in enumerate(runs):
        color = _color(run.index)
        for policy in run.last:
            found = [each for each in run.own if each.policy == policy]
            x = [each.step + shift * (place - (len(runs) - 1) / 2) for each in found]
            means, lows, highs = np.array([each.interval for each in found]).T
            behavior = policy == "behavior"
            axes.errorbar(
                x,
                means,
                [means - lows, highs - means],
                color=color,
                linewidth=1.8,
                dashes=dashes(run.index),
                elinewidth=1.2,
                marker="s" if behavior else "o",
                markersize=6,
                markerfacecolor="none" if behavior else color,
            )
            alt += [f"{run.name}, {policy}, step {each.step}: {_interval(each)}" for each in found]
    _draw_datasets(axes.axhline, runs)
    axes.set_ylabel("return of an episode")
    _label_steps(axes, "gradient step of all phases")
    return figure, f"Returns of evaluations. {'; '.join(alt)}."


@_in_the_look_of_the_page
def return_distribution(runs: Sequence[ReportRun]) -> tuple[Figure, str]:
    """Draw every episode of the last evaluations, a row each, with quartiles, mean and interval."""
    rows = [(run, evaluation) for run in runs for evaluation in run.last.values()]
    figure, alt = Figure(figsize=(_BROAD, 0.8 + 0.66 * len(rows))), []
    axes = figure.subplots()
    for row, (run, evaluation) in enumerate(rows):
        color = _color(run.index)
        low, middle, high = np.quantile(np.concatenate(evaluation.returns), [0.25, 0.5, 0.75])
        axes.barh(row, high - low, left=low, height=0.44, color=color, alpha=0.16, linewidth=0)
        axes.plot([middle, middle], [row - 0.22, row + 0.22], color=color, linewidth=1.6)
        for seed, returns in enumerate(evaluation.returns):
            # Multiples of the golden ratio spread evenly however many there are.
            jitter = (np.arange(len(returns)) * 0.618034 + 0.37 * seed) % 1.0 - 0.5
            axes.plot(
                returns,
                row + 0.36 * jitter,
                _SEED_MARKERS[seed % len(_SEED_MARKERS)],
                markersize=4.5,
                color=color,
                alpha=0.6,
                markeredgewidth=0,
            )
        mean, start, end = evaluation.interval
        error = [[mean - start], [end - mean]]
        axes.errorbar(mean, row + 0.36, xerr=error, color=_INK, fmt="D", markersize=4)
        alt.append(
            f"{run.name}, {evaluation.policy}: {_interval(evaluation)}, "
            f"median {middle:.1f}, quartiles {low:.1f} and {high:.1f}"
        )
    _draw_datasets(axes.axvline, runs)
    names = [f"{_shorten(run.name)}, {evaluation.policy}" for run, evaluation in rows]
    axes.set_yticks(range(len(rows)), names, parse_math=False)
    axes.set_ylim(len(rows) - 0.35, -0.5)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("return of an episode")
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=_ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    return figure, f"Returns of single episodes. {'; '.join(alt)}."


def _color(index: int) -> str:
    return _RUN.format(index % _COLORS)


def _draw_curve(
    axes: Axes, run: ReportRun, curve: Curve, drawstyle: str = "default", width: float = 2.2
) -> None:
    steps, mean = curve.values.index, curve.mean.to_numpy()
    look: dict[str, Any] = {"color": _color(run.index), "drawstyle": drawstyle}
    if curve.values.shape[1] > 1:
        axes.plot(steps, curve.values.to_numpy(), linewidth=0.8, alpha=0.45, **look)
    # A line needs two neighbors: what stands alone gets a point.
    marker = None if np.isfinite(mean[1:] + mean[:-1]).any() else "o"
    axes.plot(
        steps, mean, linewidth=width, dashes=dashes(run.index), marker=marker, markersize=5, **look
    )


def _draw_datasets(draw: Callable[..., object], runs: Sequence[ReportRun]) -> None:
    for value in {run.info.dataset_return for run in runs}:
        if math.isfinite(value):
            draw(value, color=_INK, linewidth=1.0, linestyle=":")


def _label_steps(axes: Axes, label: str) -> None:
    """Label the horizontal axis, and set the ticks of both."""
    axes.set_xlabel(label, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_ROUND, integer=True))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_ROUND))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_short))


def _short(value: float, _: int) -> str:
    """Write a tick's number: 30k, not 30000, and a true minus sign."""
    for size, unit, least in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e4)):
        if abs(value) >= least:
            value, suffix = value / size, unit
            break
    else:
        suffix = ""
    return f"{value:g}{suffix}".replace("-", "\N{MINUS SIGN}")


def _shorten(name: str, longest: int = 28) -> str:
    """Keep the end of a long name, because paths begin alike."""
    return name if len(name) <= longest else "\N{HORIZONTAL ELLIPSIS}" + name[-longest:]


def _in_words(run: ReportRun, curve: Curve) -> str:
    mean, seeds = curve.mean.dropna(), curve.values.shape[1]
    over = f", mean of {seeds} seeds" if seeds > 1 else ""
    first, last = (f"{mean.iloc[i]:.4g} at step {mean.index[i]}" for i in (0, -1))
    return f"{run.name}{over}: {first}, {last}"


def _interval(evaluation: Evaluation) -> str:
    mean, low, high = evaluation.interval
    return f"{mean:.1f}" + ("" if evaluation.over is None else f", 95% {low:.1f} to {high:.1f}")
