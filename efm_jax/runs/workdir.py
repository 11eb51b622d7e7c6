"""The work directory of a run: the names of its files, and the record in ``config.json``."""

import dataclasses
import json
import typing
from typing import Any

from etils import epath

from efm_jax import __version__
from efm_jax.envs import specs
from efm_jax.files import write_whole
from efm_jax.rl.config import QIPOConfig
from efm_jax.runs.plugins import check_loaded

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.csv"
RETURNS_FILE = "returns.csv"
RESULT_FILE = "result.json"  # there when the run is done
CURVE_FILE = "learning_curve.png"
CHECKPOINTS_FOLDER = "checkpoints"
TENSORBOARD_FOLDER = "tensorboard"


def resolve(path: epath.PathLike) -> epath.Path:
    """Find the work directory at ``path``, there or not; a ``ValueError`` if it is a file."""
    workdir = epath.Path(path).expanduser()
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={path}: is a file; expected a folder")
    return workdir


def read_json(path: epath.Path) -> dict[str, Any]:
    """Read the object in a JSON file; a ``ValueError`` if another thing is in it."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object; got {type(values).__name__}")
    return values


def write_json(path: epath.Path, values: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_whole(path, json.dumps(values, indent=2) + "\n")


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
    env_spec: str
    reference_scores: tuple[float, float] | None

    @property
    def seeds(self) -> list[int]:
        """The root seed of every training run."""
        return list(range(self.seed, self.seed + self.num_seeds))

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
            return cls(**values)
        except KeyError as error:
            raise ValueError(f"{path}: cannot be read: no field {error}") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error

    @classmethod
    def read(cls, workdir: epath.Path) -> "RunInfo":
        """Read the record of a run, as :meth:`load`; a ``ValueError`` also where there is none."""
        info = cls.load(workdir)
        if info is None:
            missing = "" if workdir.exists() else "no such folder; "
            raise ValueError(f"workdir {workdir}: {missing}holds no run (no {CONFIG_FILE})")
        return info

    def check_same(self, other: "RunInfo", workdir: epath.Path) -> None:
        """Refuse to continue a run of another configuration, dataset or seed."""
        mine, theirs = self.config.to_dict(), other.config.to_dict()
        pairs = [(f"config.{name}", theirs.get(name), mine[name]) for name in mine]
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
                raise ValueError(
                    f"workdir {workdir}: holds a run with {name} = {before!r}, asked for {now!r}; "
                    "give another --workdir"
                )


def _check_field(name: str, kind: Any, value: Any) -> None:
    """Refuse what no run writes, because it would be misread without a word."""
    kind = (int, float) if kind is float else typing.get_origin(kind) or kind
    if name == "reference_scores":
        numbers = value is None or all(isinstance(end, (int, float)) for end in value)
        fits = numbers and (value is None or (len(value) == 2 and value[0] < value[1]))
    elif name == "env_spec":
        fits = isinstance(value, str) and specs.id_of(value) is not None
    else:
        fits = isinstance(value, kind) and not isinstance(value, bool)
    if not fits:
        raise ValueError(f"field {name!r}: got {value!r}, which no run writes")
