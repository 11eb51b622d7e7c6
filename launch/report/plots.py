"""Figures of a report, as SVG elements that take their colors from the page: they follow dark mode."""

import io
import math
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from launch.report.html import Html, tag
from launch.report.runs import Curve, Evaluation, Run

COLORS = 8  # the page defines --run-0 to --run-7
# With the color, so that runs also differ in print and for who does not see colors: lengths of
# lines and gaps, in points.
_DASHES = ((), (5, 1.5), (1.5, 1.2), (6, 1.5, 1.5, 1.5))
_SEED_MARKERS = "o^sDvPX*"
# matplotlib needs colors where the page has names; the SVG's text is searched for these.
_INK, _GRID = "#010203", "#010204"
_RUN_COLOR = "#0a0b{:02x}"
# From this ratio of the largest value to the smallest a linear axis would show only the largest
# ones.
_LOG_RATIO = 30.0
_BROAD = 12.0  # inches of a figure that fills the page
_ROUND = [1, 2, 2.5, 5, 10]  # steps between ticks
_STYLE = {
    "svg.fonttype": "none",  # text stays text
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


def run_color(index: int) -> str:
    """The page's name of a run's color."""
    return f"var(--run-{index % COLORS})"


def _dashes(index: int) -> tuple[float, ...]:
    # A run that repeats a color has another pattern.
    return _DASHES[(index + index // COLORS) % len(_DASHES)]


def swatch(index: int) -> Html:
    """A run's line, for legends."""
    line = tag(
        "line", x1="1", y1="6", x2="35", y2="6", stroke=run_color(index), stroke_width="3",
        stroke_dasharray=" ".join(str(2 * length) for length in _dashes(index)) or None,
    )  # fmt: skip
    return tag("svg", line, viewBox="0 0 36 12", class_="swatch", aria_hidden="true")


def curves(name: str, found: Mapping[int, tuple[Run, Curve]], x_label: str) -> Html | None:
    """A metric of one phase: a thick line per run, the mean over its seeds, and a thin one per
    seed.

    Args:
      name: the metric.
      found: the run and its curve by the run's index.
      x_label: what the steps count.

    Returns:
      None where nothing finite was logged.
    """
    shown = {index: pair for index, pair in found.items() if np.isfinite(pair[1].values).any()}
    if not shown:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, [axes] = _figure(3.7, 2.4)
        for index, (_, curve) in shown.items():
            _draw_curve(axes, index, curve)
        values = np.concatenate([curve.values.ravel() for _, curve in shown.values()])
        _scale(axes, values)
        axes.set_xlabel(x_label, parse_math=False)
        alt = "; ".join(_in_words(run, curve) for run, curve in shown.values())
        return _svg(figure, f"{name} against {x_label}. {alt}.")


def ess(found: Mapping[int, tuple[Run, Mapping[str, Curve]]], x_label: str) -> Html | None:
    """Effective sample size (mean over states, and its lowest tenth) and the top weight, side by side."""
    alt = []
    with matplotlib.rc_context(_STYLE):
        figure, (left, right) = _figure(_BROAD, 3.3, 2)
        for index, (run, metrics) in found.items():
            for axes, name in ((left, "ess"), (left, "ess_low"), (right, "top_weight")):
                curve = metrics.get(name)
                if curve is None or not np.isfinite(curve.values).any():
                    continue
                low = name == "ess_low"
                # A row's value was made at the renewal before it.
                _draw_curve(axes, index, curve, drawstyle="steps-pre", width=1.0 if low else 2.2)
                alt.append(f"{name}, {_in_words(run, curve)}")
        if not alt:
            return None
        left.set_ylabel("effective sample size")
        right.set_ylabel("top weight")
        left.set_ylim(bottom=min(1.0, left.get_ylim()[0]))
        right.set_ylim(0.0, 1.0)
        for axes in (left, right):
            axes.set_xlabel(x_label, parse_math=False)
            _ticks(axes)
        return _svg(figure, f"Weights of the support actions against {x_label}. {'; '.join(alt)}.")


def returns_over_steps(runs: Mapping[int, Run], datasets: Sequence[float]) -> Html:
    """Mean returns of all evaluations with their 95% intervals; ``datasets`` are drawn as lines."""
    alt = []
    with matplotlib.rc_context(_STYLE):
        figure, [axes] = _figure(_BROAD, 4.2)
        steps = [each.total_step for run in runs.values() for each in run.evaluations]
        # Runs are moved apart a little, so that their intervals do not hide each other.
        shift = 0.006 * (max(steps) - min(steps))
        for place, (index, run) in enumerate(runs.items()):
            for policy in dict.fromkeys(each.policy for each in run.evaluations):
                found = [each for each in run.evaluations if each.policy == policy]
                x = [each.total_step + shift * (place - (len(runs) - 1) / 2) for each in found]
                means, lows, highs = np.array([each.interval for each in found]).T
                hollow = policy == "behavior"
                color = _color(index)
                axes.errorbar(
                    x, means, [means - lows, highs - means], color=color, linewidth=1.8,
                    dashes=_dashes(index), elinewidth=1.2, marker="s" if hollow else "o", markersize=6,
                    markerfacecolor="none" if hollow else color, markeredgecolor=color,
                )  # fmt: skip
                alt += [
                    f"{run.name}, {policy}, step {each.total_step}: {_interval(each)}"
                    for each in found
                ]
        _dataset_lines(axes.axhline, datasets)
        axes.set_xlabel("gradient step of all phases")
        axes.set_ylabel("return of an episode")
        _ticks(axes)
        return _svg(figure, f"Returns of evaluations. {'; '.join(alt)}.")


def return_distribution(
    evaluations: Sequence[tuple[int, Run, Evaluation]], datasets: Sequence[float]
) -> Html:
    """Every episode of some evaluations, a row each: points, quartiles, mean with 95% interval."""
    alt = []
    with matplotlib.rc_context(_STYLE):
        figure, [axes] = _figure(_BROAD, 0.8 + 0.66 * len(evaluations))
        for row, (index, run, evaluation) in enumerate(evaluations):
            color = _color(index)
            everything = np.concatenate(list(evaluation.returns.values()))
            low, middle, high = np.quantile(everything, [0.25, 0.5, 0.75])
            axes.barh(row, high - low, left=low, height=0.44, color=color, alpha=0.16, linewidth=0)
            axes.plot([middle, middle], [row - 0.22, row + 0.22], color=color, linewidth=1.6)
            for seed, returns in enumerate(evaluation.returns.values()):
                # Multiples of the golden ratio spread evenly however many there are.
                jitter = (np.arange(len(returns)) * 0.618034 + 0.37 * seed) % 1.0 - 0.5
                axes.plot(
                    returns, row + 0.36 * jitter, linestyle="none", markersize=4.5, color=color, alpha=0.6,
                    marker=_SEED_MARKERS[seed % len(_SEED_MARKERS)], markeredgewidth=0,
                )  # fmt: skip
            mean, start, end = evaluation.interval
            axes.errorbar(
                mean, row + 0.36, xerr=[[mean - start], [end - mean]], color=_INK, marker="D", markersize=4,
                linewidth=1.2,
            )  # fmt: skip
            alt.append(
                f"{run.name}, {evaluation.policy}: {_interval(evaluation)}, "
                f"median {middle:.1f}, quartiles {low:.1f} and {high:.1f}"
            )
        _dataset_lines(axes.axvline, datasets)
        axes.set_yticks(
            range(len(evaluations)),
            [f"{_shorten(run.name)}, {evaluation.policy}" for _, run, evaluation in evaluations],
            parse_math=False,
        )
        axes.set_ylim(len(evaluations) - 0.35, -0.5)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("return of an episode")
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=_ROUND))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        return _svg(figure, f"Returns of single episodes. {'; '.join(alt)}.")


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Axes side by side; sizes in inches set the proportions and the size of text."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, [figure.add_subplot(1, columns, 1 + column) for column in range(columns)]


def _color(index: int) -> str:
    return _RUN_COLOR.format(index % COLORS)


def _draw_curve(
    axes: Axes, index: int, curve: Curve, drawstyle: str = "default", width: float = 2.2
) -> None:
    color, (points, seeds) = _color(index), curve.values.shape
    if seeds > 1:
        axes.plot(
            curve.steps, curve.values, color=color, linewidth=0.8, alpha=0.45, drawstyle=drawstyle
        )
    mean = _mean(curve)
    # A line needs two neighbors: what stands alone gets a point.
    alone = points == 1 or not np.isfinite(mean[1:] + mean[:-1]).any()
    axes.plot(
        curve.steps, mean, color=color, linewidth=width, dashes=_dashes(index), drawstyle=drawstyle,
        marker="o" if alone else None, markersize=5,
    )  # fmt: skip


def _mean(curve: Curve) -> np.ndarray:
    """Over seeds with a finite value; NaN where there is none."""
    counts = np.isfinite(curve.values).sum(axis=1)
    return np.where(counts > 0, np.nansum(curve.values, axis=1) / np.maximum(counts, 1), np.nan)


def _in_words(run: Run, curve: Curve) -> str:
    mean = _mean(curve)
    first, last = np.flatnonzero(np.isfinite(mean))[[0, -1]]
    seeds = curve.values.shape[1]
    over = f", mean of {seeds} seeds" if seeds > 1 else ""
    return (
        f"{run.name}{over}: {mean[first]:.4g} at step {curve.steps[first]}, "
        f"{mean[last]:.4g} at step {curve.steps[last]}"
    )


def _interval(evaluation: Evaluation) -> str:
    mean, low, high = evaluation.interval
    return f"{mean:.1f}" + (
        "" if evaluation.interval_of is None else f", 95% {low:.1f} to {high:.1f}"
    )


def _dataset_lines(draw: object, datasets: Sequence[float]) -> None:
    for value in datasets:
        if math.isfinite(value):
            draw(value, color=_INK, linewidth=1.0, linestyle=":")


def _scale(axes: Axes, values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    if finite.min() > 0 and finite.max() > _LOG_RATIO * finite.min():
        axes.set_yscale("log")
        axes.set_ylabel("log scale")
        few = finite.max() < 1000 * finite.min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if few else (1.0,), numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    _ticks(axes)


def _ticks(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=_ROUND, integer=True))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_ROUND))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_short))


def _short(value: float, _: int) -> str:
    """A tick's number: 30k, not 30000, and a true minus sign."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}".replace(
                "-", "\N{MINUS SIGN}"
            )
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def _shorten(name: str, longest: int = 28) -> str:
    """Of a long name, its end: paths begin alike."""
    return name if len(name) <= longest else "\N{HORIZONTAL ELLIPSIS}" + name[-longest:]


def _svg(figure: Figure, alt: str) -> Html:
    """The figure as an element of the page, described by ``alt``."""
    buffer = io.StringIO()
    # The salt names what the drawing's parts share; figures of one page must not share names.
    with matplotlib.rc_context({"svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", transparent=True)
    # Past the XML header and metadata, which only a file of its own needs.
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    # Groups are numbered alike in every figure; only names that something refers to are needed.
    needed = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in needed else "", text)
    for placeholder, color in (
        (_INK, "currentColor"),
        (_GRID, "var(--grid)"),
        *((_color(index), run_color(index)) for index in range(COLORS)),
    ):
        text = text.replace(placeholder, color)
    width, height = figure.get_size_inches() * 72
    view = f"0 0 {width:g} {height:g}"
    return tag("svg", Html(text), viewBox=view, role="img", aria_label=alt, class_="plot")
