"""Loggers: where the curves of a run go, beside its CSV tables.

A logger is any callable ``(seed, step, values)``: the numbers ``values`` of some curves, such as
``policy/loss`` and ``policy/return``, of one training seed at a total step.  It may have a method
``close``, called at the end.  Names are those of ``LOGGERS``; a module of ``--plugins`` may add to
them.

No point comes twice and no curve goes back, however often a run is killed and continued, because
``loggers.json`` tells how far each curve has come.  It is written before the point is handed over:
a kill in that moment costs one point.  So TensorBoard and services get what a resumed run does
anew, which is the same numbers, once; CSV tables drop those rows and get them again.
"""

import importlib.util
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] protobuf makes it when imported
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue] likewise
from tensorboardX.summary import hparams

from efm_jax import checks
from efm_jax.errors import install, reason
from efm_jax.runs.workdir import LOGGERS_FILE, TENSORBOARD_FOLDER, RunInfo, read_json, write_json

Logger = Callable[[int, int, Mapping[str, float]], object]


class LoggedRun(NamedTuple):
    """What a logger is made for."""

    workdir: epath.Path
    info: RunInfo
    ids: dict[str, str]  # of a service's runs, by training seed; what is put here is kept

    @property
    def hyperparameters(self) -> dict[str, bool | float | str]:
        """The dataset, and every field of the configuration."""
        values: dict[str, Any] = {"dataset": self.info.dataset}
        for name, value in self.info.config.to_dict().items():
            nested = value if isinstance(value, dict) else {"": value}
            values |= {f"{name}.{field}".rstrip("."): each for field, each in nested.items()}
        plain = (bool, int, float, str)
        return {name: v if isinstance(v, plain) else str(v) for name, v in values.items()}

    def name(self, seed: int) -> str:
        """Name one training seed of the run."""
        return f"{self.workdir.name}-seed{seed}"


class TensorBoard:
    """Writes event files, a folder for each seed, and its hyper-parameters."""

    def __init__(self, run: LoggedRun):
        self._writers = {}
        for seed in run.info.seeds:
            folder = run.workdir / TENSORBOARD_FOLDER / f"seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            # tensorboardX's SummaryWriter hands events to a thread: a killed run would lose some.
            # Its EventsWriter writes at once; the count keeps names apart within a second.
            count = len(list(folder.iterdir()))
            name = os.fspath(folder / "events")
            self._writers[seed] = EventsWriter(name, filename_suffix=f".{count:04d}")
            if not count:
                values = {**run.hyperparameters, "seed": seed}
                for summary in hparams(values, dict.fromkeys(("policy/return", "policy/score"))):
                    self._write(seed, Event(summary=summary))

    def __call__(self, seed: int, step: int, values: Mapping[str, float]) -> None:
        """Write one point, on disk when this returns."""
        each = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(seed, Event(step=step, summary=Summary(value=each)))

    def _write(self, seed: int, event: Event) -> None:
        event.wall_time = time.time()
        self._writers[seed].write_event(event)
        self._writers[seed].flush()

    def close(self) -> None:
        """Close the event files."""
        for writer in self._writers.values():
            writer.close()


class WandB:
    """A run of Weights & Biases for each seed, in a group; it reads its own variables (WANDB_*)."""

    def __init__(self, run: LoggedRun):
        import wandb  # pyright: ignore[reportMissingImports] an extra

        self._runs = {}
        for seed in run.info.seeds:
            self._runs[seed] = wandb.init(
                id=run.ids.setdefault(str(seed), uuid.uuid4().hex[:12]),
                resume="allow",
                group=run.workdir.name,
                name=run.name(seed),
                config={**run.hyperparameters, "seed": seed},
                reinit="create_new",
            )
            self._runs[seed].define_metric("total_step")
            self._runs[seed].define_metric("*", step_metric="total_step")

    def __call__(self, seed: int, step: int, values: Mapping[str, float]) -> None:
        """Log one point; W&B sends it in a process of its own."""
        self._runs[seed].log({"total_step": step, **values})

    def close(self) -> None:
        """Wait until everything is sent, or in W&B's offline mode written."""
        for run in self._runs.values():
            run.finish()


