"""A training run from its configuration and dataset to its result: one way for every caller."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from gymnasium.envs.registration import EnvSpec

from efm_jax import checks
from efm_jax.data import REWARD_TRANSFORMS, fit_normalizer, gather_episodes, preprocess
from efm_jax.data.dataset import Dataset
from efm_jax.envs import EvaluationError, Rollouts, dataset_references
from efm_jax.rl.agents import AgentParams, State, make_agent
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.memory import Memory, check_fits, device_limit, predict
from efm_jax.rl.trainer import Hooks, Trainer
from efm_jax.runs.evaluation import (
    POLICIES,
    Evaluator,
    check_environment,
    episode_seeds,
    horizon,
    result_line,
)
from efm_jax.runs.learning_curve import LOW_ESS
from efm_jax.runs.loggers import Logger
from efm_jax.runs.workdir import RunInfo
from efm_jax.runs.writer import RunWriter
from efm_jax.training import hosts
from efm_jax.training.parallel import Layout
from efm_jax.types import Normalizer, Transitions, one_host

# A random key keeps 32 bits of its seed: a larger one would repeat the run of a smaller one.
MAX_SEED = 2**32 - 1

# ``(kind, row)``: "metrics", a row of metrics.csv; or "evaluation", a row of evaluations.csv with
# the ``returns`` and ``lengths`` ``[K, E]`` of one that is done.
Callback = Callable[[str, dict[str, Any]], None]
# Around what one of several hosts may refuse, so that the others do not wait for it.
Agreed = Callable[[], contextlib.AbstractContextManager[None]]


class Data(NamedTuple):
    """A dataset ready to train on."""

    transitions: Transitions  # normalized; this host's part
    normalizer: Normalizer
    layout: Layout
    memory: Memory
    info: RunInfo
    own_env: EnvSpec | None  # as in a dataset

    def trainer(self) -> Trainer:
        """Make the run's trainer."""
        info = self.info
        return Trainer(info.config, self.transitions, info.seeds, self.layout, info.transitions)


def check_run(config: QIPOConfig, seed: int, num_seeds: int) -> None:
    """Refuse what no dataset could mend: an unknown name, a field or a seed out of range."""
    checks.check_integer("seed", seed, 0)
    checks.check_integer("num_seeds", num_seeds, 1)
    if seed + num_seeds - 1 > MAX_SEED:
        raise ValueError(
            f"seed, num_seeds: the last seed may be at most {MAX_SEED}; got {seed + num_seeds - 1}"
        )
    make_agent(config, 1, 1)
    checks.check_choice("reward_transform", config.reward_transform, REWARD_TRANSFORMS)


def used_rows(config: QIPOConfig, count: int) -> int:
    """How many of a dataset's ``count`` transitions are trained on."""
    if config.max_transitions > count:
        raise ValueError(
            f"max_transitions: expected at most the {count} of the dataset; "
            f"got {config.max_transitions}"
        )
    return config.max_transitions or count


def prepare(
    config: QIPOConfig,
    dataset: Dataset,
    layout: Layout,
    *,
    seed: int,
    num_rows: int,
    plugins: Sequence[str] = (),
    normalizer: Normalizer | None = None,
    note: Callable[[str], None],
    agreed: Agreed = contextlib.nullcontext,
) -> Data:
    """Check a dataset against its environment and the devices' memory, and normalize it.

    Args:
      config: that :func:`check_run` has passed.
      dataset: this host's part of it; evaluated where it says, if it says so.
      layout: of the devices.
      seed: the first.
      num_rows: transitions of the whole dataset.
      plugins: modules that registered what the configuration names.
      normalizer: of the run that this one goes on from; by default fitted to the dataset.
      note: called with one line about whatever the user should know.
      agreed: on several hosts, a context in which they stop together.

    Raises:
      ValueError: an environment or a configuration that does not fit the data, or data that does
        not fit the devices.
    """
    sizes = dataset.observation_size, dataset.action_size
    with agreed():
        notes = list(dataset.notes)
        env = dataset.own_env or dataset.env_spec
        if env is not None:
            notes.append(horizon(env))
            check_environment(env, *sizes, (dataset.action_low, dataset.action_high))
        references = dataset_references(dataset.reference_scores, dataset.name, dataset.env_spec)
        memory = predict(config, layout, num_rows, *sizes)
        check_fits(memory, device_limit(layout), layout)
    # In parallel=seeds every host has read everything, and has nothing to ask the others.
    gather = hosts.gather if layout.mode == "data" else one_host
    dataset = gather_episodes(dataset, gather)
    if normalizer is None:
        normalizer = fit_normalizer(dataset, gather, notes)
    for text in notes:
        note(text)
    agent = make_agent(config, *sizes)
    info = RunInfo(
        config=config,
        plugins=list(plugins),
        algorithm=agent.name,
        phase_steps=agent.phase_steps,
        seed=seed,
        num_seeds=layout.num_seeds,
        dataset=dataset.name,
        fingerprint=dataset.fingerprint(gather),
        transitions=num_rows,
        dataset_return=float(dataset.episode_returns.mean()),
        observation_size=dataset.observation_size,
        action_size=dataset.action_size,
        env_spec=dataset.env_spec,
        reference_scores=references,
    )
    with agreed():
        transitions = preprocess(dataset, normalizer, config.reward_transform)
    return Data(transitions, normalizer, layout, memory, info, dataset.own_env)


