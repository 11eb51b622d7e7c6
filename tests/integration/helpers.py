"""Runs the entry points as real processes, without paying for their imports each time.

A *zygote* process imports what the entry points import, without starting JAX's backend, and forks a
child for each command; the child executes `python -m launch.NAME ARGS` from there. Run as a module
(`python -m tests.integration.helpers`) this file is that zygote: it reads one JSON request a line
from its standard input, `{"module", "args", "cwd", "env", "out", "err", "status"}`, and answers
with the child's pid; outputs and exit status come into the three files.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.programs import QUICK_TO_COMPILE

REPOSITORY = Path(__file__).resolve().parents[2]
# Beginnings of lines that are no complaints: a slow machine says once a minute how far it is.
HARMLESS = ("launch.train: after ",)


def xla_flags(devices):
    """So many virtual devices, and programs that compile fast: each runs for a moment."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK_TO_COMPILE}"


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def line(self):
        """The last line of the output, as JSON."""
        return json.loads(self.out.strip().splitlines()[-1])

    @property
    def complaints(self):
        """Lines of the error output."""
        return [
            line for line in self.err.splitlines() if line.strip() and not line.startswith(HARMLESS)
        ]


class Process:
    """A child of the zygote."""

    def __init__(self, pid, out, err, status):
        self.pid, self._out, self._err, self._status = pid, out, err, status

    @property
    def running(self):
        return not self._status.exists()

    @property
    def err(self):
        """The error output so far."""
        return self._err.read_text() if self._err.exists() else ""

    def send(self, number):
        if self.running:
            os.kill(self.pid, number)

    def wait(self, timeout=240.0):
        end = time.monotonic() + timeout
        while self.running:
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise TimeoutError(
                    f"still running after {timeout} s: {self._err.read_text()[-2000:]}"
                )
            time.sleep(0.02)
        return Result(int(self._status.read_text()), self._out.read_text(), self._err.read_text())


class Launcher:
    """Starts entry points; `folder` is where the outputs of every process go."""

    def __init__(self, folder):
        self._folder, self._count = Path(folder), 0
        self._folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "MINARI_DATASETS_PATH": str(self._folder / "minari"),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags(1),
        }
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.helpers"],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, module, *args, cwd=REPOSITORY, env=None, log=None):
        """Start `python -m launch.MODULE ARGS`; `log` is a file for both of its outputs."""
        self._count += 1
        files = {kind: self._folder / f"{self._count}.{kind}" for kind in ("out", "err", "status")}
        if log is not None:
            files |= {"out": Path(log), "err": Path(log)}
        request = {
            "module": module,
            "args": [str(a) for a in args],
            "cwd": str(cwd),
            "env": env or {},
            **{kind: str(path) for kind, path in files.items()},
        }
        self._zygote.stdin.write(json.dumps(request) + "\n")
        self._zygote.stdin.flush()
        return Process(int(self._zygote.stdout.readline()), **files)

    def run(self, module, *args, cwd=REPOSITORY, env=None):
        """Start it and wait for its end."""
        return self.start(module, *args, cwd=cwd, env=env).wait()

    def close(self):
        self._zygote.stdin.close()
        self._zygote.wait(30)


def fresh(module, *args, env=None):
    """Run `python -m launch.MODULE ARGS` in a process that has imported nothing before."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)} | (env or {})
    command = [sys.executable, "-m", f"launch.{module}", *map(str, args)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240
    )
    return Result(done.returncode, done.stdout, done.stderr)


def refused(result, *words):
    assert result.status == 2, (result.status, result.err)
    assert len(result.complaints) == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.complaints[0]


def contents(folder):
    """Every file and folder, with its bytes; of the lock, in which a number goes up, that it is."""

    def read(path):
        return path.read_bytes() if path.is_file() and path.name != "lock" else None

    return {path: read(path) for path in folder.rglob("*")}


def _zygote():
    # Everything heavy that the entry points import; not the entry points, which define flags.
    for module in (
        "jinja2",
        "matplotlib.backends.backend_svg",
        "matplotlib.style",
        "minari",
        "pandas",
        "efm_jax.data",
        "efm_jax.rl.trainer",
        "efm_jax.runs.evaluation",
        "efm_jax.runs.loading",
        "efm_jax.runs.writer",
        "launch.cli",
    ):
        importlib.import_module(module)
    gc.freeze()  # children look for garbage in what is theirs, and less often
    gc.set_threshold(20_000, 50, 100)

    for line in sys.stdin:
        request = json.loads(line)
        ready, reply = os.pipe()
        if os.fork() == 0:
            # A keeper, which outlives a killed child to write down how it ended.
            pid = os.fork()
            if pid == 0:
                _become(request)
            os.write(reply, str(pid).encode())
            os.close(reply)
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            temporary = request["status"] + ".tmp"
            Path(temporary).write_text(str(code))
            os.replace(temporary, request["status"])
            os._exit(0)
        os.close(reply)
        print(os.read(ready, 32).decode(), flush=True)
        os.close(ready)


def _become(request):
    """Be `python -m launch.MODULE ARGS`; never returns."""
    for descriptor, path in ((1, request["out"]), (2, request["err"])):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND  # both may be one file
        os.dup2(os.open(path, flags), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    sys.path.insert(0, request["cwd"])  # as python -m does
    os.environ.update(request["env"])
    sys.argv = [f"launch.{request['module']}", *request["args"]]
    code = 1
    try:
        runpy.run_module(f"launch.{request['module']}", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _zygote()
