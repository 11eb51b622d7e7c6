"""The work directory of a run: the names of its files, and the record in ``config.json``."""

import dataclasses
import json
import math
import os
import re
import typing
from typing import Any

from etils import epath

from efm_jax import __version__
from efm_jax.envs import specs
from efm_jax.files import to_json, write_whole
from efm_jax.rl.config import PHASES, QIPOConfig
from efm_jax.runs.plugins import check_loaded

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.csv"
RETURNS_FILE = "returns.csv"
EVALUATIONS_FILE = "evaluations.csv"
GUARD_FILE = "guard.csv"
SECONDS_FILE = "seconds.json"  # of all starts together
RESULT_FILE = "result.json"  # there when the run is done
CURVE_FILE = "learning_curve.png"
CHECKPOINTS_FOLDER = "checkpoints"
TENSORBOARD_FOLDER = "tensorboard"
LOGGERS_FILE = "loggers.json"  # how far each logger's curves have come

# What may differ where a run is extended: nothing that a step of training depends on.
EXTENDABLE = ("policy_steps", "eval_every", "eval_episodes", "log_every", "checkpoint_every")
# Of the longest path of a local folder, because checkpoints need about 200 bytes under it.
_MAX_PATH = 3500
_MOST = 10**6  # training seeds, and numbers of an observation or an action
_MAX_FILE = 2**30  # bytes of a table or a record: more is not a run's


def resolve(path: epath.PathLike) -> epath.Path:
    """Find the work directory at ``path``, there or not; a ``ValueError`` if it is a file."""
    workdir = epath.Path(path).expanduser()
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={path}: is a file; expected a folder")
    return workdir


def check_name(workdir: epath.Path) -> None:
    """Refuse a local path under which Orbax cannot read what it has written.

    Orbax takes ``[ ] * ?`` and backslashes for patterns, and ``gs:/`` for a bucket.
    """
    if "://" in os.fspath(workdir):
        return
    whole = os.path.abspath(workdir)
    found = re.search(r"[\[\]*?\\]|:(?=/)", whole)
    if found:
        raise ValueError(
            f"workdir {whole}: checkpoints under a path with {found[0]!r} cannot be read "
            "again; give it another name"
        )
    if len(os.fsencode(whole)) > _MAX_PATH:
        raise ValueError(
            f"workdir {whole[:60]}...: expected a path of at most {_MAX_PATH} bytes; "
            f"got {len(os.fsencode(whole))}"
        )


