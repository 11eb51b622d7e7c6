"""Shared parts of studies of offline RL: a folder of results, presets, trained stages, evaluation.

A study runs methods, each a configuration with a name, on datasets.  Behavior models and critics
are trained once for all methods that may share them, and kept under ``stages/``; what is finished
in returns.csv is not computed again.
"""

import argparse
import dataclasses
import importlib
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from gymnasium.envs.registration import EnvSpec

from efm_jax.data import BUILTIN_DATASET, fit_normalizer, load_dataset, preprocess
from efm_jax.data.dataset import Dataset
from efm_jax.envs import dataset_references, evaluate, score, specs
from efm_jax.rl.agents import AgentParams, State, player
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.trainer import Hooks, Trainer
from efm_jax.runs.evaluation import episode_seeds
from efm_jax.types import Normalizer, Transitions
from experiments import results

# Beginning of an environment's id -> preset.
FAMILIES = {"Pendulum": "qipo_ot", "PointMaze": "pointmaze"}
FAMILIES |= dict.fromkeys(("Hopper", "HalfCheetah", "Walker2d", "Ant-"), "mujoco")
SMOKE = {"hidden_dims": (16,), "critic_hidden_dims": (16,), "batch_size": 32, "support_size": 2}
SMOKE |= {"behavior_steps": 50, "critic_steps": 50, "policy_steps": 50, "renew_every": 25}
SMOKE |= {"log_every": 25, "checkpoint_every": 50, "eval_every": 25, "eval_episodes": 2}
SMOKE |= {"sample_steps": 2, "num_critics": 2, "num_candidates": 2}
FIELDS = ["dataset", "method", "seed", "step", "final", "episode_seed", "return", "length", "score"]
FIELDS += ["seconds"]


def make_parser(description: str, out: str) -> argparse.ArgumentParser:
    """Make a parser with the flags that all studies have."""
    parser = results.make_parser(description)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(out))
    parser.add_argument("--stages", type=pathlib.Path, help="trained behavior models and critics")
    parser.add_argument("--smoke", action="store_true", help="every part, in a minute or two")
    parser.add_argument("--report", action="store_true", help="only make tables and figures")
    return parser


def parse_datasets(text: str) -> dict[str, str]:
    """Parse ``name=ID_OR_FILE,...``; a bare ``pendulum`` is the built-in dataset."""
    pairs = (part.partition("=") for part in text.split(","))
    known = {"pendulum": BUILTIN_DATASET}
    return {name: source or known.get(name, name) for name, _, source in pairs}


