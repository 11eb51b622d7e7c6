"""Files of a work directory on gs://, which fsspec's in-memory file system stands for."""

import io
import sys

import matplotlib.image
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from tensorboardX import record_writer

from efm_jax.runs.learning_curve import draw_learning_curve
from efm_jax.runs.loggers import Loggers
from efm_jax.runs.metrics import MetricsWriter
from efm_jax.runs.reader import Run
from efm_jax.runs.workdir import RESULT_FILE, RunInfo, resolve, write_json
from tests.unit.test_metrics import add_returns
from tests.unit.test_runs import info


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


def test_config_and_result(workdir):
    assert RunInfo.load(workdir) is None
    info().save(workdir)
    assert RunInfo.load(workdir) == info()
    write_json(workdir / RESULT_FILE, {"a": 1})
    assert sorted(path.name for path in workdir.iterdir()) == ["config.json", "result.json"]
    assert Run.read("gs://bucket/run") == Run(workdir, info(), [], [], [], {"a": 1})


def test_metrics_returns_and_curve(workdir):
    info().save(workdir)
    for resume_from in (None, 20):
        writer = MetricsWriter(workdir, [3, 4], resume_from)
        loggers = Loggers(["tensorboard"], workdir, info(), print)
        for step in (10, 20, 30):
            if resume_from is None or step > resume_from:
                writer.write(step, "behavior", step, {"loss": np.array([1.0 / step, 2.0])})
                loggers.write(step, {"behavior/loss": np.array([1.0 / step, 2.0])})
        loggers.close()
    for total in (30, 40):
        add_returns(workdir, total, "policy", np.ones((2, 3)))
    run = Run.read(workdir)
    assert [int(row["step"]) for row in run.metrics] == [10, 10, 20, 20, 30, 30]
    assert len(run.returns) == 12
    for seed in (3, 4):
        assert len(list((workdir / "tensorboard" / f"seed{seed}").iterdir())) == 2
    assert matplotlib.image.imread(io.BytesIO(draw_learning_curve(run))).std() > 0
