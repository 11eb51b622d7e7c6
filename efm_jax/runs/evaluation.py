"""Evaluation of a run: the same episodes for all of its seeds and for every policy."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from gymnasium.envs.registration import EnvSpec

from efm_jax.envs import (
    EvaluationError,
    Rollouts,
    environments,
    evaluate,
    mean_and_interval,
    score,
    specs,
)
from efm_jax.envs.rollout import bounded_spec, make_quietly
from efm_jax.rl.agents import Agent, AgentParams, player
from efm_jax.rl.agents.agent import POLICIES
from efm_jax.runs.reader import EVALUATION_COLUMNS
from efm_jax.runs.workdir import RunInfo
from efm_jax.training import hosts
from efm_jax.types import Normalizer

# Far from the seeds that recordings use.
_FIRST_EPISODE_SEED = 1_000_000


def episode_seeds(count: int) -> list[int]:
    """List environment seeds of evaluation episodes; a longer list begins with a shorter one."""
    return list(range(_FIRST_EPISODE_SEED, _FIRST_EPISODE_SEED + count))


def check_environment(
    env: EnvSpec | str,
    observation_size: int,
    action_size: int,
    bounds: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    """Play one step, so that what is missing shows before hours of training.

    Args:
      env: a Gymnasium ``EnvSpec``, also as JSON.
      observation_size, action_size: of the data.
      bounds: the lowest and highest actions ``[A]`` of the data; None: not compared.

    Raises:
      ValueError: if the environment cannot be made, has no limit of steps, or does not fit the
        data.
    """
    played, _ = bounded_spec(env)

    def make(spec: EnvSpec) -> gymnasium.Env:
        env = make_quietly(spec)
        if bounds is not None:
            environments.check_bounds("data", spec, env.action_space, *bounds)
        return env

    def act(observations: np.ndarray, _: int) -> np.ndarray:
        if observations.shape[-1] != observation_size:
            raise ValueError(
                f"environment {played.id}: expected observations of size "
                f"{observation_size}, as in the dataset; got {observations.shape[-1]}"
            )
        return np.zeros((1, 1, action_size), np.float32)

    evaluate(act, played, episode_seeds=[0], max_steps=1, make=make)


def horizon(env: EnvSpec | str) -> str:
    """Say in one line where episodes are played, and how long."""
    spec, limit = bounded_spec(env)
    return f"episodes are evaluated in {spec.id}, of at most {limit} steps"


class Evaluator:
    """Plays a run's policies, those of all training seeds together.

    Args:
      info: what the run is.
      agent: whose behavior model and policy act.
      normalizer: statistics of the training data.
      env: where it plays, instead of what ``info`` says; see ``Dataset.own_env``.
    """

    def __init__(
        self, info: RunInfo, agent: Agent, normalizer: Normalizer, env: EnvSpec | None = None
    ):
        self._info, self._agent, self._normalizer = info, agent, normalizer
        self._env = env or info.environment()
        self._keys = jnp.stack([jax.random.key(seed) for seed in info.seeds])

    def act(
        self, name: str, params: AgentParams, episodes: Sequence[int], seeds: slice = slice(None)
    ) -> Callable[[np.ndarray, int], np.ndarray]:
        """Bind parameters to a policy, as :func:`efm_jax.envs.evaluate` wants it.

        Args:
          name: "policy" or "behavior".
          params: what acts, with a leading seed axis.
          episodes: environment seeds of the episodes; they also seed the actions' noise.
          seeds: which of the run's training seeds act, by default all.
        """
        keys, params = jax.tree.map(lambda leaf: leaf[seeds], (self._keys, params))
        return player(self._agent, name, params, self._normalizer, keys, episodes)

    def play(
        self,
        name: str,
        params: AgentParams,
        episodes: Sequence[int],
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollouts:
        """Play episodes with all seeds; each host plays a share of them and gets all.

        Args:
          name, params, episodes: as for :meth:`act`; on several hosts the same on all of them.
          progress: as for :func:`efm_jax.envs.evaluate`.

        Raises:
          EvaluationError: it came to no number; on several hosts on all of them.
        """
        self.check_finite(name, params)
        share = np.array_split(episodes, hosts.count())[hosts.index()].tolist()
        count = self._info.num_seeds
        rollouts = Rollouts(*(np.zeros((count, 0), kind) for kind in (float, np.int64, float)))
        problem: EvaluationError | None = None
        try:
            if share:
                rollouts = evaluate(
                    self.act(name, params, share),
                    self._env,
                    num_policies=count,
                    episode_seeds=share,
                    progress=progress,
                )
        except EvaluationError as error:
            problem = error
        failed = hosts.hosts_where(problem is not None)
        if failed:
            raise problem or EvaluationError(f"host {failed[0]} could not; its own output says why")
        return Rollouts(*(np.concatenate(hosts.gather(part.T)).T for part in rollouts))

    def record(
        self,
        evaluation: str,
        started_by: str,
        name: str,
        total_step: int,
        episodes: Sequence[int],
        problem: EvaluationError | None = None,
    ) -> dict[str, Any]:
        """Write down what was played: a row of ``EVALUATION_COLUMNS``.

        Args:
          evaluation: its name in the work directory.
          started_by: of ``STARTED_BY``.
          name: of the policy.
          total_step: of the checkpoint.
          episodes: environment seeds of the episodes.
          problem: why it failed, if it did.
        """
        model, config = self._agent.acting_model, self._agent.config
        # As Agent.act has it: the behavior model plays one sample.
        rule = config.action_selection if name == "policy" else "sample"
        candidates = 1 if rule == "sample" else config.num_candidates
        spec, limit = bounded_spec(self._env)
        how = spec.id, limit, model.solver, model.sample_steps, rule, candidates
        what = evaluation, started_by, name, total_step, *how, len(episodes), episodes[0]
        status = ("done", "") if problem is None else ("failed", str(problem))
        return dict(zip(EVALUATION_COLUMNS, (*what, *status), strict=True))

    def check_finite(self, name: str, params: AgentParams) -> None:
        """Refuse parameters that are not finite, which no loss need have shown."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(params._asdict()[name]):
            axes = tuple(range(1, np.ndim(leaf)))
            bad = np.flatnonzero(~np.isfinite(np.asarray(leaf)).all(axis=axes))
            if len(bad):
                raise EvaluationError(
                    f"{name}: parameters {jax.tree_util.keystr(path)} of training seed "
                    f"{self._info.seeds[bad[0]]} are not finite"
                )


