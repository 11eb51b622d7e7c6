"""The one writer of a work directory, which a training run starts or continues."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from efm_jax.envs import Rollouts, score, specs
from efm_jax.errors import reason
from efm_jax.files import write_whole
from efm_jax.rl.agents import State
from efm_jax.rl.config import PHASES
from efm_jax.runs.checkpoint import Checkpointer
from efm_jax.runs.learning_curve import draw_learning_curve
from efm_jax.runs.lock import Lock
from efm_jax.runs.loggers import Logger, Loggers
from efm_jax.runs.metrics import MetricsWriter, write_evaluation
from efm_jax.runs.reader import METRIC_INDEX, Run, read_seconds
from efm_jax.runs.workdir import (
    CHECKPOINTS_FOLDER,
    CURVE_FILE,
    RESULT_FILE,
    SECONDS_FILE,
    RunInfo,
    check_name,
    write_json,
)
from efm_jax.training import hosts
from efm_jax.types import Normalizer


class RunWriter:
    """Writes everything that a run leaves.

    Of several hosts all call every method; together they save checkpoints, and the first alone
    writes the rest.

    Args:
      workdir: local or ``gs://``; made and locked here, if it does not hold another run.
      info: what the run is.
      normalizer: statistics of its data, saved in every checkpoint.
      report: called with one line about whatever the user should know.
      began: when this process began, of ``time.perf_counter``.
      extend: whether ``EXTENDABLE`` fields may differ from those of the run that is there.
      loggers: where curves go beside the CSV tables; see :mod:`efm_jax.runs.loggers`.

    Raises:
      ValueError: the folder holds another run, or one that cannot be read, or another process
        writes in it.
      OSError: it cannot be written.
    """

    def __init__(
        self,
        workdir: epath.Path,
        info: RunInfo,
        normalizer: Normalizer,
        report: Callable[[str], None],
        began: float,
        extend: bool = False,
        loggers: Sequence[str | Logger] = (),
    ):
        self._workdir, self._info, self._normalizer = workdir, info, normalizer
        self._report, self._began, self._earlier_seconds = report, began, 0.0
        self._extend = extend
        self._open = contextlib.ExitStack()
        self._checkpointer: Checkpointer | None = None  # made by start
        self._metrics: MetricsWriter | None = None  # of the first host
        self._given, self._loggers = loggers, None  # likewise
        self._lock: Lock | None = None  # likewise
        self._renewal: Mapping[str, np.ndarray] = {}
        check_name(workdir)
        self._check_same()
        if hosts.index() == 0:
            self._lock = Lock(workdir, report, beat=self._save_seconds)
            self._open.callback(self._lock.close)
            try:
                self._check_same()  # again, because another may have come first
                # Now, because Orbax writes in the background and says late what failed.
                probe = workdir / CHECKPOINTS_FOLDER / "probe"
                write_whole(probe, b"1" * 4096)
                probe.unlink(missing_ok=True)
                self._earlier_seconds = read_seconds(workdir)
            except BaseException:
                self._open.close()
                raise

    def _check_same(self) -> None:
        earlier = RunInfo.load(self._workdir)
        if earlier is not None:
            self._info.check_same(earlier, self._workdir, self._extend)

    @property
    def seconds(self) -> float:
        """The time that all starts of the run have taken together."""
        return self._earlier_seconds + time.perf_counter() - self._began

    @property
    def saved_step(self) -> int | None:
        """The total step of the newest checkpoint; None where there is none."""
        return None if self._checkpointer is None else self._checkpointer.newest

    def _save_seconds(self) -> None:
        write_json(self._workdir / SECONDS_FILE, {"seconds": self.seconds})

    def start(self, state: State) -> tuple[int, State] | None:
        """Find where the run stopped.

        Args:
          state: a fresh one.

        Returns:
          Total step and state of the newest readable checkpoint; None where there are none.

        Raises:
          CheckpointError: none of the checkpoints can be read.
          ValueError: the hosts do not see one folder, or have started other runs; a table of the
            run cannot be read.
          OSError: the folder cannot be written.
        """
        folder = self._workdir / CHECKPOINTS_FOLDER
        self._checkpointer = Checkpointer(folder, report=self._report)
        self._open.callback(self._checkpointer.close)
        found = self._checkpointer.restore(self._tree(state), discard=True)
        step = None if found is None else found[0]
        if hosts.index() == 0:
            # Read, because what cannot be read could not be continued.
            if found is not None and Run.read(self._workdir).info.config != self._info.config:
                (self._workdir / RESULT_FILE).unlink(missing_ok=True)  # it is not done any more
            self._info.save(self._workdir)
            self._save_seconds()
            self._metrics = MetricsWriter(self._workdir, self._info.seeds, resume_from=step)
            self._loggers = Loggers(self._given, self._workdir, self._info, self._report)
            self._open.callback(self._loggers.close)
        # Also a barrier: the others read config.json after the first host has written it.
        steps = hosts.gather(np.asarray(-1 if step is None else step))
        if len(set(map(int, steps))) > 1 or RunInfo.load(self._workdir) != self._info:
            raise ValueError(
                f"workdir {self._workdir}: holds another run than this host's; "
                "all hosts need the same flags and one shared folder"
            )
        return None if found is None else (found[0], found[1]["state"])

    def _started(self) -> Checkpointer:
        if self._checkpointer is None:
            raise ValueError("a run's writer: expected start() before anything is saved")
        return self._checkpointer

    def _tree(self, state: State) -> dict[str, Any]:
        return {"state": state, "normalizer": self._normalizer}

    def total_step(self, phase: str, step: int) -> int:
        """Count the steps of all phases when ``phase`` is at ``step``."""
        earlier = PHASES[: PHASES.index(phase)]
        return step + sum(self._info.phase_steps[name] for name in earlier)

    def renewal(self, summary: Mapping[str, np.ndarray]) -> None:
        """Keep what a renewal tells, ``[K]`` each; it goes beside the metrics that follow."""
        self._renewal = summary

    def guard(self, step: int, summary: Mapping[str, np.ndarray]) -> None:
        """Log a decision of the guard, ``[K]`` each."""
        if self._metrics is not None:
            self._metrics.guard(self.total_step("policy", step), step, summary)

    def metrics(
        self, phase: str, step: int, values: Mapping[str, np.ndarray]
    ) -> list[dict[str, Any]]:
        """Log the means over a chunk that ended at ``step`` of its phase, ``[K]`` each.

        Returns:
          A row for each training seed, as ``metrics.csv`` has them.
        """
        total = self.total_step(phase, step)
        values = {**(self._renewal if phase == "policy" else {}), **values}
        if self._metrics is not None and self._loggers is not None:
            self._metrics.write(total, phase, step, values)
            self._loggers.write(total, {f"{phase}/{name}": value for name, value in values.items()})
        return [
            dict(zip(METRIC_INDEX, (total, step, phase, seed), strict=True))
            | {name: float(value[index]) for name, value in values.items()}
            for index, seed in enumerate(self._info.seeds)
        ]

    def evaluation(
        self, record: Mapping[str, Any], rollouts: Rollouts | None, episode_seeds: Sequence[int]
    ) -> None:
        """Log an evaluation and every episode of it, instead of an earlier one of its name."""
        if hosts.index() == 0:
            write_evaluation(self._workdir, record, rollouts, self._info.seeds, episode_seeds)
        if self._loggers is not None and rollouts is not None:
            returns, lengths, successes = (values.mean(1) for values in rollouts)
            of = self._info.reference_scores, specs.id_of(self._info.env_spec) or ""
            scores = [score(*pair, *of) for pair in zip(returns, successes, strict=True)]
            means = {"return": returns, "length": lengths, "success": successes, "score": scores}
            # What is not known has no curve.
            known = {name: np.array(mean, float) for name, mean in means.items()}
            curves = {
                f"{record['policy']}/{name}": mean
                for name, mean in known.items()
                if np.isfinite(mean).all()
            }
            self._loggers.write(record["total_step"], curves)

    def checkpoint(self, state: State) -> None:
        """Start saving the state."""
        if self._lock is not None:
            self._lock.check()
        step = sum(int(getattr(state, phase).step[0]) for phase in PHASES)
        self._started().save(step, self._tree(state))

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, which says that the run is done; then draw the learning curve."""
        self._started().wait()
        if hosts.index() == 0:
            write_json(self._workdir / RESULT_FILE, result)
            try:
                write_whole(
                    self._workdir / CURVE_FILE, draw_learning_curve(Run.read(self._workdir))
                )
            # Any error, because a picture may not spoil a run that is done.
            except Exception as error:
                self._report(f"{CURVE_FILE} was not drawn: {reason(error)}")

    def close(self) -> None:
        """Wait for what is being saved, and let others write."""
        with contextlib.suppress(OSError):
            if self._lock is not None:
                self._save_seconds()
        self._open.close()
