import copy
import json
import sys
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from numpy.testing import assert_allclose, assert_array_equal

from efm_jax.envs import (
    EvaluationError,
    dataset_references,
    evaluate,
    mean_and_interval,
    normalized_score,
    reference_scores,
    score,
)

SEEDS = [3, 11, 7]


class Countdown(gymnasium.Env):
    """Ends after 2 + seed % 5 steps, paying 1 a step; a second episode pays a million a step."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    closed = 0

    def __init__(self, truncates=False):
        self.truncates, self.episodes = truncates, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episodes, self.steps, self.total = self.episodes + 1, 0, 2 + (seed or 0) % 5
        return np.array([self.total, 0.0]), {}

    def step(self, action):
        self.steps += 1
        ended = self.steps == self.total
        reward = 1e6 if self.episodes > 1 else 10.0 if ended else 1.0
        observation = np.array([self.total, self.steps], float)
        return observation, reward, ended and not self.truncates, ended and self.truncates, {}

    def close(self):
        Countdown.closed += 1


class Passing(Countdown):
    """A success at step 4 alone."""

    def step(self, action):
        *rest, _ = super().step(action)
        return *rest, {"is_success": np.bool_(self.steps == 4)}


class Maze(gymnasium.Env):
    """Dict observations; the reward is the action."""

    observed: ClassVar = {"observation": [5.0, 6.0], "achieved_goal": [1.0], "desired_goal": [2.0]}
    observation_space = spaces.Dict(
        {name: spaces.Box(-10, 10, (len(value),), np.float64) for name, value in observed.items()}
    )
    action_space = spaces.Box(-2.0, 1.0, (1,), np.float32)

    def _observe(self):
        return {name: np.array(value) for name, value in self.observed.items()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action):
        return self._observe(), float(action[0]), False, False, {}


class Steered(Maze):
    action_space = spaces.Discrete(3)


@pytest.fixture(autouse=True, scope="module")
def _environments():
    made = {
        "efmtest/Countdown-v0": (Countdown, 20),
        "efmtest/Passing-v0": (Passing, 20),
        "efmtest/Endless-v0": (Countdown, None),
        "efmtest/Maze-v0": (Maze, 4),
        "efmtest/Steered-v0": (Steered, 4),
    }
    for name, (entry_point, limit) in made.items():
        gymnasium.register(name, entry_point=entry_point, max_episode_steps=limit)
    yield
    for name in made:
        gymnasium.registry.pop(name)


def swing(gain, observation, step):
    return np.float32([gain * observation[1] * observation[2] + 0.1 * np.sin(step)])


def zeros(observations, step):
    return np.zeros((*observations.shape[:2], 1))


def test_pendulum_matches_a_plain_loop():
    gains = np.array([0.5, -2.0])

    def act(observations, step):
        assert (observations.shape, observations.dtype) == ((2, 3, 3), np.float32)
        policies = zip(gains, observations, strict=True)
        return np.stack([[swing(gain, each, step) for each in seen] for gain, seen in policies])

    spec = gymnasium.spec("Pendulum-v1").to_json()
    result = evaluate(act, spec, num_policies=2, episode_seeds=SEEDS)

    expected = np.zeros((2, 3))
    for k, gain in enumerate(gains):
        for e, seed in enumerate(SEEDS):
            environment = gymnasium.make("Pendulum-v1")
            observation, _ = environment.reset(seed=seed)
            for step in range(200):
                action = np.clip(swing(gain, observation, step), -2.0, 2.0)
                observation, reward, _, _, _ = environment.step(action)
                expected[k, e] += reward
            environment.close()
    assert result.returns.dtype == np.float64
    assert result.lengths.dtype == np.int64
    assert_allclose(result.returns, expected, rtol=1e-12)
    assert_array_equal(result.lengths, 200)
    assert len(set(result.returns.ravel())) == 6


def test_episode_seeds_belong_to_episodes_not_to_policies():
    result = evaluate(zeros, "Pendulum-v1", num_policies=2, episode_seeds=SEEDS)
    assert_array_equal(result.returns[0], result.returns[1])
    assert len(set(result.returns[0])) == 3
    reverse = evaluate(zeros, "Pendulum-v1", episode_seeds=SEEDS[::-1])
    assert_array_equal(reverse.returns[0], result.returns[0, ::-1])


@pytest.mark.parametrize("truncates", [False, True])
def test_nothing_leaks_into_a_finished_episode(truncates):
    seeds = [0, 4, 2]
    calls, frozen = [], []
    spec = copy.deepcopy(gymnasium.spec("efmtest/Countdown-v0"))
    spec.kwargs = {"truncates": truncates}

    def act(observations, step):
        frozen.append(observations[0, 0].copy())
        return zeros(observations, step)

    options = {"num_policies": 2, "progress": lambda *done: calls.append(done)}
    result = evaluate(act, spec, episode_seeds=seeds, **options)
    lengths = np.array([2, 6, 4])
    assert_array_equal(result.lengths, [lengths, lengths])
    # 1 for every step but the last, which pays 10.
    assert_array_equal(result.returns, [lengths - 1 + 10.0] * 2)
    assert calls == [(1, 0), (2, 2), (3, 2), (4, 4), (5, 4), (6, 6)]
    assert_array_equal(frozen[2:], [[2.0, 2.0]] * 4)


def test_nan_in_a_finished_episode_is_no_error_but_in_a_running_one_is():
    def run(broken, value):
        def act(observations, step):
            actions = zeros(observations, step)
            if step == 3:
                actions[1, broken] = value
            return actions

        options = {"num_policies": 2, "episode_seeds": [0, 4]}
        return evaluate(act, "efmtest/Countdown-v0", **options).lengths.tolist()

    assert run(0, np.nan) == [[2, 6], [2, 6]]
    message = r"non-finite action .* at step 3 of episode 1 \(seed 4\) of policy 1"
    for value in (np.nan, np.inf):  # which no bound clips
        Countdown.closed = 0
        with pytest.raises(ValueError, match=message):
            run(1, value)
        assert Countdown.closed == 4


class Faulty(Countdown):
    """Does what its argument says in its second step."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def step(self, action):
        observation, reward, *ends = super().step(action)
        if self.steps == 2 and self.how == "raises":
            raise RuntimeError("it\nfell over")
        late = self.steps == 2
        observation = {"nan": observation * np.nan, "shape": observation[:1]}.get(
            self.how, observation
        )
        reward = {"reward": np.nan, "type": None}.get(self.how, reward)
        return (observation if late else np.zeros(2)), (reward if late else 1.0), *ends

    def reset(self, *, seed=None, options=None):
        if self.how == "reset":
            raise KeyError("start")
        return super().reset(seed=seed)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", "at step 1 of the episode with seed 11: RuntimeError: it fell over"),
        ("nan", "non-finite observation"),
        ("shape", "failed at the observations of step 2: ValueError"),
        ("type", "at step 1 of the episode with seed 11: TypeError"),
        ("reset", "at reset of the episode with seed 11: KeyError: 'start'"),
    ],
)
def test_what_an_environment_does_is_one_line_with_its_name(how, words):
    def make(spec):
        spec.kwargs = {"how": how}
        spec.entry_point = Faulty
        return gymnasium.make(spec, disable_env_checker=True)

    with pytest.raises(EvaluationError, match=words) as error:
        evaluate(zeros, "efmtest/Countdown-v0", episode_seeds=[11, 12], make=make)
    assert "environment efmtest/Countdown-v0" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_episode_with_a_success_at_any_step_is_one():
    seeds = [1, 2, 3]  # 3, 4 and 5 steps
    rollouts = evaluate(zeros, "efmtest/Passing-v0", episode_seeds=seeds, num_policies=2)
    assert_array_equal(rollouts.successes, [[0, 1, 1]] * 2)
    untold = evaluate(zeros, "efmtest/Countdown-v0", episode_seeds=seeds).successes
    assert_array_equal(untold, [[np.nan] * 3])
    rate = rollouts.successes.mean()
    assert score(-7.0, rate, None, "cube-single-singletask-task2-v0") == pytest.approx(200 / 3)
    assert score(-7.0, rate, None, "cube-single-v0") is None
    assert score(1.0, rate, (0.0, 2.0), "AntMaze_UMaze-v5") == 50


