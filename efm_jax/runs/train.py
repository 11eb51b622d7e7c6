"""Training from Python: what ``launch.train`` does, with arrays in and arrays out."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd

from efm_jax.data.dataset import Dataset
from efm_jax.envs.specs import Environment
from efm_jax.rl.config import QIPOConfig
from efm_jax.runs.loading import Policy, restore
from efm_jax.runs.loggers import Logger, check_loggers
from efm_jax.runs.reader import METRIC_INDEX, RETURN_COLUMNS, Rows, Run
from efm_jax.runs.session import Callback, Session, check_run, prepare, used_rows
from efm_jax.runs.workdir import check_name, resolve
from efm_jax.training import hosts
from efm_jax.training.parallel import Layout


class Trained(NamedTuple):
    """What a run gave; lists have an entry for each of its ``K`` training seeds."""

    policies: list[Policy]
    behaviors: list[Policy]  # the models of the data's behavior that the policies began as
    metrics: pd.DataFrame  # a row per logged point and seed: total_step, step, phase, seed, loss, …
    returns: pd.DataFrame  # a row per episode: total_step, policy, seed, return, length, …
    result: dict[str, Any]  # the line of JSON that launch.train prints
    workdir: str | None

    @property
    def policy(self) -> Policy:
        """The policy of the first training seed."""
        return self.policies[0]

    @property
    def behavior(self) -> Policy:
        """The behavior model of the first training seed."""
        return self.behaviors[0]


def train(
    dataset: Dataset,
    config: QIPOConfig | None = None,
    workdir: str | None = None,
    *,
    env: Environment | None = None,
    seed: int = 0,
    num_seeds: int = 1,
    loggers: Sequence[str | Logger] = (),
    callbacks: Sequence[Callback] = (),
    extend: bool = False,
    parallel: str = "data",
    report: Callable[[str], None] = print,
) -> Trained:
    """Train behavior models, critics and policies on a dataset, and evaluate them.

    With a work directory it leaves the files of ``launch.train``; the same call again continues
    where the last one stopped, and :func:`efm_jax.load_policy` and the commands read them.

    Args:
      dataset: of :meth:`.Dataset.from_arrays` or :func:`efm_jax.load_dataset`.
      config: hyper-parameters; None: the defaults of :class:`.QIPOConfig`.
      workdir: local or ``gs://``; None: nothing is left but what is returned.
      env: where policies are evaluated, as for :meth:`.Dataset.in_environment`; None: where the
        dataset says; nowhere if it says nothing.
      seed: root seed of the first training run.
      num_seeds: runs, of consecutive seeds, in one program.
      loggers: where curves go beside the tables: "tensorboard", "wandb", "mlflow", or objects with
        their methods.
      callbacks: each is called with ``("metrics", row)`` for every logged point and seed, and with
        ``("evaluation", row)`` for every evaluation, whose ``returns`` are ``[K, E]``.  What one
        raises stops the run; it can be continued from its last checkpoint.
      extend: continue a run of fewer policy steps.  The steps it takes are those of a longer run,
        so a ``learning_rate_schedule`` that ends with the run is refused.
      parallel: over all devices: "data" splits batches and dataset, "seeds" spreads whole seeds.
      report: called with one line about whatever the user should know.

    Raises:
      ValueError: arguments that do not fit each other, the data, the devices or the run in
        ``workdir``; as ``EvaluationError``, an evaluation at the end that came to no number.
      NonFiniteLossError: a loss that is not finite; the checkpoints before it are kept.
      OSError: the folder cannot be written.

    Example:
      >>> import numpy as np, efm_jax
      >>> rng = np.random.default_rng(0)
      >>> states, actions = rng.normal(size=(64, 3)), rng.uniform(-1, 1, (64, 1))
      >>> data = efm_jax.Dataset.from_arrays(
      ...     states, actions, -actions[:, 0] ** 2, terminated=np.ones(64), truncated=np.zeros(64))
      >>> steps = {f"{phase}_steps": 4 for phase in ("behavior", "critic", "policy")}
      >>> config = efm_jax.QIPOConfig(hidden_dims=(8,), batch_size=16, **steps)
      >>> run = efm_jax.train(data, config)
      >>> run.policy(np.zeros(3)).shape, run.policy(states).shape
      ((1,), (64, 1))
    """
    began = time.perf_counter()
    if not isinstance(dataset, Dataset):
        kind = type(dataset).__name__
        raise TypeError(f"dataset: expected a Dataset, of Dataset.from_arrays; got {kind}")
    if hosts.count() > 1:
        raise ValueError(f"train: expected one host; got {hosts.count()}; use launch.train")
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(f"callbacks: expected functions of (kind, row); got {callback!r}")
    config = QIPOConfig() if config is None else config
    check_loggers(loggers)
    check_run(config, seed, num_seeds)
    layout = Layout.create(parallel, num_seeds)
    count = used_rows(config, dataset.transitions.size)
    dataset = dataset.head(count)
    if env is not None:
        dataset = dataset.in_environment(env)
    with contextlib.ExitStack() as stack:
        if workdir is None:
            place = resolve(stack.enter_context(tempfile.TemporaryDirectory(prefix="efm_jax-")))
        else:
            check_name(place := resolve(workdir))
        data = prepare(config, dataset, layout, seed=seed, num_rows=count, note=report)
        more = {"extend": extend, "loggers": loggers, "callbacks": callbacks}
        session = Session(data, data.trainer(), place, report, began, **more)
        with contextlib.closing(session):
            result = session.run()
        run, restored = Run.read(place), restore(place, report)
    seeds = range(num_seeds)
    return Trained(
        policies=[Policy(restored, "policy", index) for index in seeds],
        behaviors=[Policy(restored, "behavior", index) for index in seeds],
        metrics=_frame(run.metrics, METRIC_INDEX),
        returns=_frame(run.own_returns, RETURN_COLUMNS),
        result=result | {"workdir": workdir},
        workdir=workdir,
    )


def _frame(rows: Rows, columns: Sequence[str]) -> pd.DataFrame:
    """A table of a run with numbers as numbers; an empty cell is NaN."""
    frame = pd.DataFrame(rows) if rows else pd.DataFrame(columns=pd.Index(columns))
    names = ["phase", "policy", "evaluation"]
    return frame.assign(
        **{name: pd.to_numeric(frame[name]) for name in frame.columns.difference(names)}
    )
