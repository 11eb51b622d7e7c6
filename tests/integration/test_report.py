"""`launch.report` as a process, on a run of the real trainer."""

import json
import shutil

import pytest

from tests.integration.runs import table
from tests.unit.test_report import Page


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def test_page_of_a_run(launcher, run):
    before = {path.name for path in run.iterdir()}
    result = launcher.run("report", f"--workdir={run}")
    assert (result.status, result.complaints) == (0, [])
    page = (run / "report.html").read_bytes()
    assert result.line == {"report": str(run / "report.html"), "runs": 1, "bytes": len(page)}
    assert {path.name for path in run.iterdir()} - before == {"report.html"}
    page = Page(page.decode())
    logged = table(run / "metrics.csv")
    for name in set(logged[0]) - {"total_step", "step", "phase", "seed"}:
        phases = {row["phase"] for row in logged if row[name]}
        assert page.texts("h4").count(name) == len(phases) > 0
    line = json.loads((run / "result.json").read_text())
    for policy in ("behavior", "policy"):
        low, high = line[f"{policy}_interval"]
        assert f"{low:,.1f} to {high:,.1f} over 2 seeds" in page.text
    fields = json.loads((run / "config.json").read_text())["config"]
    assert fields.keys() <= {row[0] for row in page.rows("All fields")}


def test_page_of_two_runs_elsewhere(launcher, run, tmp_path):
    other = tmp_path / "unfinished"
    other.mkdir()
    (other / "config.json").write_text((run / "config.json").read_text().replace('"ot"', '"vp"'))
    out = tmp_path / "new" / "page.html"
    result = launcher.run("report", f"--workdir={run}", f"--workdir={other}", f"--out={out}")
    assert (result.status, result.complaints) == (0, [])
    assert result.line["runs"] == 2
    fields = [
        row[0] for row in Page(out.read_text()).rows("Fields of the configuration that differ")
    ]
    assert fields == ["field", "path"]
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_report_refuses(launcher, run, tmp_path):
    (tmp_path / "file").write_text("mine")
    flags = [f"--workdir={run}"]
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
    assert [path.name for path in tmp_path.iterdir() if path != run] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"
