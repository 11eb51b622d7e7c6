"""Point mazes: a planner, a controller that follows its waypoints, and the task of its data.

What is recorded is D4RL's Maze2D task (Fu et al. 2020, section 5): one goal is evaluated, the data
comes from an agent that goes to others.

*The task* (:func:`task`).  The goal lies in one cell of the map, the cell of D4RL and of Minari's
evaluation environments, and is moved by the environment's uniform noise at every reset; the agent
starts in any other cell.  The reward is 1 for a step that ends within 0.45 of the goal, the episode
goes on after a success and is cut at the environment's limit, so a return is the number of steps
spent at the goal: it grows with every step that is saved on the way, where a 0 or 1 for success
would soon be 1 for everybody.  A map that marks its own goal or start cells (``..._Diverse_G-v3``)
keeps them.  Data and evaluation use the same environment.

*The data* (:func:`wanderer`).  The agent walks between goals of its own, drawn in all free cells,
and never looks at the evaluated one: where D4RL relabels the rewards afterward, here observations
and rewards are the task's from the start.  Episodes last as long as evaluated ones.  So the data
covers the maze, pays now and then in passing, and shows nobody going to the goal and staying there:
a policy has to put that together from pieces, and copying the data scores below 10.  Every episode
has gains and a noise level of its own.

Minari's own PointMaze datasets differ in this: there the controller walks to the goal that it
observes, and an episode is cut at the success, so that nothing in them starts at a goal, which is
where their evaluation spends most of its time.

*The references* of the score: uniformly random actions, and :func:`expert`, the same controller
without noise and with the best gains, on its way to the evaluated goal.
"""

import copy
import functools
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from gymnasium.envs.registration import EnvSpec

Cell = tuple[int, int]  # row, column

# D4RL's goals, by the name of the map.
GOALS: dict[str, Cell] = {"Open": (2, 3), "UMaze": (1, 1), "Medium": (6, 6), "Large": (7, 9)}
_WALL, _GOAL = 1, "g"
# How near a wanderer comes to a goal of its own before it takes the next.
_ARRIVED = 0.2
# Goals are moved from the middle of their cell by up to this, in cells, as the environment moves
# its own.
_GOAL_SPREAD = 0.25


class Gains(NamedTuple):
    """Gains of the PD controller: action per unit of distance and of velocity."""

    position: float
    velocity: float


# The best of a grid of 20 pairs (position 3 to 40, velocity 0.5 to 3) on 20 starts in UMaze and
# Medium.
BEST = Gains(position=20.0, velocity=1.0)


@dataclass(frozen=True)
class Maze:
    """Free cells of a map; the origin of positions is the middle of the map, y points up.

    ``free [rows][columns]`` is False in a wall; ``scale`` is the length of a cell's side.
    """

    free: tuple[tuple[bool, ...], ...]
    scale: float = 1.0

    @classmethod
    def of(cls, env: Any) -> "Maze":
        """The map of a Gymnasium Robotics maze, wrapped or not."""
        maze = env.unwrapped.maze
        free = tuple(tuple(cell != _WALL for cell in row) for row in maze.maze_map)
        return cls(free, float(maze.maze_size_scaling))

    @property
    def cells(self) -> list[Cell]:
        """All free cells, row by row."""
        return [
            (i, j) for i, row in enumerate(self.free) for j, is_free in enumerate(row) if is_free
        ]

    def is_free(self, cell: Cell) -> bool:
        """Whether a cell lies in the map and is no wall."""
        row, column = cell
        inside = 0 <= row < len(self.free) and 0 <= column < len(self.free[0])
        return inside and self.free[row][column]

    def middle(self, cell: Cell) -> tuple[float, float]:
        """Position ``(x, y)`` of the middle of a cell."""
        row, column = cell
        x = (column + 0.5 - len(self.free[0]) / 2) * self.scale
        y = (len(self.free) / 2 - row - 0.5) * self.scale
        return x, y

    def cell(self, x: float, y: float) -> Cell:
        """The cell that a position is in; a wall and the outside are a ``ValueError``."""
        row = int(np.floor(len(self.free) / 2 - y / self.scale))
        column = int(np.floor(len(self.free[0]) / 2 + x / self.scale))
        if not self.is_free((row, column)):
            raise ValueError(
                f"position ({x:g}, {y:g}): expected a place in a free cell; got {(row, column)}"
            )
        return row, column


