"""The presets of `experiments/configs/d4rl/` and what `launch.reproduce` counts as a score."""

import dataclasses
import importlib

import numpy as np
import pandas as pd
import pytest

from efm_jax.data.d4rl_files import D4RL_FILES
from efm_jax.envs import reference_scores
from efm_jax.rl.agents import make_agent
from launch.reproduce import ANTMAZE, LOCOMOTION, PUBLISHED, seed_scores


def preset(name):
    return importlib.import_module(f"experiments.configs.d4rl.{name}").get_config().validate()


def test_tasks_are_d4rls():
    assert (len(LOCOMOTION), len(ANTMAZE)) == (9, 6)
    for task in (*LOCOMOTION, *ANTMAZE):
        assert task in D4RL_FILES
        assert reference_scores(task) is not None
    assert PUBLISHED.keys() <= {*LOCOMOTION, *ANTMAZE}


@pytest.mark.parametrize(("path", "algorithm"), [("ot", "qipo_ot"), ("vp", "qipo_diff")])
@pytest.mark.parametrize("settings", ["", "_code"])
@pytest.mark.parametrize("name", ["locomotion", "antmaze"])
def test_presets_are_the_papers_and_its_codes(name, settings, path, algorithm):
    config = dataclasses.replace(preset(name + settings), path=path).validate()
    agent = make_agent(config, 17, 6)
    assert agent.name == algorithm
    assert list(agent.phase_steps.values()) == [600_000, 500_000, 100_000]
    assert (config.beta, config.support_size) == (3.0, 64)
    batches = [config.of_phase("batch_size", phase) for phase in agent.phase_steps]
    assert (config.sample_steps, batches) == (15, [4096, 256, 256])
    tables = range(0, config.policy_steps, config.renew_every)
    assert (len(tables), config.eval_every, config.eval_episodes) == (10, 5000, 100)
    assert (config.critic, config.num_critics) == ("softmax_q", 2)
    assert config.critic_hidden_dims == (256, 256, 256)
    beta_q = {"locomotion": 1.0, "antmaze": 20.0}[name]
    assert (config.discount, config.polyak, config.beta_q) == (0.99, 0.005, beta_q)
    code = settings == "_code"
    assert (config.data_copies, config.table_polyak) == ((0.0, 0.005) if code else (1.0, 0.0))
    model = agent.model.prediction, agent.model.solver
    velocity = path == "ot" and not code
    assert model == (("velocity", "midpoint") if velocity else ("noise", "dpmpp"))
    assert (config.learning_rate, config.critic_learning_rate) == (1e-4, 3e-4)
    assert config.reward_transform == name


def returns(*rows):
    """Make the rows of returns.csv of (step, seed, episodes)."""
    columns = ["total_step", "seed", "return"]
    return pd.DataFrame(rows, columns=columns).explode("return").assign(policy="policy")


def test_locomotion_scores_are_of_the_mean_return():
    low, high = reference_scores("hopper-medium-v2")
    last = ("1000", "0", [low, low]), ("1000", "10", [low, high])
    early = ("90", "0", [low, high]), ("90", "10", [high])
    scores = seed_scores("hopper-medium-v2", returns(*last, *early))
    assert list(scores.index) == [("policy", 90), ("policy", 1000)]  # numbers in order, not texts
    np.testing.assert_allclose(scores, [[50.0, 100.0], [0.0, 50.0]], atol=1e-9)


def test_antmaze_scores_are_shares_of_successes():
    episodes = ("90", "0", [0.0, 1.0, 0.0, 0.0]), ("90", "10", [37.0, 0.0, 2.0, 1.0])
    scores = seed_scores("antmaze-umaze-v2", returns(*episodes))
    np.testing.assert_allclose(scores, [[25.0, 75.0]])
