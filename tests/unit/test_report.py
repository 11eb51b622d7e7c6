"""The page of `launch.report`, read as a browser would: by a parser."""

import base64
import dataclasses
import html.parser
import json
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from etils import epath

from efm_jax.envs import Rollouts
from efm_jax.rl.config import OPTIONS, QIPOConfig
from efm_jax.runs.metrics import MetricsWriter, write_evaluation
from efm_jax.runs.plugins import load_plugins
from efm_jax.runs.workdir import RunInfo
from launch.report.page import build_page
from launch.report.runs import load_runs
from tests.unit import test_remote_workdir
from tests.unit.test_metrics import evaluation

bucket = test_remote_workdir.workdir

VOID = {"br", "img", "meta"}
CONFIG = QIPOConfig(hidden_dims=(8, 8))
INFO = RunInfo(
    config=CONFIG,
    plugins=[],
    algorithm="qipo_ot",
    phase_steps={"behavior": 200, "critic": 100, "policy": 300},
    seed=5,
    num_seeds=1,
    dataset="some/data-v0",
    fingerprint="f00d" * 16,
    transitions=40000,
    dataset_return=-424.75,
    observation_size=3,
    action_size=1,
    env_spec=json.dumps({"id": "Pendulum-v1"}),
    reference_scores=(-1000.0, 0.0),
)
RESULT = {"algorithm": "qipo_ot", "steps": 600, "seconds": 35.25}


class Page(html.parser.HTMLParser):
    """The tree of a document; fails where it is not well-formed."""

    def __init__(self, source):
        super().__init__()
        self.source, self._builder, self._open = source, ElementTree.TreeBuilder(), []
        self.feed(source)
        self.close()
        assert self._open == []
        self.root = self._builder.close()
        self.text = text(self.root)

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self._builder.start(tag, {name: value or "" for name, value in attrs})
        if tag in VOID:
            self._builder.end(tag)
        else:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._builder.start(tag, dict(attrs))
        self._builder.end(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self._builder.end(tag)

    def handle_data(self, data):
        if self._open:
            # As they are easier to write here.
            self._builder.data(data.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "none"))

    def find(self, path):
        """Elements."""
        return self.root.findall(f".//{path}")

    def texts(self, path):
        return [text(element) for element in self.find(path)]

    def attributes(self, name):
        return [element.get(name) for element in self.find(f"*[@{name}]")]

    def figure(self, description):
        """The one figure whose description begins so."""
        [found] = [
            e for e in self.find("svg[@role]") if e.get("aria-label").startswith(description)
        ]
        return found

    def rows(self, caption):
        """Cells of the one table whose caption starts so."""
        [table] = [e for e in self.find("table") if e.get("aria-label").startswith(caption)]
        return [[text(cell) for cell in row] for row in table.iter("tr")]


def text(element):
    """What it says; the lines of a cell are separated by a space."""
    parts = [element.text or ""]
    for child in element:
        parts += [" " * (child.tag == "div"), text(child), child.tail or ""]
    return (
        " ".join("".join(parts).split()) if element.tag in ("td", "th", "html") else "".join(parts)
    )


def write(folder, *, result=RESULT, phases=None, returns=None, **changes):
    """A work directory; `returns` maps policy and step to `[K, E]`, `changes` are those of INFO."""
    folder.mkdir(parents=True)
    info = dataclasses.replace(INFO, **changes)
    info.save(epath.Path(folder))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    if phases is not None:
        writer, total = MetricsWriter(folder, info.seeds, None), 0
        for phase, points in phases.items():
            for step, values in points:
                writer.write(total + step, phase, step, values)
            total += points[-1][0]
    for (policy, step), values in (returns or {}).items():
        shape = np.shape(values)
        # A success in the first seed, in no other.
        successes = np.broadcast_to(np.eye(shape[0])[:, :1], shape)
        rollouts = Rollouts(np.asarray(values, float), np.full(shape, 200), successes)
        episodes = range(np.shape(values)[1])
        row = evaluation(policy, step, len(episodes))
        write_evaluation(folder, row, rollouts, info.seeds, episodes)
    return folder


