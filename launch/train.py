"""Train QIPO offline and evaluate it: python -m launch.train [--flags]

Without flags it records a Pendulum-v1 dataset (once), trains the behavior model, the critic and the
improved policy, evaluates both policies on the same episodes, and prints a table and a line of
JSON.

  --dataset=ID_OR_FILE  the built-in dataset, a Minari id, a name of D4RL or OGBench, an .hdf5 or .npz file
  --config=FILE.py      a preset, such as experiments/configs/qipo_diff.py
  --config.FIELD=VALUE  any field of efm_jax/rl/config.py, such as --config.beta=5
  --num_seeds=8 --parallel=seeds   whole seeds on every device; by default batch and data are split

The work directory gets config.json, metrics.csv, returns.csv, result.json, checkpoints/,
tensorboard/ and learning_curve.png; it may be gs://.  The same command again continues where the
run stopped, on any number of devices.  On several hosts run it on each of them with --multihost and
one shared work directory. Exit status: 0 done, 1 failed (a loss that is not finite), 2 bad flags,
data or checkpoint, 143 stopped by SIGTERM and saved.
"""

import re
import sys
import time
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from ml_collections import config_flags
from tqdm import tqdm

from efm_jax.data import (
    BUILTIN_DATASET,
    DATASET_SOURCES,
    fit_normalizer,
    gather_episodes,
    load_dataset,
    preprocess,
)
from efm_jax.envs import Rollouts, evaluate, reference_scores
from efm_jax.rl.algorithm import State
from efm_jax.rl.config import PHASES, QIPOConfig
from efm_jax.rl.memory import check_fits, device_limit, predict
from efm_jax.rl.policies import Acting
from efm_jax.rl.trainer import StoppedError, Trainer
from efm_jax.runs.checkpoint import Checkpointer
from efm_jax.runs.learning_curve import plot_learning_curve
from efm_jax.runs.metrics import MetricsWriter, return_rows, write_returns
from efm_jax.runs.workdir import CHECKPOINTS_FOLDER, METRICS_FILE, RETURNS_FILE, RunInfo
from efm_jax.training import hosts
from efm_jax.training.loop import NonFiniteLossError
from efm_jax.training.parallel import MODES, Layout
from efm_jax.types import Normalizer, one_host
from launch import cli, evaluation, multihost
from launch.datasets import dataset_folders
from launch.workdir import RESULT_FILE, resolve, write_json

_DEFAULT_PRESET = cli.ROOT / "experiments" / "configs" / "qipo_ot.py"
# A random key keeps 32 bits of its seed: a larger one would repeat the run of a smaller one.
_MAX_SEED = 2**32 - 1
# Under this many effective actions a state's target is all but one action: beta is too large to
# trust.
_LEAST_ESS = 1.5

_DATASET = flags.DEFINE_string("dataset", BUILTIN_DATASET, f"One of\n{DATASET_SOURCES}")
_ENV = flags.DEFINE_string(
    "env", None, "Gymnasium id to evaluate in, instead of the one the dataset names."
)
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    f"Preset, a .py file, here or where launch is installed; by default {_DEFAULT_PRESET.name}.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where results go; by default runs/ALGORITHM-DATASET-SEED."
)
_SEED = flags.DEFINE_integer("seed", 0, "Root seed of the first training run.", 0, _MAX_SEED)
_PARALLEL = flags.DEFINE_enum(
    "parallel",
    "data",
    MODES,
    "Over devices: data splits batches and dataset, seeds spreads whole seeds.",
)
flags.adopt_module_key_flags(multihost)
_NUM_SEEDS = flags.DEFINE_integer(
    "num_seeds", 1, "Training runs, with consecutive seeds, in one program.", 1
)


def main(_: list[str]) -> int:
    """Train to the end, evaluate, report."""
    start = time.perf_counter()
    with multihost.lost_hosts():
        with cli.usage_errors():
            multihost.start()
        return _train(start)


