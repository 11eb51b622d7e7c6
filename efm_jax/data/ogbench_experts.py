"""OGBench's data again: the scripted experts of its package play, and their rows are kept.

Facts of ``data_gen_scripts`` in seohongpark/ogbench (Park et al. 2025, arXiv 2410.20092), whose
package holds the environments and the experts, but not the scripts:

*play* and *noisy* (cube, scene, puzzle): an expert moves an object to a target that the environment
draws, then to the next one, for 1,000 steps.  In *play* it follows a plan with noise of its own; in
*noisy* it looks at every state, its actions have Gaussian noise of a deviation that is drawn for
the episode, uniform up to 0.1 (3 times that on the yaw, 10 times on the gripper), and one in ten is
uniformly random (one in five in puzzles).  Cubes are stacked with a probability drawn for the
episode.  A scene whose cube was out of sight is played again.

*navigate* and *stitch* (pointmaze): along the shortest path with noise of deviation 0.5, in
*navigate* for 1,000 steps to one goal after the other, away from corridors; in *stitch* for 200
steps to a goal four cells away.

Published data was not seeded, and other versions of MuJoCo move otherwise: what is made here is
*regenerated*, never the published numbers.  The file says so, with seed and versions, in the array
``regenerated``, which OGBench's own loader passes over.
"""

import collections
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from etils import epath
from tqdm import tqdm

from efm_jax import checks
from efm_jax.data import ogbench
from efm_jax.errors import DataError
from efm_jax.files import write_whole

# The policy of an episode: an observation and the environment's information to an action.
Act = Callable[[np.ndarray, dict[str, Any]], np.ndarray]
Cell = tuple[int, int]
Rows = dict[str, np.ndarray]

_NAME = re.compile(
    r"(?P<env>(?P<what>cube-(?:single|double|triple|quadruple)|scene|puzzle-(?:3x3|4x4|4x5|4x6))"
    r"-(?P<kind>play|noisy)|(?P<maze>pointmaze-(?:medium|large|giant|teleport))"
    r"-(?P<walk>navigate|stitch))-v0"
)
_OBJECTS = {
    "cube": ("cube",),
    "puzzle": ("button",),
    "scene": ("cube", "button", "drawer", "window"),
}
_STACKED = {  # least and greatest probability that a cube goes on another one
    "cube-single": (0.0, 0.0),
    "cube-double": (0.0, 0.25),
    "cube-triple": (0.05, 0.35),
    "cube-quadruple": (0.1, 0.5),
}
_NOISY = 0.1 * np.array([1.0, 1.0, 1.0, 3.0, 10.0])
_WALK_NOISE = 0.5
_STITCHED = 4  # cells from the start to the goal
_EPISODES = {  # where they are not a million steps
    **{"cube-triple": 3000, "puzzle-4x5": 3000, "cube-quadruple": 5000, "puzzle-4x6": 5000},
}
_EXPERTS = 6  # purpose of the random numbers, folded into the seed


