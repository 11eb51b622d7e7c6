"""Train QIPO offline and evaluate it: python -m launch.train [--flags]

Without flags it records a Pendulum-v1 dataset (once), trains the behaviour model, the critic and the
improved policy, evaluates both policies on the same episodes, and prints a table and a line of JSON.

  --dataset=ID_OR_FILE  the built-in dataset, a Minari id (local or downloaded), or a D4RL .hdf5 file
  --config=FILE.py      a preset, such as experiments/configs/qipo_diff.py
  --config.FIELD=VALUE  any field of efm_jax/rl/config.py, such as --config.beta=5

The work directory gets config.json, metrics.csv, returns.csv, checkpoints/, tensorboard/ and
learning_curve.png.  The same command again continues where the run stopped.
Exit status: 0 done, 1 failed (a loss that is not finite), 2 bad flags, data or checkpoint, 143 stopped
by SIGTERM and saved.
"""

import re
import signal
import sys
import time
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from ml_collections import config_flags
from tqdm import tqdm

from efm_jax.data import BUILTIN_DATASET, fit_normalizer, load_dataset, preprocess
from efm_jax.evaluation import Rollouts, evaluate, reference_scores
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.qipo import PHASES, QIPOState
from efm_jax.rl.trainer import StoppedError, Trainer
from efm_jax.training.checkpoint import Checkpointer
from efm_jax.training.loop import NonFiniteLossError
from efm_jax.training.metrics import METRICS_FILE, RETURNS_FILE, MetricsWriter, return_rows, write_returns
from efm_jax.training.plots import plot_learning_curve
from efm_jax.types import Normalizer, Params
from launch import cli, evaluation
from launch.workdir import CHECKPOINTS, RunInfo, resolve

_DEFAULT_PRESET = cli.ROOT / "experiments" / "configs" / "qipo_ot.py"
# A random key keeps 32 bits of its seed: a larger one would repeat the run of a smaller one.
_MAX_SEED = 2**32 - 1
# Under this many effective actions a state's target is all but one action: beta is too large to trust.
_LEAST_ESS = 1.5

_DATASET = flags.DEFINE_string("dataset", BUILTIN_DATASET, "Built-in dataset, Minari id or D4RL .hdf5 file.")
_ENV = flags.DEFINE_string("env", None, "Gymnasium id to evaluate in, instead of the one the dataset names.")
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    f"Preset, a .py file, here or where launch is installed; by default {_DEFAULT_PRESET.name}.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go; by default runs/ALGORITHM-DATASET-SEED.")
_SEED = flags.DEFINE_integer("seed", 0, "Root seed of the first training run.", 0, _MAX_SEED)
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 1, "Training runs, with consecutive seeds, in one program.", 1)


def main(_: list[str]) -> int:
    """Train to the end, evaluate, report."""
    start = time.perf_counter()
    with cli.usage_errors():
        config = _read_config()
        last = _SEED.value + _NUM_SEEDS.value - 1
        if last > _MAX_SEED:
            raise ValueError(f"--seed, --num_seeds: the last seed may be at most {_MAX_SEED}; got {last}")
        dataset = load_dataset(_DATASET.value, env=_ENV.value)
        if dataset.env_spec is None:
            raise ValueError(f"dataset {dataset.name}: names no environment to evaluate in; give --env=ID")
        evaluation.check_environment(dataset.env_spec, dataset.observation_size, dataset.action_size)
        references = dataset.reference_scores or reference_scores(evaluation.env_id(dataset.env_spec))
        info = RunInfo.describe(config, dataset, references, _SEED.value, _NUM_SEEDS.value)
        normalizer = fit_normalizer(dataset)
        data = preprocess(dataset, normalizer, config.reward_transform)
        trainer = Trainer(config, data, info.seeds)
        workdir = resolve(_WORKDIR.value or _default_workdir(info))
        earlier = RunInfo.load(workdir)
        if earlier is not None:
            info.check_same(earlier, workdir)
    run = _Run(workdir, info, normalizer, trainer)
    try:
        with cli.usage_errors():
            state = run.restore()
            info.save(workdir)
        state = trainer.run(state, run)
        rollouts = run.evaluate_final(state)
    except NonFiniteLossError as error:
        print(f"launch.train: failed: {error}; the last checkpoint is kept", file=sys.stderr)
        return cli.EXIT_FAILED
    except StoppedError:
        print(f"launch.train: stopped by SIGTERM, saved in {workdir}", file=sys.stderr)
        return cli.EXIT_TERMINATED
    finally:
        run.close()
    summary = evaluation.summarize(info, rollouts)
    line = {
        "dataset": info.dataset,
        "algorithm": config.algorithm,
        "seeds": info.num_seeds,
        "steps": sum(getattr(config, f"{phase}_steps") for phase in PHASES),
        "dataset_return": info.dataset_return,
        **summary,
        "seconds": round(time.perf_counter() - start, 1),
        "workdir": str(workdir),
    }
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