STEPS = (10, 20, 30)
WEIGHTS = {"ess": [3.5, 2.5], "ess_low": [1.2, 1.4], "top_weight": [0.6, 0.7]}
PHASES = {
    "behavior": [(s, {"loss": [1.0 / s, 2.0 / s], "grad_norm": [0.5, 0.7]}) for s in STEPS],
    "critic": [(s, {"loss": [3.0, 4.0], "q_mean": [-s, -s - 1.0]}) for s in STEPS],
    "policy": [(s, {"loss": [0.1, 0.2], **WEIGHTS}) for s in STEPS],
}
RETURNS = {
    ("behavior", 30): [[-400.0, -500.0], [-300.0, -400.0]],
    ("policy", 75): [[-250.0, -250.0], [-250.0, -240.0]],
    ("policy", 90): [[-100.0, -200.0], [-200.0, -220.0]],
}


def page_of(*folders):
    return Page(build_page(load_runs([str(folder) for folder in folders]), "today"))


@pytest.fixture
def run(tmp_path):
    return write(tmp_path / "a", num_seeds=2, phases=PHASES, returns=RETURNS)


def test_everything_of_a_run_is_there(run):
    page = page_of(run)
    headings = ["Results", "Comparison of runs", "Returns", "Effective sample sizes"]
    headings += [*(f"Curves: {phase}" for phase in PHASES), "Data", "Configuration"]
    assert page.texts("h2") == headings
    # The contents lead to every section, which its heading names.
    sections = [section.get("id") for section in page.find("section")]
    assert page.attributes("href") == [f"#{anchor}" for anchor in sections]
    assert page.texts("nav/a") == headings
    assert page.attributes("aria-labelledby") == [e.get("id") for e in page.find("h2")]
    shown = {"loss": 3, "steps_per_second": 0, "grad_norm": 1, "q_mean": 1}
    shown |= dict.fromkeys(WEIGHTS, 1)
    assert {metric: page.texts("h4").count(metric) for metric in shown} == shown
    assert page.texts("th").count("success %") == 3  # of two policies, and of all evaluations
    assert page.texts("td").count("50.0") == 2 + len(RETURNS)
    for words in (
        "qipo_ot on some/data-v0, 2 seeds (5 to 6), 600 gradient steps; they took 35 s.",
        "The dataset's mean return is -424.8 (score 57.5).",
        f"Work directory {run}",
        f"a: {CONFIG.support_size} sampled actions and the data's, renewed every "
        f"{CONFIG.renew_every} steps.",
    ):
        assert words in page.text
    assert dict(page.rows("The data")).items() >= {
        ("fingerprint", INFO.fingerprint),
        ("transitions", "40,000"),
        ("return of score 0 (random)", "-1,000.0"),
        ("return of score 100 (expert)", "0.0"),
    }
    fields = dict(page.rows("All fields")[1:])
    assert (fields["hidden_dims"], fields["beta"], fields["num_seeds"]) == ("[8, 8]", "10.0", "2")
    assert fields["version"] == json.loads((run / "config.json").read_text())["version"]
    assert fields.keys() >= CONFIG.to_dict().keys()


def test_one_seed_has_an_interval_over_episodes_and_one_episode_has_none(tmp_path):
    # Student's t of 97.5% with 2 degrees is 4.3027; the standard deviation is 10.
    returns = {("behavior", 5): [[7.0]], ("policy", 9): [[10.0, 20.0, 30.0]]}
    page = page_of(write(tmp_path / "a", returns=returns))
    margin = 4.3027 * 10 / 3**0.5
    interval = f"-{margin - 20:.1f} to {margin + 20:.1f}"
    assert (
        f"Improved policy: mean return 20.0, score 102.0 (95% interval {interval} over 3 episodes)."
        in page.text
    )
    assert "Behavior model: mean return 7.0, score 100.7 (one episode, no interval)." in page.text
    behavior, policy = page.rows("All evaluations")[1:]
    expected = ["a", "behavior", "5", "7.0", "none", "none", "100.7", "100.0", "1", "200.0"]
    assert behavior == [*expected, "train-behavior-5", "midpoint, 10 steps"]
    assert policy[3:6] == ["20.0", interval, "over 3 episodes"]


