"""Train QIPO offline and evaluate it: python -m launch.train [--flags]

Without flags it records a Pendulum-v1 dataset (once), trains the behavior model, the critic and the
improved policy, evaluates both policies on the same episodes, and prints a table and a line of
JSON.

  --dataset=ID_OR_FILE  the built-in dataset, a Minari id, a name of D4RL or OGBench, an .hdf5 or
                        .npz file
  --config=FILE.py      a preset, such as experiments/configs/qipo_diff.py
  --config.FIELD=VALUE  any field of efm_jax/rl/config.py, such as --config.beta=5
  --loggers=tensorboard,wandb,mlflow   where curves go beside the CSV tables, one for each seed
  --num_seeds=8 --parallel=seeds   whole seeds on every device; by default batch and data are split
  --online_steps=20000  afterwards play so many steps, and train on them too: see Fine-tuning below
  --compile_only [--topology=v6e:4x4]   memory and, on TPUs, estimated speed; nothing is trained

The work directory gets config.json, metrics.csv, evaluations.csv, returns.csv, result.json,
checkpoints/, tensorboard/ and learning_curve.png; it may be gs://.  The same command again
continues where the run stopped, on any number of devices; one process at a time; with --extend and
more policy_steps it continues a finished run.  On several hosts run it on each of them with
--multihost and one shared work directory.
Fine-tuning: in each of --online_rounds the policy plays its share of --online_steps, what it played
joins the data, and behavior model and critic train on with a share of their steps; the round is a
run of its own in WORKDIR/online/1, 2, ..., and the last one's result is printed.
Exit status: 0 done; 1 failed (a loss that is not finite, an evaluation at the end that came to no
number, or a folder that could no longer be written); 2 bad flags, data or checkpoint, or a folder
that cannot be written at the start; 130, 129, 143 stopped by ctrl-C, SIGHUP, SIGTERM, and saved if
training had begun.
"""

import contextlib
import dataclasses
import re
import signal
import sys
import time
from typing import Any

import numpy as np
from etils import epath
from ml_collections import config_flags
from tqdm import tqdm

from efm_jax.data import BUILTIN_DATASET, DATASET_SOURCES, load_dataset
from efm_jax.data.dataset import Dataset
from efm_jax.envs import EvaluationError
from efm_jax.rl.agents import State
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.programs import Programs
from efm_jax.rl.trainer import StoppedError, Trainer
from efm_jax.runs import online
from efm_jax.runs.loading import restore
from efm_jax.runs.lock import LockedError
from efm_jax.runs.loggers import check_loggers
from efm_jax.runs.session import MAX_SEED, Data, Session, check_run, prepare, used_rows
from efm_jax.runs.workdir import RunInfo, check_name, resolve
from efm_jax.training import hosts
from efm_jax.training.loop import NonFiniteLossError
from efm_jax.training.parallel import MODES, SHARDINGS, Layout
from efm_jax.types import Normalizer

from . import cli, compilation, datasets, leave, multihost, stop_at
from .evaluation import print_report
from .heartbeat import Heartbeat

_DEFAULT_PRESET = cli.ROOT / "experiments" / "configs" / "qipo_ot.py"