def _default_workdir(info: RunInfo) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", info.dataset).strip("-.")
    seeds = f"seed{info.seed}" + (f"x{info.num_seeds}" if info.num_seeds > 1 else "")
    return f"runs/{info.config.algorithm}-{name}-{seeds}"


class _Run:
    """The hooks of one training run: files, progress bars, evaluation, signals."""

    def __init__(self, workdir: epath.Path, info: RunInfo, normalizer: Normalizer, trainer: Trainer):
        self._workdir = workdir
        self._info = info
        self._normalizer = normalizer
        self._trainer = trainer
        self._bar: tqdm | None = None
        self._table: tqdm | None = None
        self._stop = False
        self._checkpointer: Checkpointer | None = None
        self._metrics: MetricsWriter | None = None
        self._renewal: dict[str, np.ndarray] = {}
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: Any) -> None:
        self._stop = True

    def restore(self) -> QIPOState:
        """The newest readable checkpoint, or a fresh state."""
        state = self._trainer.init_state()
        self._checkpointer = Checkpointer(self._workdir / CHECKPOINTS, report=_say)
        found = self._checkpointer.restore(self._saved(state), discard=True)
        self._metrics = MetricsWriter(self._workdir, resume_from=None if found is None else found[0])
        if found is None:
            return state
        step, tree = found
        _say(f"continuing {self._workdir} from step {step}")
        return tree["state"]

    def _saved(self, state: QIPOState) -> dict[str, Any]:
        return {"state": state, "normalizer": self._normalizer}

    def on_phase(self, phase: str, done: int, total: int) -> None:
        self._close_bars()
        self._bar = tqdm(total=total, initial=done, desc=f"{phase:<8}", unit="step", disable=None, leave=True)

    def on_table(self, name: str, done: int, total: int) -> None:
        if self._table is None:
            self._table = tqdm(total=total, desc=f"  {name}", unit="state", disable=None, leave=False)
        self._table.update(done - self._table.n)
        if done == total:
            self._table.close()
            self._table = None

    def on_renewal(self, step: int, summary: dict[str, np.ndarray]) -> None:
        self._renewal = summary
        low = float(summary["ess"].min())
        if low < _LEAST_ESS:
            _say(
                f"warning: at policy step {step} the mean effective sample size of the support weights is "
                f"{low:.2f} of {self._info.config.support_size + 1} actions; a smaller beta would help"
            )

    def on_metrics(self, phase: str, step: int, values: dict[str, np.ndarray]) -> None:
        if phase == "policy":
            values = {**self._renewal, **values}
        self._metrics.write(self._total(phase, step), phase, step, values)
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix(loss=f"{float(values['loss'].mean()):.3g}", refresh=False)

    def _total(self, phase: str, step: int) -> int:
        """Steps of all phases when ``phase`` is at ``step``."""
        earlier = PHASES[: PHASES.index(phase)]
        return step + sum(getattr(self._info.config, f"{name}_steps") for name in earlier)

    def on_evaluate(self, step: int, params: Params) -> None:
        self._evaluate("policy", self._total("policy", step), params)

    def _evaluate(self, name: str, total_step: int, params: Params) -> Rollouts:
        seeds = evaluation.episode_seeds(self._info.config.eval_episodes)
        act = self._trainer.act_fn(params, self._normalizer, seeds)
        rollouts = evaluate(act, self._info.env_spec, num_policies=self._info.num_seeds, episode_seeds=seeds)
        write_returns(self._workdir, return_rows(total_step, name, *rollouts, seeds))
        return rollouts

    def on_checkpoint(self, state: QIPOState) -> None:
        step = sum(int(getattr(state, phase).step[0]) for phase in PHASES)
        self._checkpointer.save(step, self._saved(state))

    def stop_requested(self) -> bool:
        return self._stop

    def evaluate_final(self, state: QIPOState) -> dict[str, Rollouts]:
        """Returns of behaviour model and policy on the same episodes; draws the learning curve."""
        config = self._info.config
        rollouts = {
            name: self._evaluate(name, self._total(name, steps), getattr(state, name).average)
            for name, steps in (("behavior", config.behavior_steps), ("policy", config.policy_steps))
        }
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


def _say(text: str) -> None:
    tqdm.write(f"launch.train: {text}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, {"config": str(_DEFAULT_PRESET)})
