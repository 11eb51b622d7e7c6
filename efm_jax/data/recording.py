"""Play in an environment and record a Minari dataset, whole or not at all.

The recording is made under a temporary id in Minari's own folder and becomes the dataset by one
rename, so it is there whole or not at all; of two processes that record at once, the second to
finish finds the dataset there and removes its own recording.  A recording that was killed leaves
its temporary folder behind: it is never read, and may be deleted.
"""

import contextlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from tqdm import tqdm

from efm_jax import checks
from efm_jax.data import validation
from efm_jax.data.minari import is_id, local_path
from efm_jax.envs.environments import spec_of
from efm_jax.envs.play import Act, Begin, action_box, play, random_actions
from efm_jax.errors import DataError, reason

REFERENCE_EPISODES = 100

# Purposes of a recording's random numbers, folded into its seed; smaller ones are the recorded
# policy's own, and `efm_jax.envs.play` has another.
_RESETS, _REFERENCE_RESETS, _RANDOM_ACTIONS = 2, 3, 4


class Recording(NamedTuple):
    """What was recorded; not ``published`` where another process's dataset was there by then."""

    returns: np.ndarray  # [E] float64, of every episode
    lengths: np.ndarray  # [E] int64
    reference_scores: tuple[float, float] | None
    published: bool


def record(
    dataset_id: str,
    env: gymnasium.Env,
    begin: Begin,
    *,
    seed: int,
    episodes: int | None = None,
    steps: int | None = None,
    expert: Act | None = None,
    **metadata: Any,
) -> Recording:
    """Record whole episodes of ``env`` as a Minari dataset, to be evaluated in ``env`` too.

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
    import minari

    checks.check_integer("seed", seed, 0)
    given = [(n, unit) for n, unit in ((steps, "step"), (episodes, "episode")) if n is not None]
    if len(given) != 1:
        raise ValueError(f"episodes, steps: expected one of them; got {episodes} and {steps}")
    [(count, unit)] = given
    checks.check_integer(f"{unit}s", count, 1)
    check_environment(env)
    with contextlib.closing(env), new_dataset(dataset_id) as (temporary_id, publish):
        references = None if expert is None else _reference_scores(env, seed, expert)
        returns, lengths = [], []
        resets = np.random.default_rng([seed, _RESETS])
        collector = minari.DataCollector(env, data_format="hdf5")
        bar = tqdm(total=count, desc="recording", unit=unit, disable=None)
        with contextlib.closing(collector), bar:
            while (sum(lengths) if episodes is None else len(returns)) < count:
                total, length = play(collector, _reset_seed(resets), begin(len(returns)))
                returns.append(total)
                lengths.append(length)
                bar.update(length if episodes is None else 1)
            if references is not None:
                metadata["ref_min_score"], metadata["ref_max_score"] = references
                metadata["num_episodes_average_score"] = REFERENCE_EPISODES
            collector.create_dataset(temporary_id, eval_env=env.spec, author="efm_jax", **metadata)
        published = publish()
    return Recording(np.array(returns), np.array(lengths), references, published)


def check_new(dataset_id: str) -> None:
    """Refuse what is no Minari id with a version, and the id of a local dataset."""
    if not is_id(dataset_id):
        raise DataError(f"dataset {dataset_id!r}: expected a Minari id, as namespace/name-v0")
    path = local_path(dataset_id)
    if path.joinpath("data").exists():
        raise DataError(f"dataset {dataset_id}: expected a new id; there is one at {path}")


def check_environment(env: gymnasium.Env) -> None:
    """Refuse an environment whose data this package cannot read, or whose episodes may not end."""
    spec = spec_of(env)
    name = f"environment {spec.id}"
    validation.check_observation_space(name, env.observation_space)
    validation.check_action_space(name, env.action_space)
    if spec.max_episode_steps is None:
        raise DataError(
            f"{name}: expected a limit on the length of an episode; got none: give "
            "--max_episode_steps"
        )


@contextlib.contextmanager
def new_dataset(dataset_id: str) -> Iterator[tuple[str, Callable[[], bool]]]:
    """A temporary Minari id to create, and what makes it the dataset ``dataset_id`` then.

    ``publish()`` returns False where another process's dataset is there already, and leaves that
    alone.
    """
    # A name of its own for each process and call; without a namespace, because Minari walks through
    # every folder, those that another process is just removing too, to create one.
    temporary_id = f"efm-recording-{os.getpid()}-{secrets.token_hex(4)}-v0"
    temporary = local_path(temporary_id)

    def publish() -> bool:
        # Written here, because Minari itself refuses to change an id.
        path = temporary / "data" / "metadata.json"
        metadata = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(metadata | {"dataset_id": dataset_id}), encoding="utf-8")
        return _publish(temporary, local_path(dataset_id))

    try:
        with warnings.catch_warnings():
            # Because Minari leaves the removal of temporary folders to the garbage collector, and
            # asks for an e-mail.
            warnings.simplefilter("ignore", ResourceWarning)
            warnings.filterwarnings("ignore", message="`author_email` is set to None")
            yield temporary_id, publish
    except OSError as error:
        raise DataError(
            f"{dataset_id}: cannot be recorded in {temporary.parent} ({reason(error)})"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, final: Path) -> bool:
    """Rename the recording to its place and say so, unless another process's is there already."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for folder in final.relative_to(temporary.parent).parents[:-1]:
        # Minari's mark of a namespace, whole or not at all.
        mark = temporary.parent / folder / "namespace_metadata.json"
        if not mark.exists():
            draft = temporary / f"{folder.name}-{mark.name}"
            draft.write_text("{}", encoding="utf-8")
            os.replace(draft, mark)
    try:
        os.rename(temporary, final)
    except OSError:
        # The folder of the other process's finished recording, which is not empty, stopped the
        # rename.
        if not final.joinpath("data").exists():
            raise
        return False
    return True


def _reference_scores(env: gymnasium.Env, seed: int, expert: Act) -> tuple[float, float]:
    """Mean returns of random actions and of the expert, on the same starts."""
    rng = np.random.default_rng([seed, _RANDOM_ACTIONS])
    means = []
    with tqdm(total=2 * REFERENCE_EPISODES, desc="references", unit="episode", disable=None) as bar:
        for act in (random_actions(action_box(env), rng), expert):
            resets = np.random.default_rng([seed, _REFERENCE_RESETS])
            returns = []
            for _ in range(REFERENCE_EPISODES):
                returns.append(play(env, _reset_seed(resets), act)[0])
                bar.update()
            means.append(float(np.mean(returns)))
    worst, best = means
    if best <= worst:
        name = f"environment {spec_of(env).id}"
        raise DataError(
            f"{name}: expected an expert that is better than random actions; "
            f"got mean returns {best:g} and {worst:g}"
        )
    return worst, best


def _reset_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))
