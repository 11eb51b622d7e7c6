import dataclasses
import importlib
import json

import numpy as np
import pytest

from efm_jax.rl.config import QIPOConfig

FIELDS = {field.name: field for field in dataclasses.fields(QIPOConfig)}
WRONG_TYPES = {
    int: [1.5, 2.0, "3", True, None, (1,)],
    float: ["0.5", True, None, (0.5,)],
    str: [3, None, True],
    bool: [1, 0, "yes", None],
    tuple[int, ...]: [64, "64", None, [64, 64], (64, "64"), (64.0,), (True,)],
}
WRONG_VALUES = {
    "path": ["linear", "", "OT"],
    "network": ["resnet"],
    "activation": ["swish"],
    "dtype": ["float16", "bf16"],
    "solver": ["rk45"],
    "critic": ["sarsa"],
    "policy": ["sac"],
    "learning_rate_schedule": ["linear"],
    "action_selection": ["greedy"],
    "eval_solver": ["rk45", ""],
    "data_copies": [0.0, -1.0, np.nan, np.inf],
    "target_ess": [-0.1, 1.0, np.nan],
    "pessimism": [-1.0, np.nan, np.inf],
    "eval_sample_steps": [-1],
    "estimator": ["half"],
    "hidden_dims": [(), (0,), (64, -1)],
    "critic_hidden_dims": [(), (0,), (64, -1)],
    "time_features": [0, 1, 3, -2],
    "learning_rate": [0.0, -1e-3, np.nan, np.inf],
    "critic_learning_rate": [0.0, -1e-3, np.nan, np.inf],
    "max_grad_norm": [-1.0, np.nan, np.inf],
    "ema_decay": [-0.1, 1.0, 1.5, np.nan],
    "beta": [-1.0, np.nan, np.inf],
    "beta_q": [-1.0, np.nan, np.inf],
    "discount": [-0.1, 1.1, np.nan],
    "polyak": [0.0, -0.1, 1.1, np.nan],
    "expectile": [0.0, 1.0, -0.5, np.nan],
    "eval_every": [-1],
    "max_transitions": [-1],
    **{
        name: [0, -1]
        for name in (
            "batch_size", "sample_steps", "support_size", "renew_every", "behavior_steps", "critic_steps",
            "policy_steps", "log_every", "checkpoint_every", "eval_episodes", "num_critics", "n_step",
            "num_candidates",
        )
    },
}  # fmt: skip
BOUNDARIES = {
    "max_grad_norm": 0.0, "ema_decay": 0.0, "beta": 0.0, "beta_q": 0.0, "discount": 1.0, "polyak": 1.0,
    "eval_every": 0, "batch_size": 1, "support_size": 1, "time_features": 2, "hidden_dims": (1,),
    "learning_rate": 1, "pessimism": 0.0, "target_ess": 0.0, "eval_sample_steps": 0,
}  # fmt: skip


def replaced(name, value):
    return dataclasses.replace(QIPOConfig(), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, field in FIELDS.items() for value in WRONG_TYPES[field.type]],
)
def test_wrong_type_names_the_field(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .*; got "):
        replaced(name, value).validate()


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in WRONG_VALUES.items() for v in values]
)
def test_wrong_value_names_the_field(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*; got "):
        replaced(name, value).validate()


def test_every_field_that_can_be_wrong_is_checked():
    # preprocess, which owns the choices, refuses an unknown reward_transform.
    assert set(FIELDS) - set(WRONG_VALUES) == {
        "layer_norm",
        "critic_layer_norm",
        "reward_transform",
    }


@pytest.mark.parametrize(("name", "value"), BOUNDARIES.items())
def test_values_at_a_boundary_are_accepted(name, value):
    assert getattr(replaced(name, value).validate(), name) == value


@pytest.mark.parametrize(
    "config",
    [
        QIPOConfig(),
        QIPOConfig(path="vp", hidden_dims=(8, 4), beta=3.5, critic="iql", layer_norm=True),
    ],
)
def test_dict_round_trip_through_json(config):
    assert QIPOConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_refuses_what_validate_refuses():
    with pytest.raises(ValueError, match=r"unknown field 'nosuch'"):
        QIPOConfig.from_dict({"nosuch": 1, "beta": 1.0})
    with pytest.raises(ValueError, match=r"^beta: "):
        QIPOConfig.from_dict({"beta": -1.0})


@pytest.mark.parametrize(
    ("preset", "algorithm", "path"),
    [("qipo_ot", "qipo_ot", "ot"), ("qipo_diff", "qipo_diff", "vp"), ("quick", "qipo_ot", "ot")],
)
def test_presets(preset, algorithm, path):
    config = importlib.import_module(f"experiments.configs.{preset}").get_config().validate()
    assert (config.algorithm, config.path) == (algorithm, path)


def test_fields_of_the_public_contract():
    assert FIELDS.keys() >= {
        "path", "beta", "support_size", "renew_every", "estimator", "behavior_steps", "critic_steps",
        "policy_steps", "batch_size", "learning_rate", "hidden_dims", "sample_steps", "solver", "critic",
        "discount", "checkpoint_every", "log_every", "eval_episodes",
    }  # fmt: skip


def test_guidance_needs_a_score():
    with pytest.raises(ValueError, match=r"^path: expected 'vp' with policy=qgpo"):
        QIPOConfig(policy="qgpo").validate()
    assert QIPOConfig(policy="qgpo", path="vp").validate().algorithm == "qgpo"


def test_behaviour_cloning_has_no_policy_phase():
    assert QIPOConfig(policy="bc").phase_steps["policy"] == 0
    assert QIPOConfig().phase_steps == {"behavior": 10_000, "critic": 10_000, "policy": 10_000}