def _train(start: float) -> int:
    with multihost.agreed_errors():
        config = _read_config()
        last = _SEED.value + _NUM_SEEDS.value - 1
        if last > _MAX_SEED:
            raise ValueError(
                f"--seed, --num_seeds: the last seed may be at most {_MAX_SEED}; got {last}"
            )
        layout = Layout.create(_PARALLEL.value, _NUM_SEEDS.value)
        total = 0

        def rows(count: int) -> slice:
            nonlocal total
            total = config.max_transitions or count
            if total > count:
                raise ValueError(
                    f"max_transitions: expected at most the {count} of the dataset; got {total}"
                )
            return layout.host_rows(total)

        dataset = load_dataset(_DATASET.value, env=_ENV.value, rows=rows, folders=dataset_folders())
        if dataset.env_spec is None:
            raise ValueError(
                f"dataset {dataset.name}: names no environment to evaluate in; give --env=ID"
            )
        evaluation.check_environment(
            dataset.env_spec, dataset.observation_size, dataset.action_size
        )
        references = dataset.reference_scores or reference_scores(dataset.name)
        references = references or reference_scores(evaluation.env_id(dataset.env_spec))
        memory = predict(config, layout, total, dataset.observation_size, dataset.action_size)
        check_fits(memory, device_limit(layout), layout)
        workdir = resolve(_WORKDIR.value or _default_workdir(config, dataset.name))
    # In parallel=seeds every host has read everything, and has nothing to ask the others.
    gather = hosts.gather if layout.mode == "data" else one_host
    dataset = gather_episodes(dataset, gather)
    normalizer = fit_normalizer(dataset, gather)
    info = RunInfo.describe(
        config,
        dataset,
        total,
        dataset.fingerprint(gather),
        references,
        _SEED.value,
        _NUM_SEEDS.value,
    )
    with multihost.agreed_errors():
        data = preprocess(dataset, normalizer, config.reward_transform)
        trainer = Trainer(config, data, info.seeds, layout, total)
        earlier = RunInfo.load(workdir)
        if earlier is not None:
            info.check_same(earlier, workdir)
    run = _Run(workdir, info, normalizer, trainer)
    try:
        with multihost.agreed_errors():
            state = run.restore()
        if run.is_first:
            devices = f"{len(layout.devices)} devices, {hosts.count()} hosts"
            print(f"memory of each device: {memory}; {devices}", flush=True)
        state = trainer.run(state, run)
        rollouts = run.evaluate_final(state)
    except NonFiniteLossError as error:
        run.say(f"failed: {error}; the last checkpoint is kept")
        return cli.EXIT_FAILED
    except StoppedError:
        run.say(f"stopped by SIGTERM, saved in {workdir}")
        return cli.EXIT_TERMINATED
    finally:
        run.close()
    if not run.is_first:
        return 0
    summary = evaluation.summarize(info, rollouts)
    line = {
        "dataset": info.dataset,
        "algorithm": config.algorithm,
        "seeds": info.num_seeds,
        "steps": sum(config.phase_steps.values()),
        "dataset_return": info.dataset_return,
        **summary,
        "seconds": round(time.perf_counter() - start, 1),
        "workdir": str(workdir),
    }
    write_json(workdir / RESULT_FILE, line)
    evaluation.print_report(info, summary, line)
    return 0


def _read_config() -> QIPOConfig:
    path = flags.FLAGS["config"].config_filename
    problem = cli.preset_problem(path)
    if problem is not None:
        raise ValueError(f"--config={path}: {problem}")
    config = _CONFIG.value
    if not isinstance(config, QIPOConfig):
        raise ValueError(
            f"--config={path}: get_config() must return a QIPOConfig; got {type(config).__name__}"
        )
    return config.validate()


