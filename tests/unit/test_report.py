"""The page of `launch.report`, read as a browser would: by a parser."""

import base64
import html.parser
import json
import re
import sys

import numpy as np
import pytest
from etils import epath

from efm_jax.envs import Rollouts
from efm_jax.runs.metrics import MetricsWriter, write_returns
from launch.report import page as report_page
from launch.report.page import build_page
from launch.report.runs import load_runs

VOID = {"br", "img", "meta"}
CONFIG = {
    "path": "ot",
    "beta": 10.0,
    "hidden_dims": [8, 8],
    "behavior_steps": 200,
    "support_size": 4,
    "renew_every": 10,
}
INFO = {
    "version": "0.1.0", "config": CONFIG, "seed": 0, "num_seeds": 1, "dataset": "some/data-v0",
    "fingerprint": "f00d" * 16, "transitions": 40000, "dataset_return": -424.75, "observation_size": 3,
    "action_size": 1, "env_spec": json.dumps({"id": "Pendulum-v1"}), "reference_scores": [-1000.0, 0.0],
}  # fmt: skip
RESULT = {"algorithm": "qipo_ot", "steps": 600, "seconds": 35.25}


class Page(html.parser.HTMLParser):
    """The elements of a document: tag, attributes and text of each; fails where it is not well-formed."""

    def __init__(self, text):
        super().__init__()
        self.source, self.elements, self._open = text, [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self._open, tag
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        # As they are easier to write here.
        data = data.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "none")
        for _, _, text in self._open:
            text.append(data)

    def find(self, tag, **attributes):
        """Texts of elements."""
        wanted = attributes.items()
        return [
            "".join(text)
            for name, found, text in self.elements
            if name == tag and wanted <= found.items()
        ]

    def attribute(self, name):
        return [found[name] for _, found, _ in self.elements if name in found]

    @property
    def text(self):
        return " ".join(self.find("html")[0].split())

    def rows(self, caption):
        """Cells of the table whose caption starts so; lines of a cell are separated."""
        [start] = [
            m.start() for m in re.finditer(f'<table aria-label="{re.escape(caption)}', self.source)
        ]
        source = self.source[start : self.source.index("</table>", start)]
        table = Page(re.sub("<div[^>]*>", " ", source).replace("</div>", "") + "</table>")
        rows, cells = [], iter(table.elements)
        for tag, _, text in cells:
            if tag == "tr":
                rows.append([])
            elif tag in ("th", "td"):
                rows[-1].append(" ".join("".join(text).split()))
        return rows


