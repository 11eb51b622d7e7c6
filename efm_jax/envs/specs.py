"""Which environment a user, or a file, may ask for.

A user's own (:func:`named`) is any id that ``gymnasium.make`` takes, ``module:Name-v0`` too, which
imports the module; or a function that makes one.

What a file says (:func:`stated`: a dataset's metadata or attribute, ``config.json``) is data, and
chooses no code.  It may name a registered id whose code is in one of ``PACKAGES``, in a package
that the user allowed (:func:`allow`) or named an environment of, or defined by the running program
itself; give it keyword arguments of plain JSON that name no file, and a step limit; and put
wrappers of ``WRAPPERS``, or of a package that the user allowed, around it.  An environment's entry
point in a file is only compared with the registered one, never imported.
"""

import contextlib
import copy
import importlib
import io
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import gymnasium
from gymnasium.envs import registration
from gymnasium.envs.registration import EnvSpec

from efm_jax.errors import DataError, install, reason

ROBOTICS = "gymnasium_robotics"
PACKAGES = ("gymnasium", ROBOTICS, "ogbench")
# Of Gymnasium's: those that take plain arguments, and neither write files nor draw.
WRAPPERS = (
    *("TimeLimit", "OrderEnforcing", "PassiveEnvChecker", "Autoreset", "RecordEpisodeStatistics"),
    *("ClipAction", "RescaleAction", "StickyAction", "RepeatAction", "ClipReward"),
    *("NormalizeReward", "NormalizeObservation", "RescaleObservation", "ReshapeObservation"),
    *("FlattenObservation", "FilterObservation", "DtypeObservation", "TimeAwareObservation"),
    *("DelayObservation", "MaxAndSkipObservation"),
)

# A user's own: an id, ``module:Id``, or a function that returns a new environment.
Environment = str | Callable[[], gymnasium.Env]

_NOT_A_SPEC = (ValueError, TypeError, AttributeError, KeyError, RecursionError)
# Fields that older Gymnasium versions wrote into a spec and newer ones refuse.
_REMOVED_FIELDS = ("apply_api_compatibility", "autoreset")
_INSTALL = {ROBOTICS: f"Gymnasium Robotics need {install('robotics')}"}
# Packages that files may use for the rest of this process; no file adds to them.
_allowed: set[str] = set()


def allow(packages: Iterable[str]) -> None:
    """Import packages, which register their environments, and let files name those.

    Raises:
      ValueError: one that cannot be imported, and why.
    """
    for name in packages:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"allow_env: expected names of modules; got {name!r}")
        try:
            _import(name)
        except Exception as error:  # a user's module may raise anything
            raise ValueError(f"allow_env: {name} cannot be imported ({reason(error)})") from error
        _allowed.add(name)


def named(source: str, env: Environment) -> EnvSpec:
    """A spec of its own for what the user gave; files may name an id's package from then on.

    Raises:
      DataError: no such environment; the message begins with ``source``.
    """
    if not isinstance(env, str):
        return _made_by(source, env)
    module, _, env_id = env.rpartition(":")
    try:
        if module:
            _import(module)
            _allowed.add(module)
        spec = _registered(env_id)
    except Exception as error:  # a user's module may raise anything
        raise DataError(
            f"{source}: environment {env!r} is not known to Gymnasium ({reason(error)})"
        ) from error
    _allowed.add(_module(spec.entry_point))
    return spec


def _made_by(source: str, make: Callable[[], gymnasium.Env]) -> EnvSpec:
    """A spec that calls ``make``, with the limit of steps that what it makes has."""
    if not callable(make):
        raise TypeError(f"env: expected an id or a function without arguments; got {make!r}")
    name = re.sub(r"[^\w.]+", "-", getattr(make, "__qualname__", type(make).__name__)).strip("-.")
    try:
        with contextlib.closing(make()) as env:
            limit = env.spec.max_episode_steps if env.spec is not None else None
    except Exception as error:  # a user's function may raise anything
        raise DataError(f"{source}: environment {name} cannot be made ({reason(error)})") from error
    # In a function that copies of the spec share.
    entry_point = lambda **arguments: make(**arguments)  # noqa: E731
    return EnvSpec(f"python/{name}-v0", entry_point, max_episode_steps=limit)


