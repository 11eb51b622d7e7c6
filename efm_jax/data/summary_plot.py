"""A picture of a dataset: returns, lengths, rewards, actions and observations at a glance."""

import io
import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from efm_jax.data.dataset import Dataset

_COLOR, _LIGHT, _MARK = "#4477aa", "#9ebbd6", "#aa3377"
_SAMPLE = 50_000  # rows drawn of a large dataset
_BINS = 40


def draw_summary(
    dataset: Dataset, summary: dict[str, Any], references: tuple[float, float] | None = None
) -> bytes:
    """Draw six panels as a PNG.

    Histograms of episode returns (with scores on a second axis where there are ``references``),
    lengths and rewards; returns in the order of the recording; where in its interval every action
    dimension lies; quantiles of every observation dimension.

    Args:
      dataset: the whole dataset.
      summary: what :func:`.summary.summarize` says of it.
      references: returns of scores 0 and 100.
    """
    figure = Figure(figsize=(15.5, 8.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3).ravel()
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    _returns(panels[0], dataset, references)
    _histogram(panels[1], dataset.episode_lengths, "Episode lengths", "steps", "episodes")
    _histogram(
        panels[2], dataset.transitions.rewards, "Rewards", "reward", "transitions (log)", log=True
    )
    _course(panels[3], dataset)
    _actions(panels[4], dataset, summary["actions"])
    _observations(panels[5], dataset)
    title = (
        f"{summary['dataset']}: {summary['transitions']:,} transitions, {summary['episodes']:,} "
        f"episodes, {summary['observations']['size']} observation and "
        f"{summary['actions']['size']} action dimensions"
    )
    figure.suptitle("\n".join(textwrap.wrap(title, 140)), fontsize=12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _returns(axes: Axes, dataset: Dataset, references: tuple[float, float] | None) -> None:
    _histogram(axes, dataset.episode_returns, "Episode returns", "return", "episodes")
    mean = float(np.mean(dataset.episode_returns))
    axes.axvline(mean, color=_MARK, linewidth=1.4, linestyle="--", label=f"mean {mean:.4g}")
    axes.legend(fontsize=8, frameon=False)
    if references is not None:
        low, high = references
        score = (
            lambda x: 100.0 * (x - low) / (high - low),
            lambda y: low + y * (high - low) / 100.0,
        )
        top = axes.secondary_xaxis("top", functions=score)
        top.set_xlabel("score", fontsize=8)
        top.tick_params(labelsize=8)


def _histogram(
    axes: Axes, values: np.ndarray, title: str, x: str, y: str, *, log: bool = False
) -> None:
    values = np.asarray(values, np.float64)
    low, high = float(values.min()), float(values.max())
    if low == high:  # a bar in the middle of an interval that shows its size
        margin = max(0.5, 0.1 * abs(low))
        low, high = low - margin, high + margin
    axes.hist(values, bins=_BINS, range=(low, high), color=_COLOR, log=log)
    if log:
        axes.set_ylim(bottom=0.5)  # a bar of one must be seen
    _label(axes, title, x, y)


def _course(axes: Axes, dataset: Dataset) -> None:
    """Returns in the order of the recording: drifts, and parts of different policies."""
    returns = dataset.episode_returns
    episodes = np.arange(len(returns))
    every = max(1, len(returns) // _SAMPLE)
    axes.plot(episodes[::every], returns[::every], ".", color=_COLOR, markersize=3, alpha=0.5)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _label(axes, "Returns in the order of the recording", "episode", "return")


def _actions(axes: Axes, dataset: Dataset, columns: dict[str, Any]) -> None:
    """Every action dimension's histogram between its bounds, as a column of shades."""
    low, high = dataset.action_low, dataset.action_high
    scaled = 2.0 * (_sample(dataset.transitions.actions) - low) / (high - low) - 1.0
    counts = np.stack(
        [np.histogram(column, bins=_BINS, range=(-1.0, 1.0))[0] for column in scaled.T]
    )
    shares = counts.T / len(scaled)
    size = shares.shape[1]
    # The square root, because a few full bins would leave all others white.
    extent = (-0.5, size - 0.5, -1.0, 1.0)
    image = axes.imshow(np.sqrt(shares), aspect="auto", origin="lower", cmap="Blues", extent=extent)
    bar = axes.figure.colorbar(image, ax=axes)
    ticks = [tick for tick in bar.get_ticks() if 0.0 <= tick <= np.sqrt(shares.max())]
    bar.set_ticks(ticks, labels=[f"{tick**2:.1%}" for tick in ticks])
    bar.ax.tick_params(labelsize=8)
    title = f"Actions: share per bin; {columns['any_at_bounds']:.1%} have a dimension at a bound"
    _label(axes, title, "dimension", "scaled to its bounds")
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))


def _observations(axes: Axes, dataset: Dataset) -> None:
    """Quantiles of every observation dimension, on a scale that is logarithmic beyond 1."""
    rows = _sample(dataset.transitions.observations)
    x = np.arange(rows.shape[1])
    least, low, middle, high, most = np.quantile(rows, (0.0, 0.05, 0.5, 0.95, 1.0), axis=0)
    axes.vlines(x, least, most, color=_LIGHT, linewidth=1.0, label="least to greatest")
    axes.vlines(x, low, high, color=_COLOR, linewidth=4.0, label="5% to 95%")
    axes.plot(x, middle, "_", color=_MARK, markersize=7, label="median")
    axes.set_yscale("symlog", linthresh=1.0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0.0, -0.02))
    bottom = axes.get_ylim()[0]
    axes.set_ylim(bottom=4.0 * bottom if bottom < -1.0 else bottom - 1.0)  # room for the legend
    _label(axes, "Observations", "dimension", "value")
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))


def _sample(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows[:: max(1, len(rows) // _SAMPLE)], np.float64)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
