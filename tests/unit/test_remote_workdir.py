"""Files of a work directory on gs://, with fsspec's in-memory file system in the place of Google's."""

import io
import sys

import matplotlib.image
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from tensorboardX import record_writer

from efm_jax.data import load_dataset
from efm_jax.rl.config import QIPOConfig
from efm_jax.runs.learning_curve import plot_learning_curve
from efm_jax.runs.metrics import MetricsWriter, read_table, return_rows, write_returns
from efm_jax.runs.workdir import RunInfo
from launch.workdir import RESULT_FILE, resolve, write_json
from tests.unit.data_fixtures import d4rl_arrays, write_d4rl


class Bucket(MemoryFileSystem):
    """In memory, and like a bucket: an object does not grow, and names begin with gs://."""

    protocol = ("gs", "gcs")
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol("memory://" + path.removeprefix("gs://"))

    def _open(self, path, mode="rb", **options):
        if "a" in mode:
            raise NotImplementedError("objects of a bucket cannot be appended to")
        return super()._open(path, mode, **options)


class Events:
    """What tensorboardX does on gs:// through Google's client: the whole object at every flush."""

    def __init__(self, path):
        self._path, self._data = path, io.BytesIO()
        self.write = self._data.write

    def flush(self):
        epath.Path(self._path).write_bytes(self._data.getvalue())

    close = flush


@pytest.fixture
def workdir(monkeypatch):
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gcs", Bucket)
    monkeypatch.setattr(Bucket, "store", {}, raising=False)
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""], raising=False)
    monkeypatch.setattr(record_writer, "GCSRecordWriter", Events)
    return resolve("gs://bucket/run")


def test_config_and_result(workdir, tmp_path):
    dataset = load_dataset(write_d4rl(tmp_path / "a.hdf5", d4rl_arrays([0, 0, 1], [0, 0, 0])))
    assert RunInfo.load(workdir) is None
    info = RunInfo.describe(QIPOConfig(), dataset, 3, dataset.fingerprint(), (0.0, 1.0), 0, 1)
    info.save(workdir)
    assert RunInfo.load(workdir) == info
    write_json(workdir / RESULT_FILE, {"a": 1})
    assert sorted(path.name for path in workdir.iterdir()) == ["config.json", "result.json"]


def test_metrics_returns_and_curve(workdir):
    for resume_from in (None, 20):
        writer = MetricsWriter(workdir, resume_from)
        for step in (10, 20, 30):
            if resume_from is None or step > resume_from:
                writer.write(step, "behavior", step, {"loss": np.array([1.0 / step, 2.0])})
        writer.close()
    steps = [int(row["step"]) for row in read_table(workdir / "metrics.csv")]
    assert steps == [10, 10, 20, 20, 30, 30]
    for total in (30, 40):
        rows = return_rows(total, "policy", np.ones((2, 3)), np.ones((2, 3), int), [0, 1, 2])
        write_returns(workdir, rows)
    assert len(read_table(workdir / "returns.csv")) == 12
    assert len(list((workdir / "tensorboard").iterdir())) == 2
    curve = workdir / "learning_curve.png"
    plot_learning_curve(
        workdir / "metrics.csv",
        workdir / "returns.csv",
        curve,
        dataset_return=0.5,
        title="in memory",
    )
    assert matplotlib.image.imread(io.BytesIO(curve.read_bytes())).std() > 0
