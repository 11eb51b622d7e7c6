"""`launch.report` as a process, on a run of the real trainer."""

import json

import pytest

from tests.integration.runs import table, train_flags
from tests.unit.test_report import Page


@pytest.fixture(scope="module")
def finished(launcher, dataset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("report") / "finished"
    result = launcher.run("train", *train_flags(dataset, workdir, "--num_seeds=2"))
    assert result.status == 0, result.err
    return workdir


def test_page_of_a_run(launcher, finished):
    before = {path.name for path in finished.iterdir()}
    result = launcher.run("report", f"--workdir={finished}")
    assert (result.status, result.complaints) == (0, [])
    page = (finished / "report.html").read_bytes()
    assert result.line == {"report": str(finished / "report.html"), "runs": 1, "bytes": len(page)}
    assert {path.name for path in finished.iterdir()} - before == {"report.html"}
    page = Page(page.decode())
    logged = table(finished / "metrics.csv")
    for name in set(logged[0]) - {"total_step", "step", "phase", "seed"}:
        phases = {row["phase"] for row in logged if row[name]}
        assert page.texts("h4").count(name) == len(phases) > 0
    line = json.loads((finished / "result.json").read_text())
    for policy in ("behavior", "policy"):
        low, high = line[f"{policy}_interval"]
        assert f"{low:,.1f} to {high:,.1f} over 2 seeds" in page.text
    fields = json.loads((finished / "config.json").read_text())["config"]
    assert fields.keys() <= {row[0] for row in page.rows("All fields")}


def test_page_of_two_runs_elsewhere(launcher, dataset, finished, tmp_path):
    other = tmp_path / "unfinished"
    other.mkdir()
    (other / "config.json").write_text(
        (finished / "config.json").read_text().replace('"ot"', '"vp"')
    )
    out = tmp_path / "new" / "page.html"
    result = launcher.run("report", f"--workdir={finished}", f"--workdir={other}", f"--out={out}")
    assert (result.status, result.complaints) == (0, [])
    assert result.line["runs"] == 2
    fields = [
        row[0] for row in Page(out.read_text()).rows("Fields of the configuration that differ")
    ]
    assert fields == ["field", "path"]
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_report_refuses(launcher, finished, tmp_path):
    (tmp_path / "file").write_text("mine")
    flags = [f"--workdir={finished}"]
    cases = [
        ([], "--workdir"),
        (["--workdir="], "--workdir"),
        ([f"--workdir={tmp_path / 'nosuch'}"], "nosuch"),
        ([*flags, f"--workdir={tmp_path / 'nosuch'}"], "nosuch"),
        ([*flags, *flags], "given twice"),
        ([*flags, f"--out={tmp_path}"], "--out"),
        ([*flags, "--out="], "--out"),
        ([*flags, f"--out={tmp_path / 'file' / 'page.html'}"], "file"),
        ([*flags, "positional"], "positional"),
    ]
    for arguments, word in cases:
        result = launcher.run("report", *arguments)
        assert (result.status, len(result.complaints)) == (2, 1), (arguments, result.err)
        assert result.complaints[0].startswith("launch.report: error: ")
        assert word in result.complaints[0]
        assert result.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"
