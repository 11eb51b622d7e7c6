"""One item of the suite in a process of its own: ``python -m ...benchmarks.item MODULE SIZE``.

The process prints a line of JSON for each part of a table as soon as it is measured, so that an
item that fails or is stopped leaves what it had; other lines that it prints are notes.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from efm_jax.files import to_json


def run(
    name: str, size: str, seconds: float | None, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Measure an item in a new process.

    Args:
      name: a module of this package.
      size: of the module's ``SIZES``.
      seconds: after which the process is stopped, None: never.
      environment: what the process has besides this one's.

    Returns:
      ``status`` (done, incomplete, failed or stopped), its ``reason``, ``seconds``, ``tables`` and
      ``notes``.
    """
    start, command = time.perf_counter(), [sys.executable, "-m", __spec__.name, name, size]
    process = subprocess.Popen(
        command, env=os.environ | environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    status, reason = "done", None
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        status, reason = "stopped", f"took longer than {seconds / 60:.1f} minutes"
        _stop(process)
        out, errors = process.communicate()
    finally:
        _stop(process)  # and what it started, such as compilers
    if status == "done" and process.returncode:
        status, reason = "failed", f"status {process.returncode}: {errors.strip()[-300:]}"
    found = {"status": status, "reason": reason, "tables": {}, "notes": []}
    for line in out.splitlines():
        if line.startswith('{"table": '):
            part = json.loads(line)
            found["tables"].setdefault(part["table"], []).extend(part["rows"])
        elif line.startswith('{"reason": '):
            found |= json.loads(line)
        else:
            found["notes"].append(line)
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def _stop(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def measure(name: str, size: str) -> None:
    """Measure in this process."""
    module = importlib.import_module(f"experiments.systems.benchmarks.{name}")
    for title, rows in module.run(module.SIZES[size]):
        print(to_json({"table": title, "rows": rows}), flush=True)


if __name__ == "__main__":
    try:
        measure(*sys.argv[1:])
    except Exception as error:
        # The first line: notes of JAX about its tracebacks come last.
        first = str(error).strip().partition("\n")[0]
        print(json.dumps({"reason": f"{type(error).__name__}: {first[:500]}"}), flush=True)
        raise