def test_dict_observations_are_flattened_by_key_and_actions_clipped():
    def act(observations, step):
        assert_array_equal(observations, np.broadcast_to([1.0, 2.0, 5.0, 6.0], (2, 2, 4)))
        return np.array([[[-5.0], [-0.5]], [[0.5], [5.0]]])

    result = evaluate(act, "efmtest/Maze-v0", num_policies=2, episode_seeds=[0, 1])
    assert_array_equal(result.returns, [[-8.0, -2.0], [2.0, 4.0]])


def test_length_must_be_bounded():
    with pytest.raises(ValueError, match=r"efmtest/Endless-v0 .*max_steps"):
        evaluate(zeros, "efmtest/Endless-v0", episode_seeds=[0])
    result = evaluate(zeros, "efmtest/Endless-v0", episode_seeds=[0, 4], max_steps=3)
    assert result.lengths.tolist() == [[2, 3]]
    assert result.returns.tolist() == [[11.0, 3.0]]
    limited = evaluate(zeros, "efmtest/Maze-v0", episode_seeds=[0], max_steps=100)
    assert limited.lengths.tolist() == [[4]]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ("NoSuchThing-v3", "NoSuchThing-v3"),
        ("Pendulum-v99", "Pendulum-v99"),
        ("not an id", "not an id"),
        ("{]", "EnvSpec"),
        ('{"id": "Pendulum-v1"}', "EnvSpec"),
        ("efmtest/Steered-v0", "Box action space"),
    ],
)
def test_bad_environment_is_one_line(environment, words):
    with pytest.raises(ValueError, match=words) as caught:
        evaluate(zeros, environment, episode_seeds=[0], max_steps=2)
    assert "\n" not in str(caught.value)