def write(folder, *, info=(), result=RESULT, phases=None, returns=None):
    """A work directory; `returns` maps policy and step to `[K, E]`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(INFO | dict(info)))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    if phases is not None:
        writer, total = (
            MetricsWriter(
                folder,
                range(max(np.size(v) for p in phases.values() for _, m in p for v in m.values())),
                None,
            ),
            0,
        )
        for phase, points in phases.items():
            for step, values in points:
                writer.write(total + step, phase, step, values)
            total += points[-1][0]
        writer.close()
    for (policy, step), values in (returns or {}).items():
        values = np.asarray(values, float)
        seeds = range(values.shape[1])
        rollouts = Rollouts(values, np.full(values.shape, 200))
        write_returns(folder, step, policy, rollouts, range(len(values)), seeds)
    return folder


PHASES = {
    "behavior": [
        (step, {"loss": [1.0 / step, 2.0 / step], "grad_norm": [0.5, 0.7]}) for step in (10, 20, 30)
    ],
    "critic": [
        (step, {"loss": [3.0, 4.0], "q_mean": [-step, -step - 1.0]}) for step in (10, 20, 30)
    ],
    "policy": [
        (
            step,
            {
                "loss": [0.1, 0.2],
                "ess": [3.5, 2.5],
                "ess_low": [1.2, 1.4],
                "top_weight": [0.6, 0.7],
            },
        )
        for step in (10, 20, 30)
    ],
}
RETURNS = {
    ("behavior", 30): [[-400.0, -500.0], [-300.0, -400.0]],
    ("policy", 75): [[-250.0, -250.0], [-250.0, -240.0]],
    ("policy", 90): [[-100.0, -200.0], [-200.0, -220.0]],
}
TWO_SEEDS = {"num_seeds": 2}


def page_of(*folders):
    return Page(build_page(load_runs([str(folder) for folder in folders]), "today"))


@pytest.fixture
def run(tmp_path):
    return write(tmp_path / "a", info=TWO_SEEDS, phases=PHASES, returns=RETURNS)


def test_everything_of_a_run_is_there(run):
    page = page_of(run)
    headings = [text.strip() for text in page.find("h2")]
    assert headings == [
        "Results", "Comparison of runs", "Returns", "Effective sample sizes", "Curves: behavior",
        "Curves: critic", "Curves: policy", "Data", "Configuration",
    ]  # fmt: skip
    assert [href[1:] for href in page.attribute("href")] == [
        id_ for id_ in page.attribute("id") if id_ + "-title" in page.attribute("id")
    ]
    names = page.find("h4")
    for metric, phases in {
        "loss": 3,
        "grad_norm": 1,
        "q_mean": 1,
        "ess": 1,
        "ess_low": 1,
        "top_weight": 1,
    }.items():
        assert names.count(metric) == phases
    for words in (
        "qipo_ot on some/data-v0, 2 seeds (0 to 1), 600 gradient steps; its last start took 35 s.",
        "The dataset's mean return is -424.8 (score 57.5).",
        str(run),
    ):
        assert words in page.text
    data = dict(page.rows("The data"))
    assert data["fingerprint"] == INFO["fingerprint"]
    assert (data["transitions"], data["return of score 0 (random)"]) == ("40,000", "-1,000.0")
    fields = dict(page.rows("All fields")[1:])
    assert (fields["hidden_dims"], fields["beta"], fields["num_seeds"]) == ("[8, 8]", "10.0", "2")


def test_one_seed_has_an_interval_over_episodes_and_one_episode_has_none(tmp_path):
    # Student's t of 97.5% with 2 degrees is 4.3027; the standard deviation is 10.
    folder = write(
        tmp_path / "a", returns={("behavior", 5): [[7.0]], ("policy", 9): [[10.0, 20.0, 30.0]]}
    )
    page = page_of(folder)
    margin = 4.3027 * 10 / 3**0.5
    interval = f"-{margin - 20:.1f} to {margin + 20:.1f}"
    words = (
        f"Improved policy: mean return 20.0, score 102.0 (95% interval {interval} over 3 episodes)"
    )
    assert words in page.text
    assert "Behavior model: mean return 7.0, score 100.7 (one episode, no interval)" in page.text
    behavior, policy = page.rows("All evaluations")[1:]
    assert behavior == ["a", "behavior", "5", "7.0", "none", "none", "100.7", "1", "200.0"]
    assert policy[3:6] == ["20.0", interval, "over 3 episodes"]


def test_several_seeds_have_an_interval_over_their_means(run):
    # Means -150 and -210: standard error 30, and Student's t of 97.5% with 1 degree is 12.7062.
    interval = f"-{180 + 12.7062 * 30:.1f} to {12.7062 * 30 - 180:.1f}"
    page = page_of(run)
    assert [row[1:6] for row in page.rows("All evaluations")[1:]][-1] == [
        "policy", "90", "-180.0", interval, "over 2 seeds",
    ]  # fmt: skip
    head, row = page.rows("Last evaluation")
    assert dict(zip(head, row, strict=True))["policy return"] == f"-180.0 {interval} 4 episodes"
    assert f"95% interval {interval} over 2 seeds, 4 episodes" in page.text


def test_runs_are_compared(run, tmp_path):
    other = write(
        tmp_path / "b",
        info=TWO_SEEDS | {"config": CONFIG | {"beta": 3.0, "new": {"deep": True}}},
        phases=PHASES,
        returns=RETURNS | {("policy", 90): [[-50.0, -50.0], [-50.0, -60.0]]},
    )
    page = page_of(run, other)
    assert page.find("h1") == ["Report of 2 runs"]
    assert page.rows("Fields of the configuration that differ")[1:] == [
        ["beta", "10.0", "3.0"],
        ["new.deep", "none", "true"],
    ]
    marked = [row for row in page.rows("All fields") if row[0].endswith("≠")]
    assert [row[0] for row in marked] == ["beta ≠", "new.deep ≠"]
    # The better policy, and the first of two equal behavior models or the second, but one of them.
    assert "-52.5" in page.find("strong")
    assert "-180.0" not in page.find("strong")
    for index in (0, 1):
        assert f"stroke: var(--run-{index})" in page.source
    # One dataset, both runs.
    assert page.rows("The data")[1][1] == "a b"


def test_returns_of_different_environments_are_not_drawn_together(run, tmp_path):
    env = {"env_spec": json.dumps({"id": "Hopper-v5"}), "fingerprint": "0" * 64}
    other = write(tmp_path / "b", info=env, returns={("policy", 90): [[3000.0, 3100.0]]})
    page = page_of(run, other)
    assert [text for text in page.find("h3") if "-v" in text] == ["Pendulum-v1", "Hopper-v5"]
    alts = [alt for alt in page.attribute("aria-label") if alt.startswith("Returns of evaluations")]
    assert ["a, policy" in alt for alt in alts] == [True, False]
    assert ["b, policy, step 90: 3050.0" in alt for alt in alts] == [False, True]
    assert page.find("strong") == []  # nothing to compare with


def lines(page, metric, phase):
    """Stroke attributes of the curves in a metric's figure."""
    [svg] = re.findall(
        f'<svg[^>]*aria-label="{metric} against {phase} step.*?</svg>', page.source, re.DOTALL
    )
    return re.findall(r'<path [^>]*style="([^"]*var\(--run-[^"]*)"', svg)