def test_several_seeds_have_an_interval_over_their_means(run):
    # Means -150 and -210: standard error 30, and Student's t of 97.5% with 1 degree is 12.7062.
    interval = f"-{180 + 12.7062 * 30:.1f} to {12.7062 * 30 - 180:.1f}"
    page = page_of(run)
    rows = page.rows("All evaluations")[1:]
    assert [row[1:3] for row in rows] == [["behavior", "30"], ["policy", "75"], ["policy", "90"]]
    assert rows[-1][3:6] == ["-180.0", interval, "over 2 seeds"]
    head, row = page.rows("Last evaluation")
    assert dict(zip(head, row, strict=True))["policy return"] == f"-180.0 {interval} 4 episodes"
    assert f"95% interval {interval} over 2 seeds, 4 episodes)." in page.text


def test_runs_are_compared(run, tmp_path):
    config = dataclasses.replace(CONFIG, beta=3.0, hidden_dims=(8,))
    returns = RETURNS | {("policy", 90): [[-50.0, -50.0], [-50.0, -60.0]]}
    other = write(tmp_path / "b", num_seeds=2, config=config, phases=PHASES, returns=returns)
    page = page_of(run, other)
    assert page.texts("h1") == ["Report of 2 runs"]
    differing = [["beta", "10.0", "3.0"], ["hidden_dims", "[8, 8]", "[8]"]]
    assert sorted(page.rows("Fields of the configuration that differ")[1:]) == differing
    marked = [row for row in page.rows("All fields") if row[0].endswith(" ≠")]
    assert sorted(row[0] for row in marked) == ["beta ≠", "hidden_dims ≠"]
    assert len(page.find("tr[@class='differs']")) == 2
    # The better policy, and one of two equal behavior models.
    assert sorted(page.texts("strong")) == ["-400.0", "-52.5"]
    drawing = ElementTree.tostring(page.figure("loss against critic step"), "unicode")
    assert {f"stroke: var(--run-{i})" in drawing for i in (0, 1)} == {True}
    # One dataset, both runs.
    assert page.rows("The data")[1][1] == "a b"
    assert "The configurations are equal." in page_of(run, write(tmp_path / "c", num_seeds=2)).text


def test_options_of_a_plugin_are_fields(tmp_path, monkeypatch):
    options = dataclasses.make_dataclass("Options", [("deep", bool, False)])
    monkeypatch.setitem(OPTIONS, "deeper", options)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "report_plugin.py").write_text(
        "import dataclasses\nfrom efm_jax.rl.config import register_options\n"
        "options = dataclasses.make_dataclass('Options', [('deep', bool, False)])\n"
        "register_options('deeper', options)\n"
    )
    config = dataclasses.replace(CONFIG, options={"deeper": options(True)})
    new = write(tmp_path / "new", config=config, plugins=["report_plugin"])
    del OPTIONS["deeper"]
    old = write(tmp_path / "old")
    with pytest.raises(ValueError, match="give --plugins=report_plugin") as caught:
        page_of(old, new)
    assert "\n" not in str(caught.value)
    assert "report_plugin" not in sys.modules  # a file does not choose what is imported
    load_plugins(["report_plugin"])
    differing = page_of(old, new).rows("Fields of the configuration that differ")[1:]
    deep, plugins = sorted(differing)
    assert deep == ["deeper.deep", "false", "true"]
    assert plugins == ["plugins", "[]", '["report_plugin"]']


def test_returns_of_different_environments_are_not_drawn_together(run, tmp_path):
    hopper = {"env_spec": json.dumps({"id": "Hopper-v5"}), "fingerprint": "0" * 64}
    returns = {("policy", 90): [[3000.0, 3100.0]]}
    page = page_of(run, write(tmp_path / "b", returns=returns, **hopper))
    assert [h for h in page.texts("h3") if "-v" in h] == ["Hopper-v5", "Pendulum-v1"]
    figures = [e.get("aria-label") for e in page.find("figure[@class='broad']/svg")]
    hopper, pendulum = (label for label in figures if label.startswith("Returns of evaluations"))
    assert "b, policy, step 90: 3050.0" in hopper
    assert "a, policy" not in hopper
    assert "a, policy, step 90: -180.0" in pendulum
    assert "b, policy" not in pendulum
    assert page.find("strong") == []  # nothing to compare with


def lines(page, description):
    """Styles of the curves in a figure."""
    paths = page.figure(description).iter("path")
    return [path.get("style") for path in paths if "var(--run-" in path.get("style", "")]


