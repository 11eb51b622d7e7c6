"""The hyper-parameters of offline RL: each defined, typed and checked here, once."""

import dataclasses
import typing

from efm_jax import checks
from efm_jax.data import REWARD_TRANSFORMS
from efm_jax.networks import ACTIVATIONS, FIELDS
from efm_jax.paths import PATHS
from efm_jax.rl.critics import CRITICS
from efm_jax.rl.policies import POLICIES
from efm_jax.rl.selection import ACTION_SELECTIONS
from efm_jax.sampling import SAMPLE_SOLVERS

ESTIMATORS = ("full", "resample")
SCHEDULES = ("constant", "cosine")
DTYPES = ("float32", "bfloat16")
SOLVERS = ("auto", *SAMPLE_SOLVERS, "dpmpp")
PHASES = ("behavior", "critic", "policy")


@dataclasses.dataclass
class QIPOConfig:
    """Hyper-parameters of the three stages; the defaults fit the built-in data."""

    policy: str = "qipo"  # what follows behavior model and critic; bc: nothing
    # The generative model: of the behavior, then of the improved policy.
    path: str = "ot"  # ot and vp_cosine learn a velocity (QIPO-OT), vp a score (QIPO-Diff)
    network: str = "mlp"
    hidden_dims: tuple[int, ...] = (64, 64, 64)
    activation: str = "silu"
    layer_norm: bool = False
    time_features: int = 12
    dtype: str = (
        "float32"  # what the model's layers compute in; parameters, losses and critics stay float32
    )
    learning_rate: float = 1e-3
    # cosine: from learning_rate to 0 over each of the behavior and policy phases.
    learning_rate_schedule: str = "constant"
    batch_size: int = 256  # states per step, over all devices
    max_grad_norm: float = 1.0  # of the behavior and policy gradients; 0 does not clip
    ema_decay: float = 0.0  # of the parameters that act; 0 acts with the last parameters
    # auto: midpoint for velocities, DPM-Solver++ for scores.  Euler's few steps narrow every
    # support set, and renewals compound it.
    solver: str = "auto"
    sample_steps: int = 10
    # Energy weighting; in qgpo of the guidance, in reweight and gaussian of the advantages.
    beta: float = 10.0
    # qipo, qgpo: at every renewal, the beta at which support sets have this mean effective sample
    # size, as a fraction of their size; 0 keeps beta fixed.
    target_ess: float = 0.0
    support_size: int = 16  # actions drawn from the policy for each state; the data action is added
    # As many support actions the data action counts for: more of it keeps the policy near the data,
    # where errors of sampling cannot compound over renewals.
    data_copies: float = 1.0
    renew_every: int = 2500
    estimator: str = "full"  # full: all support actions a step; resample: one, drawn by its weight
    # Critic.
    critic: str = "softmax_q"
    critic_hidden_dims: tuple[int, ...] = (64, 64, 64)
    critic_layer_norm: bool = False
    critic_learning_rate: float = 1e-3
    num_critics: int = 2  # Q-networks; softmax_q and iql take their minimum
    pessimism: float = 1.0  # ensemble: standard deviations under the mean
    # Values must travel over 1 / (1 - discount) Bellman backups, each taking about 1 / polyak
    # steps: keep critic_steps above a few times their product.
    discount: float = 0.98
    n_step: int = (
        1  # rewards of the data before a target looks at a value; values travel so much faster
    )
    polyak: float = 0.02
    beta_q: float = 1.0  # softmax_q: inverse temperature over the next state's support actions
    expectile: float = 0.7  # iql, ensemble
    # Acting.
    action_selection: str = "sample"  # best, mean: of num_candidates sampled actions
    num_candidates: int = 16
    eval_solver: str = "same"  # as in training, or another
    eval_sample_steps: int = 0  # 0: as in training
    # Data and schedule.
    max_transitions: int = 0  # train on the first so many of the dataset; 0 on all
    reward_transform: str = "none"
    behavior_steps: int = 10_000
    critic_steps: int = 10_000
    policy_steps: int = 10_000
    log_every: int = 500
    checkpoint_every: int = 5_000
    eval_every: int = 2_500  # policy steps between evaluations; 0 evaluates at the end only
    eval_episodes: int = 10

    @property
    def algorithm(self) -> str:
        """What results call this configuration: qipo_ot and qipo_diff are the paper's names."""
        return POLICIES[self.policy].name(self)

    @property
    def path_name(self) -> str:
        """The path as it is in names of algorithms."""
        return {"ot": "ot", "vp": "diff", "vp_cosine": "cosine"}[self.path]

    @property
    def phase_steps(self) -> dict[str, int]:
        """Training steps of every phase."""
        policy_steps = self.policy_steps if POLICIES[self.policy].trains else 0
        return {
            "behavior": self.behavior_steps,
            "critic": self.critic_steps,
            "policy": policy_steps,
        }

    def validate(self) -> "QIPOConfig":
        """Return self, or raise a ``ValueError`` or ``TypeError`` that names the field."""
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), field.type)
        for name, choices in (
            ("policy", POLICIES),
            ("path", PATHS),
            ("network", FIELDS),
            ("activation", ACTIVATIONS),
            ("solver", SOLVERS),
            ("dtype", DTYPES),
            ("critic", CRITICS),
            ("estimator", ESTIMATORS),
            ("learning_rate_schedule", SCHEDULES),
            ("action_selection", ACTION_SELECTIONS),
            ("eval_solver", ("same", *SOLVERS)),
            ("reward_transform", REWARD_TRANSFORMS),
        ):
            checks.check_choice(name, getattr(self, name), choices)
        for name in (
            "batch_size", "sample_steps", "support_size", "renew_every", "behavior_steps", "critic_steps",
            "policy_steps", "log_every", "checkpoint_every", "eval_episodes", "num_critics", "n_step",
            "num_candidates",
        ):  # fmt: skip
            checks.check_integer(name, getattr(self, name), 1)
        for name in ("max_transitions", "eval_every", "eval_sample_steps"):
            checks.check_integer(name, getattr(self, name), 0)
        checks.check_integer("time_features", self.time_features, 2)
        if self.time_features % 2:
            raise ValueError(f"time_features: expected an even number; got {self.time_features}")
        for name in ("hidden_dims", "critic_hidden_dims"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one hidden layer; got none")
            for width in getattr(self, name):
                checks.check_integer(name, width, 1)
        for name in ("beta", "beta_q", "max_grad_norm", "pessimism"):
            checks.check_number(name, getattr(self, name), minimum=0.0)
        for name in ("learning_rate", "critic_learning_rate", "data_copies"):
            checks.check_number(name, getattr(self, name), minimum=0.0, open_minimum=True)
        checks.check_number("discount", self.discount, minimum=0.0, maximum=1.0)
        checks.check_number("polyak", self.polyak, minimum=0.0, maximum=1.0, open_minimum=True)
        for name in ("expectile", "ema_decay", "target_ess"):
            value = getattr(self, name)
            checks.check_number(
                name, value, minimum=0.0, maximum=1.0, open_minimum=name == "expectile"
            )
            if value == 1:
                raise ValueError(f"{name}: expected a number below 1; got 1")
        if self.policy == "qgpo" and self.path != "vp":
            raise ValueError(
                f"path: expected 'vp' with policy=qgpo, which guides a score; got {self.path!r}"
            )
        return self

    def to_dict(self) -> dict[str, typing.Any]:
        """Fields as plain JSON values."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, typing.Any]) -> "QIPOConfig":
        """The inverse of :meth:`to_dict`; raises ``ValueError`` for an unknown field."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"config: unknown field {unknown[0]!r}")
        return cls(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        ).validate()


def _check_type(name: str, value: typing.Any, expected: type) -> None:
    if typing.get_origin(expected) is tuple:
        matches = isinstance(value, tuple)
    elif expected is float:
        matches = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif expected is int:
        matches = isinstance(value, int) and not isinstance(value, bool)
    else:
        matches = isinstance(value, expected)
    if not matches:
        label = "tuple of integers" if typing.get_origin(expected) is tuple else expected.__name__
        raise TypeError(f"{name}: expected {label}; got {value!r}")
