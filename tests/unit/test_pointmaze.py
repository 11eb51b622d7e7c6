"""Planner and controller of point mazes: on maps and a point mass of ours, then in the real one."""

import copy
import itertools
import json

import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from numpy.testing import assert_allclose, assert_array_equal

from efm_jax.data import load_dataset, recording
from efm_jax.envs import environments, evaluate, normalized_score, pointmaze, specs
from efm_jax.envs.pointmaze import BEST, Gains, Maze, routes, steer, wanderer


def draw(*rows, scale=1.0):
    """A maze from rows of # and spaces."""
    return Maze(tuple(tuple(cell != "#" for cell in row) for row in rows), scale)


U = draw("#####", "#   #", "### #", "#   #", "#####")
RING = draw("######", "#    #", "# ## #", "#    #", "######")


def route(maze, start, goal):
    """All cells from `start` to `goal`."""
    following, cells = routes(maze, goal), [start]
    while cells[-1] != goal:
        cells.append(following[cells[-1]])
    return cells


def simulate(maze, act, start, goal, steps, velocity=(0.0, 0.0)):
    """A point mass like the environment's; walls stop it. States `[steps + 1, 4]`."""
    states = [np.array([*start, *velocity], float)]
    for _ in range(steps):
        state = states[-1]
        observation = {"observation": state, "achieved_goal": state[:2], "desired_goal": goal}
        speed = np.clip(state[2:] + 0.24 * np.clip(act(observation), -1, 1), -5, 5)
        place = state[:2].copy()
        for axis in (0, 1):
            there = place.copy()
            there[axis] += 0.01 * speed[axis]
            try:
                maze.cell(*there)
                place = there
            except ValueError:
                speed[axis] = 0.0
        states.append(np.concatenate([place, speed]))
    return np.array(states)


def test_shortest_routes():
    assert route(U, (3, 1), (1, 1)) == [(3, 1), (3, 2), (3, 3), (2, 3), (1, 3), (1, 2), (1, 1)]
    assert route(U, (1, 1), (1, 1)) == [(1, 1)]
    assert len(route(RING, (1, 1), (3, 4))) == 6
    assert len(route(RING, (2, 1), (3, 4))) == 5  # the short way around
    assert len(route(RING, (2, 1), (1, 4))) == 5
    assert set(routes(RING, (1, 1))) == set(RING.cells)


def test_routes_are_as_long_as_an_independent_search_says():
    rng = np.random.default_rng(0)
    for _ in range(20):
        free = rng.random((6, 7)) < 0.7
        maze = Maze(tuple(tuple(bool(cell) for cell in row) for row in free))
        goal = maze.cells[rng.integers(len(maze.cells))]
        distance = np.full(free.shape, np.inf)
        distance[goal] = 0
        for _ in range(free.size):  # repeated relaxation
            padded = np.pad(distance, 1, constant_values=np.inf)
            near = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
            near = np.min(near, axis=0)
            distance = np.where(free, np.minimum(distance, near + 1), np.inf)
        reached = {tuple(int(i) for i in cell) for cell in np.argwhere(np.isfinite(distance))}
        assert set(routes(maze, goal)) == reached
        for cell in reached:
            assert len(route(maze, cell, goal)) == distance[cell] + 1


def test_positions_and_cells():
    maze = draw("#####", "#   #", "#####", scale=2.0)
    assert maze.middle((1, 2)) == (0, 0)
    assert maze.middle((1, 1)) == (-2, 0)
    assert U.middle((1, 1)) == (-1, 1)  # y points up, rows count down
    for grid in (maze, U, RING):
        for cell in grid.cells:
            x, y = grid.middle(cell)
            reach = 0.49 * grid.scale
            steps = itertools.product((-reach, reach), repeat=2)
            assert {grid.cell(x + dx, y + dy) for dx, dy in steps} == {cell}
    for x, y in [(0.0, 2.0), (9.0, 0.0), (0.0, -9.0), (-2.6, 0.0)]:
        with pytest.raises(ValueError, match="expected a place in a free cell"):
            U.cell(x, y)


@pytest.mark.parametrize("maze", [U, RING])
def test_expert_reaches_every_goal_and_stays(maze):
    for start in maze.cells:
        goal = np.array(maze.middle(maze.cells[0])) + 0.2
        states = simulate(maze, pointmaze.expert(maze), maze.middle(start), goal, 400)
        distances = np.hypot(*(states[:, :2] - goal).T)
        assert distances[-50:].max() < 0.1
        steps = len(route(maze, start, maze.cells[0]))
        assert np.argmax(distances < 0.45) <= 30 * steps


def test_a_push_off_the_route_is_recovered():
    x, y = RING.middle((2, 1))
    goal = np.array(RING.middle((1, 4)))
    states = simulate(RING, pointmaze.expert(RING), (x, y - 0.4), goal, 400, velocity=(0.0, -5.0))
    assert (3, 1) in {RING.cell(*state[:2]) for state in states}
    assert_allclose(states[-1], [*goal, 0, 0], atol=0.01)


def test_steering_is_a_pd_law_towards_the_next_cell():
    goal = np.array(U.middle((1, 1)))
    gains = Gains(position=3.0, velocity=2.0)
    # In (3, 1): next is the middle of (3, 2), at (0, -1).  In the goal's cell: the goal itself.
    for y, towards in ((-1.1, (3 * 0.9, 3 * 0.1)), (1.1, (-3 * 0.1, -3 * 0.1))):
        found = steer(U, gains, np.array([-0.9, y, 0.5, -0.25]), goal)
        assert_allclose(found, np.array(towards) - 2 * np.array([0.5, -0.25]))