def _default_workdir(config: QIPOConfig, dataset: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", dataset).strip("-.")
    seeds = f"seed{_SEED.value}" + (f"x{_NUM_SEEDS.value}" if _NUM_SEEDS.value > 1 else "")
    return f"runs/{config.algorithm}-{name}-{seeds}"


class _Run:
    """The hooks of one training run: files, progress bars, evaluation, signals.

    Of several hosts, the first writes and speaks; checkpoints and evaluation are everyone's work.
    """

    def __init__(
        self, workdir: epath.Path, info: RunInfo, normalizer: Normalizer, trainer: Trainer
    ):
        self.is_first = hosts.index() == 0
        self._workdir = workdir
        self._info = info
        self._normalizer = normalizer
        self._trainer = trainer
        self._bar: tqdm | None = None
        self._table: tqdm | None = None
        self._stop = multihost.StopSignal()
        self._checkpointer: Checkpointer | None = None
        self._metrics: MetricsWriter | None = None
        self._renewal: dict[str, np.ndarray] = {}

    def say(self, text: str) -> None:
        """One line for the user."""
        if self.is_first:
            tqdm.write(f"launch.train: {text}", file=sys.stderr)

    def restore(self) -> State:
        """The newest readable checkpoint, or a fresh state; the work directory is made."""
        state = self._trainer.init_state()
        self._checkpointer = Checkpointer(self._workdir / CHECKPOINTS_FOLDER, report=self.say)
        found = self._checkpointer.restore(self._saved(state), discard=True)
        if self.is_first:
            self._info.save(self._workdir)
            self._metrics = MetricsWriter(
                self._workdir, resume_from=None if found is None else found[0]
            )
        # Also a barrier: the others read config.json after the first host has written it.
        steps = [int(step) for step in hosts.gather(np.asarray(-1 if found is None else found[0]))]
        if len(set(steps)) > 1 or RunInfo.load(self._workdir) != self._info:
            raise ValueError(
                f"workdir {self._workdir}: holds another run than this host's; "
                "all hosts need the same flags and one shared folder"
            )
        if found is None:
            return state
        step, tree = found
        self.say(f"continuing {self._workdir} from step {step}")
        return tree["state"]

    def _saved(self, state: State) -> dict[str, Any]:
        return {"state": state, "normalizer": self._normalizer}

    def on_phase(self, phase: str, done: int, total: int) -> None:
        self._close_bars()
        self._bar = self._new_bar(
            total=total, initial=done, desc=f"{phase:<8}", unit="step", leave=True
        )

    def _new_bar(self, **options: Any) -> tqdm:
        return tqdm(disable=None if self.is_first else True, **options)

    def on_table(self, name: str, done: int, total: int) -> None:
        if self._table is None:
            self._table = self._new_bar(total=total, desc=f"  {name}", unit="state", leave=False)
        self._table.update(done - self._table.n)
        if done == total:
            self._table.close()
            self._table = None

    def on_renewal(self, step: int, summary: dict[str, np.ndarray]) -> None:
        self._renewal = summary
        low = float(summary["ess"].min()) if "ess" in summary else np.inf
        if low < _LEAST_ESS:
            self.say(
                f"warning: at policy step {step} the mean effective sample size of the support "
                "weights is "
                f"{low:.2f} of {self._info.config.support_size + 1} actions; a smaller beta would "
                "help"
            )

    def on_metrics(self, phase: str, step: int, values: dict[str, np.ndarray]) -> None:
        if not self.is_first:
            return
        if phase == "policy":
            values = {**self._renewal, **values}
        self._metrics.write(self._total(phase, step), phase, step, values)
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix(loss=f"{float(values['loss'].mean()):.3g}", refresh=False)

    def _total(self, phase: str, step: int) -> int:
        """Steps of all phases when ``phase`` is at ``step``."""
        earlier = PHASES[: PHASES.index(phase)]
        return step + sum(self._info.config.phase_steps[name] for name in earlier)

    def on_evaluate(self, step: int, acting: Acting) -> None:
        self._evaluate("policy", self._total("policy", step), acting)

    def _evaluate(self, name: str, total_step: int, acting: Acting) -> Rollouts:
        """Plays this host's share of the episodes; the result is that of all hosts."""
        seeds = evaluation.episode_seeds(self._info.config.eval_episodes)
        share = [part.tolist() for part in np.array_split(seeds, hosts.count())][hosts.index()]
        rollouts = Rollouts(
            np.zeros((self._info.num_seeds, 0)), np.zeros((self._info.num_seeds, 0), np.int64)
        )
        if share:
            rollouts = evaluate(
                self._trainer.act_fn(name, acting, self._normalizer, share),
                self._info.env_spec,
                num_policies=self._info.num_seeds,
                episode_seeds=share,
                progress=self._check_stop,
            )
        rollouts = Rollouts(*(np.concatenate(hosts.gather(part.T)).T for part in rollouts))
        if self.is_first:
            write_returns(self._workdir, return_rows(total_step, name, *rollouts, seeds))
        return rollouts

    def _check_stop(self, *_: int) -> None:
        if self._stop.received_alone():
            raise StoppedError

    def on_checkpoint(self, state: State) -> None:
        step = sum(int(getattr(state, phase).step[0]) for phase in PHASES)
        self._checkpointer.save(step, self._saved(state))

    def stop_requested(self) -> bool:
        return self._stop.requested()

    def evaluate_final(self, state: State) -> dict[str, Rollouts]:
        """Returns of behavior model and policy on the same episodes; draws the learning curve."""
        config = self._info.config
        rollouts = {
            name: self._evaluate(name, self._total(name, config.phase_steps[name]), state.acting())
            for name in ("behavior", "policy")
        }
        if self.is_first:
            plot_learning_curve(
                self._workdir / METRICS_FILE,
                self._workdir / RETURNS_FILE,
                self._workdir / "learning_curve.png",
                dataset_return=self._info.dataset_return,
                title=f"{config.algorithm} on {self._info.dataset}",
            )
        return rollouts

    def _close_bars(self) -> None:
        for bar in (self._table, self._bar):
            if bar is not None:
                bar.close()
        self._table = self._bar = None

    def close(self) -> None:
        """Finish what runs in the background."""
        self._close_bars()
        if self._metrics is not None:
            self._metrics.close()
        if self._checkpointer is not None:
            self._checkpointer.close()


if __name__ == "__main__":
    cli.run(main, {"config": str(_DEFAULT_PRESET)})
