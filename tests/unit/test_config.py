import dataclasses
import importlib
import json
import subprocess
import sys

import numpy as np
import pytest

from efm_jax import checks
from efm_jax.rl.agents import make_agent
from efm_jax.rl.config import OPTIONS, PHASES, QIPOConfig, describe, register_options

FIELDS = {field.name: field for field in dataclasses.fields(QIPOConfig) if field.name != "options"}
PHASE_RATES = [f"{phase}_learning_rate" for phase in PHASES]
WRONG_TYPES = {
    int: [1.5, 2.0, "3", True, None, (1,)],
    float: ["0.5", True, None, (0.5,)],
    str: [3, None, True],
    bool: [1, 0, "yes", None],
    tuple[int, ...]: [64, "64", None, [64, 64], (64, "64"), (64.0,), (True,)],
}
WRONG_VALUES = {
    "dtype": ["float16", "bf16"],
    "learning_rate_schedule": ["linear"],
    "action_selection": ["greedy"],
    "data_copies": [-1.0, np.nan, np.inf],
    "target_ess": [-0.1, 1.0, np.nan],
    "pessimism": [-1.0, np.nan, np.inf],
    "eval_sample_steps": [-1],
    "estimator": ["half"],
    "hidden_dims": [(), (0,), (64, -1)],
    "critic_hidden_dims": [(), (0,), (64, -1)],
    "time_features": [0, 1, 3, -2],
    "learning_rate": [0.0, -1e-3, np.nan, np.inf],
    **{name: [-1e-3, np.nan, np.inf] for name in PHASE_RATES},
    "max_grad_norm": [-1.0, np.nan, np.inf],
    "table_polyak": [-0.1, 1.5, np.nan],
    "ema_decay": [-0.1, 1.0, 1.5, np.nan],
    "beta": [-1.0, np.nan, np.inf],
    "beta_q": [-1.0, np.nan, np.inf],
    "guard": [-1.0, np.nan, np.inf],
    "discount": [-0.1, 1.1, np.nan],
    "polyak": [0.0, -0.1, 1.1, np.nan],
    "expectile": [0.0, 1.0, -0.5, np.nan],
    "eval_every": [-1],
    "max_transitions": [-1],
    **{f"{phase}_batch_size": [-1] for phase in PHASES},
    **{
        name: [0, -1]
        for name in (
            "batch_size", "sample_steps", "support_size", "renew_every", "behavior_steps",
            "critic_steps", "policy_steps", "log_every", "checkpoint_every", "eval_episodes",
            "num_critics", "n_step", "num_candidates", "guard_steps", "guard_length",
        )
    },
}  # fmt: skip
BOUNDARIES = {
    "max_grad_norm": 0.0, "ema_decay": 0.0, "beta": 0.0, "beta_q": 0.0, "discount": 1.0,
    "data_copies": 0.0, "table_polyak": 1.0,
    "critic_learning_rate": 0.0, "critic_batch_size": 0, "polyak": 1.0,
    "eval_every": 0, "batch_size": 1, "support_size": 1, "time_features": 2, "hidden_dims": (1,),
    "learning_rate": 1, "pessimism": 0.0, "guard": 0.0, "target_ess": 0.0, "eval_sample_steps": 0,
}  # fmt: skip


def replaced(name, value):
    return dataclasses.replace(QIPOConfig(), **{name: value})


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_types_and_values_name_the_field(name):
    wrong = [(value, (TypeError, ValueError)) for value in WRONG_TYPES[FIELDS[name].type]]
    wrong += [(value, ValueError) for value in WRONG_VALUES.get(name, [])]
    for value, error in wrong:
        with pytest.raises(error, match=rf"^{name}: expected .*; got "):
            replaced(name, value).validate()


def test_every_field_that_can_be_wrong_is_checked():
    # The registries, which own the names, refuse unknown ones: test_model, test_agents and
    # test_data_preprocess.
    names = {"path", "prediction", "loss", "network", "activation", "solver", "eval_solver"}
    names |= {"critic", "policy", "reward_transform"}
    assert set(FIELDS) - set(WRONG_VALUES) == names | {"layer_norm", "critic_layer_norm"}


def test_values_at_a_boundary_are_accepted():
    for name, value in BOUNDARIES.items():
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
    with pytest.raises(ValueError, match=r"unknown field 'expectle'; did you mean expectile\?"):
        QIPOConfig.from_dict({"expectle": 1, "beta": 1.0})
    with pytest.raises(ValueError, match=r"^beta: "):
        QIPOConfig.from_dict({"beta": -1.0})


@pytest.mark.parametrize(
    ("preset", "name", "path"),
    [
        ("qipo_ot", "qipo_ot", "ot"),
        ("qipo_diff", "qipo_diff", "vp"),
        ("quick", "qipo_ot", "ot"),
        ("ogbench", "qipo_ot", "ot"),
    ],
)
def test_presets(preset, name, path):
    config = importlib.import_module(f"experiments.configs.{preset}").get_config().validate()
    assert (make_agent(config, 3, 2).name, config.path) == (name, path)


def test_a_preset_loads_neither_data_formats_nor_environments_nor_networks():
    code = "import sys, experiments.configs.qipo_ot; print('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "efm_jax.rl.config" in loaded
    heavy = {"h5py", "gymnasium", "minari", "flax", "optax", "orbax", "diffrax", "matplotlib"}
    assert not loaded & (heavy | {"efm_jax.networks", "efm_jax.losses", "efm_jax.data"})


@dataclasses.dataclass
class Options:
    # A heading.

    # Above
    temperature: float = 1.0  # and beside.
    layers: tuple[int, ...] = (4,)

    def validate(self):
        checks.check_number("mine.temperature", self.temperature, minimum=0.0)


@pytest.fixture
def mine():
    register_options("mine", Options)
    yield
    OPTIONS.pop("mine")


def test_options_of_a_registered_critic_are_fields(mine):
    config = QIPOConfig()
    config.mine.temperature = 2.5
    values = json.loads(json.dumps(config.validate().to_dict()))
    assert values["mine"] == {"temperature": 2.5, "layers": [4]}
    assert QIPOConfig.from_dict(values) == config
    assert QIPOConfig.from_dict({"mine": {"layers": [1]}}).mine.layers == (1,)
    for name, value in (("temperature", -1.0), ("temperature", "hot"), ("layers", [4])):
        config = QIPOConfig()
        setattr(config.mine, name, value)
        with pytest.raises((ValueError, TypeError), match=rf"^mine\.{name}: expected "):
            config.validate()
    with pytest.raises(ValueError, match=r"unknown field 'mine.nosuch'"):
        QIPOConfig.from_dict({"mine": {"nosuch": 1}})


def test_every_field_tells_its_meaning(mine):
    rows = {name: (kind, default, meaning) for name, kind, default, meaning in describe()}
    assert rows.keys() == {*FIELDS, "mine.temperature", "mine.layers"}
    assert [name for name in FIELDS if not rows[name][2]] == []
    assert rows["mine.temperature"] == ("float", 1.0, "Above and beside.")
    assert rows["hidden_dims"][:2] == ("tuple of integers", (64, 64, 64))
    assert "Critic" not in rows["critic"][2]


def test_options_that_cannot_be_registered():
    with pytest.raises(TypeError, match=r"^options: expected a dataclass; got "):
        register_options("mine", dict)
    for name in ("beta", "options", "validate", "not a name"):
        with pytest.raises(ValueError, match=r"^name: expected an identifier that is no field"):
            register_options(name, Options)
    with pytest.raises(AttributeError, match="no field 'mine'"):
        QIPOConfig().mine  # noqa: B018
