"""``learning_curve.png``: a run's losses, weights, Q-values and returns at a glance."""

import functools
import io
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter, StrMethodFormatter

from efm_jax.runs.reader import Rows, Run

_COLORS = {"behavior": "#4477aa", "critic": "#ccbb44", "policy": "#aa3377"}
_OTHER_COLOR = "#228833"
_ESS_COLOR, _TOP_WEIGHT_COLOR, _DATASET_COLOR = "#4477aa", "#ee6677", "#555555"
# Below this effective sample size one action carries nearly all the weight of a state; the run
# warns too.
LOW_ESS = 1.5


class _Curve(NamedTuple):
    steps: np.ndarray  # [P] in order
    values: np.ndarray  # [P, K]; NaN where a seed has nothing finite


def draw_learning_curve(run: Run) -> bytes:
    """Draw what a run has logged so far, as a PNG; panels for which nothing is there are left out.

    Panels: losses by phase; effective sample size and top weight of the policy phase; Q-values of
    data and support actions; returns of behavior, policy and dataset. Lines are means over training
    seeds, bands reach from the smallest to the largest seed (each seed's return being its mean over
    episodes).

    Raises:
      ValueError: there is no finite number to draw.
    """
    metrics = run.metrics
    policy = [row for row in metrics if row["phase"] == "policy"]
    losses = _grouped(metrics, "phase", "loss")
    weights = _curves(dict.fromkeys(("ess", "top_weight"), policy), "step")
    q_values = _curves(dict.fromkeys(("q_data", "q_support"), metrics), "total_step")
    returns = _grouped(run.own_returns, "policy", "return")
    # Evaluations carry the total step; the policy phase starts where the earlier phases ended.
    start = min((int(row["total_step"]) - int(row["step"]) for row in policy), default=0)
    panels: list[Callable[[Axes], None]] = [
        functools.partial(draw, curves=curves, **more)
        for draw, curves, more in (
            (_draw_losses, losses, {}),
            (_draw_weights, weights, {}),
            (_draw_q_values, q_values, {}),
            (_draw_returns, returns, {"start": start, "dataset_return": run.info.dataset_return}),
        )
        if curves
    ]
    if not panels:
        raise ValueError(f"{run.path}: no finite number to draw")
    rows, columns = (2, 2) if len(panels) == 4 else (1, len(panels))
    width = 5.6 * columns
    figure = Figure(figsize=(width, 3.9 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for index, draw in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 10k, not 10000
        draw(axes)
    title = f"{run.info.algorithm} on {run.info.dataset}"
    lines = textwrap.wrap(title, int(10 * width))
    figure.suptitle("\n".join(lines), fontsize=12, parse_math=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _grouped(rows: Rows, group: str, column: str) -> dict[str, _Curve]:
    """Collect a curve of ``column`` over the total step for each text in the column ``group``."""
    names = dict.fromkeys(row[group] for row in rows)
    parts = {name: [row for row in rows if row[group] == name] for name in names}
    return _curves(parts, "total_step", column)


def _curves(parts: Mapping[str, Rows], step: str, column: str | None = None) -> dict[str, _Curve]:
    """Collect curves of rows over the column ``step``, but those that have no finite value.

    Args:
      parts: rows, by the name of their curve.
      step: the column of steps.
      column: of values, the mean of a seed's rows at a step; by default the curve's name.
    """
    curves = {}
    for name, rows in parts.items():
        groups: dict[tuple[int, int], list[float]] = {}
        for row in rows:
            value = float(row.get(column or name) or np.nan)
            if np.isfinite(value):
                groups.setdefault((int(row[step]), int(row["seed"])), []).append(value)
        if groups:
            steps, seeds = (sorted(set(part)) for part in zip(*groups, strict=True))
            points = [[np.mean(groups.get((at, seed), np.nan)) for seed in seeds] for at in steps]
            curves[name] = _Curve(np.array(steps), np.array(points))
    return curves


def _draw_losses(axes: Axes, curves: Mapping[str, _Curve]) -> None:
    for phase, curve in curves.items():
        _line(axes, curve, phase, _COLORS.get(phase, _OTHER_COLOR))
    smallest = min(np.nanmin(curve.values) for curve in curves.values())
    largest = max(np.nanmax(curve.values) for curve in curves.values())
    if smallest > 0:
        axes.set_yscale("log")
        number = StrMethodFormatter("{x:g}")
        axes.yaxis.set_major_formatter(number)
        # Within one decade the powers of ten alone would leave the axis with one or two numbers.
        axes.yaxis.set_minor_formatter(number if largest < 10 * smallest else NullFormatter())
    _label(axes, "Loss by phase", "gradient step, all phases", "loss")


def _draw_weights(axes: Axes, curves: Mapping[str, _Curve]) -> None:
    handles, right = [], axes
    if "ess" in curves:
        handles += _line(axes, curves["ess"], "effective sample size", _ESS_COLOR)
        low = {"color": _ESS_COLOR, "linewidth": 1, "linestyle": ":"}
        handles.append(axes.axhline(LOW_ESS, label=f"warning below {LOW_ESS}", **low))
        axes.set_ylim(bottom=min(1.0, axes.get_ylim()[0]))
        right = axes.twinx() if "top_weight" in curves else axes
        right.spines[["top"]].set_visible(False)
    if "top_weight" in curves:
        handles += _line(right, curves["top_weight"], "top weight", _TOP_WEIGHT_COLOR)
        right.set_ylabel("top weight")
        right.set_ylim(0.0, 1.0)
    y = "effective sample size" if "ess" in curves else "top weight"
    _label(axes, "Weights of a state's support actions", "policy step", y, handles)


def _draw_q_values(axes: Axes, curves: Mapping[str, _Curve]) -> None:
    for column, curve in curves.items():
        of = column.removeprefix("q_")
        _line(axes, curve, f"{of} actions", _COLORS["behavior" if of == "data" else "policy"])
    _label(axes, "Mean Q-value", "gradient step, all phases", "Q")


def _draw_returns(
    axes: Axes, curves: Mapping[str, _Curve], start: int, dataset_return: float
) -> None:
    for name, (steps, values) in curves.items():
        color = _COLORS.get(name, _OTHER_COLOR)
        if name == "behavior":
            last = values[-1]
            axes.axhspan(np.nanmin(last), np.nanmax(last), color=color, alpha=0.15, linewidth=0)
            axes.axhline(np.nanmean(last), color=color, linewidth=1.6, label=name)
        else:
            _line(axes, _Curve(steps - start, values), name, color, marker="o")
    if np.isfinite(dataset_return):
        dashes = {"color": _DATASET_COLOR, "linewidth": 1.2, "linestyle": "--"}
        axes.axhline(dataset_return, label="dataset", **dashes)
    if list(curves) == ["behavior"]:
        axes.set_xticks([])  # nothing was evaluated along the policy phase yet
    seeds = max(curve.values.shape[1] for curve in curves.values())
    spread = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    _label(axes, f"Return of an episode ({spread})", "policy step", "return")


def _line(axes: Axes, curve: _Curve, label: str, color: str, marker: str | None = None) -> list:
    """Draw the mean over seeds with a band to the extremes; returns handles for a legend."""
    steps, values = curve
    low, high = np.nanmin(values, axis=1), np.nanmax(values, axis=1)
    axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    if len(steps) == 1:
        marker = "o"  # a line through one point is invisible
    style: dict[str, Any] = {"marker": marker, "markersize": 4, "linewidth": 1.6}
    return axes.plot(steps, np.nanmean(values, axis=1), color=color, label=label, **style)


def _label(axes: Axes, title: str, x: str, y: str, handles: Iterable | None = None) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    legend = axes.legend(handles=handles, fontsize=8, frameon=False, loc="best")
    for text in legend.get_texts():
        text.set_parse_math(False)  # because names may hold $
