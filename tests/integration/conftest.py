"""What tests of entry points share: a launcher with a cache of programs, a dataset, a run of it."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from tests.integration.helpers import Launcher, Result
from tests.integration.runs import SEEDS, arrays, train_flags
from tests.unit.data_fixtures import write_d4rl


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder of all workers of this test run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return write_d4rl(
        tmp_path_factory.mktemp("data") / "small.hdf5", arrays(), env_id="Pendulum-v1"
    )


@pytest.fixture(scope="session")
def finished(launcher, dataset, shared):
    """An uninterrupted run, not to be changed: its workdir and what it printed."""
    workdir, streams = shared / "finished", [shared / f"finished.{name}" for name in ("out", "err")]
    with (shared / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker runs it, another waits and reads
        if not all(map(Path.exists, streams)):
            result = launcher.run("train", *train_flags(dataset, workdir, *SEEDS))
            assert result.status == 0, result.err
            for path, text in zip(streams, result[1:], strict=True):
                path.write_text(text)
    return workdir, Result(0, *(path.read_text() for path in streams))


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished workdir, to be damaged."""
    return shutil.copytree(finished[0], tmp_path / "copy")
