"""The short form of the stress run, on the tests' dataset and with processes of their launcher."""

import json
import sys
import types

from experiments.systems import preemption_stress as stress
from tests.integration.runs import CHEAP
from tests.markdown import cells


def test_killed_runs_end_with_the_same_bits(launcher, dataset, monkeypatch, capsys):
    class Popen:
        def __init__(self, command, *, stdout, stderr, env):
            assert (command[:3], stderr) == ([sys.executable, "-m", "launch.train"], stdout)
            cheap = (f"--config.{name}={value}" for name, value in CHEAP.items())
            flags = *command[3:], f"--dataset={dataset}", *cheap
            self._process = launcher.start("train", *flags, log=stdout.name)
            self.send_signal = self._process.send

        def poll(self):
            return None if self._process.running else self.wait()

        def wait(self, timeout=240):
            return self._process.wait(timeout).status

    monkeypatch.setattr(stress, "subprocess", types.SimpleNamespace(Popen=Popen))
    monkeypatch.setattr(stress, "SMOKE", stress.SMOKE._replace(rows=0))
    monkeypatch.setattr(sys, "argv", ["preemption_stress", "--smoke"])
    status = stress.main()
    printed = capsys.readouterr().out
    assert status == 0, printed
    rows = [row for row in cells(printed) if row[0] in ("SIGKILL", "SIGTERM")]
    assert sum(int(row[2]) for row in rows) == sum(int(row[4]) for row in rows) == 2
    summary = json.loads(printed.strip().splitlines()[-1])
    assert summary["kills"] == 2
    assert summary["identical"]
    assert summary["as_expected"]
    assert summary["newest_checkpoint"]