def total_beta(config: QIPOConfig) -> float:
    """Sum QIPO's guidance scale up to its last renewal: (l + 1) beta."""
    return config.beta * -(-config.policy_steps // config.renew_every)


def preset(env_id: str) -> QIPOConfig:
    """Find the preset of an environment's family."""
    for start, name in FAMILIES.items():
        if env_id.startswith(start):
            return importlib.import_module(f"experiments.configs.{name}").get_config()
    raise ValueError(f"no family has the environment {env_id}; known: {', '.join(FAMILIES)}")


class Problem(NamedTuple):
    """Data to train on, and the configuration that methods change."""

    name: str  # in results and files
    config: QIPOConfig
    data: Transitions  # preprocessed
    # What policies are played with; None where they are not.
    dataset: Dataset | None = None
    normalizer: Normalizer | None = None


@dataclasses.dataclass
class Study:
    """One folder of results: returns.csv, and renewals.csv with what renewals and guard log."""

    out: pathlib.Path
    num_seeds: int  # training seeds, all in one program
    changes: dict[str, Any]  # fields changed in every preset
    # Trained behavior models and critics; studies of the same presets and seeds may share them.
    stages: pathlib.Path | None = None

    def __post_init__(self) -> None:
        self.stages = self.stages or self.out / "stages"
        self.out.mkdir(parents=True, exist_ok=True)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Study":
        return cls(args.out, args.seeds, SMOKE if args.smoke else {}, args.stages)

    def load(self, name: str, source: str) -> Problem:
        """Read a dataset, with the preset of its environment's family and this study's changes.

        Raises:
          ValueError: for a dataset that cannot be read, or of an environment without a preset.
        """
        dataset = load_dataset(source)
        config = dataclasses.replace(preset(EnvSpec.from_json(dataset.env_spec).id), **self.changes)
        normalizer = fit_normalizer(dataset)
        data = preprocess(dataset, normalizer, config.reward_transform)
        return Problem(name, config, data, dataset, normalizer)

    def rows(self) -> pd.DataFrame:
        return results.read_rows(self.out / "returns.csv", FIELDS)

    def trainer(self, config: QIPOConfig, problem: Problem) -> Trainer:
        return Trainer(config, problem.data, range(self.num_seeds))

    def run(
        self,
        problem: Problem,
        method: str,
        config: QIPOConfig,
        stages: QIPOConfig | None = None,
        part: str = "",
    ) -> None:
        """Train and evaluate one method, unless it is finished.

        ``stages`` and ``part`` are those of :meth:`trained`, by default of ``config``.
        """
        done = self.rows().query("final == 1 and dataset == @problem.name and method == @method")
        if done.empty:
            trainer = self.trainer(config, problem)
            hooks = Evaluation(self.out, problem, method, trainer)
            stages = self.trained(problem, stages or config, hooks, part)
            params = self.improve(trainer, stages, hooks)
            hooks.on_evaluate(trainer.agent.phase_steps["policy"], params, final=True)

    def improve(self, trainer: Trainer, stages: State, hooks: Hooks) -> AgentParams:
        """Train the policy on the behavior model and critic of :meth:`trained`."""
        state = trainer.init_state().replace(behavior=stages.behavior, critic=stages.critic)
        return trainer.run(state, hooks).params()

    def trained(
        self,
        problem: Problem,
        config: QIPOConfig,
        hooks: Hooks,
        part: str = "",
        after: str | None = None,
    ) -> State:
        """Train behavior model and critic, or read them where they are in the folder.

        ``part`` names a critic that is trained for other than the usual steps, ``after`` the part
        that this one continues, if it is there.  Of the state only these two are to be used.
        """
        # Without a policy phase a run ends when both are trained.
        config = dataclasses.replace(config, policy="bc", action_selection="sample")
        trainer = self.trainer(config, problem)
        like = jax.eval_shape(trainer.init_state)  # the structure: what is read needs no program
        critic = f"{problem.name}-{config.critic}"
        if trainer.agent.critic.uses_next_actions:
            critic += f"-{config.path}"
        stems = {"behavior": f"{problem.name}-{config.path}", "critic": critic + part}
        files = {phase: self._file(stem) for phase, stem in stems.items()}
        sources = {phase: file for phase, file in files.items() if file.exists()}
        missing = files.keys() - sources.keys()
        if after is not None and self._file(critic + after).exists():
            sources.setdefault("critic", self._file(critic + after))
        found = {phase: _load(file, getattr(like, phase)) for phase, file in sources.items()}
        if not missing:
            return like.replace(**found)
        state = trainer.run(trainer.init_state().replace(**found), hooks)
        for phase in missing:
            results.write_arrays(files[phase], jax.tree.leaves(getattr(state, phase)))
        return state

    def _file(self, stem: str) -> pathlib.Path:
        return self.stages / f"{stem}-x{self.num_seeds}.npz"


def _load(file: pathlib.Path, like: Any) -> Any:
    """Read the leaves of a pytree of the structure of ``like``."""
    leaves = list(results.read_arrays(file).values())
    found, expected = ([(a.shape, a.dtype) for a in s] for s in (leaves, jax.tree.leaves(like)))
    if found != expected:
        raise ValueError(f"{file}: was trained with another configuration; choose another folder")
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


class Progress(Hooks):
    """One line for each phase of one method on one dataset."""

    def __init__(self, dataset: str, method: str):
        self.dataset, self.method = dataset, method

    def say(self, text: str) -> None:
        print(f"{self.dataset:<12} {self.method:<14} {text}", flush=True)

    def on_phase(self, phase: str, done: int, total: int) -> None:
        self.say(f"{phase}: {total - done} steps")


class Evaluation(Progress):
    """Returns and what renewals log, of one method on one dataset, in the files of a study."""

    def __init__(self, out: pathlib.Path, problem: Problem, method: str, trainer: Trainer):
        super().__init__(problem.name, method)
        self._out, self._trainer, self._problem = out, trainer, problem
        dataset = problem.dataset
        references = dataset.reference_scores, dataset.name, dataset.env_spec
        self._references = dataset_references(*references)
        if self._references is None:
            self.say(f"{dataset.name} has no reference scores: scores are raw returns")
        self._episodes = episode_seeds(trainer.config.eval_episodes)
        self._started = time.perf_counter()

    def on_evaluate(self, step: int, params: AgentParams, final: bool = False) -> None:
        agent, keys, episodes = self._trainer.agent, self._trainer.keys, self._episodes
        act = player(agent, "policy", params, self._problem.normalizer, keys, episodes)
        how = {"num_policies": len(keys), "episode_seeds": episodes}
        returns, lengths, successes = evaluate(act, self._problem.dataset.env_spec, **how)
        env_id = specs.id_of(self._problem.dataset.env_spec) or ""
        pairs = zip(returns.ravel(), successes.ravel(), strict=True)
        found = [score(*pair, self._references, env_id) for pair in pairs]
        scores = returns if None in found else np.reshape(found, returns.shape)
        seconds = round(time.perf_counter() - self._started, 1)
        columns = {"dataset": self.dataset, "method": self.method}
        columns |= {"seed": np.repeat(range(len(keys)), len(episodes)), "step": step}
        columns |= {"final": int(final), "episode_seed": np.tile(episodes, len(keys))}
        columns |= {"return": returns.ravel(), "length": lengths.ravel(), "score": scores.ravel()}
        columns |= {"success": successes.ravel()}
        rows = pd.DataFrame(columns | {"seconds": seconds})
        results.append_rows(self._out / "returns.csv", rows)
        means = " ".join(f"{mean:.1f}" for mean in scores.mean(axis=1))
        self.say(f"step {step}{' (last)' if final else ''}: scores {means}, {seconds} s")

    def on_renewal(self, step: int, summary: dict[str, np.ndarray]) -> None:
        self._log(f"table at {step}", step, summary)

    def on_guard(self, step: int, summary: dict[str, np.ndarray]) -> None:
        self._log(f"guard at {step}", step, summary)

    def _log(self, title: str, step: int, summary: dict[str, np.ndarray]) -> None:
        means = ", ".join(f"{name} {values.mean():.4g}" for name, values in summary.items())
        self.say(f"{title}: {means}")
        rows = pd.DataFrame(summary, dtype=float).rename_axis("seed").reset_index()
        rows = rows.melt("seed", var_name="name")
        rows = rows.assign(dataset=self.dataset, method=self.method, step=step)
        rows = rows[[*FIELDS[:4], "name", "value"]]
        results.append_rows(self._out / "renewals.csv", rows)