class Session(Hooks):
    """One training run in a work directory: what it writes and evaluates beside its steps.

    Of several hosts all call every method; checkpoints and evaluation are everyone's work.

    Args:
      data: from :func:`prepare`.
      trainer: made of it.
      workdir: made and locked here; a run that is there is continued.
      say: called with one line about whatever the user should know.
      began: when this process began, of ``time.perf_counter``.
      warm: a state of another run, whose behavior model and critic this one begins with.
      extend: whether a run that is there may be of fewer steps; see :class:`.RunWriter`.
      loggers: as for :class:`.RunWriter`.
      callbacks: called with what has been written.
      agreed: as for :func:`prepare`.

    Raises:
      ValueError, OSError: as :class:`.RunWriter` does.
    """

    def __init__(
        self,
        data: Data,
        trainer: Trainer,
        workdir: epath.Path,
        say: Callable[[str], None],
        began: float,
        *,
        warm: State | None = None,
        extend: bool = False,
        loggers: Sequence[str | Logger] = (),
        callbacks: Sequence[Callback] = (),
        agreed: Agreed = contextlib.nullcontext,
    ):
        self._warm = warm
        self.info, self.trainer, self.workdir = data.info, trainer, workdir
        self.say, self._callbacks, self._agreed = say, callbacks, agreed
        with agreed():
            of = workdir, data.info, data.normalizer, say, began
            self.writer = RunWriter(*of, extend, loggers)
        self._evaluator = None
        if data.info.env_spec is not None:
            of = data.info, trainer.agent, data.normalizer, data.own_env
            self._evaluator = Evaluator(*of)
        # Of each policy, the last evaluation: what it gave and its name, or why it failed.
        self._rollouts: dict[str, Rollouts] = {}
        self._evaluations: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        """Train from where the run stopped to its end, evaluate, and write the result.

        Returns:
          The line of :func:`.result_line`.

        Raises:
          NonFiniteLossError, StoppedError: as :meth:`.Trainer.run`.
          EvaluationError: one at the end failed; everything is saved, and trying again may help.
          ValueError, OSError: what is there cannot be continued; the folder cannot be written.
        """
        state = self.trainer.run(self.start(), self)
        for name in POLICIES if self._evaluator is not None else ():
            self.evaluate(name, self.info.phase_steps[name], state.params())
        if self.failed:
            raise EvaluationError("; ".join(self.failed.values()))
        steps = sum(self.info.phase_steps.values())
        of = self.info, self.workdir, steps, self._rollouts, self._evaluations
        line = result_line(*of, self.writer.seconds)
        self.writer.finish(line)
        return line

    def close(self) -> None:
        """Wait for what is being saved, and let others write."""
        self.writer.close()

    def start(self) -> State:
        """Read the newest checkpoint, or make a fresh state."""
        with self._agreed():
            state = self.trainer.init_state()
            state = state if self._warm is None else state.begun_as(self._warm)
            found = self.writer.start(state)
        if found is not None:
            step, state = found
            self.say(f"continuing {self.workdir} from step {step}")
        return state

    def evaluate(self, name: str, step: int, params: AgentParams) -> str | None:
        """Play a policy at a step of its phase and write what it gave; None, or why it failed."""
        if self._evaluator is None:
            return None
        episodes = episode_seeds(self.info.config.eval_episodes)
        total_step = self.writer.total_step(name, step)
        evaluation, rollouts, problem = f"train-{name}-{total_step}", None, None
        self.failed.pop(name, None)
        try:
            rollouts = self._evaluator.play(name, params, episodes, self.on_play)
            self._rollouts[name], self._evaluations[name] = rollouts, evaluation
        except EvaluationError as error:
            problem = error
            self.failed[name] = f"evaluation {evaluation}: {error}"
        of = evaluation, "train", name, total_step, episodes
        record = self._evaluator.record(*of, problem)
        self.writer.evaluation(record, rollouts, episodes)
        self.tell("evaluation", record | (rollouts._asdict() if rollouts is not None else {}))
        return self.failed.get(name)

    def on_play(self, steps: int, ended: int) -> None:
        """Tell that an evaluation has played so many steps; may raise :class:`.StoppedError`."""

    def tell(self, kind: str, row: dict[str, Any]) -> None:
        """Call the callbacks; may raise :class:`.StoppedError`."""
        for callback in self._callbacks:
            callback(kind, row)

    def on_renewal(self, step: int, summary: dict[str, np.ndarray]) -> None:
        self.writer.renewal(summary)
        low = float(summary["ess"].min()) if "ess" in summary else np.inf
        if low < LOW_ESS:
            self.say(
                f"warning: at policy step {step} the mean effective sample size of the support "
                f"weights is {low:.2f} of {self.info.config.support_size + 1} actions; "
                "a smaller beta would help"
            )

    def on_guard(self, step: int, summary: dict[str, np.ndarray]) -> None:
        self.writer.guard(step, summary)
        gains, accepted = summary["guard_gain"], summary["accepted"]
        told = ", ".join(
            f"{gain:.3g} ± {error:.2g}{'' if kept else ' (back to the policy before)'}"
            for gain, error, kept in zip(gains, summary["guard_error"], accepted, strict=True)
        )
        self.say(f"policy step {step}: guard: gain in return in learned models: {told}")

    def on_metrics(self, phase: str, step: int, values: dict[str, np.ndarray]) -> None:
        for row in self.writer.metrics(phase, step, values):
            self.tell("metrics", row)

    def on_evaluate(self, step: int, params: AgentParams) -> None:
        problem = self.evaluate("policy", step, params)
        if problem is not None:
            self.say(f"failed: {problem}; training goes on")

    def on_checkpoint(self, state: State) -> None:
        self.writer.checkpoint(state)