def test_no_route_is_an_error():
    maze = draw("#####", "# # #", "#####")
    with pytest.raises(ValueError, match="there is no route"):
        steer(maze, BEST, np.array([-1.0, 0, 0, 0]), np.array([1.0, 0]))
    alone = wanderer(maze, np.random.default_rng(0), 0.5)
    with pytest.raises(ValueError, match="expected a second cell"):
        alone({"observation": np.array([-1.0, 0, 0, 0])})


def test_wanderer_visits_the_maze_and_ignores_the_goal():
    visits = np.zeros(len(U.cells))
    for episode in range(20):
        paths = []
        for goal in (U.middle((1, 1)), U.middle((3, 1))):
            act = wanderer(U, np.random.default_rng(episode), 0.5)
            paths.append(simulate(U, act, U.middle((3, 1)), np.array(goal), 300))
        assert_array_equal(*paths)
        seen = {U.cell(*state[:2]) for state in paths[0]}
        visits += [cell in seen for cell in U.cells]
    assert (visits >= 5).all()


def test_wanderers_differ_and_noise_is_scaled():
    first = {"observation": np.array([-1.0, -1.0, 0.0, 0.0])}
    actions = [wanderer(U, np.random.default_rng(seed), 0.0)(first) for seed in range(2)]
    assert not np.array_equal(*actions)

    def deviation(noise):
        spreads = []
        for seed in range(30):
            act = wanderer(U, np.random.default_rng(seed), noise)
            spreads.append(np.std([act(first)[1] for _ in range(100)]))
        return np.mean(spreads)

    assert deviation(0.0) == 0
    assert deviation(0.5) == pytest.approx(0.5, rel=0.25)


def spec(name, **kwargs):
    return EnvSpec(name, "gymnasium_robotics.envs.maze.point_maze:PointMazeEnv", kwargs=kwargs)


def test_task_has_one_goal_and_continues():
    rows = [[1] * 5, [1, 0, 0, 0, 1], [1] * 5]
    plain = spec("PointMaze_UMaze-v3", maze_map=rows, reward_type="sparse")
    before = copy.deepcopy(plain)
    assert pointmaze.task(plain).kwargs == {
        "maze_map": [[1] * 5, [1, "g", 0, 0, 1], [1] * 5],
        "reward_type": "sparse",
        "continuing_task": True,
        "reset_target": False,
    }
    assert plain == before
    assert pointmaze.is_point_maze(plain)
    pendulum = EnvSpec("Pendulum-v1", "gymnasium.envs.classic_control:PendulumEnv")
    assert not pointmaze.is_point_maze(pendulum)
    marked = pointmaze.task(spec("PointMaze_Medium_Diverse_GR-v3", maze_map=[[1, "c", 0, 1]]))
    assert marked.kwargs["maze_map"] == [[1, "c", 0, 1]]
    dense = pointmaze.task(spec("PointMaze_UMazeDense-v3", maze_map=rows))
    assert dense.kwargs["maze_map"][1][1] == "g"


@pytest.mark.parametrize("name", ["UMaze", "Open", "Medium", "Large"])
def test_real_map_and_positions(name):
    env = environments.make(pointmaze.task(specs.named("test", f"PointMaze_{name}-v3")))
    maze, theirs = Maze.of(env), env.unwrapped.maze
    assert len(maze.cells) > 5
    for cell in maze.cells:
        assert_allclose(maze.middle(cell), theirs.cell_rowcol_to_xy(np.array(cell)))
    goals = {maze.cell(*env.reset(seed=seed)[0]["desired_goal"]) for seed in range(20)}
    assert goals == {pointmaze.GOALS[name]}
    assert maze.cells == sorted(routes(maze, pointmaze.GOALS[name]))
    env.close()


def test_real_dataset_loads_and_its_expert_scores_100(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(recording, "REFERENCE_EPISODES", 6)
    env = environments.make(pointmaze.task(specs.named("test", "PointMaze_UMaze-v3")))
    maze = Maze.of(env)
    described = dict.fromkeys(["algorithm_name", "code_permalink", "description"], "x")
    options = {"seed": 0, "episodes": 6, "expert": pointmaze.expert(maze), **described}
    wander = lambda episode: wanderer(maze, np.random.default_rng(episode), 0.5)  # noqa: E731
    recording.record("efm/maze/test-v0", env, wander, **options)
    dataset = load_dataset("efm/maze/test-v0")
    assert dataset.transitions.observations.shape == (1800, 8)
    assert set(dataset.episode_lengths) == {300}
    assert not dataset.transitions.terminated.any()
    assert set(np.unique(dataset.transitions.rewards)) == {0, 1}
    # Rewards are the evaluated task's: near the goal that is observed (the first four numbers are
    # goals).
    after = dataset.transitions.next_observations
    distances = np.hypot(*(after[:, :2] - after[:, 2:4]).T)
    assert_array_equal(dataset.transitions.rewards, distances <= 0.45)

    def act(observations, step):
        expert, rows = pointmaze.expert(maze), observations[0].astype(float)
        return np.array(
            [[expert({"observation": row[4:], "desired_goal": row[2:4]}) for row in rows]]
        )

    # In a process that has never asked for the id: the spec is enough.
    assert json.loads(dataset.env_spec)["kwargs"]["maze_map"][1][1] == "g"
    seeds = range(1000, 1010)
    returns = evaluate(act, dataset.env_spec, episode_seeds=seeds).returns
    assert 90 < normalized_score(returns.mean(), dataset.reference_scores) < 110
    nothing = lambda observations, step: np.zeros((1, 10, 2))  # noqa: E731
    still = evaluate(nothing, dataset.env_spec, episode_seeds=seeds)
    assert still.returns.max() == 0
    assert normalized_score(dataset.episode_returns.mean(), dataset.reference_scores) < 30
