"""Play in an environment and record a Minari dataset, whole or not at all.

The recording is made under a temporary id in Minari's own folder and becomes the dataset by one
rename, so it is there whole or not at all; of two processes that record at once, the second to
finish finds the dataset there and removes its own recording.  A recording that was killed leaves
its temporary folder behind: it is never read, and may be deleted.
"""

import contextlib
import itertools
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import jax
import numpy as np
from tqdm import tqdm

from efm_jax import checks
from efm_jax.data import validation
from efm_jax.data.minari import local_path
from efm_jax.envs.flatten import flatten_observation
from efm_jax.errors import DataError, reason
from efm_jax.types import Array

REFERENCE_EPISODES = 100

# One observation, as the environment gives it, to an action [A] in its units; bounds are seen to
# here.
Act = Callable[[Any], np.ndarray]

# What plays an episode, given its number.
Begin = Callable[[int], Act]

# Purposes of a recording's random numbers, folded into its seed; smaller ones are the recorded
# policy's own.
_RESETS, _REFERENCE_RESETS, _RANDOM_ACTIONS, _ACTION_NOISE = 2, 3, 4, 5


class Recording(NamedTuple):
    """What was recorded."""

    returns: np.ndarray  # [E] float64, of every episode
    lengths: np.ndarray  # [E] int64
    reference_scores: tuple[float, float] | None
    published: (
        bool  # False when another process had recorded the dataset by then, which was left as it is
    )


def record(
    dataset_id: str,
    env: gymnasium.Env,
    begin: Begin,
    *,
    seed: int,
    episodes: int | None = None,
    steps: int | None = None,
    expert: Act | None = None,
    **metadata: str,
) -> Recording:
    """Record whole episodes of ``env`` as the Minari dataset ``dataset_id``, to be evaluated in
    ``env`` too.

    The same arguments give the same bytes, and more episodes begin with the same ones.  Where an
    ``expert`` is given, the metadata has reference scores: ``ref_min_score`` is the mean return of
    uniformly random actions and ``ref_max_score`` that of the expert, each over
    ``REFERENCE_EPISODES`` seeded episodes.

    Args:
      dataset_id: a Minari id, ``namespace/name-v0``.
      env: made with a spec, which has a limit on the length of an episode.  It is closed in the
        end.
      begin: given the number of an episode, what acts in it; called in order.
      seed: of the starts and of the random actions; ``begin`` has its own.
      episodes: how many to record.
      steps: or the least number of steps; the last episode is finished.
      expert: what scores 100.
      **metadata: ``algorithm_name``, ``code_permalink``, ``description``, as Minari has them.

    Raises:
      DataError: Minari's folder cannot be written, spaces that no dataset can have here, no limit
        on the length of an episode, an expert that is not better than random actions, or an action
        that is not finite or of another shape.
      ValueError: bad numbers, or not exactly one of ``episodes`` and ``steps``.
    """
    checks.check_integer("seed", seed, 0)
    if (episodes is None) == (steps is None):
        raise ValueError(f"episodes, steps: expected one of them; got {episodes} and {steps}")
    checks.check_integer(
        "episodes" if steps is None else "steps", episodes if steps is None else steps, 1
    )
    check_environment(env)
    with contextlib.closing(env), new_dataset(dataset_id) as (temporary_id, publish):
        references = None
        if expert is not None:
            references = _reference_scores(env, seed, expert)
        returns, lengths = [], []
        resets = np.random.default_rng([seed, _RESETS])
        bar = tqdm(
            total=episodes or steps,
            desc="recording",
            unit="episode" if episodes else "step",
            disable=None,
        )
        with bar, _collector(env) as collector:
            while len(returns) < episodes if episodes else sum(lengths) < steps:
                act = begin(len(returns))
                total, length = play(collector, _reset_seed(resets), act)
                returns.append(total)
                lengths.append(length)
                bar.update(1 if episodes else length)
            _create(collector, temporary_id, env.spec, references, metadata)
        published = publish()
    return Recording(np.array(returns), np.array(lengths), references, published)


def check_new(dataset_id: str) -> None:
    """``dataset_id`` must be a Minari id with a version that no local dataset has."""
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(dataset_id)
    except (
        ValueError,
        TypeError,
    ) as error:  # TypeError: Minari's int(None) for an id without a version
        raise DataError(
            f"dataset {dataset_id!r}: expected a Minari id, as namespace/name-v0"
        ) from error
    path = local_path(dataset_id)
    if path.joinpath("data").exists():
        raise DataError(f"dataset {dataset_id}: expected a new id; there is one at {path}")


def check_environment(env: gymnasium.Env) -> None:
    """What is recorded must be something that this package reads, and each episode must end."""
    name = f"environment {env.spec.id}"
    validation.check_observation_space(name, env.observation_space)
    validation.check_action_space(name, env.action_space)
    if env.spec.max_episode_steps is None:
        raise DataError(
            f"{name}: expected a limit on the length of an episode (max_episode_steps); got none"
        )


def random_actions(space: gymnasium.spaces.Box, rng: np.random.Generator) -> Act:
    """Actions uniform between the bounds of ``space``."""
    return lambda observation: rng.uniform(space.low, space.high)


