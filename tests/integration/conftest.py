"""One launcher, with one cache of programs, and one small dataset for tests of entry points."""

import pytest

from tests.integration.helpers import Launcher
from tests.integration.runs import arrays
from tests.unit.data_fixtures import write_d4rl


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return write_d4rl(
        tmp_path_factory.mktemp("data") / "small.hdf5", arrays(), env_id="Pendulum-v1"
    )