def read_text(path: epath.Path) -> str:
    """Read a file of a work directory; a ``ValueError`` if it is none that a run writes."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a file")
    if path.stat().length > _MAX_FILE:
        raise ValueError(f"{path}: expected at most {_MAX_FILE} bytes; got {path.stat().length}")
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def read_json(path: epath.Path) -> dict[str, Any]:
    """Read the object in a JSON file; a ``ValueError`` if another thing is in it."""
    text = read_text(path)
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: cannot be read: nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object; got {type(values).__name__}")
    return values


def write_json(path: epath.Path, values: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all; numbers that are not finite become null."""
    write_whole(path, to_json(values, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """Everything that identifies a run and is needed to evaluate it without its dataset."""

    config: QIPOConfig
    plugins: list[str]  # modules that registered what the configuration names
    algorithm: str  # the agent's name in results
    phase_steps: dict[str, int]
    seed: int
    num_seeds: int
    dataset: str
    fingerprint: str
    transitions: int
    dataset_return: float
    observation_size: int
    action_size: int
    env_spec: str | None  # None: nothing is evaluated
    reference_scores: tuple[float, float] | None

    @property
    def seeds(self) -> list[int]:
        """The root seed of every training run."""
        return list(range(self.seed, self.seed + self.num_seeds))

    def environment(self) -> str:
        """Return the environment to evaluate in; a ``ValueError`` where the run names none."""
        if self.env_spec is None:
            raise ValueError("the run names no environment to play in; give --env=ID")
        return self.env_spec

    def save(self, workdir: epath.Path) -> None:
        """Write ``config.json``, whole or not at all."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        config = self.config.to_dict()
        write_json(workdir / CONFIG_FILE, {"version": __version__, **values, "config": config})

    @classmethod
    def load(cls, workdir: epath.Path) -> "RunInfo | None":
        """Read the record of a run started before; None where there is none.

        Raises:
          ValueError: the file cannot be understood, or is missing beside checkpoints, which could
            then be those of any run.
        """
        path = workdir / CONFIG_FILE
        if not path.exists():
            checkpoints = workdir / CHECKPOINTS_FOLDER
            if checkpoints.is_dir() and any(
                child.name.isdigit() for child in checkpoints.iterdir()
            ):
                raise ValueError(
                    f"workdir {workdir}: checkpoints are there, but {CONFIG_FILE} is missing; "
                    "put it back or give another --workdir"
                )
            return None
        values = read_json(path)
        try:
            del values["version"]
            check_loaded(values["plugins"])
            values["config"] = QIPOConfig.from_dict(values["config"])
            if isinstance(values["reference_scores"], list):
                values["reference_scores"] = tuple(values["reference_scores"])
            for name, kind in typing.get_type_hints(cls).items():
                _check_field(name, kind, values[name])
            info = cls(**values)
            info.check()
            return info
        except KeyError as error:
            raise ValueError(f"{path}: cannot be read: no field {error}") from error
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error

    def check(self) -> None:
        """Refuse values of the right types that no run has."""
        wrong = [
            name
            for name, fits in (
                ("phase_steps", self.phase_steps.keys() == set(PHASES)),
                ("phase_steps", all(type(n) is int and n >= 0 for n in self.phase_steps.values())),
                ("seed", 0 <= self.seed < 2**32),
                ("num_seeds", 0 < self.num_seeds <= min(_MOST, 2**32 - self.seed)),
                ("transitions", 0 < self.transitions < 2**53),
                ("dataset_return", math.isfinite(self.dataset_return)),
                ("observation_size", 0 < self.observation_size <= _MOST),
                ("action_size", 0 < self.action_size <= _MOST),
            )
            if not fits
        ]
        if wrong:
            raise ValueError(
                f"field {wrong[0]!r}: got {getattr(self, wrong[0])!r}, which no run writes"
            )

    @classmethod
    def read(cls, workdir: epath.Path) -> "RunInfo":
        """Read the record of a run, as :meth:`load`; a ``ValueError`` also where there is none."""
        info = cls.load(workdir)
        if info is None:
            missing = "" if workdir.exists() else "no such folder; "
            raise ValueError(f"workdir {workdir}: {missing}holds no run (no {CONFIG_FILE})")
        return info

    def check_same(self, other: "RunInfo", workdir: epath.Path, extend: bool = False) -> None:
        """Refuse to continue a run of another configuration, dataset or seed.

        Args:
          other: what the folder holds.
          workdir: the folder, for messages.
          extend: let ``EXTENDABLE`` fields differ, where more steps are those that a longer run
            would have taken: not under a schedule of the learning rate that ends with the run, nor
            where the guard has judged a table before its time.
        """
        mine, theirs = self.config.to_dict(), other.config.to_dict()
        free = EXTENDABLE if extend else ()
        names = [name for name in mine if name not in free]
        pairs = [(f"config.{name}", theirs.get(name), mine[name]) for name in names]
        # One file has several paths: the fingerprint tells datasets apart, the name only says it
        # better.
        data = (
            "dataset"
            if self.fingerprint != other.fingerprint and self.dataset != other.dataset
            else None
        )
        for name in (data or "fingerprint", "seed", "num_seeds", "env_spec"):
            pairs.append((name, getattr(other, name), getattr(self, name)))
        for name, before, now in pairs:
            if before != now:
                extendable = name.partition(".")[2] in EXTENDABLE
                hint = "--extend (in Python: extend=True) or " if extendable else ""
                raise ValueError(
                    f"workdir {workdir}: holds a run with {name} = {before!r}, asked for {now!r}; "
                    f"give {hint}another --workdir"
                )
        before, now = other.phase_steps["policy"], self.phase_steps["policy"]
        schedule = self.config.learning_rate_schedule
        if before != now and schedule != "constant":
            raise ValueError(
                f"workdir {workdir}: a run of {before} policy steps cannot be extended to {now}: "
                f"its learning_rate_schedule is {schedule}, over all of them"
            )
        every = self.config.renew_every
        if before != now and self.config.guard and before % every:
            raise ValueError(
                f"workdir {workdir}: a run of {before} policy steps cannot be extended to {now}: "
                f"its guard has judged a table before its {every} steps were over"
            )
        if now < before:
            raise ValueError(
                f"workdir {workdir}: holds a run of {before} policy steps; expected at least as "
                f"many to extend it, asked for {now}"
            )


def _check_field(name: str, kind: Any, value: Any) -> None:
    """Refuse what no run writes, because it would be misread without a word."""
    kind = (int, float) if kind is float else typing.get_origin(kind) or kind
    if name == "reference_scores":
        numbers = value is None or all(
            isinstance(end, (int, float)) and math.isfinite(end) for end in value
        )
        fits = numbers and (value is None or (len(value) == 2 and value[0] < value[1]))
    elif name == "env_spec":
        fits = value is None or (isinstance(value, str) and specs.id_of(value) is not None)
    else:
        fits = isinstance(value, kind) and not isinstance(value, bool)
    if not fits:
        raise ValueError(f"field {name!r}: got {value!r}, which no run writes")
