"""What the entry points share: flags, exit statuses and one-line errors."""

import contextlib
import functools
import os
import pathlib
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from efm_jax import checks
from efm_jax.errors import install, reason
from efm_jax.rl.config import describe
from efm_jax.runs.plugins import load_plugins

from . import leave, stop_at

EXIT_FAILED = 1
EXIT_USAGE = 2
# Where experiments/configs is: the repository, or efm_jax where that is installed.
ROOT = pathlib.Path(__file__).resolve().parent.parent

# Packages that are asked for by their own names -> the extra that brings them.
_EXTRAS = {"gcsfs": "gcs", "flatbuffers": "export"}


class Flags:
    """Flags in a set of their own, because two commands may give one name two meanings.

    Args:
      *shared: sets of other modules that belong to the command too.
    """

    def __init__(self, *shared: "Flags"):
        self._shared, self.values = shared, flags.FlagValues()
        own = {"flag_values": self.values}
        self.string = functools.partial(flags.DEFINE_string, **own)
        self.integer = functools.partial(flags.DEFINE_integer, **own)
        self.float = functools.partial(flags.DEFINE_float, **own)
        self.bool = functools.partial(flags.DEFINE_bool, **own)
        self.enum = functools.partial(flags.DEFINE_enum, **own)
        self.list = functools.partial(flags.DEFINE_list, **own)
        self.multi_string = functools.partial(flags.DEFINE_multi_string, **own)

    def parse(self, argv: Sequence[str]) -> list[str]:
        """Set the values of all the flags, and absl's; returns what is left of ``argv``."""
        parts = [*(part.values for part in self._shared), flags.FLAGS]
        for part in parts:
            if not set(part) <= set(self.values):  # they are there the second time
                self.values.append_flag_values(part)
        rest = self.values(argv)
        for part in parts:
            part.mark_as_parsed()
        return rest

    def help(self) -> str:
        """List the flags by name, without absl's."""
        every = flags.FlagValues()  # without their modules, by which they would be sorted
        for part in (self, *self._shared):
            for name in set(part.values) - set(every) - set(flags.FLAGS):
                every[name] = part.values[name]
        return every.get_help("  ", include_special_flags=False)


FLAGS = Flags()
_FIRST = "Modules to import first: they register paths, losses, critics, agents."
PLUGINS = FLAGS.list("plugins", [], _FIRST)


class UsageError(Exception):
    """Flags, data or a checkpoint that cannot be used; the message is one line for the user."""


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Around checks of what the user gave: a ``ValueError`` or ``TypeError`` is theirs to mend.

    So is an ``ImportError``: of the client that a path like gs:// needs.
    """
    try:
        yield
    except ImportError as error:
        extras = [extra for package, extra in _EXTRAS.items() if package in str(error)]
        hint = f": {install(extras[0])}" if extras else ""
        raise UsageError(f"{error}{hint}") from error
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error


def command(
    main: Callable[[list[str]], int], own: Flags, defaults: Mapping[str, str] | None = None
) -> Callable[[], None]:
    """Make the command that parses flags, calls ``main`` and exits with its status.

    Args:
      main: takes what is left of the command line, returns the exit status.
      own: the command's flags.
      defaults: values of flags that are parsed as if they had been given.  ml_collections reads a
        default of its own while the flag is being defined, where a bad override could not be
        caught.
    """

    def run() -> None:
        stop_at(leave)
        # Orbax logs the traceback of what it raises, from several threads.
        logging.set_verbosity(logging.FATAL)
        sys.unraisablehook = _ignore_closed_loops
        # Libraries' deprecation notices are for us, not for a user of the launcher.
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        documentation = sys.modules[main.__module__].__doc__ or ""
        app.run(
            _guard(main), flags_parser=lambda argv: _parse(argv, own, documentation, defaults or {})
        )

    return run


def _ignore_closed_loops(unraisable: Any) -> None:
    """Leave out what TensorStore says, after Orbax has gone on, of damage that has been told."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _parse(
    argv: list[str], own: Flags, documentation: str, defaults: Mapping[str, str]
) -> list[str]:
    try:
        # First, because a preset or a field of the configuration may be a plugin's.
        load_plugins(plugins_of(argv))
    except ValueError as error:
        _complain(error)
        sys.exit(EXIT_USAGE)
    if any(re.fullmatch("--?h(elp(full|short)?)?", arg) for arg in argv[1:]):
        if program().startswith("efm-"):
            documentation = documentation.replace("python -m launch.", "efm-")
        print(f"{documentation.strip()}\n\nFlags:\n{own.help()}{_fields_help(own)}")
        sys.exit(0)
    missing = [
        f"--{name}={value}"
        for name, value in defaults.items()
        if not any(arg.lstrip("-").split("=")[0] == name for arg in argv[1:])
    ]
    argv = _find_presets([argv[0], *missing, *argv[1:]])
    try:
        rest = own.parse(argv)
    except flags.Error as error:
        _complain(error)
        sys.exit(EXIT_USAGE)
    # Parsing also runs the configuration file, which is the user's code and may raise anything.
    except Exception as error:
        _complain(f"{_config_argument(argv)}: {_reason(error, argv)}")
        sys.exit(EXIT_USAGE)
    if len(rest) > 1:
        _complain(f"unexpected argument {rest[1]!r}; flags are written --name=value")
        sys.exit(EXIT_USAGE)
    return rest


