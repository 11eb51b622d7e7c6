"""D4RL's classic datasets: their names, their files, and what is odd about each family.

Names, files and step limits are facts of ``d4rl/infos.py`` and of the environments' registrations
(``d4rl/locomotion``, ``kitchen``, ``hand_manipulation_suite``, ``pointmaze``) in
Farama-Foundation/D4RL (Fu et al. 2020, arXiv 2004.07219).  Issue numbers below are of that
repository.

- **Gym-MuJoCo** (``hopper``, ``halfcheetah``, ``walker2d``, ``ant``): v2 files have ``timeouts``
  and ``next_observations``, so that a timeout's row is kept with its real next observation, and so
  is a last row in the middle of an episode; v0 files lack ``next_observations`` (#34) and lose
  those rows.  In replay files timeouts are not always marked (#162): transitions of v2 are right
  all the same, but returns and lengths are then those of several episodes together; :mod:`.summary`
  counts such places. hopper-medium-expert-v0 holds medium-replay in the place of medium (#19); v1
  has errors too (#76, #86).  Use v2.
- **AntMaze**: a row within 0.5 of the evaluation goal has reward 1 and is ``terminal``, but the
  recording went on: to other goals, or around this one, in clusters of such rows (#199, except
  umaze-diverse, which has only one). So here a terminal row does not end an episode, a timeout
  does; it is ``terminated`` all the same, since the environment ends there.  An episode's return
  and length are counted up to its first terminal row, as the environment would: the mean return is
  the share of episodes that reach the goal.  In v0 timeouts are out of step with the ends of
  trajectories (#77), and D4RL calls v0 and v1 deprecated: in both, a row after which the ant is
  ``ANT_JUMP`` away ends an episode as well.  Use v2.
- **Maze2D** is one continuous trajectory without terminals; a timeout marks that a goal of the
  recording was reached (#85).  A row's reward is that of its own observation, not of its next one
  as in the environment (#194).
- **Kitchen** files mark the last row of each demonstration as ``terminal``, whether or not its
  tasks were done.  The flag is kept, as everyone who reports results does; where a file has no
  ``timeouts``, terminals alone end episodes, for demonstrations can be longer than the
  environment's 280 steps.
- **Adroit** (``pen``, ``door``, ``hammer``, ``relocate``): human demonstrations can be longer than
  the step limit of the environment.  A v0 file without ``timeouts`` is cut at that limit, as D4RL
  does (#137); v1 has them.
"""

import difflib
import posixpath
from pathlib import Path
from typing import NamedTuple

from gymnasium.envs.registration import EnvSpec

from efm_jax.data.download import HDF5_SIGNATURE, fetch

DEFAULT_FOLDER = "~/.d4rl/datasets"
URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"

# First word of a dataset's name -> today's version of its environment, of the same sizes but Ant's.
ENVIRONMENTS = {
    "halfcheetah": "HalfCheetah-v5",
    "hopper": "Hopper-v5",
    "walker2d": "Walker2d-v5",
    "ant": "Ant-v5",
    **{task: f"AdroitHand{task.capitalize()}-v1" for task in ("pen", "door", "hammer", "relocate")},
}
_MAZES = {"umaze": "UMaze", "medium": "Medium", "large": "Large", "open": "Open"}

# In a step an ant moves by some tenths; cells of its mazes are 4 wide.
ANT_JUMP = 1.0


class Family(NamedTuple):
    """What files of one kind of task have in common."""

    step_limit: int | None = None  # of D4RL's environment, where files may lack timeouts
    terminals_end_all: bool = False  # without timeouts, terminals mark the end of every episode
    terminals_pass: bool = False  # a terminal row does not end an episode
    jumps_end: bool = False  # so does a jump of the first two observation dimensions


_LOCOMOTION = ("halfcheetah", "hopper", "walker2d", "ant")
_ADROIT = ("pen", "door", "hammer", "relocate")
_MAZE_KINDS = ("medium-play", "medium-diverse", "large-play", "large-diverse")
_MAZE_FILES = {"umaze": "u-maze", "medium": "big-maze", "large": "hardest-maze"}


