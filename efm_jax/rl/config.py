"""Hyper-parameters of offline RL: each named, typed and bounded here, once.

Names of registered things (``path``, ``policy``, ``critic``, ...) are checked where the registries
are, when an agent is made: this module imports :mod:`efm_jax.checks` alone.  The comment above a
field and the one beside it are its meaning, which :func:`describe` reads for ``--help``.
"""

import dataclasses
import inspect
import typing

from efm_jax import checks

PHASES = ("behavior", "critic", "policy")
ESTIMATORS = ("full", "resample")
SCHEDULES = ("constant", "cosine")
DTYPES = ("float32", "bfloat16")
ACTION_SELECTIONS = ("sample", "best", "mean")

# Fields of registered critics and agents, by name; see :func:`register_options`.
OPTIONS: dict[str, type] = {}


@dataclasses.dataclass
class QIPOConfig:
    """Hyper-parameters of the three phases; the defaults fit the built-in data."""

    policy: str = "qipo"  # an agent, trained after behavior model and critic; bc: nothing more

    # The generative model: of the behavior, then of the improved policy.

    path: str = "ot"  # ot and vp_cosine learn a velocity (QIPO-OT), vp the noise (QIPO-Diff)
    prediction: str = "auto"  # velocity, noise, score or data on any path; auto: the path's own
    loss: str = "auto"  # auto: squared error of the prediction
    network: str = "mlp"  # registered name of the model's network
    hidden_dims: tuple[int, ...] = (64, 64, 64)  # widths of the model's hidden layers
    activation: str = "silu"  # after each hidden layer of the model
    layer_norm: bool = False  # normalize before each activation of the model
    time_features: int = 12  # sines and cosines of the time, which the model reads; even
    dtype: str = "float32"  # the model's layers compute in it; parameters and critics: float32
    learning_rate: float = 1e-3  # of Adam, in all phases that have none of their own
    behavior_learning_rate: float = 0.0  # of one phase; 0: learning_rate
    policy_learning_rate: float = 0.0  # of one phase; 0: learning_rate
    # constant, or cosine: from the learning rate to 0 over each of the behavior and policy phases.
    learning_rate_schedule: str = "constant"
    batch_size: int = 256  # states per step, over all devices
    behavior_batch_size: int = 0  # of one phase; 0: batch_size
    critic_batch_size: int = 0  # of one phase; 0: batch_size
    policy_batch_size: int = 0  # of one phase; 0: batch_size
    max_grad_norm: float = 1.0  # of the behavior and policy gradients; 0 does not clip
    ema_decay: float = 0.0  # of the parameters that act; 0 acts with the last parameters
    # auto: midpoint, or DPM-Solver++ where the noise is predicted.  Euler's few steps narrow every
    # support set, and renewals compound it.
    solver: str = "auto"
    sample_steps: int = 10  # of the solver, from noise to action

    # Energy weighting.

    beta: float = 10.0  # of Q; in qgpo of the guidance, in reweight and gaussian of the advantages
    # qipo, qgpo: at every renewal, the beta at which support sets have this mean effective sample
    # size, as a fraction of their size; 0 keeps beta fixed.
    target_ess: float = 0.0
    support_size: int = 16  # actions drawn from the policy for each state; the data action is added
    # As many support actions the data action counts for: more of it keeps the policy near the data,
    # where errors of sampling cannot compound over renewals.
    data_copies: float = 1.0  # 0: the data action is not in the support set
    renew_every: int = 2500  # policy steps between renewals of the support sets
    # qipo: a Polyak average of the policy at this rate draws the tables, and the last parameters
    # act (ema_decay is the behavior model's alone then); 0: the parameters that act draw.
    table_polyak: float = 0.0
    # qipo: what came of a table stands only if it plays better than the policy before by so many
    # standard errors over learned models of the environment, else training goes back; 0: it stands.
    guard: float = 0.0
    guard_steps: int = 4_000  # gradient steps of the models
    guard_length: int = 400  # steps of an episode in them
    estimator: str = "full"  # full: all support actions a step; resample: one, drawn by its weight

    # Critic.

    critic: str = "softmax_q"  # registered name; softmax_q, iql, ensemble or your own
    critic_hidden_dims: tuple[int, ...] = (64, 64, 64)  # widths of its hidden layers
    critic_layer_norm: bool = False  # normalize before each of its activations
    critic_learning_rate: float = 1e-3  # of the critic phase; 0: learning_rate
    num_critics: int = 2  # Q-networks; softmax_q and iql take their minimum
    pessimism: float = 1.0  # ensemble: standard deviations under the mean
    # Of the next value.  Values must travel over 1 / (1 - discount) Bellman backups, each taking
    # about 1 / polyak steps: keep critic_steps above a few times their product.
    discount: float = 0.98
    n_step: int = 1  # rewards of the data before a target looks at a value: values travel faster
    polyak: float = 0.02  # Polyak rate: the step of target networks toward the critic
    beta_q: float = 1.0  # softmax_q: inverse temperature over the next state's support actions
    expectile: float = 0.7  # iql, ensemble: of the value regression; above 0.5 the better actions

    # Acting.

    action_selection: str = "sample"  # best, mean: of num_candidates sampled actions
    num_candidates: int = 16  # actions sampled for best and mean
    eval_solver: str = "same"  # of evaluated actions; same: as in training
    eval_sample_steps: int = 0  # of evaluated actions; 0: as in training

    # Data and schedule.

    max_transitions: int = 0  # train on the first so many of the dataset; 0 on all
    reward_transform: str = "none"  # locomotion, antmaze: as published there; none: the data's
    behavior_steps: int = 10_000  # gradient steps of the behavior model
    critic_steps: int = 10_000  # gradient steps of the critic
    policy_steps: int = 10_000  # gradient steps of the improved policy
    log_every: int = 500  # steps between rows of metrics.csv, each a mean over them
    checkpoint_every: int = 5_000  # steps of a phase between checkpoints
    eval_every: int = 2_500  # policy steps between evaluations; 0 evaluates at the end only
    eval_episodes: int = 10  # of an evaluation, of each policy and seed

    # Fields of registered critics and agents: ``config.NAME.FIELD``.
    options: dict[str, typing.Any] = dataclasses.field(
        default_factory=lambda: {name: make() for name, make in OPTIONS.items()}
    )

    def __getattr__(self, name: str) -> typing.Any:
        options = self.__dict__.get("options", {})
        if name in options:
            return options[name]
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def of_phase(self, field: str, phase: str) -> typing.Any:
        """``batch_size`` or ``learning_rate`` of one of ``PHASES``."""
        return getattr(self, f"{phase}_{field}") or getattr(self, field)

    def validate(self) -> "QIPOConfig":
        """Return self, or raise a ``ValueError`` or ``TypeError`` that names the field."""
        _check_types(self, "")
        for name, choices in (
            ("dtype", DTYPES),
            ("estimator", ESTIMATORS),
            ("learning_rate_schedule", SCHEDULES),
            ("action_selection", ACTION_SELECTIONS),
        ):
            checks.check_choice(name, getattr(self, name), choices)
        for minimum, names in (
            (1, "batch_size sample_steps support_size renew_every behavior_steps critic_steps"),
            (1, "policy_steps log_every checkpoint_every eval_episodes num_critics n_step"),
            (1, "num_candidates guard_steps guard_length"),
            (0, "behavior_batch_size critic_batch_size policy_batch_size max_transitions"),
            (0, "eval_every eval_sample_steps"),
            (2, "time_features"),
        ):
            for name in names.split():
                checks.check_integer(name, getattr(self, name), minimum)
        if self.time_features % 2:
            raise ValueError(f"time_features: expected an even number; got {self.time_features}")
        for name in ("hidden_dims", "critic_hidden_dims"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one hidden layer; got none")
            for width in getattr(self, name):
                checks.check_integer(name, width, 1)
        rates = "behavior_learning_rate critic_learning_rate policy_learning_rate"
        for name in f"beta beta_q data_copies guard max_grad_norm pessimism {rates}".split():
            checks.check_number(name, getattr(self, name), minimum=0.0)
        checks.check_number("learning_rate", self.learning_rate, minimum=0.0, open_minimum=True)
        checks.check_number("discount", self.discount, minimum=0.0, maximum=1.0)
        checks.check_number("table_polyak", self.table_polyak, minimum=0.0, maximum=1.0)
        checks.check_number("polyak", self.polyak, minimum=0.0, maximum=1.0, open_minimum=True)
        for name in ("expectile", "ema_decay", "target_ess"):
            value = getattr(self, name)
            open_minimum = name == "expectile"
            checks.check_number(name, value, minimum=0.0, maximum=1.0, open_minimum=open_minimum)
            if value == 1:
                raise ValueError(f"{name}: expected a number below 1; got 1")
        for name, options in self.options.items():
            _check_types(options, f"{name}.")
            if hasattr(options, "validate"):
                options.validate()
        return self

    def to_dict(self) -> dict[str, typing.Any]:
        """Fields as plain JSON values; options of a critic or agent under its name."""
        values = dataclasses.asdict(self)
        return _plain(values | values.pop("options"))

    @classmethod
    def from_dict(cls, values: dict[str, typing.Any]) -> "QIPOConfig":
        """The inverse of :meth:`to_dict`; raises ``ValueError`` for an unknown field."""
        names = {field.name for field in dataclasses.fields(cls)} - {"options"}
        _check_known(values, names | set(OPTIONS), "")
        config = cls(**{name: _tuples(values[name]) for name in values if name in names})
        for name in OPTIONS.keys() & values.keys():
            given = {field: _tuples(value) for field, value in values[name].items()}
            _check_known(
                given, {field.name for field in dataclasses.fields(OPTIONS[name])}, f"{name}."
            )
            config.options[name] = OPTIONS[name](**given)
        return config.validate()


def register_options(name: str, options: type) -> None:
    """Make ``config.NAME.FIELD`` of a registered critic or agent, typed and checked as others are.

    Args:
      name: of the critic or agent in its registry.
      options: a dataclass whose fields are bool, int, float, str or tuple of integers and have
        defaults; a method ``validate`` may check ranges.

    Raises:
      ValueError, TypeError: a name that is taken, or no such dataclass.
    """
    if not dataclasses.is_dataclass(options):
        raise TypeError(f"options: expected a dataclass; got {options!r}")
    if not name.isidentifier() or hasattr(QIPOConfig, name) or name == "options":
        raise ValueError(
            f"name: expected an identifier that is no field of QIPOConfig; got {name!r}"
        )
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        field.type = hints[
            field.name
        ]  # not a string, as under `from __future__ import annotations`
    options()
    OPTIONS[name] = options


def describe() -> list[tuple[str, str, typing.Any, str]]:
    """List every field, those of registered options too: name, type, default and meaning."""
    rows = []
    for prefix, record in (("", QIPOConfig), *((f"{name}.", OPTIONS[name]) for name in OPTIONS)):
        meanings, default = _meanings(record), record()
        for field in dataclasses.fields(record):
            if record is not QIPOConfig or field.name != "options":
                value, meaning = getattr(default, field.name), meanings.get(field.name, "")
                rows.append((prefix + field.name, _type_name(field.type), value, meaning))
    return rows


def _meanings(record: type) -> dict[str, str]:
    """Read the comments of a class; those that a blank line follows are headings."""
    try:
        lines = inspect.getsource(record).splitlines()
    except OSError:  # it was not defined in a file
        return {}
    found, above = {}, []
    for line in lines:
        code, _, comment = map(str.strip, line.partition("#"))
        name = code.partition(":")[0]
        if code:
            found[name] = " ".join(filter(None, [*above, comment]))
        above = [*above, comment] if comment and not code else []
    return found


def _type_name(kind: typing.Any) -> str:
    return "tuple of integers" if typing.get_origin(kind) is tuple else kind.__name__


def _plain(value: typing.Any) -> typing.Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _tuples(value: typing.Any) -> typing.Any:
    return tuple(value) if isinstance(value, list) else value


def _check_known(values: dict, names: set[str], prefix: str) -> None:
    unknown = sorted(set(values) - names)
    if unknown:
        hint = checks.did_you_mean(unknown[0], names)
        raise ValueError(f"config: unknown field {prefix + unknown[0]!r}{hint}")


def _check_types(record: typing.Any, prefix: str) -> None:
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        kind: typing.Any = typing.get_origin(field.type) or field.type
        if kind is float:
            matches = isinstance(value, (int, float)) and not isinstance(value, bool)
        elif kind is int:
            matches = isinstance(value, int) and not isinstance(value, bool)
        else:
            matches = isinstance(value, kind)
        if not matches:
            label = _type_name(field.type)
            raise TypeError(f"{prefix}{field.name}: expected {label}; got {value!r}")