def stated(source: str, text: str) -> EnvSpec:
    """A spec of its own for what a file says: the JSON that any Gymnasium wrote, or an id.

    Raises:
      DataError: what the top of this module does not allow, or is not known; the message begins
        with ``source`` and says what was asked for, and how to allow it.
    """
    is_json = text.lstrip().startswith("{")
    what = "the JSON of its EnvSpec" if is_json else f"environment {text!r:.100}"
    asked = None
    try:
        # Builds records of texts and numbers, and runs nothing.
        asked = EnvSpec.from_json(_modern(text)) if is_json else EnvSpec(text)
        spec = _registered(asked.id)
    except (gymnasium.error.Error, *_NOT_A_SPEC) as error:
        if asked is not None and asked.entry_point is not None:
            _check_package(source, asked.id, asked.entry_point)
        raise DataError(
            f"{source}: {what} is not known to Gymnasium ({reason(error)}); an environment of "
            "another package needs --allow_env=PACKAGE"
        ) from error
    _check_package(source, spec.id, spec.entry_point)
    if not is_json:
        return spec
    if asked.entry_point is not None and _origin(asked.entry_point) != _origin(spec.entry_point):
        raise DataError(
            f"{source}: asks for the code {asked.entry_point!r:.100} under the id {spec.id}, which "
            f"is {_path(spec.entry_point)!r}; to evaluate in that one, give --env={spec.id}"
        )
    _check_values(source, asked)
    asked.kwargs.pop("render_mode", None)  # because it may open a window
    asked.entry_point, asked.vector_entry_point = spec.entry_point, spec.vector_entry_point
    asked.additional_wrappers = tuple(
        _wrapper(source, asked, wrapper) for wrapper in asked.additional_wrappers
    )
    return asked


def id_of(text: str | None) -> str | None:
    """The id in the JSON of a spec, known or not; None for a text that is no such JSON."""
    try:
        env_id = json.loads(text or "")["id"]
    except _NOT_A_SPEC:
        return None
    return env_id if isinstance(env_id, str) else None


def by_name(spec: EnvSpec) -> EnvSpec:
    """The spec with a class or function as ``module:Name``, but Gymnasium's own as they are."""
    spec = copy.copy(spec)
    if callable(spec.entry_point) and _module(spec.entry_point).split(".")[0] != "gymnasium":
        spec.entry_point = _path(spec.entry_point)
    if callable(spec.vector_entry_point):
        spec.vector_entry_point = None  # because episodes are played one by one
    return spec


def to_json(source: str, spec: EnvSpec) -> str:
    """The spec as JSON, for :func:`stated`: a class or function is written as its name.

    Raises:
      DataError: one of Gymnasium's functions, as retired environments have, or keyword arguments
        that are not plain.
    """
    spec = by_name(spec)
    try:
        return spec.to_json()
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{source}: environment {spec.id} cannot be used ({reason(error)})"
        ) from error


def _modern(text: str) -> str:
    fields = json.loads(text)
    for name in _REMOVED_FIELDS:
        fields.pop(name, None)
    return json.dumps(fields)


def _registered(env_id: str) -> EnvSpec:
    """A copy of the registered spec, after importing packages of ``PACKAGES`` if need be."""
    for package in (None, *PACKAGES[1:]):
        if package is not None:
            with contextlib.suppress(ImportError):
                _import(package)
        namespace, name, version = registration.parse_env_id(env_id)
        if version is None and env_id not in gymnasium.registry:
            version = registration.find_highest_version(namespace, name)
        full = registration.get_env_id(namespace, name, version)
        if full in gymnasium.registry:
            return copy.deepcopy(gymnasium.spec(full))
    try:
        return copy.deepcopy(gymnasium.spec(env_id))
    except gymnasium.error.NameNotFound as error:
        missing = [text for package, text in _INSTALL.items() if not _is_there(package)]
        hint = "".join(f" Environments of {text}" for text in missing)
        raise type(error)(f"{error}{hint}") from error