def test_seeds_are_thin_and_their_mean_is_thick(tmp_path):
    points = [(step, {"loss": [1.0, 2.0, 4.0 * step]}) for step in (1, 2, 3)]
    page = page_of(write(tmp_path / "a", info={"num_seeds": 3}, phases={"critic": points}))
    found = lines(page, "loss", "critic")
    assert ["stroke-width: 0.8" in style for style in found] == [True, True, True, False]
    assert "stroke-width: 2.2" in found[3]
    [alt] = [
        alt for alt in page.attribute("aria-label") if alt.startswith("loss against critic step")
    ]
    assert "a, mean of 3 seeds: 2.333 at step 1, 5 at step 3" in alt


def test_values_that_are_not_finite_are_said(tmp_path):
    points = [(1, {"loss": [np.nan], "odd": [np.inf]}), (2, {"loss": [2.0]}), (3, {"loss": [3.0]})]
    page = page_of(write(tmp_path / "a", phases={"critic": points}))
    assert "a: 1 values that are not finite are not drawn." in page.text
    assert "No finite value." in page.text
    assert page.find("h4").count("odd") == 1
    assert len(lines(page, "loss", "critic")) == 1


def test_unknown_phases_and_metrics_and_missing_ones(run, tmp_path):
    points = [(step, {"loss": 1.0, "guide_error": [0.1, 0.2]}) for step in (5, 6)]
    other = write(tmp_path / "b", info=TWO_SEEDS, phases={"behavior": points, "guidance": points})
    page = page_of(run, other)
    assert "Curves: guidance" in page.find("h2")
    assert page.find("h4").count("guide_error") == 2
    assert "Norm of the gradient before clipping. Not logged by b." in page.text
    assert lines(page, "guide_error", "guidance")


