"""The script that breaks runs, data and situations, in its short form."""

import json
import random

from experiments.systems import robustness
from tests.integration.runs import CHEAP


def test_one_case_of_each_kind(launcher, capsys, monkeypatch):
    monkeypatch.setattr(robustness, "SHORT", robustness.SHORT | CHEAP)
    assert robustness.main(["--quick"], launcher) == 0
    *table, line = capsys.readouterr().out.splitlines()
    line = json.loads(line)
    assert line["cases"] == line["answered"] == len(table) - 2 == 9


def test_what_is_no_answer_is_told(launcher, tmp_path, monkeypatch):
    monkeypatch.setattr(robustness.Bench, "train", lambda *_: ["--help"])
    bench = robustness.Bench(tmp_path, launcher, random.Random(0))
    assert bench.answer("train", ["--nosuch=1"]) is None
    assert "No module named launch.nosuch" in bench.answer("nosuch", [])
    monkeypatch.setitem(robustness.STATUSES, "train", {0})
    assert bench.answer("train", ["--nosuch=1"]).startswith(
        "status 2, 1 lines: launch.train: error"
    )