def batched(
    env: gymnasium.Env, policy: Callable[[np.ndarray, Array], Array], seed: int, noise: float = 0.0
) -> Begin:
    """A policy of batches, such as a trained one, for single episodes of ``env``.

    Args:
      env: what it will act in.
      policy: ``(observations [B, S] float32, key) -> actions [B, A]``; observations are flattened.
      seed: the keys and the noise are folded from it, the episode and the step.
      noise: standard deviation of Gaussian noise on the actions, in units of half their range.
    """
    space = env.action_space
    deviation = noise * (space.high - space.low) / 2
    root = jax.random.key(seed)
    fold = jax.jit(
        lambda episode, step: jax.random.fold_in(jax.random.fold_in(root, episode), step)
    )

    def begin(episode: int) -> Act:
        rng = np.random.default_rng([seed, _ACTION_NOISE, episode])
        steps = itertools.count()

        def act(observation: Any) -> np.ndarray:
            flat = flatten_observation(env.observation_space, observation, 0)
            actions = np.asarray(policy(flat[None], fold(episode, next(steps))))
            return actions[0] + deviation * rng.standard_normal(space.shape)

        return act

    return begin


def check_action(env: gymnasium.Env, action: Any) -> np.ndarray:
    """An action of ``env``'s shape and type; a :class:`DataError` for another shape or a non-finite one."""
    space = env.action_space
    array = np.asarray(action, space.dtype)
    if array.shape != space.shape:
        raise DataError(
            f"actions: expected shape {space.shape}, of {env.spec.id}; got {array.shape}"
        )
    if not np.isfinite(array).all():
        raise DataError(f"actions: expected finite numbers; got {array}")
    return array


def play(env: gymnasium.Env, seed: int, act: Act) -> tuple[float, int]:
    """One episode, actions clipped to their bounds; its return and its length."""
    space = env.action_space
    observation, _ = env.reset(seed=seed)
    total, length, over = 0.0, 0, False
    while not over:
        action = check_action(env, act(observation))
        observation, reward, terminated, truncated, _ = env.step(
            np.clip(action, space.low, space.high)
        )
        total += float(reward)
        length += 1
        over = terminated or truncated
    return total, length


@contextlib.contextmanager
def new_dataset(dataset_id: str) -> Iterator[tuple[str, Callable[[], bool]]]:
    """A temporary Minari id to create, and what makes it the dataset ``dataset_id`` then.

    ``publish()`` returns False where another process's dataset is there already, and leaves that
    alone.
    """
    # Its own name for each process and call; without a namespace, since Minari walks through every
    # folder, those that another process is just removing too, to create one.
    temporary_id = f"efm-recording-{os.getpid()}-{secrets.token_hex(4)}-v0"
    temporary = local_path(temporary_id)

    def publish() -> bool:
        _set_dataset_id(temporary / "data" / "metadata.json", dataset_id)
        return _publish(temporary, local_path(dataset_id))

    try:
        with warnings.catch_warnings():
            # Minari leaves the removal of temporary folders to the garbage collector, and asks for
            # an e-mail.
            warnings.simplefilter("ignore", ResourceWarning)
            warnings.filterwarnings("ignore", message="`author_email` is set to None")
            yield temporary_id, publish
    except OSError as error:
        raise DataError(
            f"{dataset_id}: cannot be recorded in {temporary.parent} ({reason(error)})"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _collector(env: gymnasium.Env) -> Iterator[Any]:
    import minari

    collector = minari.DataCollector(env, data_format="hdf5")
    try:
        yield collector
    finally:
        collector.close()


def _create(
    collector: Any,
    dataset_id: str,
    spec: gymnasium.envs.registration.EnvSpec,
    references: tuple[float, float] | None,
    metadata: dict[str, str],
) -> None:
    scores = {}
    if references is not None:
        scores = {
            "ref_min_score": references[0],
            "ref_max_score": references[1],
            "num_episodes_average_score": REFERENCE_EPISODES,
        }
    collector.create_dataset(dataset_id, eval_env=spec, author="efm_jax", **scores, **metadata)


def _reference_scores(env: gymnasium.Env, seed: int, expert: Act) -> tuple[float, float]:
    """Mean returns of random actions and of the expert, on the same starts."""
    rng = np.random.default_rng([seed, _RANDOM_ACTIONS])
    means = []
    with tqdm(total=2 * REFERENCE_EPISODES, desc="references", unit="episode", disable=None) as bar:
        for act in (random_actions(env.action_space, rng), expert):
            resets = np.random.default_rng([seed, _REFERENCE_RESETS])
            returns = []
            for _ in range(REFERENCE_EPISODES):
                returns.append(play(env, _reset_seed(resets), act)[0])
                bar.update()
            means.append(float(np.mean(returns)))
    worst, best = means
    if best <= worst:
        raise DataError(
            f"environment {env.spec.id}: expected an expert that is better than random actions; "
            f"got mean returns {best:g} and {worst:g}"
        )
    return worst, best


def _reset_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def _set_dataset_id(path: Path, dataset_id: str) -> None:
    """Give a recording its final id; Minari itself refuses to change one."""
    metadata = json.loads(path.read_text(encoding="utf-8"))
    metadata["dataset_id"] = dataset_id
    path.write_text(json.dumps(metadata), encoding="utf-8")


def _publish(temporary: Path, final: Path) -> bool:
    """Rename the recording to its place, unless another process's is there already; whether it was done."""
    root = temporary.parent
    final.parent.mkdir(parents=True, exist_ok=True)
    for folder in (final.parent, *final.parent.parents):
        if folder == root:
            break
        _mark_namespace(folder, temporary)
    try:
        os.rename(temporary, final)
    except OSError:
        # The folder of the other process's finished recording, which is not empty, stopped the
        # rename.
        if not final.joinpath("data").exists():
            raise
        return False
    return True


def _mark_namespace(folder: Path, temporary: Path) -> None:
    """Write Minari's mark of a namespace, whole or not at all."""
    mark = folder / "namespace_metadata.json"
    if not mark.exists():
        draft = temporary / f"{folder.name}-{mark.name}"
        draft.write_text("{}", encoding="utf-8")
        os.replace(draft, mark)