def test_missing_simulator_names_the_extra(monkeypatch):
    for module in [
        name for name in sys.modules if name.startswith(("gymnasium.envs.mujoco", "mujoco"))
    ]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ValueError, match=r"Hopper-v5 .*pip install 'efm-jax\[mujoco\]'") as caught:
        evaluate(zeros, "Hopper-v5", episode_seeds=[0])
    assert "\n" not in str(caught.value)


def test_code_that_a_spec_names_is_refused():
    spec = json.loads(gymnasium.spec("Pendulum-v1").to_json())
    spec["entry_point"] = "no_such_package.envs:Thing"
    with pytest.raises(
        ValueError, match=r"code .no_such_package.envs:Thing. under the id Pendulum-v1"
    ):
        evaluate(zeros, json.dumps(spec), episode_seeds=[0])


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one seed"):
        evaluate(zeros, "Pendulum-v1", episode_seeds=[])
    with pytest.raises(ValueError, match="num_policies"):
        evaluate(zeros, "Pendulum-v1", episode_seeds=[0], num_policies=0)
    with pytest.raises(ValueError, match=r"actions: expected shape \(1, 1, 1\)"):
        evaluate(lambda observations, step: np.zeros((1, 1)), "Pendulum-v1", episode_seeds=[0])


def test_rendering_asked_for_by_a_recorded_spec_is_dropped():
    spec = copy.deepcopy(gymnasium.spec("Pendulum-v1"))  # the registry's is everybody's
    spec.kwargs = {"render_mode": "no_such_mode"}
    assert evaluate(zeros, spec.to_json(), episode_seeds=[0], max_steps=1).lengths.tolist() == [[1]]


