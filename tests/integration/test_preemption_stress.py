"""The short form of the stress run."""

import json
import os
import subprocess
import sys

from tests.integration.helpers import REPOSITORY, xla_flags
from tests.markdown import cells


def test_killed_runs_end_with_the_same_bits():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.systems.preemption_stress", "--smoke"],
        cwd=REPOSITORY, env=os.environ | {"XLA_FLAGS": xla_flags(1)},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in cells(done.stdout) if row[0] in ("SIGKILL", "SIGTERM")]
    assert sum(int(row[2]) for row in rows) == sum(int(row[4]) for row in rows) == 2
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert summary["kills"] == 2
    assert summary["identical"]
    assert summary["as_expected"]
    assert summary["newest_checkpoint"]