def _files() -> dict[str, str]:
    """Name -> path of its file under ``URL``."""
    files = {}
    for task in _LOCOMOTION:
        for kind in ("random", "medium", "expert", "medium-replay", "medium-expert"):
            stem = f"{task}_{kind.replace('-', '_')}"
            if kind == "medium-replay":  # v0 called it mixed, and one file leaves out the 2d
                stem = "walker_mixed" if task == "walker2d" else f"{task}_mixed"
            files[f"{task}-{kind}-v0"] = f"gym_mujoco/{stem}.hdf5"
        for kind in ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert"):
            for version in ("v1", "v2"):
                stem = f"{task}_{kind.replace('-', '_')}-{version}"
                files[f"{task}-{kind}-{version}"] = f"gym_mujoco_{version}/{stem}.hdf5"
    files["ant-random-expert-v0"] = "gym_mujoco/ant_random_expert.hdf5"
    for kind in ("umaze", "umaze-diverse", *_MAZE_KINDS):
        maze, _, goals = kind.partition("-")
        rest = f"noisy_multistart_{goals != ''}_multigoal_{goals == 'diverse'}_sparse"
        files[f"antmaze-{kind}-v0"] = f"ant_maze_new/Ant_maze_{_MAZE_FILES[maze]}_{rest}.hdf5"
        files[f"antmaze-{kind}-v1"] = f"ant_maze_v1/Ant_maze_{maze}_{rest}.hdf5"
        files[f"antmaze-{kind}-v2"] = f"ant_maze_v2/Ant_maze_{_MAZE_FILES[maze]}_{rest}_fixed.hdf5"
    for task in _ADROIT:
        files[f"{task}-human-v0"] = f"hand_dapg/{task}-v0_demos_clipped.hdf5"
        files[f"{task}-cloned-v0"] = f"hand_dapg/{task}-demos-v0-bc-combined.hdf5"
        files[f"{task}-expert-v0"] = f"hand_dapg/{task}-v0_expert_clipped.hdf5"
        for kind in ("human", "cloned", "expert"):
            files[f"{task}-{kind}-v1"] = f"hand_dapg_v1/{task}-{kind}-v1.hdf5"
    files["kitchen-complete-v0"] = "kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5"
    files["kitchen-partial-v0"] = "kitchen/kitchen_microwave_kettle_light_slider-v0.hdf5"
    files["kitchen-mixed-v0"] = "kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5"
    files["maze2d-open-v0"] = "maze2d/maze2d-open-sparse.hdf5"
    files["maze2d-open-dense-v0"] = "maze2d/maze2d-open-dense.hdf5"
    for maze in ("umaze", "medium", "large", "eval-umaze", "eval-medium", "eval-large"):
        files[f"maze2d-{maze}-v1"] = f"maze2d/maze2d-{maze}-sparse-v1.hdf5"
        files[f"maze2d-{maze}-dense-v1"] = f"maze2d/maze2d-{maze}-dense-v1.hdf5"
    return files


# Every classic name -> its file under ``URL``.
D4RL_FILES = _files()

_NAME_OF_FILE = {posixpath.basename(file): name for name, file in D4RL_FILES.items()}
_FAMILIES = {
    "antmaze": Family(terminals_pass=True),
    "kitchen": Family(terminals_end_all=True),
    "pen": Family(step_limit=100),
    **dict.fromkeys(("door", "hammer", "relocate"), Family(step_limit=200)),
}


def misspelled(name: str) -> str | None:
    """What to say of a name that begins like one of D4RL's and is none; None for any other name."""
    kinds = (*_LOCOMOTION, *_FAMILIES, "maze2d")
    if name in D4RL_FILES or "/" in name or first_word(name) not in kinds:
        return None
    close = difflib.get_close_matches(name, D4RL_FILES, n=3, cutoff=0.0)
    return f"{name}: unknown dataset: D4RL has no such name; the nearest are {', '.join(close)}"


def ensure_file(name: str, folder: str = DEFAULT_FOLDER) -> str:
    """Path of a classic dataset's file in ``folder``, downloaded if it is not there.

    ``d4rl`` itself uses the same folder and the same name in it, so its downloads are found.

    Raises:
      DataError: as :func:`.download.fetch` does.
    """
    file = D4RL_FILES[name]
    path = Path(folder).expanduser() / posixpath.basename(file)
    fetch(name, URL + file, path, HDF5_SIGNATURE)
    return str(path)


def task_of_file(path: str) -> str:
    """The classic name of a file that D4RL named; for another file its own, without the ending."""
    base = posixpath.basename(path.replace("\\", "/"))
    return _NAME_OF_FILE.get(base, posixpath.splitext(base)[0])


def family_of(task: str) -> Family:
    """Oddities of a task's files, by the first word of its name; none for other names."""
    family = _FAMILIES.get(first_word(task), Family())
    early = task.lower().replace("_", "-").endswith(("-v0", "-v1"))
    return family._replace(jumps_end=True) if family.terminals_pass and early else family


def environment_of(task: str) -> str | None:
    """Today's version of a task's environment, or None for a name that is not like D4RL's.

    Observations of kitchens and mazes are not laid out as D4RL's were.
    """
    word = first_word(task)
    maze = next((maze for maze in _MAZES if maze in task.lower()), None)
    if word in ("antmaze", "maze2d"):
        return maze and (
            f"AntMaze_{_MAZES[maze]}-v5" if word == "antmaze" else f"PointMaze_{_MAZES[maze]}-v3"
        )
    return ENVIRONMENTS.get(word) or {"kitchen": "FrankaKitchen-v1"}.get(word)


def own_limit(name: str) -> int | None:
    """Steps after which D4RL ends an episode of a dataset, where today's environment may differ.

    ``name`` is D4RL's, or Minari's of a recording of it, such as ``D4RL/pen/human-v2``.
    """
    namespace, _, rest = name.lower().partition("/")
    if name in D4RL_FILES or (namespace == "d4rl" and rest):
        return _FAMILIES.get(first_word(rest.replace("/", "-") or name), Family()).step_limit
    return None


def cut(spec: EnvSpec, limit: int, reason: str) -> str:
    """Limit a spec's episodes to the steps of the data's; returns the line that says so."""
    note = (
        f"episodes of {spec.id} are cut at {limit} steps, as {reason}, not at "
        f"{spec.max_episode_steps}; --max_episode_steps sets another limit"
    )
    spec.max_episode_steps = limit
    return note


def first_word(task: str) -> str:
    """The kind of task that a file's or a dataset's name begins with, in lower case."""
    words = task.lower().replace("_", "-").split("-")
    # D4RL's own files: Ant_maze_u-maze_...
    return "antmaze" if words[:2] == ["ant", "maze"] else words[0]