def result_line(
    info: RunInfo,
    workdir: epath.Path,
    step: int,
    rollouts: Mapping[str, Rollouts],
    evaluations: Mapping[str, str],
    seconds: float,
) -> dict[str, Any]:
    """Sum up an evaluation: the line of JSON that training and evaluation end with.

    Each policy has the mean over seeds of the mean return, its interval (over training seeds where
    there are several, otherwise over episodes; of a single episode, which has none, the mean
    twice), its score, and the share of episodes with a success; all are None of a policy that did
    not play, and the last where the environment says nothing of it.

    Args:
      info: what the run is.
      workdir: where it is.
      step: gradient steps of all phases.
      rollouts: of each of ``POLICIES``; none where the run names no environment.
      evaluations: their names in the work directory; none where they are not written.
      seconds: how long it took, with all starts of the run.
    """
    line: dict[str, Any] = {
        "dataset": info.dataset,
        "algorithm": info.algorithm,
        "seeds": info.num_seeds,
        "steps": step,
        "dataset_return": info.dataset_return,
    }
    env_id = specs.id_of(info.env_spec) or ""
    for name in POLICIES:
        mean = low = high = scored = success = None
        if name in rollouts:
            returns, share = rollouts[name].returns, float(rollouts[name].successes.mean())
            samples = returns.mean(axis=1) if info.num_seeds > 1 else returns[0]
            mean, low, high = mean_and_interval(samples)
            scored = score(mean, share, info.reference_scores, env_id)
            success = None if math.isnan(share) else share
        line |= {f"{name}_return": mean, f"{name}_interval": [low, high]}
        line |= {f"{name}_score": scored, f"{name}_success": success}
    return {
        **line,
        "evaluations": dict(evaluations),
        "seconds": round(seconds, 1),
        "workdir": str(workdir),
    }