FLAGS = cli.Flags(cli.FLAGS, compilation.FLAGS, datasets.FLAGS, multihost.FLAGS)
_DATASET = FLAGS.string("dataset", BUILTIN_DATASET, f"One of\n{DATASET_SOURCES}")
_CONFIG_HELP = "Preset: a .py file, or the name of one in experiments/configs; default: qipo_ot."
_CONFIG = config_flags.DEFINE_config_file("config", None, _CONFIG_HELP, FLAGS.values)
_WORKDIR = FLAGS.string("workdir", None, "For results; default: runs/ALGORITHM-DATASET-SEED.")
_SEED = FLAGS.integer("seed", 0, "Root seed of the first training run.", 0, MAX_SEED)
_PARALLEL_HELP = "Over devices: data splits batches and dataset, seeds spreads whole seeds."
_PARALLEL = FLAGS.enum("parallel", "data", MODES, _PARALLEL_HELP)
_SHARDING_HELP = "How programs are put on devices: pmap, or jit with a mesh; the same numbers."
_SHARDING = FLAGS.enum("sharding", "pmap", SHARDINGS, _SHARDING_HELP)
_STOP_HELP = "Save and stop where an evaluation fails, instead of recording it and going on."
_STOP = FLAGS.bool("stop_on_failed_evaluation", False, _STOP_HELP)
_LOGGERS_HELP = "Curves beside CSV tables: tensorboard, wandb, mlflow, or a name of --plugins."
_LOGGERS = FLAGS.list("loggers", ["tensorboard"], _LOGGERS_HELP)
_EXTEND_HELP = "Continue a run of fewer policy steps; refused where it would be another run's."
_EXTEND = FLAGS.bool("extend", False, _EXTEND_HELP)
_ONLINE_HELP = "Steps to play after training, which then goes on with them; one seed, one host."
_ONLINE = FLAGS.integer("online_steps", 0, _ONLINE_HELP, 0)
_ROUNDS = FLAGS.integer("online_rounds", 5, "Parts of --online_steps, trained on after each.", 1)
_NUM_SEEDS = FLAGS.integer("num_seeds", 1, "Runs, of consecutive seeds, in one program.", 1)


def main(_: list[str]) -> int:
    """Train to the end, evaluate, report."""
    start = time.perf_counter()
    with multihost.joined():
        config = _read_config()
        data, dataset = _read_dataset(config)
        if compilation.COMPILE_ONLY.value:
            return _compile(config, data)
        run = _Run(data, _make_trainer(data), start)
        return run.to_the_end() or _go_online(run, dataset)


@multihost.agreed_errors()
def _read_config() -> QIPOConfig:
    datasets.allow_environments()
    path = config_flags.get_config_filename(FLAGS.values["config"])
    problem = cli.preset_problem(path)
    if problem is not None:
        raise ValueError(f"--config={path}: {problem}")
    if _WORKDIR.value:
        check_name(resolve(_WORKDIR.value))
    config = _CONFIG.value
    if not isinstance(config, QIPOConfig):
        raise ValueError(
            f"--config={path}: get_config() must return a QIPOConfig; got {type(config).__name__}"
        )
    if _ONLINE.value and (_NUM_SEEDS.value > 1 or hosts.count() > 1):
        raise ValueError(
            f"--online_steps: expected one seed and one host; got --num_seeds={_NUM_SEEDS.value} "
            f"and {hosts.count()} hosts"
        )
    check_loggers(_LOGGERS.value)
    check_run(config, _SEED.value, _NUM_SEEDS.value)  # before the dataset is read
    return config


def _read_dataset(config: QIPOConfig) -> tuple[Data, Dataset]:
    with multihost.agreed_errors():
        devices = compilation.devices()
        layout = Layout.create(_PARALLEL.value, _NUM_SEEDS.value, devices, _SHARDING.value)
        dataset, total = _load(config, layout)
    return _prepare(config, dataset, layout, total), dataset


def _prepare(
    config: QIPOConfig,
    dataset: Dataset,
    layout: Layout,
    total: int,
    normalizer: Normalizer | None = None,
) -> Data:
    return prepare(
        config,
        dataset,
        layout,
        seed=_SEED.value,
        num_rows=total,
        plugins=cli.PLUGINS.value,
        normalizer=normalizer,
        note=_print_note,
        agreed=multihost.agreed_errors,
    )


def _load(config: QIPOConfig, layout: Layout) -> tuple[Dataset, int]:
    """Read this host's part of the dataset, and all hosts' number of rows."""
    total = 0

    def rows(count: int) -> slice:
        nonlocal total
        total = used_rows(config, count)
        return layout.host_rows(total)

    dataset = load_dataset(
        _DATASET.value,
        env=datasets.ENV.value,
        rows=rows,
        folders=datasets.dataset_folders(),
        max_episode_steps=datasets.MAX_EPISODE_STEPS.value,
    )
    if dataset.env_spec is None:
        raise ValueError(
            f"dataset {dataset.name}: names no environment to evaluate in; give --env=ID"
            + "".join(f" ({note})" for note in dataset.notes)
        )
    return dataset, total


