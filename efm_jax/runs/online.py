"""From offline to online: what a policy plays joins its data, and training goes on with both.

Training on batches that grow by what the policy of the last one played, as in Matsushima et al.
2020 (arXiv 2006.03647); between two batches a policy is not changed.
"""

import contextlib
import io
from typing import Any

import gymnasium
import numpy as np
from etils import epath

from efm_jax.data.dataset import Dataset
from efm_jax.data.rows import read_npz
from efm_jax.envs import environments, specs
from efm_jax.envs.flatten import flatten_observation
from efm_jax.envs.play import batched, play
from efm_jax.errors import DataError
from efm_jax.files import write_whole
from efm_jax.runs.loading import Policy, restore
from efm_jax.types import Transitions

PLAYED_FILE = "played.npz"
_FIELDS = ("observations", "actions", "rewards", "terminated", "truncated", "next_observations")


class _Recorder(gymnasium.Wrapper):
    """Keeps every step."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.steps: list[tuple] = []
        self._state: Any = None

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**options)
        self._state = flatten_observation(self.observation_space, observation, 0)
        return observation, info

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        following = flatten_observation(self.observation_space, observation, 0)
        self.steps.append((self._state, action, reward, terminated, truncated, following))
        self._state = following
        return observation, reward, terminated, truncated, info


def grown(
    dataset: Dataset, source: epath.Path, workdir: epath.Path, num_steps: int, seed: int
) -> Dataset:
    """A dataset with what the policy of a run plays; played once, then read from ``workdir``.

    Args:
      dataset: that the run has trained on, with the environment to play in.
      source: the run's work directory; actions are single samples, so that they explore.
      workdir: gets ``PLAYED_FILE``.
      num_steps: at least so many; the last episode is finished.
      seed: of starts and actions.

    Raises:
      ValueError: an environment that cannot be made, or no trained policy.
      OSError: the folder cannot be written.
    """
    file = workdir / PLAYED_FILE
    if not file.exists():
        spec = dataset.own_env or specs.stated(dataset.name, dataset.env_spec or "")
        policy: Any = Policy(restore(source, print, action_selection="sample"))
        with contextlib.closing(_Recorder(environments.make(spec))) as env:
            begin, episode = batched(env, policy, seed), 0
            while len(env.steps) < num_steps:
                start = np.random.default_rng([seed, episode]).integers(2**31)
                play(env, int(start), begin(episode))
                episode += 1
            of = zip(_FIELDS, zip(*env.steps, strict=True), strict=True)
            steps: Any = {name: np.asarray(column) for name, column in of}
        np.savez(buffer := io.BytesIO(), **steps)
        write_whole(file, buffer.getvalue())
    columns: Any = read_npz(str(file), _FIELDS)
    if len(columns) < len(_FIELDS):
        raise DataError(f"{file}: expected {', '.join(_FIELDS)}; got {', '.join(columns)}")
    columns |= {"action_low": dataset.action_low, "action_high": dataset.action_high}
    played = Dataset.from_arrays(**columns, name=str(file))
    joined = {
        name: np.concatenate([getattr(dataset, name), getattr(played, name)])
        for name in ("episode_returns", "episode_lengths")
    }
    pairs = zip(dataset.transitions, played.transitions, strict=True)
    return dataset._replace(transitions=Transitions(*map(np.concatenate, pairs)), **joined)