def test_unfinished_runs(tmp_path):
    half = write(tmp_path / "half", result=None, phases={"behavior": PHASES["behavior"]})
    with open(half / "metrics.csv", "a") as file:
        file.write("40,40,behav")  # what a run is writing
    fresh = write(tmp_path / "fresh", result=None)
    page = page_of(half, fresh)
    assert (
        "path ot on some/data-v0, seed 0, unfinished: step 30 of 200 of phase behavior is logged"
        in page.text
    )
    assert "unfinished: nothing has been logged yet." in page.text
    assert "No policy has been evaluated yet." in page.text
    assert "Effective sample sizes" not in page.find("h2")
    assert [row[4] for row in page.rows("Last evaluation")[1:]] == [
        "30 unfinished",
        "none unfinished",
    ]
    assert build_page(load_runs([str(fresh)]), "today")


NASTY = """--></svg></style><script>alert(1)</script>&amp;<b>'"$x^{$ """


def test_texts_are_escaped(tmp_path):
    spec = {
        "env_spec": json.dumps({"id": NASTY}),
        "dataset": NASTY,
        "config": {"path": NASTY, NASTY: NASTY},
    }
    points = [
        (1, {"loss": [1.0], NASTY: [2.0], "ess": [2.0]}),
        (2, {"loss": [1.5], NASTY: [2.0], "ess": [2.0]}),
    ]
    name = NASTY.replace("/", "|")
    folder = write(
        tmp_path / name,
        info=spec,
        result=RESULT | {"algorithm": NASTY},
        phases={NASTY: points},
        returns={(NASTY, 1): [[1.0, 2.0]], (NASTY, 2): [[1.0, 2.0]]},
    )
    (folder / f"{name}.mp4").write_bytes(b"video")
    page = page_of(folder)
    assert "script" not in {tag for tag, _, _ in page.elements}
    assert "b" not in {tag for tag, _, _ in page.elements}
    assert page.find("h4").count(NASTY) == 1
    assert page.find("td").count(NASTY) >= 3  # dataset, environment, configuration
    assert any(name[-28:] in text for text in page.find("text"))  # within the figure
    assert f"{NASTY} against" in "".join(page.attribute("aria-label"))


def test_the_page_needs_nothing_else(run, tmp_path):
    (run / "video.mp4").write_bytes(b"video")
    page = page_of(run, write(tmp_path / "b", phases=PHASES, returns=RETURNS))
    assert not re.search("https?://|//[a-z]", re.sub(r"base64,[^\"]*", "", page.source))
    assert "@import" not in page.source
    assert "url(" not in page.source.replace("url(#", "")
    for name in ("src", "href", "xlink:href", "poster", "action", "srcset"):
        assert all(value.startswith(("data:", "#")) for value in page.attribute(name))
    # A scheme that a later change may forget is refused by the browser.
    [policy] = [found["content"] for tag, found, _ in page.elements if found.get("http-equiv")]
    assert policy.startswith("default-src 'none'")
    ids = page.attribute("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in page.attribute("xlink:href") + page.attribute("href")} <= set(
        ids
    )


def test_figures_have_descriptions_and_the_colors_of_the_page(run):
    page = page_of(run)
    plots = [found for tag, found, _ in page.elements if tag == "svg" and found["class"] == "plot"]
    assert len(plots) == 2 + 1 + 8  # returns, weights, metrics
    assert all(found["role"] == "img" and len(found["aria-label"]) > 20 for found in plots)
    assert len({found["aria-label"] for found in plots}) == len(plots)
    drawing = "".join(re.findall('<svg[^>]*class="plot".*?</svg>', page.source, re.DOTALL))
    colors = set(re.findall('(?:fill|stroke): *([^;"]+)', drawing))
    assert colors == {"none", "currentColor", "var(--grid)", "var(--run-0)"}
    assert "prefers-color-scheme: dark" in page.source
    assert "@media print" in page.source


