"""The built-in dataset: scripted controllers on ``Pendulum-v1``, recorded at first use, nothing downloaded.

It is a local Minari dataset like any other.  The recording is made under a temporary id in Minari's own
folder and becomes the dataset by one rename, so it is there whole or not at all; of two processes that
record at once, the second to finish finds the dataset there and removes its own recording, which held the
same bytes.  A recording that was killed leaves its temporary folder behind: it is never read, and may be
deleted.
"""

import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
from tqdm import tqdm

from efm_jax import checks
from efm_jax.data import controllers
from efm_jax.data.errors import DataError, reason
from efm_jax.data.minari_source import local_path

BUILTIN_DATASET = "efm/pendulum/scripted-v0"
ENVIRONMENT = "Pendulum-v1"
REFERENCE_EPISODES = 100

# Purposes of the recording's random numbers, folded into its seed.
_CONTROLLERS, _NOISE, _RESETS, _REFERENCE_RESETS, _RANDOM_ACTIONS = range(5)


def ensure_recorded() -> None:
    """Record the built-in dataset if it is not there."""
    if not local_path(BUILTIN_DATASET).exists():
        record()


def record(seed: int = 0, num_episodes: int = 200) -> None:
    """Record the built-in dataset: ``num_episodes`` episodes of 200 steps, each by a controller of its own.

    The same seed gives the same bytes.  Does nothing lasting when the dataset exists by the time the
    recording is done.  Reference scores in its metadata: ``ref_min_score`` is the mean return of uniformly
    random actions and ``ref_max_score`` that of the best scripted controller without noise, each over
    ``REFERENCE_EPISODES`` seeded episodes played now.

    Raises:
      DataError: Minari's folder cannot be written.
    """
    checks.check_integer("seed", seed, 0)
    checks.check_integer("num_episodes", num_episodes, 1)
    # Its own name for each process and call; without a namespace, since Minari walks through every folder,
    # those that another process is just removing too, to create one.
    temporary_id = f"efm-recording-{os.getpid()}-{secrets.token_hex(4)}-v0"
    temporary = local_path(temporary_id)
    try:
        with warnings.catch_warnings():
            # Minari leaves the removal of temporary folders to the garbage collector, and asks for an e-mail.
            warnings.simplefilter("ignore", ResourceWarning)
            warnings.filterwarnings("ignore", message="`author_email` is set to None")
            _record(temporary_id, seed, num_episodes)
        _set_dataset_id(temporary / "data" / "metadata.json", BUILTIN_DATASET)
        _publish(temporary, local_path(BUILTIN_DATASET))
    except OSError as error:
        place = temporary.parent
        raise DataError(f"{BUILTIN_DATASET}: cannot be recorded in {place} ({reason(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _record(dataset_id: str, seed: int, num_episodes: int) -> None:
    import minari

    env = gymnasium.make(ENVIRONMENT)
    low, high = float(env.action_space.low[0]), float(env.action_space.high[0])
    parameters = np.random.default_rng([seed, _CONTROLLERS])
    noise = np.random.default_rng([seed, _NOISE])
    resets = np.random.default_rng([seed, _RESETS])
    total = num_episodes + 2 * REFERENCE_EPISODES
    with tqdm(total=total, desc="recording", unit="episode", disable=None) as bar:
        worst, best = _reference_scores(env, seed, bar.update)
        collector = minari.DataCollector(env, data_format="hdf5")
        try:
            for _ in range(num_episodes):
                controller = controllers.draw(parameters)

                def act(observation, controller=controller):
                    torque = controller.torque(observation) + controller.noise * noise.standard_normal()
                    return min(max(torque, low), high)

                _play(collector, _reset_seed(resets), act)
                bar.update()
            collector.create_dataset(
                dataset_id,
                eval_env=ENVIRONMENT,
                algorithm_name="scripted energy pumping and PD, random gains, random action noise",
                author="efm_jax",
                code_permalink="efm_jax/data/builtin.py",
                ref_min_score=worst,
                ref_max_score=best,
                num_episodes_average_score=REFERENCE_EPISODES,
                description=f"{num_episodes} episodes of {ENVIRONMENT}, recorded locally with seed {seed}",
            )
        finally:
            collector.close()


def _reference_scores(env: gymnasium.Env, seed: int, done: Callable[[], object]) -> tuple[float, float]:
    """Mean returns of random actions and of the best controller, on the same starts."""
    space = env.action_space
    rng = np.random.default_rng([seed, _RANDOM_ACTIONS])

    def random_action(observation) -> float:
        return rng.uniform(space.low[0], space.high[0])

    def best_action(observation) -> float:
        return float(np.clip(controllers.BEST.torque(observation), space.low[0], space.high[0]))

    means = []
    for act in (random_action, best_action):
        resets = np.random.default_rng([seed, _REFERENCE_RESETS])
        returns = []
        for _ in range(REFERENCE_EPISODES):
            returns.append(_play(env, _reset_seed(resets), act))
            done()
        means.append(float(np.mean(returns)))
    return means[0], means[1]


def _play(env: gymnasium.Env, seed: int, act: Callable[[np.ndarray], float]) -> float:
    """One episode; its return."""
    observation, _ = env.reset(seed=seed)
    total, over = 0.0, False
    while not over:
        action = np.array([act(observation)], np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        over = terminated or truncated
    return total


def _reset_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def _set_dataset_id(path: Path, dataset_id: str) -> None:
    """Give a recording its final id; Minari itself refuses to change one."""
    metadata = json.loads(path.read_text(encoding="utf-8"))
    metadata["dataset_id"] = dataset_id
    path.write_text(json.dumps(metadata), encoding="utf-8")


def _publish(temporary: Path, final: Path) -> None:
    """Rename the recording to its place, unless another process's is there already."""
    root = temporary.parent
    final.parent.mkdir(parents=True, exist_ok=True)
    for folder in (final.parent, *final.parent.parents):
        if folder == root:
            break
        _mark_namespace(folder, temporary)
    try:
        os.rename(temporary, final)
    except OSError:
        # The folder of the other process's finished recording, which is not empty, stopped the rename.
        if not final.joinpath("data").exists():
            raise


def _mark_namespace(folder: Path, temporary: Path) -> None:
    """Write Minari's mark of a namespace, whole or not at all."""
    mark = folder / "namespace_metadata.json"
    if not mark.exists():
        draft = temporary / f"{folder.name}-{mark.name}"
        draft.write_text("{}", encoding="utf-8")
        os.replace(draft, mark)
