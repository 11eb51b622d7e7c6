"""``learning_curve.png``: a run's losses, weights, Q-values and returns at a glance."""

import io
import textwrap
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter, StrMethodFormatter

from efm_jax.files import write_whole
from efm_jax.runs.metrics import read_table

Rows = list[dict[str, str]]

_PHASE_COLORS = {"behavior": "#4477aa", "critic": "#ccbb44", "policy": "#aa3377"}
_OTHER_COLORS = ("#228833", "#66ccee", "#ee6677", "#777777")
_DATASET_COLOR = "#555555"
# Below this effective sample size one action carries nearly all the weight of a state; the run
# warns too.
_LOW_ESS = 1.5


def plot_learning_curve(
    metrics_csv: epath.PathLike,
    returns_csv: epath.PathLike,
    output_png: epath.PathLike,
    *,
    dataset_return: float | None = None,
    title: str = "",
) -> None:
    """Draws what a run has logged so far; panels for which nothing is logged yet are left out.

    Panels: losses by phase; effective sample size and top weight of the policy phase; Q-values of
      data
    and support actions; returns of behavior, policy and dataset. Lines are means over training
    seeds, bands reach from the smallest to the largest seed (each seed's return being its mean over
    episodes).

    Args:
      metrics_csv: as written by :class:`efm_jax.runs.metrics.MetricsWriter`.
      returns_csv: as written by :func:`efm_jax.runs.metrics.write_returns`; may not exist yet.
      output_png: replaced in one rename.
      dataset_return: mean return of the dataset's episodes, drawn as a line.
      title: over the whole figure.

    Raises:
      FileNotFoundError: no ``metrics_csv``.
      ValueError: there is no finite number to draw.
    """
    metrics = read_table(metrics_csv)
    returns = read_table(returns_csv) if epath.Path(returns_csv).exists() else []
    policy = [row for row in metrics if row["phase"] == "policy"]
    panels: list[Callable[[Axes], None]] = []
    if _has(metrics, "loss"):
        panels.append(lambda axes: _draw_losses(axes, metrics))
    if _has(policy, "ess") or _has(policy, "top_weight"):
        panels.append(lambda axes: _draw_weights(axes, policy))
    if _has(metrics, "q_data") or _has(metrics, "q_support"):
        panels.append(lambda axes: _draw_q_values(axes, metrics))
    if _has(returns, "return"):
        # Evaluations carry the total step; the policy phase starts where the earlier phases ended.
        start = min((int(row["total_step"]) - int(row["step"]) for row in policy), default=0)
        panels.append(lambda axes: _draw_returns(axes, returns, start, dataset_return))
    if not panels:
        raise ValueError(f"{epath.Path(metrics_csv)}: no finite number to draw")

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
    if title:
        figure.suptitle("\n".join(textwrap.wrap(title, int(10 * width))), fontsize=12)
    _save(figure, epath.Path(output_png))


def _draw_losses(axes: Axes, metrics: Rows) -> None:
    smallest, largest = np.inf, -np.inf
    phases = list(dict.fromkeys(row["phase"] for row in metrics))
    for index, phase in enumerate(phases):
        rows = [row for row in metrics if row["phase"] == phase]
        if _has(rows, "loss"):
            color = _PHASE_COLORS.get(phase, _OTHER_COLORS[index % len(_OTHER_COLORS)])
            steps, values = _by_seed(rows, "total_step", "loss")
            _line(axes, steps, values, phase, color)
            smallest, largest = min(smallest, np.nanmin(values)), max(largest, np.nanmax(values))
    if smallest > 0:
        axes.set_yscale("log")
        number = StrMethodFormatter("{x:g}")
        axes.yaxis.set_major_formatter(number)
        # Within one decade the powers of ten alone would leave the axis with one or two numbers.
        axes.yaxis.set_minor_formatter(number if largest < 10 * smallest else NullFormatter())
    _label(axes, "Loss by phase", "gradient step, all phases", "loss")