def _print_note(note: str) -> None:
    if hosts.index() == 0:
        print(f"note: {note}", flush=True)


@multihost.agreed_errors()
def _make_trainer(data: Data) -> Trainer:
    return data.trainer()


@multihost.agreed_errors()
def _compile(config: QIPOConfig, data: Data) -> int:
    info = data.info
    sizes = info.transitions, info.observation_size, info.action_size
    return compilation.report(Programs(config, data.layout, *sizes), data.memory)


def _go_online(run: "_Run", dataset: Dataset) -> int:
    """Play, train on, and so on in ``--online_rounds``; returns the exit status."""
    rounds, config, layout = _ROUNDS.value, run.info.config, run.trainer.layout
    if not _ONLINE.value:
        return 0
    shares = {f"{name}_steps": -(-count // rounds) for name, count in run.info.phase_steps.items()}
    shares = {name: count for name, count in shares.items() if count}
    every = min(config.renew_every, shares.get("policy_steps", config.renew_every))
    config = dataclasses.replace(config, renew_every=every, **shares)
    place = run.workdir
    for number in range(1, rounds + 1):
        if run.stop_requested():  # after its last chunk
            return run.stopped()
        stop_at(leave)  # while it plays there is nothing to save
        began, folder = time.perf_counter(), place / "online" / str(number)
        with cli.usage_errors():
            before = restore(run.workdir, cli.say)
            steps = _ONLINE.value * number // rounds - _ONLINE.value * (number - 1) // rounds
            seed = (_SEED.value + number) % (MAX_SEED + 1)
            dataset = online.grown(dataset, run.workdir, folder, steps, seed)
            count = dataset.transitions.size
            count -= count % layout.num_shards
            config = dataclasses.replace(config, max_transitions=count).validate()
            data = _prepare(config, dataset.head(count), layout, count, before.normalizer)
            run = _Run(data, data.trainer(), began, folder, before.state)
        if status := run.to_the_end():
            return status
    return 0


def _default_workdir(info: RunInfo) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", info.dataset).strip("-.")[-150:]
    seeds = f"seed{_SEED.value}" + (f"x{_NUM_SEEDS.value}" if _NUM_SEEDS.value > 1 else "")
    return f"runs/{info.algorithm}-{name}-{seeds}"


class _Run(Session):
    """One training run on the command line: progress bars, signals, exit statuses.

    Of several hosts, the first speaks.
    """

    def __init__(
        self,
        data: Data,
        trainer: Trainer,
        began: float,
        workdir: epath.Path | None = None,
        warm: State | None = None,
    ):
        self._memory, self._is_first = data.memory, hosts.index() == 0
        with multihost.agreed_errors():
            workdir = workdir or resolve(_WORKDIR.value or _default_workdir(data.info))
        super().__init__(
            *(data, trainer, workdir, self._say, began),
            warm=warm,
            extend=_EXTEND.value,
            loggers=_LOGGERS.value,
            agreed=multihost.agreed_errors,
        )
        self._bar = tqdm(disable=True)  # until a phase begins
        self._table: tqdm | None = None
        self._stop = multihost.StopSignal()
        self._heartbeat = Heartbeat(self._say)

    def to_the_end(self) -> int:
        """Train, evaluate and report; returns the exit status."""
        try:
            with contextlib.closing(self):
                return self._train()
        # A disk that filled or a bucket that went away; not status 2, at which clusters give up.
        except OSError as error:
            self._say(f"failed: {error}; the same command tries again")
            return cli.EXIT_FAILED

    def close(self) -> None:
        self._close_bars()
        self._heartbeat.close()
        super().close()

    def _train(self) -> int:
        try:
            line = self.run()
        except NonFiniteLossError as error:
            step = self.writer.saved_step
            kept = f"the checkpoint of step {step} is kept"
            none = "no checkpoint had been saved yet"
            self._say(f"failed: {error}; {none if step is None else kept}")
            return cli.EXIT_FAILED
        except EvaluationError as error:
            return self._give_up(error)
        except StoppedError as error:
            # JAX ends every host when one leaves, and others may still compile what comes before.
            hosts.hosts_where(False)
            return self._give_up(error) if error.args else self.stopped()
        if self._is_first:
            print_report(self.info, line)
        return 0

    def start(self) -> State:
        state = super().start()
        if self._is_first:
            info, devices = self.info, self.trainer.layout.devices
            what = f"{info.algorithm} on {info.dataset}, {info.transitions} transitions"
            kind = f"{len(devices)} devices ({devices[0].device_kind}), {hosts.count()} hosts"
            covers = "besides what a program computes with (see --compile_only)"
            memory = f"memory of each device: {self._memory}, {covers}"
            print(f"{self.workdir}: {what}; {memory}; {kind}", flush=True)
        return state

    def stopped(self) -> int:
        """Say which signal stopped the run; returns the exit status."""
        name = signal.Signals(self._stop.number).name
        self._say(f"stopped by {name}, saved in {self.workdir}")
        return 128 + self._stop.number

    def _give_up(self, why: Exception) -> int:
        """Say that there is no result, because evaluations failed; returns the exit status."""
        self._say(f"failed: {why}; saved in {self.workdir}, and the same command tries again")
        return cli.EXIT_FAILED

    def _say(self, text: str) -> None:
        if self._is_first:
            tqdm.write(f"{cli.program()}: {text}", file=sys.stderr)

    def on_phase(self, phase: str, done: int, total: int) -> None:
        self._close_bars()
        self._heartbeat.status = f"{phase}: step {done} of {total}"
        self._bar = self._new_bar(
            total=total, initial=done, desc=f"{phase:<8}", unit="step", leave=True
        )

    def _new_bar(self, **options: Any) -> tqdm:
        return tqdm(disable=None if self._is_first else True, **options)

    def on_table(self, name: str, done: int, total: int) -> None:
        if self._table is None:
            self._table = self._new_bar(total=total, desc=f"  {name}", leave=False)
        self._table.update(done - self._table.n)
        self._heartbeat.status = f"{name}: {done} of {total}"
        if done == total:
            self._table.close()
            self._table = None

    def _close_bars(self) -> None:
        if self._table is not None:
            self._table.close()
            self._table = None
        self._bar.close()

    def on_metrics(self, phase: str, step: int, values: dict[str, np.ndarray]) -> None:
        super().on_metrics(phase, step, values)
        self._bar.update(step - self._bar.n)
        loss, speed = values["loss"].mean(), values["steps_per_second"].mean()
        self._bar.set_postfix(loss=f"{loss:.3g}", refresh=False)
        of = f"step {step} of {self.info.phase_steps[phase]}"
        self._heartbeat.status = f"{phase}: {of}, loss {loss:.3g}, {speed:.1f} steps a second"

    def on_play(self, steps: int, ended: int) -> None:
        self._heartbeat.status = f"evaluating: {steps} steps played, {ended} episodes ended"
        if self._stop.received_alone():
            raise StoppedError

    def tell(self, kind: str, row: dict[str, Any]) -> None:
        if _STOP.value and self.failed:
            raise StoppedError("; ".join(self.failed.values()))

    def on_checkpoint(self, state: State) -> None:
        try:
            super().on_checkpoint(state)
        except LockedError as error:  # another process has taken the folder over
            raise cli.UsageError(str(error)) from error

    def stop_requested(self) -> bool:
        return self._stop.requested()


command = cli.command(main, FLAGS, {"config": str(_DEFAULT_PRESET)})

if __name__ == "__main__":
    command()