SCORES = {
    "Hopper-v5 Hopper-v2 hopper-medium-v2 hopper-full-replay-v2 mujoco/hopper/medium-v0 "
    "mujoco/hopper/expert-v0": (-20.272305, 3234.3),
    "HalfCheetah-v4 halfcheetah-medium-expert-v2": (-280.178953, 12135.0),
    "Walker2d-v5 walker2d-medium-replay-v2": (1.629008, 4592.3),
    "Ant-v5 ant-random-v2 mujoco/ant/simple-v0 mujoco/ant/expert-finetuned-v0": (-325.6, 3879.7),
    "AntMaze_UMaze-v5 AntMaze_Large_Diverse_GR-v4 antmaze-large-play-v2 D4RL/antmaze/umaze-v1 "
    "D4RL/antmaze/large-diverse-v2": (0.0, 1.0),
    "FrankaKitchen-v1 kitchen-mixed-v0 D4RL/kitchen/complete-v2": (0.0, 4.0),
    "AdroitHandPen-v1 pen-human-v1 D4RL/pen/human-v2": (96.262799, 3076.8331017826877),
    "AdroitHandDoor-v1 door-cloned-v0": (-56.512833, 2880.5693087298737),
    "AdroitHandHammer-v1 hammer-expert-v1": (-274.856578, 12794.134825156867),
    "AdroitHandRelocate-v1 relocate-human-v1 D4RL/relocate/cloned-v2": (
        -6.425911,
        4233.877797728884,
    ),
    "maze2d-umaze-v1 D4RL/pointmaze/umaze-v2": (23.85, 161.86),
    "maze2d-large-dense-v1 D4RL/pointmaze/large-dense-v2": (30.569041, 303.4857382709002),
    "antmaze-large-navigate-v0 ogbench:cube-double-play-v0 puzzle-4x6-noisy-v0 scene-v0 "
    "humanoidmaze-giant-v0": (0.0, 1.0),
    "Pendulum-v1 AdroitHandPenSparse-v1 AntMaze_UMazeDense-v5 HopperBulletEnv-v0 "
    "hopper-stochastic-v3 PointMaze_UMaze-v3 maze2d-umaze-v9 D4RL/pointmaze/open-v2 "
    "D4RL/minigrid/fourrooms-v0 mujoco/humanoid/expert-v0 mujoco/hopper/ "
    "cube-single-play-singletask-v0 antmaze-large-singletask-task1-v0 "
    "powderworld-easy-play-v0": None,
}


def test_reference_scores():
    for names, expected in SCORES.items():
        found = {name: reference_scores(name) for name in names.split()}
        assert found == dict.fromkeys(names.split(), expected)


def test_references_of_a_dataset_are_its_own_then_its_names_then_its_environments():
    hopper, kitchen = reference_scores("Hopper-v5"), reference_scores("FrankaKitchen-v1")
    spec, file = gymnasium.spec("Hopper-v5").to_json(), "some/file.hdf5"
    for own, name, environment, expected in (
        ((0.0, 2.0), "hopper-medium-v2", "FrankaKitchen-v1", (0.0, 2.0)),
        (None, "hopper-medium-v2", "FrankaKitchen-v1", hopper),
        (None, file, "FrankaKitchen-v1", kitchen),
        (None, file, spec, hopper),
        (None, file, "Pendulum-v1", None),
        (None, file, None, None),
    ):
        assert dataset_references(own, name, environment) == expected


def test_normalized_score():
    references = reference_scores("Hopper-v5")
    assert normalized_score(-20.272305, references) == 0.0
    assert normalized_score(3234.3, references) == 100.0
    assert_allclose(normalized_score(np.array([[0.5], [2.0]]), (0.0, 1.0)), [[50.0], [200.0]])
    assert normalized_score(5.0, None) is None
    with pytest.raises(ValueError, match="references"):
        normalized_score(5.0, (1.0, 1.0))


def test_mean_and_interval():
    # Student's t with 4 degrees of freedom: 2.7764451 from the printed table; s = sqrt(2.5).
    mean, low, high = mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    margin = 2.7764451 * np.sqrt(2.5 / 5)
    assert_allclose([mean, low, high], [3.0, 3.0 - margin, 3.0 + margin], rtol=1e-7)
    assert mean_and_interval([4.0]) == (4.0, 4.0, 4.0)
    for bad in (([],), ([[1.0, 2.0]],), ([1.0, 2.0], 1.0), ([1.0, 2.0], 0.0)):
        with pytest.raises(ValueError, match=r"values|confidence"):
            mean_and_interval(*bad)
