"""The style of the experiments' figures."""

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from experiments import figures


def test_a_figure_is_saved_whole_in_the_style_which_ends_with_it(tmp_path):
    before, path = dict(matplotlib.rcParams), tmp_path / "new" / "figure.png"
    with figures.drawn(path, 3, 2) as figure:
        axes = figure.subplots()
        (line,) = axes.plot([0, 1])
        assert not axes.spines["top"].get_visible()
        assert line.get_color() == figures.COLORS["blue"]
    assert dict(matplotlib.rcParams) == before
    assert Image.open(path).size == (300, 200)
    assert np.asarray(Image.open(path).convert("L")).std() > 5
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(ZeroDivisionError), figures.drawn(path, 1, 1):
        print(1 / 0)
    assert Image.open(path).size == (300, 200)  # the old file


def test_a_thin_line_keeps_its_color_beside_many_others(tmp_path):
    path = tmp_path / "figure.png"
    with figures.drawn(path, 6, 4) as figure:
        axes = figure.subplots()
        axes.imshow(np.linspace(0, 1, 250_000).reshape(500, 500), extent=(0, 1, 0, 1))
        for i, color in enumerate(figures.COLORS.values()):
            figures.banded(axes, [1.1, 2], [i / 9, i / 9], [0, 0], [1, 1], color=color, marker="")
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int)
    for color in figures.COLORS.values():
        wanted = 255 * np.array(matplotlib.colors.to_rgb(color))
        assert np.abs(pixels - wanted).max(-1).min() < 8


def test_panels_without_content_are_hidden(tmp_path):
    path = tmp_path / "figure.png"
    with figures.panels(path, 4, 3, (2, 1), 0.5) as (figure, found):
        assert [axes.axison for axes in figure.axes] == [True] * 4 + [False] * 2
        assert list(found) == figure.axes[:4]
    assert Image.open(path).size == (600, 250)


def test_methods_of_one_figure_have_different_colors():
    for names in (
        ("cg", "cfg", "cep", "ed", "efm_ot", "efm_cosine", "monte_carlo", "exact_ot"),
        ["bc", "bc-diff", "best-of-n", "gaussian", "reweight", "qgpo", "qipo-ot", "qipo-diff"],
    ):
        assert len({figures.METHODS[name] for name in names}) == len(names)
    assert set(figures.METHODS.values()) <= set(figures.COLORS.values())


def test_a_band_has_its_lines_color_and_goes_from_low_to_high():
    axes = Figure().subplots()
    figures.banded(axes, [0, 1], [2, 3], [1, 2], [4, 5], color="#123456", label="line")
    (line,), (band,) = axes.lines, axes.collections
    assert line.get_color() == "#123456"
    assert line.get_label() == "line"
    assert matplotlib.colors.to_hex(band.get_facecolor()[0]) == "#123456"
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    assert (low, high) == (1, 5)


@pytest.mark.parametrize(("top", "named"), [(20, True), (2000, False)])
def test_numbers_between_powers_of_ten_are_named_only_within_two_decades(top, named):
    axes = Figure().subplots()
    axes.plot([1, top])
    figures.log_numbers(axes)
    assert axes.get_yscale() == "log"
    assert axes.yaxis.get_major_formatter()(10.0) == "10"
    assert (axes.yaxis.get_minor_formatter()(5.0) == "5") == named