def test_seeds_are_thin_and_their_mean_is_thick(tmp_path):
    points = [(step, {"loss": [1.0, 2.0, 4.0 * step]}) for step in (1, 2, 3)]
    page = page_of(write(tmp_path / "a", num_seeds=3, phases={"critic": points}))
    found = lines(page, "loss against critic step")
    assert ["stroke-width: 0.8" in style for style in found] == [True, True, True, False]
    assert "stroke-width: 2.2" in found[3]
    alt = page.figure("loss against critic step").get("aria-label")
    assert alt.endswith("a, mean of 3 seeds: 2.333 at step 1, 5 at step 3.")


def test_values_that_are_not_finite_are_said_and_one_point_is_a_point(tmp_path):
    points = [(1, {"loss": np.nan, "odd": np.inf, "even": 2.0}), (2, {"loss": 2.0})]
    page = page_of(write(tmp_path / "a", phases={"critic": [*points, (3, {"loss": 3.0})]}))
    assert "a: 1 values that are not finite are not drawn." in page.text
    assert "No finite value." in page.text
    assert page.texts("h4").count("odd") == 1
    assert len(lines(page, "loss against critic step")) == 1
    uses = page.figure("even against critic step").iter("use")
    assert sum("var(--run-0)" in use.get("style", "") for use in uses) == 1


def test_unknown_phases_and_metrics_and_missing_ones(run, tmp_path):
    points = [(step, {"loss": 1.0, "guide_error": [0.1, 0.2]}) for step in (5, 6)]
    phases = {"behavior": points, "guidance": points}
    page = page_of(run, write(tmp_path / "b", num_seeds=2, phases=phases))
    assert "Curves: guidance" in page.texts("h2")
    assert page.texts("h4").count("guide_error") == 2
    assert "Norm of the gradient before clipping. Not logged by b." in page.text
    assert lines(page, "guide_error against guidance step")
    # Only runs that have weights are in the legend of the weights.
    assert page.texts("section[@id='weights']/ul/li") == ["a"]


def test_unfinished_runs(tmp_path):
    phases = {"behavior": PHASES["behavior"]}
    half = write(tmp_path / "half", num_seeds=2, result=None, phases=phases)
    with open(half / "metrics.csv", "a") as file:
        file.write("40,40,behav")  # what a run is writing
    fresh = write(tmp_path / "fresh", result=None)
    page = page_of(half, fresh)
    start = "qipo_ot on some/data-v0, 2 seeds (5 to 6), unfinished: step 30 of 200 of phase "
    assert f"{start}behavior is logged, 30 gradient steps in all." in page.text
    assert "qipo_ot on some/data-v0, seed 5, unfinished: nothing has been logged yet." in page.text
    assert "No policy has been evaluated yet." in page.text
    assert "Effective sample sizes" not in page.texts("h2")
    steps = [row[4] for row in page.rows("Last evaluation")[1:]]
    assert steps == ["30 unfinished", "none unfinished"]
    assert page_of(fresh).texts("h1") == ["Report of one run"]


NASTY = """--></svg></style><script>alert(1)</script>&amp;{{ 7 * 7 }}<b>'"$x^{$ """


def test_texts_are_escaped(tmp_path):
    points = [(step, {"loss": 1.0, NASTY: 2.0, "ess": 2.0}) for step in (1, 2)]
    name = NASTY.replace("/", "|")
    changes = {"algorithm": NASTY, "dataset": NASTY, "env_spec": json.dumps({"id": NASTY})}
    returns = {(NASTY, step): [[1.0, 2.0]] for step in (1, 2)}
    config = dataclasses.replace(CONFIG, path=NASTY)
    data = {"phases": {NASTY: points}, "returns": returns}
    folder = write(tmp_path / name, config=config, **changes, **data)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"version": NASTY}))
    (folder / f"{name}.mp4").write_bytes(b"video")
    page = page_of(folder)
    assert not page.find("script")
    assert not page.find("b")
    assert page.texts("h4").count(NASTY) == 1
    # Algorithm, path, dataset twice, environment, policy twice, version.
    assert [cell.text.strip() for cell in page.find("td") if cell.text].count(NASTY.strip()) == 8
    assert any(name[-28:] in label for label in page.texts("text"))  # within the figure
    assert page.figure(f"{NASTY} against {NASTY} step")
    assert page.find("video")[0].get("aria-label").startswith(f"{name}.mp4: an episode of run ")


