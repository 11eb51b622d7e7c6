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
  --compile_only [--topology=v6e:4x4]   memory and, on TPUs, estimated speed; nothing is trained

The work directory gets config.json, metrics.csv, evaluations.csv, returns.csv, result.json,
checkpoints/, tensorboard/ and learning_curve.png; it may be gs://.  The same command again
continues where the run stopped, on any number of devices; one process at a time.  On several hosts
run it on each of them with --multihost and one shared work directory.
Exit status: 0 done; 1 failed (a loss that is not finite, an evaluation at the end that came to no
number, or a folder that could no longer be written); 2 bad flags, data or checkpoint, or a folder
that cannot be written at the start; 130, 129, 143 stopped by ctrl-C, SIGHUP, SIGTERM, and saved if
training had begun.
"""

import contextlib
import re
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from efm_jax import checks
from efm_jax.data import (
    BUILTIN_DATASET,
    DATASET_SOURCES,
    REWARD_TRANSFORMS,
    fit_normalizer,
    gather_episodes,
    load_dataset,
    preprocess,
)
from efm_jax.envs import EvaluationError, Rollouts, dataset_references
from efm_jax.rl.agents import AgentParams, State, make_agent
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.memory import Memory, check_fits, device_limit, predict
from efm_jax.rl.programs import Programs
from efm_jax.rl.trainer import Hooks, StoppedError, Trainer
from efm_jax.runs.evaluation import (
    POLICIES,
    Evaluator,
    check_environment,
    episode_seeds,
    horizon,
    result_line,
)
from efm_jax.runs.learning_curve import LOW_ESS
from efm_jax.runs.lock import LockedError
from efm_jax.runs.loggers import check_loggers
from efm_jax.runs.workdir import RunInfo, check_name, resolve
from efm_jax.runs.writer import RunWriter
from efm_jax.training import hosts
from efm_jax.training.loop import NonFiniteLossError
from efm_jax.training.parallel import MODES, SHARDINGS, Layout
from efm_jax.types import Dataset, Normalizer, Transitions, one_host
from launch import cli, compilation, datasets, multihost
from launch.evaluation import print_report
from launch.heartbeat import Heartbeat

_DEFAULT_PRESET = cli.ROOT / "experiments" / "configs" / "qipo_ot.py"
# A random key keeps 32 bits of its seed: a larger one would repeat the run of a smaller one.
_MAX_SEED = 2**32 - 1

_DATASET = flags.DEFINE_string("dataset", BUILTIN_DATASET, f"One of\n{DATASET_SOURCES}")
_CONFIG_HELP = f"Preset, a .py file here or in the installation; default: {_DEFAULT_PRESET.name}."
_CONFIG = config_flags.DEFINE_config_file("config", None, _CONFIG_HELP)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "For results; default: runs/ALGORITHM-DATASET-SEED."
)
_SEED = flags.DEFINE_integer("seed", 0, "Root seed of the first training run.", 0, _MAX_SEED)
_PARALLEL_HELP = "Over devices: data splits batches and dataset, seeds spreads whole seeds."
_PARALLEL = flags.DEFINE_enum("parallel", "data", MODES, _PARALLEL_HELP)
_SHARDING_HELP = "How programs are put on devices: pmap, or jit with a mesh; the same numbers."
_SHARDING = flags.DEFINE_enum("sharding", "pmap", SHARDINGS, _SHARDING_HELP)
flags.adopt_module_key_flags(cli)
flags.adopt_module_key_flags(compilation)
flags.adopt_module_key_flags(datasets)
flags.adopt_module_key_flags(multihost)
_STOP_HELP = "Save and stop where an evaluation fails, instead of recording it and going on."
_STOP = flags.DEFINE_bool("stop_on_failed_evaluation", False, _STOP_HELP)
_LOGGERS_HELP = "Curves beside CSV tables: tensorboard, wandb, mlflow, or a name of --plugins."
_LOGGERS = flags.DEFINE_list("loggers", ["tensorboard"], _LOGGERS_HELP)
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 1, "Runs, of consecutive seeds, in one program.", 1)


def main(_: list[str]) -> int:
    """Train to the end, evaluate, report."""
    start = time.perf_counter()
    with multihost.joined():
        config = _read_config()
        data = _read_dataset(config)
        if compilation.COMPILE_ONLY.value:
            return _compile(config, data)
        trainer = _make_trainer(config, data)
        return _Run(data, trainer, start).to_the_end()


@multihost.agreed_errors()
def _read_config() -> QIPOConfig:
    datasets.allow_environments()
    path = config_flags.get_config_filename(flags.FLAGS["config"])
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
    last = _SEED.value + _NUM_SEEDS.value - 1
    if last > _MAX_SEED:
        raise ValueError(
            f"--seed, --num_seeds: the last seed may be at most {_MAX_SEED}; got {last}"
        )
    check_loggers(_LOGGERS.value)
    make_agent(config, 1, 1)  # every name is known, before the dataset is read
    checks.check_choice("reward_transform", config.reward_transform, REWARD_TRANSFORMS)
    return config


class _Data(NamedTuple):
    """A dataset ready to train on."""

    transitions: Transitions  # normalized; this host's part
    normalizer: Normalizer
    layout: Layout
    memory: Memory
    info: RunInfo


def _read_dataset(config: QIPOConfig) -> _Data:
    with multihost.agreed_errors():
        devices = compilation.devices()
        layout = Layout.create(_PARALLEL.value, _NUM_SEEDS.value, devices, _SHARDING.value)
        dataset, env_spec, total = _load(config, layout)
        references = dataset_references(dataset.reference_scores, dataset.name, env_spec)
        memory = predict(config, layout, total, dataset.observation_size, dataset.action_size)
        check_fits(memory, device_limit(layout), layout)
    # In parallel=seeds every host has read everything, and has nothing to ask the others.
    gather = hosts.gather if layout.mode == "data" else one_host
    dataset = gather_episodes(dataset, gather)
    notes: list[str] = []
    normalizer = fit_normalizer(dataset, gather, notes)
    _print_notes(notes)
    agent = make_agent(config, dataset.observation_size, dataset.action_size)
    info = RunInfo(
        config=config,
        plugins=cli.PLUGINS.value,
        algorithm=agent.name,
        phase_steps=agent.phase_steps,
        seed=_SEED.value,
        num_seeds=_NUM_SEEDS.value,
        dataset=dataset.name,
        fingerprint=dataset.fingerprint(gather),
        transitions=total,
        dataset_return=float(dataset.episode_returns.mean()),
        observation_size=dataset.observation_size,
        action_size=dataset.action_size,
        env_spec=env_spec,
        reference_scores=references,
    )
    with multihost.agreed_errors():
        transitions = preprocess(dataset, normalizer, config.reward_transform)
    return _Data(transitions, normalizer, layout, memory, info)


def _load(config: QIPOConfig, layout: Layout) -> tuple[Dataset, str, int]:
    """Read this host's part of the dataset, its environment, and all hosts' number of rows."""
    total = 0

    def rows(count: int) -> slice:
        nonlocal total
        total = config.max_transitions or count
        if total > count:
            raise ValueError(
                f"max_transitions: expected at most the {count} of the dataset; got {total}"
            )
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
    _print_notes([*dataset.notes, horizon(dataset.env_spec)])
    bounds = dataset.action_low, dataset.action_high
    check_environment(dataset.env_spec, dataset.observation_size, dataset.action_size, bounds)
    return dataset, dataset.env_spec, total


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes if hosts.index() == 0 else ():
        print(f"note: {note}", flush=True)


@multihost.agreed_errors()
def _make_trainer(config: QIPOConfig, data: _Data) -> Trainer:
    info = data.info
    return Trainer(config, data.transitions, info.seeds, data.layout, info.transitions)


@multihost.agreed_errors()
def _compile(config: QIPOConfig, data: _Data) -> int:
    info = data.info
    sizes = info.transitions, info.observation_size, info.action_size
    return compilation.report(Programs(config, data.layout, *sizes), data.memory)


def _default_workdir(info: RunInfo) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", info.dataset).strip("-.")[-150:]
    seeds = f"seed{_SEED.value}" + (f"x{_NUM_SEEDS.value}" if _NUM_SEEDS.value > 1 else "")
    return f"runs/{info.algorithm}-{name}-{seeds}"


class _Run(Hooks):
    """The hooks of one training run: progress bars, warnings, evaluation, signals.

    Of several hosts, the first speaks; checkpoints and evaluation are everyone's work.
    """

    @multihost.agreed_errors()
    def __init__(self, data: _Data, trainer: Trainer, began: float):
        self._info, self._memory, self._trainer = data.info, data.memory, trainer
        self._is_first = hosts.index() == 0
        self._workdir = resolve(_WORKDIR.value or _default_workdir(data.info))
        self._writer = RunWriter(
            self._workdir, data.info, data.normalizer, self._say, began, _LOGGERS.value
        )
        self._evaluator = Evaluator(data.info, trainer.agent, data.normalizer)
        # Of each policy, the last evaluation: what it gave and its name, or why it failed.
        self._rollouts: dict[str, Rollouts] = {}
        self._evaluations: dict[str, str] = {}
        self._failed: dict[str, str] = {}
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
        """Take the bars off, and wait for what is being saved."""
        self._close_bars()
        self._heartbeat.close()
        self._writer.close()

    def _train(self) -> int:
        try:
            state = self._trainer.run(self._start(), self)
            for name in POLICIES:
                self._evaluate(name, self._info.phase_steps[name], state.params())
            if self._failed:
                return self._give_up()
            self._report()
        except NonFiniteLossError as error:
            step = self._writer.saved_step
            kept = f"the checkpoint of step {step} is kept"
            none = "no checkpoint had been saved yet"
            self._say(f"failed: {error}; {none if step is None else kept}")
            return cli.EXIT_FAILED
        except StoppedError:
            # JAX ends every host when one leaves, and others may still compile what comes before.
            hosts.hosts_where(False)
            if self._failed and _STOP.value:
                return self._give_up()
            name = signal.Signals(self._stop.number).name
            self._say(f"stopped by {name}, saved in {self._workdir}")
            return 128 + self._stop.number
        return 0

    def _start(self) -> State:
        with multihost.agreed_errors():
            state = self._trainer.init_state()
            found = self._writer.start(state)
        if found is not None:
            step, state = found
            self._say(f"continuing {self._workdir} from step {step}")
        if self._is_first:
            info, devices = self._info, self._trainer.layout.devices
            what = f"{info.algorithm} on {info.dataset}, {info.transitions} transitions"
            kind = f"{len(devices)} devices ({devices[0].device_kind}), {hosts.count()} hosts"
            memory = f"memory of each device: {self._memory}"
            print(f"{self._workdir}: {what}; {memory}; {kind}", flush=True)
        return state

    def _report(self) -> None:
        """Write and print the result of a run that came to its end."""
        steps = sum(self._info.phase_steps.values())
        of = self._info, self._workdir, steps, self._rollouts, self._evaluations
        line = result_line(*of, self._writer.seconds)
        self._writer.finish(line)
        if self._is_first:
            print_report(self._info, line)

    def _give_up(self) -> int:
        """Say that there is no result, because evaluations failed; returns the exit status."""
        why = "; ".join(self._failed.values())
        self._say(f"failed: {why}; saved in {self._workdir}, and the same command tries again")
        return cli.EXIT_FAILED

    def _say(self, text: str) -> None:
        if self._is_first:
            tqdm.write(f"launch.train: {text}", file=sys.stderr)

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
            self._table = self._new_bar(total=total, desc=f"  {name}", unit="state", leave=False)
        self._table.update(done - self._table.n)
        self._heartbeat.status = f"{name}: {done} of {total} states"
        if done == total:
            self._table.close()
            self._table = None

    def _close_bars(self) -> None:
        if self._table is not None:
            self._table.close()
            self._table = None
        self._bar.close()

    def on_renewal(self, step: int, summary: dict[str, np.ndarray]) -> None:
        self._writer.renewal(summary)
        low = float(summary["ess"].min()) if "ess" in summary else np.inf
        if low < LOW_ESS:
            self._say(
                f"warning: at policy step {step} the mean effective sample size of the support "
                f"weights is {low:.2f} of {self._info.config.support_size + 1} actions; "
                "a smaller beta would help"
            )

    def on_metrics(self, phase: str, step: int, values: dict[str, np.ndarray]) -> None:
        self._writer.metrics(phase, step, values)
        self._bar.update(step - self._bar.n)
        loss, speed = values["loss"].mean(), values["steps_per_second"].mean()
        self._bar.set_postfix(loss=f"{loss:.3g}", refresh=False)
        of = f"step {step} of {self._info.phase_steps[phase]}"
        self._heartbeat.status = f"{phase}: {of}, loss {loss:.3g}, {speed:.1f} steps a second"

    def on_evaluate(self, step: int, params: AgentParams) -> None:
        self._evaluate("policy", step, params)
        if self._failed and not _STOP.value:
            self._say(f"failed: {self._failed['policy']}; training goes on")

    def _evaluate(self, name: str, step: int, params: AgentParams) -> None:
        episodes = episode_seeds(self._info.config.eval_episodes)
        total_step = self._writer.total_step(name, step)
        evaluation, rollouts, problem = f"train-{name}-{total_step}", None, None
        self._failed.pop(name, None)
        self._heartbeat.status = f"evaluating {name} at step {total_step}"
        try:
            rollouts = self._evaluator.play(name, params, episodes, self._check_stop)
            self._rollouts[name], self._evaluations[name] = rollouts, evaluation
        except EvaluationError as error:
            problem = error
            self._failed[name] = f"evaluation {evaluation}: {error}"
        of = evaluation, "train", name, total_step, episodes
        self._writer.evaluation(self._evaluator.record(*of, problem), rollouts, episodes)
        if problem is not None and _STOP.value:
            raise StoppedError

    def _check_stop(self, *_: int) -> None:
        if self._stop.received_alone():
            raise StoppedError

    def on_checkpoint(self, state: State) -> None:
        try:
            self._writer.checkpoint(state)
        except LockedError as error:  # another process has taken the folder over
            raise cli.UsageError(str(error)) from error

    def stop_requested(self) -> bool:
        return self._stop.requested()


if __name__ == "__main__":
    cli.run(main, {"config": str(_DEFAULT_PRESET)})