def _draw_weights(axes: Axes, policy: Rows) -> None:
    handles = []
    if _has(policy, "ess"):
        handles += _line(axes, *_by_seed(policy, "step", "ess"), "effective sample size", "#4477aa")
        handles.append(
            axes.axhline(
                _LOW_ESS,
                color="#4477aa",
                linewidth=1,
                linestyle=":",
                label=f"warning below {_LOW_ESS}",
            )
        )
        axes.set_ylim(bottom=min(1.0, axes.get_ylim()[0]))
    _label(axes, "Weights of a state's support actions", "policy step", "effective sample size")
    if _has(policy, "top_weight"):
        right = axes
        if handles:
            right = axes.twinx()
            right.spines[["top"]].set_visible(False)
        handles += _line(right, *_by_seed(policy, "step", "top_weight"), "top weight", "#ee6677")
        right.set_ylabel("top weight")
        right.set_ylim(0.0, 1.0)
    _legend(axes, handles)


def _draw_q_values(axes: Axes, metrics: Rows) -> None:
    names = (("q_data", "data actions", "#4477aa"), ("q_support", "support actions", "#aa3377"))
    for column, label, color in names:
        if _has(metrics, column):
            _line(axes, *_by_seed(metrics, "total_step", column), label, color)
    _label(axes, "Mean Q-value", "gradient step, all phases", "Q")


def _draw_returns(
    axes: Axes, returns: Rows, policy_start: int, dataset_return: float | None
) -> None:
    handles = []
    names = list(dict.fromkeys(row["policy"] for row in returns))
    for index, name in enumerate(name for name in names if name != "behavior"):
        rows = [row for row in returns if row["policy"] == name]
        steps, values = _by_seed(rows, "total_step", "return")
        color = _PHASE_COLORS.get(name, _OTHER_COLORS[index % len(_OTHER_COLORS)])
        handles += _line(axes, steps - policy_start, values, name, color, marker="o")
    behavior = [row for row in returns if row["policy"] == "behavior"]
    if _has(behavior, "return"):
        values = _by_seed(behavior, "total_step", "return")[1][-1]
        color = _PHASE_COLORS["behavior"]
        handles.append(
            axes.axhline(np.nanmean(values), color=color, linewidth=1.6, label="behavior")
        )
        axes.axhspan(np.nanmin(values), np.nanmax(values), color=color, alpha=0.15, linewidth=0)
    if dataset_return is not None and np.isfinite(dataset_return):
        line = axes.axhline(
            dataset_return, color=_DATASET_COLOR, linewidth=1.2, linestyle="--", label="dataset"
        )
        handles.append(line)
    if names == ["behavior"]:
        axes.set_xticks([])  # nothing was evaluated along the policy phase yet
    seeds = len({row["seed"] for row in returns})
    spread = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    _label(axes, f"Return of an episode ({spread})", "policy step", "return")
    _legend(axes, handles)


def _line(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    label: str,
    color: str,
    marker: str | None = None,
) -> list:
    """Mean over seeds of ``values [points, K]`` with a band to the extremes; the handle for the legend."""
    if len(steps) == 1:
        marker = "o"  # a line through one point is invisible
    handles = axes.plot(
        steps,
        np.nanmean(values, axis=1),
        color=color,
        label=label,
        marker=marker,
        markersize=4,
        linewidth=1.6,
    )
    low, high = np.nanmin(values, axis=1), np.nanmax(values, axis=1)
    axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    return handles


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    handles, _ = axes.get_legend_handles_labels()
    _legend(axes, handles)


def _legend(axes: Axes, handles: Sequence) -> None:
    if handles:
        axes.legend(handles=handles, fontsize=8, frameon=False, loc="best")


def _number(text: str | None) -> float:
    """A cell's number; NaN for an empty cell and for what cannot be drawn."""
    value = float(text) if text else np.nan
    return value if np.isfinite(value) else np.nan


def _has(rows: Rows, column: str) -> bool:
    return any(np.isfinite(_number(row.get(column))) for row in rows)


def _by_seed(rows: Rows, step_column: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps ``[P]`` in order and the values there ``[P, K]``, the mean of a seed's rows at a step.

    NaN where a seed has no finite value; steps at which no seed has one are left out.
    """
    groups: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        value = _number(row.get(column))
        if np.isfinite(value):
            groups.setdefault((int(row[step_column]), row["seed"]), []).append(value)
    steps = sorted({step for step, _ in groups})
    seeds = sorted({seed for _, seed in groups})
    values = np.full((len(steps), len(seeds)), np.nan)
    row_of = {step: index for index, step in enumerate(steps)}
    for (step, seed), numbers in groups.items():
        values[row_of[step], seeds.index(seed)] = np.mean(numbers)
    return np.array(steps), values


def _save(figure: Figure, output: epath.Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(output, buffer.getvalue())