@functools.lru_cache(maxsize=1024)
def routes(maze: Maze, goal: Cell) -> Mapping[Cell, Cell]:
    """The next cell of a shortest route, for every cell that ``goal`` can be reached from.

    Breadth first, with steps to the four neighbors.  ``goal`` itself is its own next cell; cells
    without a route are absent.
    """
    following = {goal: goal}
    queue = deque([goal])
    while queue:
        row, column = cell = queue.popleft()
        for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            neighbor = (row + down, column + right)
            if maze.is_free(neighbor) and neighbor not in following:
                following[neighbor] = cell
                queue.append(neighbor)
    return following


def steer(maze: Maze, gains: Gains, state: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """The action ``[2]``, without noise and bounds, of going from ``state [4]`` to ``goal [2]``.

    Drives to the middle of the next cell of the shortest route, and in the goal's cell to the goal.
    It depends on nothing but its arguments, so a push off the route needs no new plan.

    Raises:
      ValueError: the position or the goal is not in a free cell, or no route joins them.
    """
    state = np.asarray(state, float)
    here, there = maze.cell(*state[:2]), maze.cell(*goal)
    following = routes(maze, there)
    if here not in following:
        raise ValueError(
            f"goal {there}: expected a cell that can be reached from {here}; there is no route"
        )
    target = goal if here == there else maze.middle(following[here])
    return gains.position * (np.array(target, float) - state[:2]) - gains.velocity * state[2:]


def expert(maze: Maze) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """The best controller without noise; it goes to the goal that it observes and stays there."""
    return lambda observation: steer(
        maze, BEST, observation["observation"], observation["desired_goal"]
    )


def wanderer(
    maze: Maze, rng: np.random.Generator, noise: float
) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """A controller of one episode that walks between goals of its own, without an end.

    Args:
      maze: where.
      rng: draws the gains, the level of the noise, the goals and the noise.
      noise: mean of the noise's standard deviation, in units of the action; an episode has its own,
        uniform between 0 and twice this.
    """
    # From hurried ones that overshoot and slide along walls to slow ones.
    position = float(np.exp(rng.uniform(np.log(5.0), np.log(20.0))))
    gains = Gains(position, velocity=rng.uniform(0.5, 2.0))
    deviation = rng.uniform(0.0, 2.0 * noise)
    goal: np.ndarray | None = None

    def act(observation: Mapping[str, np.ndarray]) -> np.ndarray:
        nonlocal goal
        state = observation["observation"]
        if goal is None or np.hypot(*(state[:2] - goal)) < _ARRIVED * maze.scale:
            goal = _another_goal(maze, maze.cell(*state[:2]), rng)
        return steer(maze, gains, state, goal) + deviation * rng.standard_normal(2)

    return act


def _another_goal(maze: Maze, here: Cell, rng: np.random.Generator) -> np.ndarray:
    """A place in another cell that can be reached."""
    cells = [cell for cell in sorted(routes(maze, here)) if cell != here]
    if not cells:
        raise ValueError(f"maze: expected a second cell that can be reached from {here}; got none")
    middle = np.array(maze.middle(cells[rng.integers(len(cells))]))
    return middle + maze.scale * rng.uniform(-_GOAL_SPREAD, _GOAL_SPREAD, 2)


def is_point_maze(spec: EnvSpec) -> bool:
    """Whether the controllers of this module can drive the environment."""
    return isinstance(spec.entry_point, str) and spec.entry_point.endswith(":PointMazeEnv")


def task(spec: EnvSpec) -> EnvSpec:
    """The spec of the task that is recorded and evaluated, as the top of this module says."""
    spec = copy.deepcopy(spec)
    name = re.fullmatch(r"PointMaze_([A-Za-z]+?)(?:Dense)?-v\d+", spec.id)
    if name is not None and name[1] in GOALS:
        row, column = GOALS[name[1]]
        spec.kwargs["maze_map"][row][column] = _GOAL
    # Explicit, so that another version's defaults do not change the task.
    spec.kwargs |= {"continuing_task": True, "reset_target": False}
    return spec
