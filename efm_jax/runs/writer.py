"""The one writer of a work directory, which a training run starts or continues."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from efm_jax.envs import Rollouts
from efm_jax.files import write_whole
from efm_jax.rl.agents import State
from efm_jax.rl.config import PHASES
from efm_jax.runs.checkpoint import Checkpointer
from efm_jax.runs.learning_curve import draw_learning_curve
from efm_jax.runs.metrics import MetricsWriter, write_returns
from efm_jax.runs.reader import Run
from efm_jax.runs.workdir import (
    CHECKPOINTS_FOLDER,
    CURVE_FILE,
    RESULT_FILE,
    RunInfo,
    write_json,
)
from efm_jax.training import hosts
from efm_jax.types import Normalizer


class RunWriter:
    """Writes everything that a run leaves.

    Of several hosts all call every method; together they save checkpoints, and the first alone
    writes the rest.

    Args:
      workdir: local or ``gs://``; nothing is made in it before :meth:`start`.
      info: what the run is.
      normalizer: statistics of its data, saved in every checkpoint.

    Raises:
      ValueError: the folder holds another run, or one that cannot be read.
    """

    def __init__(self, workdir: epath.Path, info: RunInfo, normalizer: Normalizer):
        self._workdir, self._info, self._normalizer = workdir, info, normalizer
        self._open = contextlib.ExitStack()
        self._checkpointer: Checkpointer  # made by start
        self._metrics: MetricsWriter | None = None  # of the first host
        self._renewal: Mapping[str, np.ndarray] = {}
        earlier = RunInfo.load(workdir)
        if earlier is not None:
            info.check_same(earlier, workdir)

    def start(self, state: State, report: Callable[[str], None]) -> tuple[int, State] | None:
        """Make the folder, or find in it where the run stopped.

        Args:
          state: a fresh one.
          report: called with one line about every checkpoint that cannot be read.

        Returns:
          Total step and state of the newest readable checkpoint; None where there are none.

        Raises:
          CheckpointError: none of the checkpoints can be read.
          ValueError: the hosts do not see one folder, or have started other runs.
        """
        self._checkpointer = Checkpointer(self._workdir / CHECKPOINTS_FOLDER, report=report)
        self._open.callback(self._checkpointer.close)
        found = self._checkpointer.restore(self._tree(state), discard=True)
        step = None if found is None else found[0]
        if hosts.index() == 0:
            self._info.save(self._workdir)
            self._metrics = MetricsWriter(self._workdir, self._info.seeds, resume_from=step)
            self._open.callback(self._metrics.close)
        # Also a barrier: the others read config.json after the first host has written it.
        steps = hosts.gather(np.asarray(-1 if step is None else step))
        if len(set(map(int, steps))) > 1 or RunInfo.load(self._workdir) != self._info:
            raise ValueError(
                f"workdir {self._workdir}: holds another run than this host's; "
                "all hosts need the same flags and one shared folder"
            )
        return None if found is None else (found[0], found[1]["state"])

    def _tree(self, state: State) -> dict[str, Any]:
        return {"state": state, "normalizer": self._normalizer}

    def total_step(self, phase: str, step: int) -> int:
        """Count the steps of all phases when ``phase`` is at ``step``."""
        earlier = PHASES[: PHASES.index(phase)]
        return step + sum(self._info.phase_steps[name] for name in earlier)

    def renewal(self, summary: Mapping[str, np.ndarray]) -> None:
        """Keep what a renewal tells, ``[K]`` each; it goes beside the metrics that follow."""
        self._renewal = summary

    def metrics(self, phase: str, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Log the means over a chunk that ended at ``step`` of its phase, ``[K]`` each."""
        if self._metrics is not None:
            renewal = self._renewal if phase == "policy" else {}
            self._metrics.write(self.total_step(phase, step), phase, step, {**renewal, **values})

    def returns(
        self, policy: str, total_step: int, rollouts: Rollouts, episode_seeds: list[int]
    ) -> None:
        """Log every episode of an evaluation, instead of an earlier one at the same step."""
        if hosts.index() == 0:
            seeds = self._info.seeds
            write_returns(self._workdir, total_step, policy, rollouts, seeds, episode_seeds)

    def checkpoint(self, state: State) -> None:
        """Start saving the state."""
        step = sum(int(getattr(state, phase).step[0]) for phase in PHASES)
        self._checkpointer.save(step, self._tree(state))

    def finish(self, result: dict[str, Any]) -> None:
        """Close, draw the learning curve, and write the result, which says that the run is done."""
        self.close()
        if hosts.index() == 0:
            picture = draw_learning_curve(Run.read(self._workdir))
            write_whole(self._workdir / CURVE_FILE, picture)
            write_json(self._workdir / RESULT_FILE, result)

    def close(self) -> None:
        """Wait for what is being saved."""
        self._open.close()