def test_the_page_needs_nothing_else(run, tmp_path):
    (run / "video.mp4").write_bytes(b"video")
    page = page_of(run, write(tmp_path / "b", num_seeds=2, phases=PHASES, returns=RETURNS))
    assert not re.search("https?://|//[a-z]", re.sub(r"base64,[^\"]*", "", page.source))
    assert "@import" not in page.source
    assert "url(" not in page.source.replace("url(#", "")
    for name in ("src", "href", "poster", "action", "srcset"):
        assert all(value.startswith(("data:", "#")) for value in page.attributes(name))
    # A scheme that a later change may forget is refused by the browser.
    [policy] = page.find("meta[@http-equiv]")
    assert policy.get("content").startswith("default-src 'none'")
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    links = [e.get("href", e.get("xlink:href")) for tag in ("a", "use") for e in page.find(tag)]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_figures_have_descriptions_and_the_colors_of_the_page(run):
    page = page_of(run)
    plots = page.find("svg[@class='plot']")
    assert len(plots) == 2 + 1 + 8  # returns, weights, metrics
    labels = {plot.get("aria-label") for plot in plots}
    assert len(labels) == len(plots)
    assert min(map(len, labels)) > 20
    assert {plot.get("role") for plot in plots} == {"img"}
    drawing = "".join(ElementTree.tostring(plot, "unicode") for plot in plots)
    colors = set(re.findall('(?:fill|stroke): *([^;"]+)', drawing))
    assert colors == {"none", "currentColor", "var(--grid)", "var(--run-0)"}
    [style] = page.texts("head/style")
    for words in ("prefers-color-scheme: dark", "@media print", "--grid:", "--run-7:"):
        assert words in style
    # The same colors in light and dark.
    for name in set(re.findall(r"var\((--[a-z0-9-]+)", page.source)) - {"--tone"}:
        assert style.count(f"{name}:") == 2, name


def test_videos(run):
    contents = {"video.mp4": bytes(range(256)), "another.gif": b"GIF89a"}
    for name, content in contents.items():
        (run / name).write_bytes(content)
    with open(run / "long.mp4", "wb") as file:
        file.truncate(60_000_000)
    page = page_of(run)
    kinds, _, data = zip(*(uri.partition(",") for uri in page.attributes("src")), strict=True)
    assert kinds == ("data:video/mp4;base64", "data:image/gif;base64")
    assert [base64.b64decode(each) for each in data] == list(contents.values())
    [video] = page.find("video")
    assert video.get("controls") is not None
    assert video.get("aria-label") == "video.mp4: an episode of run a in Pendulum-v1"
    assert "60 MB: too large to be part of this page." in page.text


def test_names_tell_runs_apart(tmp_path):
    folders = [write(tmp_path / "x" / "run"), write(tmp_path / "y" / "run"), write(tmp_path / "z")]
    names = ["x/run", "y/run", f"{tmp_path.name}/z"]
    assert [name.strip() for name in page_of(*folders).texts("article/h3")] == names
    assert page_of(*folders[1:]).texts("title") == ["run, z: report"]


def test_work_directory_in_a_bucket(bucket, run):
    for path in run.iterdir():
        if path.is_file():
            (bucket / path.name).write_bytes(path.read_bytes())
    remote = page_of(bucket)
    assert f"Work directory {bucket}" in remote.text
    assert remote.rows("All evaluations")[1][1:] == page_of(run).rows("All evaluations")[1][1:]


DAMAGE = {
    "config.json": (r"\"{\\\"id\\\": \\\"Pendulum-v1\\\"}\"", '"[]"', "'env_spec'"),
    "metrics.csv": ("0.5", "half", "grad_norm"),
    "returns.csv": ("-400.0", "", "empty return"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_files_that_cannot_be_understood(run, name):
    old, new, words = DAMAGE[name]
    damaged, count = re.subn(old, new, (run / name).read_text(), count=1)
    assert count == 1
    (run / name).write_text(damaged)
    with pytest.raises(ValueError, match=re.escape(f"{run / name}: ")) as error:
        load_runs([str(run)])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_that_are_no_runs(run, tmp_path):
    for folders, words in (
        ([run, tmp_path / "nosuch"], "nosuch: no such folder"),
        ([run / "config.json"], "is a file"),
        ([run, f"{run}/"], "given twice"),
    ):
        with pytest.raises(ValueError, match=words):
            load_runs([str(folder) for folder in folders])