class MLflow:
    """A run of MLflow for each seed; MLflow reads its own variables (MLFLOW_*)."""

    def __init__(self, run: LoggedRun):
        import mlflow  # pyright: ignore[reportMissingImports] an extra

        self._mlflow, self._ids, self._client = mlflow, run.ids, mlflow.MlflowClient()
        for seed in run.info.seeds:
            if str(seed) not in run.ids:
                with mlflow.start_run(run_name=run.name(seed)) as started:
                    mlflow.log_params({**run.hyperparameters, "seed": seed})
                run.ids[str(seed)] = started.info.run_id
            self._client.update_run(run.ids[str(seed)], "RUNNING")

    def __call__(self, seed: int, step: int, values: Mapping[str, float]) -> None:
        """Log one point."""
        self._mlflow.log_metrics(dict(values), step=step, run_id=self._ids[str(seed)])

    def close(self) -> None:
        """Mark the runs as ended."""
        for run_id in self._ids.values():
            self._client.set_terminated(run_id)


LOGGERS: dict[str, Callable[[LoggedRun], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}
_EXTRAS = ("wandb", "mlflow")  # names of loggers, packages and extras alike


def check_loggers(loggers: Sequence[str | Logger]) -> None:
    """Refuse a name that is not in ``LOGGERS``, or whose package is not installed."""
    for name in loggers:
        if callable(name):
            continue
        checks.check_choice("loggers", name, LOGGERS)
        # A folder that W&B has made here is found too, without an origin.
        found = importlib.util.find_spec(name) if name in _EXTRAS else None
        if name in _EXTRAS and (found is None or found.origin is None):
            raise ValueError(f"loggers: {name} is not installed: {install(name)}")


class Loggers:
    """Hands the points of a run to its loggers.

    Args:
      loggers: names of ``LOGGERS``, or loggers.
      workdir: the run's folder.
      info: what the run is.
      report: called with one line where a logger has failed; the run goes on without it.

    Raises:
      ValueError: a name that is not known, or a logger that cannot start.
    """

    def __init__(
        self,
        loggers: Sequence[str | Logger],
        workdir: epath.Path,
        info: RunInfo,
        report: Callable[[str], None],
    ):
        check_loggers(loggers)
        self._seeds, self._report, self._file = info.seeds, report, workdir / LOGGERS_FILE
        # By logger, the last step of each curve and its ids.
        self._kept = _read(self._file)
        self._loggers: dict[str, Logger] = {}
        for logger in loggers:
            name = getattr(logger, "__name__", type(logger).__name__)
            name = logger if isinstance(logger, str) else name
            if name in self._loggers:
                raise ValueError(f"loggers: expected different names; got {name!r} twice")
            kept = self._kept.setdefault(name, {"ids": {}, "last": {}})
            if isinstance(logger, str):
                try:
                    logger = LOGGERS[name](LoggedRun(workdir, info, kept["ids"]))
                except Exception as error:  # a service's client may raise anything
                    self.close()
                    raise ValueError(f"loggers: {name} cannot start: {reason(error)}") from error
            self._loggers[name] = logger
        if loggers:
            write_json(self._file, self._kept)

    def write(self, step: int, curves: Mapping[str, Any]) -> None:
        """Log one point of some curves at a total step; ``[K]``, or a number for all seeds."""
        new: dict[str, list[str]] = {}
        for name in self._loggers:
            last = self._kept[name]["last"]
            new[name] = [curve for curve in curves if step > last.get(curve, -1)]
            last |= dict.fromkeys(new[name], step)
        if any(new.values()):
            write_json(self._file, self._kept)
        columns = {name: np.broadcast_to(v, len(self._seeds)) for name, v in curves.items()}
        for name, logger in list(self._loggers.items()):
            try:
                for index, seed in enumerate(self._seeds if new[name] else ()):
                    logger(seed, step, {curve: float(columns[curve][index]) for curve in new[name]})
            except Exception as error:  # a service that is down may not stop hours of training
                self._report(f"logger {name} failed, and is left out from now on: {reason(error)}")
                del self._loggers[name]

    def close(self) -> None:
        """Close those that can be closed."""
        for name, logger in self._loggers.items():
            try:
                getattr(logger, "close", lambda: None)()
            except Exception as error:  # likewise
                self._report(f"logger {name} could not be closed: {reason(error)}")


def _read(path: epath.Path) -> dict[str, Any]:
    kept: dict[str, Any] = read_json(path) if path.exists() else {}
    for name, parts in kept.items():
        inner = parts if isinstance(parts, dict) else {}
        last: Any = inner.get("last")
        fits = isinstance(inner.get("ids"), dict) and isinstance(last, dict)
        if not fits or not all(type(step) is int for step in last.values()):
            raise ValueError(f"{path}: {name!r}: got {parts!r:.100}, which no run writes")
    return kept