class Task(NamedTuple):
    """What the name of a dataset says."""

    env: str  # without the version
    kind: str
    steps: int  # of an episode

    @property
    def episodes(self) -> int:
        """How many were published."""
        return _EPISODES.get(self.env, 1_000_000 // self.steps)


def parse_name(name: str) -> Task:
    """Task of a published name; a ``DataError`` if no script of this module makes its data."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise DataError(
            f"{name}: expected a dataset of scripted experts: cube, scene or puzzle with play or "
            "noisy, such as cube-single-play-v0, or pointmaze with navigate or stitch, such as "
            "pointmaze-teleport-stitch-v0"
        )
    kind = match["kind"] or match["walk"]
    return Task(match["what"] or match["maze"], kind, 200 if kind == "stitch" else 1000)


def regenerate(path: epath.Path, *, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Write the ``npz`` file of the dataset that ``path`` is named after, and say what is in it.

    Every episode is kept when it is over, in a folder beside the file that is named after seed and
    versions: a run that was killed goes on there, more steps begin with the same ones, and several
    processes may share the work.  The folder may be deleted when no more are wanted.

    Args:
      path: ``FOLDER/cube-single-play-v0.npz``, for example.
      seed: of every random number.
      steps: the least number of transitions; by default, as many as were published.

    Raises:
      DataError: no name of such a dataset, or a file that was not regenerated with this seed and
        these versions.
    """
    task = parse_name(path.stem)
    checks.check_integer("seed", seed, 0)
    ogbench.import_ogbench(path.stem)
    origin = {"seed": seed} | {p: importlib.metadata.version(p) for p in ("ogbench", "mujoco")}
    count = task.episodes
    if steps is not None:
        checks.check_integer("steps", steps, 1)
        count = -(-steps // task.steps)
    if path.exists() and ogbench.origin_of(str(path)) != origin:
        expected = f"expected no file, or one of this origin ({ogbench.say_origin(origin)})"
        raise DataError(f"{path}: {expected}")
    folder = path.parent / "-".join(
        [f"{path.name}.episodes", *(f"{k}{v}" for k, v in origin.items())]
    )
    places = [folder / f"{i:05d}.npz" for i in range(count)]
    missing = [i for i in range(count) if not places[i].exists()]
    # In an order of its own, so that processes that share the work seldom play the same one.
    random.Random(os.getpid()).shuffle(missing)
    if missing:
        with contextlib.closing(_make(task)) as env, _random_state():
            begun = count - len(missing)
            for i in tqdm(missing, path.stem, count, initial=begun, unit="episode", disable=None):
                if not places[i].exists():
                    write_whole(places[i], _npz(np.savez, _episode(env, task, seed, i)))
    episodes = [_read(place) for place in places]
    columns = {name: np.concatenate([rows[name] for rows in episodes]) for name in episodes[0]}
    # Plain bytes, because a reader of numbers alone reads them too.
    columns["regenerated"] = np.frombuffer(json.dumps(origin).encode(), np.uint8)
    write_whole(path, _npz(np.savez_compressed, columns))
    return {"episodes": count, "steps": count * task.steps, "regenerated": origin}


def _make(task: Task) -> gymnasium.Env:
    how: dict[str, Any] = {"terminate_at_goal": False, "max_episode_steps": task.steps + 1}
    if not task.env.startswith("pointmaze"):
        how |= {"mode": "data_collection", "visualize_info": False}
    return gymnasium.make(f"{task.env}-v0", disable_env_checker=True, **how)


@contextlib.contextmanager
def _random_state() -> Iterator[None]:
    """Leave NumPy's global random numbers, which OGBench draws from, as they were."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)


def _episode(env: gymnasium.Env, task: Task, seed: int, episode: int) -> Rows:
    """Rows of one episode; they depend on the arguments alone, not on what was played before."""
    begin = _walk if task.env.startswith("pointmaze") else _manipulate
    attempt = 0
    while True:
        words = np.random.SeedSequence([seed, _EXPERTS, episode, attempt]).generate_state(4)
        np.random.seed(words)
        env.action_space.seed(int(words[0]))
        rows = _play(env, task, *begin(env, task, int(words[1])))
        if task.env != "scene" or _in_sight(rows["qpos"][:, 14:17]):
            return rows
        attempt += 1


def _play(
    env: gymnasium.Env, task: Task, observation: np.ndarray, info: dict[str, Any], act: Act
) -> Rows:
    rows = collections.defaultdict(list)
    over = False
    while not over:
        action = np.clip(act(observation, info), -1.0, 1.0)
        following, _, terminated, over, info = env.step(action)
        if terminated:
            raise DataError(f"{task.env}: this version of OGBench ends episodes at their goal")
        rows["observations"].append(observation)
        rows["actions"].append(action)
        rows["terminals"].append(over)
        for name in ("qpos", "qvel", "button_states"):
            if f"prev_{name}" in info:
                rows[name].append(info[f"prev_{name}"])
        observation = following
    types = {"terminals": np.bool_, "button_states": np.int64}
    return {name: np.array(column, types.get(name, np.float32)) for name, column in rows.items()}


def _in_sight(cube: np.ndarray) -> bool:
    """Whether a scene's cube ``[T, 3]`` was never too far right, nor left but in the drawer."""
    _, y, z = cube.T
    return not (np.any(y >= 0.29) or np.any((y <= -0.3) & ((z < 0.06) | (z > 0.08))))


def _manipulate(env: gymnasium.Env, task: Task, seed: int) -> tuple[np.ndarray, dict, Act]:
    """Begin an episode of *play* or *noisy*."""
    world: Any = env.unwrapped
    style = "plan" if task.kind == "play" else "markov"
    family = task.env.split("-")[0]
    closed = {"gripper_always_closed": True} if family == "puzzle" else {}
    experts = {name: _expert(name, style)(env=env, **closed) for name in _OBJECTS[family]}
    observation, info = env.reset(seed=seed)
    stacked = np.random.uniform(*_STACKED.get(task.env, (0.5, 0.5)))
    deviation = np.random.uniform() * _NOISY
    random_share = 0.2 if family == "puzzle" else 0.1
    expert = experts[info["privileged/target_task"]]
    expert.reset(observation, info)

    def act(observation: np.ndarray, info: dict[str, Any]) -> np.ndarray:
        nonlocal expert
        if expert.done:
            # The scripts' expert sees the old target for one step more, in a scene even one of the
            # episode before, which would make episodes depend on each other.
            observation, info = world.set_new_target(p_stack=stacked)
            expert = experts[info["privileged/target_task"]]
            expert.reset(observation, info)
        if task.kind == "noisy" and np.random.uniform() < random_share:
            return np.random.uniform(-1.0, 1.0, len(deviation))
        action = expert.select_action(observation, info)
        return action if task.kind == "play" else action + np.random.normal(0.0, deviation)

    return observation, info, act


def _expert(name: str, style: str) -> Callable[..., Any]:
    module = importlib.import_module(f"ogbench.manipspace.oracles.{style}.{name}_{style}")
    return getattr(module, f"{name.capitalize()}{style.capitalize()}Oracle")


def _walk(env: gymnasium.Env, task: Task, seed: int) -> tuple[np.ndarray, dict, Act]:
    """Begin an episode of *navigate* or *stitch*."""
    world: Any = env.unwrapped
    free: list[Cell] = [(row, column) for row, column in np.argwhere(world.maze_map == 0).tolist()]
    start = _one_of(free)
    goals = [cell for cell in free if not _in_corridor(cell, free)]
    if task.kind == "stitch":
        goals = _at_distance(start, free, _STITCHED) or [start]
    options = {"task_info": {"init_ij": start, "goal_ij": _one_of(goals)}}
    observation, info = env.reset(seed=seed, options=options)

    def act(observation: np.ndarray, info: dict[str, Any]) -> np.ndarray:
        if task.kind == "navigate" and info.get("success"):
            world.set_goal(goal_xy=world.add_noise(world.ij_to_xy(_one_of(goals))))
        here = world.get_xy()
        way = world.get_oracle_subgoal(here, world.cur_goal_xy)[0] - here
        return way / (np.linalg.norm(way) + 1e-6) + np.random.normal(0.0, _WALK_NOISE, 2)

    return observation, info, act


def _one_of(cells: list[Cell]) -> Cell:
    return cells[np.random.randint(len(cells))]


def _neighbors(cell: Cell) -> list[Cell]:
    """North, south, west, east."""
    i, j = cell
    return [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]


def _in_corridor(cell: Cell, free: list[Cell]) -> bool:
    """Whether both ways of one axis are free and both of the other are walls."""
    north, south, west, east = (other in free for other in _neighbors(cell))
    return north == south and west == east and north != west


def _at_distance(start: Cell, free: list[Cell], distance: int) -> list[Cell]:
    """Cells whose shortest path from ``start`` has ``distance`` steps."""
    seen, ring = {start}, [start]
    for _ in range(distance):
        reached = {other for cell in ring for other in _neighbors(cell) if other in free}
        ring = sorted(reached - seen)
        seen |= reached
    return ring


def _npz(save: Callable[..., None], rows: Rows) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **rows)
    return buffer.getvalue()


def _read(place: epath.Path) -> Rows:
    with place.open("rb") as file, np.load(file) as rows:
        return dict(rows)
