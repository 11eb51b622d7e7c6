"""One style for the figures of all experiments: colors of methods, fonts, grid, whole files."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import ArrayLike
from PIL import Image

from efm_jax.files import write_whole

# The first seven are Tol's bright scheme, which color-blind readers can tell apart too.
COLORS = {"blue": "#4477aa", "red": "#ee6677", "green": "#228833", "yellow": "#ccbb44"}
COLORS |= {"cyan": "#66ccee", "purple": "#aa3377", "gray": "#777777", "brown": "#994f00"}
COLORS |= {"black": "#222222"}
# Methods of one kind share their color over all experiments: blue is the paper's flow.
_NAMES = {"blue": "efm_ot qipo-ot", "cyan": "efm_cosine", "purple": "ed qipo-diff"}
_NAMES |= {"green": "cep qgpo", "red": "cg exact_cg gaussian", "yellow": "cfg reweight"}
_NAMES |= {
    "gray": "exact_ot exact_cosine exact_vp bc",
    "black": "bc-diff",
    "brown": "monte_carlo best-of-n",
}
# Methods of offline RL by the words that figures call them.
WORDS = {"bc": "cloning, OT", "bc-diff": "cloning, diffusion", "best-of-n": "best of N"}
WORDS |= {"qipo-ot": "QIPO-OT", "qipo-diff": "QIPO-Diff", "reweight": "reweighting, once"}
WORDS |= {"gaussian": "IQL's Gaussian", "qgpo": "QGPO"}
METHODS = {method: COLORS[color] for color, names in _NAMES.items() for method in names.split()}

STYLE: dict[str, Any] = {"figure.dpi": 100, "figure.constrained_layout.use": True}
STYLE |= {"font.size": 9, "axes.titlesize": 10, "axes.labelsize": 10, "figure.labelsize": 10}
STYLE |= {"figure.titlesize": 12, "legend.fontsize": 8, "legend.frameon": False}
STYLE |= {"axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6, "axes.axisbelow": True}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"lines.linewidth": 1.4, "lines.markersize": 4}
STYLE["axes.prop_cycle"] = matplotlib.cycler(color=COLORS.values())
REFERENCE = {"color": "#999999", "linestyle": "--", "linewidth": 1, "zorder": 0}  # known answers


@contextlib.contextmanager
def drawn(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Give an empty figure in the style; save it at the block's end. Sizes are in inches."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        yield figure
        save(figure, path)


@contextlib.contextmanager
def panels(
    path: Path, count: int, most: int, size: tuple[float, float], more: float = 0, **shared: bool
) -> Iterator[tuple[Figure, np.ndarray]]:
    """Give a figure and its ``count`` panels, at most ``most`` in a row, each of a size."""
    columns = min(count, most)
    lines = -(-count // columns)
    with drawn(path, size[0] * columns, size[1] * lines + more) as figure:
        found = figure.subplots(lines, columns, squeeze=False, **shared).ravel()
        for axes in found[count:]:
            axes.set_axis_off()
        yield figure, found[:count]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file that is there whole or not at all."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    # A palette makes the file a third of the size; this kind, because the usual one is chosen by
    # area and gives a thin line the color of its neighbors.
    image = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
    image.save(small, format="png", optimize=True)
    write_whole(path, small.getvalue())


def banded(
    axes: Axes, x: ArrayLike, y: ArrayLike, low: ArrayLike, high: ArrayLike, **style: Any
) -> None:
    """Draw a line with markers, and a band of its color from ``low`` to ``high``."""
    (line,) = axes.plot(x, y, **{"marker": "o", **style})
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0)


def log_numbers(axes: Axes) -> None:
    """Make y logarithmic with plain numbers; powers of ten alone are too few in two decades."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    low, high = axes.dataLim.intervaly
    minor = StrMethodFormatter("{x:g}") if high < 100 * low else NullFormatter()
    axes.yaxis.set_minor_formatter(minor)