def _is_there(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def _import(package: str) -> None:
    """Import a package, which registers its environments."""
    if package != ROBOTICS:
        importlib.import_module(package)
        return
    before = dict(gymnasium.registry)
    # Without the news that some versions print when imported.
    with contextlib.redirect_stderr(io.StringIO()):
        gymnasium.register_envs(importlib.import_module(package))
    # Restored, because the import also replaces Gymnasium's own retired environments by some that
    # need mujoco-py.
    gymnasium.registry.update(before)


def _path(entry_point: Any) -> str:
    """``module:Name`` of an entry point, which may be a class or a function."""
    if isinstance(entry_point, str):
        return entry_point
    name = getattr(entry_point, "__qualname__", type(entry_point).__name__)
    return f"{getattr(entry_point, '__module__', '')}:{name}"


def _module(entry_point: Any) -> str:
    return _path(entry_point).partition(":")[0]


def _origin(entry_point: Any) -> tuple[str, str]:
    """Package and name: a package's other versions keep a class elsewhere."""
    module, _, name = _path(entry_point).partition(":")
    return module.split(".")[0], name


def _prefixes(entry_point: str) -> set[str]:
    """The packages that an entry point's module is in, and the module."""
    parts = entry_point.partition(":")[0].split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts) + 1)}


def _check_package(source: str, env_id: str, entry_point: Any) -> None:
    """Refuse code that is neither known, allowed, nor the running program's own."""
    if callable(entry_point):
        return
    package, _ = _origin(entry_point)
    if not _prefixes(_path(entry_point)) & {*PACKAGES, *_allowed}:
        raise DataError(
            f"{source}: asks for environment {env_id}, whose code is {_path(entry_point)!r}: only "
            f"{', '.join(PACKAGES)} are known; if you trust it, give --allow_env={package} (in "
            "Python: efm_jax.envs.specs.allow)"
        )


def _check_values(source: str, spec: EnvSpec) -> None:
    """Refuse a step limit that is none, and arguments that name files."""
    limit = spec.max_episode_steps
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise DataError(
            f"{source}: environment {spec.id}: expected max_episode_steps of at least 1 or none; "
            f"got {limit!r}"
        )
    _check_arguments(f"{source}: environment {spec.id}", spec.kwargs)


def _check_arguments(what: str, arguments: Any) -> None:
    if not isinstance(arguments, dict):
        raise DataError(f"{what}: expected keyword arguments; got {arguments!r:.100}")
    values: list[Any] = list(arguments.items())
    while values:
        value = values.pop()
        if isinstance(value, str) and ("/" in value or "\\" in value):
            raise DataError(
                f"{what}: an argument is the path {value!r:.100}, and a file may not choose files; "
                "register the environment in a module and give --env=MODULE:NAME"
            )
        if isinstance(value, dict):
            value = list(value.items())
        if isinstance(value, (list, tuple)):
            values.extend(value)


def _wrapper(
    source: str, spec: EnvSpec, asked: registration.WrapperSpec
) -> registration.WrapperSpec:
    package, name = _origin(asked.entry_point)
    own = package == "gymnasium"
    if name not in WRAPPERS if own else not _prefixes(_path(asked.entry_point)) & _allowed:
        raise DataError(
            f"{source}: asks for the wrapper {asked.entry_point!r:.100} around {spec.id}: a file "
            "may ask for Gymnasium's own plain wrappers alone; if you trust its package, give "
            "--allow_env=PACKAGE, or register the environment with it in a module and give "
            "--env=MODULE:NAME"
        )
    _check_arguments(f"{source}: wrapper {name}", asked.kwargs or {})
    if not own:
        _check_own_wrapper(source, asked.entry_point)
        return asked
    # Not the file's path, which names a module.
    return registration.WrapperSpec(name, f"gymnasium.wrappers:{name}", asked.kwargs)


def _check_own_wrapper(source: str, entry_point: str) -> None:
    """Refuse what is no wrapper class of an allowed package, such as what its module imports."""
    module, _, name = entry_point.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module may raise anything
        raise DataError(
            f"{source}: the wrapper {entry_point!r:.100} cannot be imported ({reason(error)})"
        ) from error
    is_wrapper = isinstance(found, type) and issubclass(found, gymnasium.Wrapper)
    if not is_wrapper or not _prefixes(found.__module__) & _allowed:
        raise DataError(f"{source}: {entry_point!r:.100} is no wrapper class of an allowed package")