def plugins_of(argv: Sequence[str]) -> list[str]:
    """The modules that ``--plugins`` on a command line names."""
    for i, arg in enumerate(argv):
        name, equals, value = arg.lstrip("-").partition("=")
        if i and name == "plugins":
            return [
                part
                for part in (value if equals else "".join(argv[i + 1 : i + 2])).split(",")
                if part
            ]
    return []


def find_preset(name: str) -> str:
    """Find a preset's file: ``name`` itself, else under ``ROOT``, else that of a bare name there.

    Args:
      name: a path, or the name of a preset of ours such as ``qipo_diff`` or ``d4rl/antmaze``.

    Returns:
      The path, or ``name`` where there is no such file.
    """
    places = (pathlib.Path(name), ROOT / name, ROOT / "experiments" / "configs" / f"{name}.py")
    return next((str(place) for place in places if os.path.isfile(place)), name)


def _find_presets(argv: list[str]) -> list[str]:
    """The command line with every preset's path."""
    for i in range(1, len(argv)):
        name, equals, value = argv[i].partition("=")
        if name.lstrip("-") != "config":
            continue
        place, start = (i, f"{name}=") if equals else (i + 1, "")
        for given in [value] if equals else argv[place : place + 1]:
            argv[place] = start + find_preset(given)
    return argv


def _config_argument(argv: list[str]) -> str:
    """The last ``--config`` on the command line, as ``--config=FILE``."""
    for i in range(len(argv) - 1, 0, -1):
        name, _, value = argv[i].lstrip("-").partition("=")
        if name == "config":
            return f"--config={value or ' '.join(argv[i + 1 : i + 2])}"
    return "flags"


def preset_problem(path: str) -> str | None:
    """Why a preset cannot be read at all; None where its file is there."""
    if path and os.path.isdir(path):
        return "is a folder; expected a .py file"
    try:
        os.stat(path)
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return str(error.strerror).lower()
    return None


def _reason(error: Exception, argv: list[str]) -> str:
    """What a preset or an override of its fields raised, in words."""
    if isinstance(error, OSError):
        # ml_collections keeps the error of reading the file until an override needs its contents.
        return preset_problem(_config_argument(argv).partition("=")[2]) or str(error)
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, (KeyError, AttributeError)):
        # Of an override that the preset has no field for, a dict or ConfigDict says the bare name,
        # in quotes.
        names = [
            arg.lstrip("-").partition("=")[0] for arg in argv if re.match("--?(no)?config[.]", arg)
        ]
        word = re.findall(r"\w+|$", text)[0]
        if word in {part for name in names for part in name.split(".")[1:]}:
            return unknown_field(word)
    # The first of NAME.FIELD where the configuration has no NAME.
    missing = re.search(r"Attempting to lookup: (\w+)|^Field (\w+) not found", text)
    if missing:
        return unknown_field(missing[1] or missing[2])
    return text if " " in text else f"{type(error).__name__}: {text!r}"


def unknown_field(name: str) -> str:
    """What to say of a field that a configuration lacks."""
    known = [part for field, *_ in describe() for part in field.split(".")]
    return f"unknown field {name!r}{checks.did_you_mean(name, known)}"


def _fields_help(own: Flags) -> str:
    """The hyper-parameters, where a command has them."""
    if "config" not in own.values:
        return ""
    fields = [
        textwrap.fill(
            f"--config.{name} ({kind}, {default}): {meaning}",
            width=100,
            initial_indent="  ",
            subsequent_indent="    ",
        )
        for name, kind, default, meaning in describe()
    ]
    title = "Hyper-parameters (type, default, which a preset may replace):"
    return "\n".join(["\n", title, *fields])


def check_backend() -> None:
    """Start JAX's devices; a ``ValueError`` where what ``JAX_PLATFORMS`` asks for is not here."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise ValueError(f"JAX_PLATFORMS={asked}: JAX cannot start: {reason(error)}") from error


def _guard(main: Callable[[list[str]], int]) -> Callable[[list[str]], None]:
    def guarded(argv: list[str]) -> None:
        try:
            status = main(argv)
            sys.stdout.flush()
        # A full disk, a closed pipe or a folder that went away is the user's to mend too.
        except (UsageError, OSError) as error:
            _complain(error)
            status = EXIT_USAGE
            if isinstance(error, BrokenPipeError):  # nobody reads what would be flushed at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(status)

    return guarded


def program() -> str:
    """The command's name, as it was started: ``launch.train``, or the console script efm-train."""
    path = pathlib.Path(sys.argv[0])  # of a package, its __main__.py
    name = path.parent.name if path.stem == "__main__" else path.stem
    return name if name.startswith("efm-") else f"launch.{name}"


def say(text: str) -> None:
    """Print one line to the standard error, with the command's name before it."""
    print(f"{program()}: {text}", file=sys.stderr, flush=True)


def _complain(error: object) -> None:
    say(f"error: {' '.join(str(error).split())}")