def test_videos(run, monkeypatch):
    contents = {"video.mp4": bytes(range(256)), "another.gif": b"GIF89a"}
    for name, content in contents.items():
        (run / name).write_bytes(content)
    page = page_of(run)
    sources = page.attribute("src")
    assert [source.partition(",")[0] for source in sources] == [
        "data:video/mp4;base64",
        "data:image/gif;base64",
    ]
    assert [base64.b64decode(source.partition(",")[2]) for source in sources] == list(
        contents.values()
    )
    [video] = [found for tag, found, _ in page.elements if tag == "video"]
    assert "controls" in video
    assert "video.mp4: an episode of run a in Pendulum-v1" in video["aria-label"]
    monkeypatch.setattr(report_page, "_MAX_VIDEO_BYTES", 100)
    page = page_of(run)
    assert page.find("video") == []
    assert "too large to be part of this page" in page.text


def test_names_tell_runs_apart(tmp_path):
    folders = [write(tmp_path / "x" / "run"), write(tmp_path / "y" / "run"), write(tmp_path / "z")]
    assert [run.name for run in load_runs([str(folder) for folder in folders[1:]])] == ["run", "z"]
    names = [run.name for run in load_runs([str(folder) for folder in folders])]
    assert names == ["x/run", "y/run", f"{tmp_path.name}/z"]


def test_work_directory_in_a_bucket(monkeypatch, run):
    from tests.unit.test_remote_workdir import Bucket

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gcs", Bucket)
    monkeypatch.setattr(Bucket, "store", {}, raising=False)
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""], raising=False)
    for path in run.iterdir():
        if path.is_file():
            (epath.Path("gs://bucket/run") / path.name).write_bytes(path.read_bytes())
    remote = page_of("gs://bucket/run")
    assert "Work directory gs://bucket/run" in remote.text
    assert remote.rows("All evaluations")[1][1:] == page_of(run).rows("All evaluations")[1][1:]


def replace(name, old, new):
    def change(folder):
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["holds no run"]),
    "half a config": (replace("config.json", '"seed": 0', '"seed'), ["config.json"]),
    "another config": (lambda folder: (folder / "config.json").write_text("[1]"), ["config.json", "list"]),
    "config without data": (replace("config.json", '"dataset"', '"data"'), ["config.json", "'dataset'"]),
    "text for a number": (replace("config.json", "40000", '"many"'), ["'transitions'", "many"]),
    "references": (replace("config.json", "[-1000.0, 0.0]", "[0.0, 0.0]"), ["reference_scores"]),
    "result": (lambda folder: (folder / "result.json").write_text("{"), ["result.json"]),
    "metric": (replace("metrics.csv", "0.5", "half"), ["metrics.csv", "line", "grad_norm", "half"]),
    "step": (replace("metrics.csv", "\n10,10,", "\n10,ten,"), ["metrics.csv", "step", "ten"]),
    "cells": (replace("metrics.csv", "\n10,10,", "\n10,10,1,1,1,1,1,1,1,1,1,1,"), ["metrics.csv", "cells"]),
    "no column": (replace("metrics.csv", "phase", "stage"), ["metrics.csv", "'phase'"]),
    "return": (replace("returns.csv", "-400.0", ""), ["returns.csv", "empty return"]),
    "bytes": (lambda folder: (folder / "returns.csv").write_bytes(b"\xff\n"), ["returns.csv"]),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_files_that_cannot_be_understood(run, case):
    change, words = DAMAGE[case]
    change(run)
    with pytest.raises(ValueError, match=re.escape(str(run))) as error:
        load_runs([str(run)])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_that_are_no_runs(run, tmp_path):
    with pytest.raises(ValueError, match="nosuch: no such folder"):
        load_runs([str(run), str(tmp_path / "nosuch")])
    with pytest.raises(ValueError, match="is a file"):
        load_runs([str(run / "config.json")])
    with pytest.raises(ValueError, match="given twice"):
        load_runs([str(run), f"{run}/"])
