"""What the entry points share: flags, exit statuses and one-line errors."""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator

from absl import app, flags, logging

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_TERMINATED = 143  # 128 + SIGTERM, as a shell reports it


class UsageError(Exception):
    """Flags, data or a checkpoint that cannot be used; the message is one line for the user."""


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Around checks of what the user gave: a ``ValueError`` or ``TypeError`` is theirs to mend."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error


def run(main: Callable[[list[str]], int]) -> None:
    """Parse flags, call ``main`` and exit with its status."""
    logging.set_verbosity(logging.ERROR)
    # Libraries' deprecation notices are for us, not for a user of the launcher.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    app.run(_guard(main), flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    if any(arg in ("-h", "--h") for arg in argv[1:]):
        argv = [argv[0], "--help"]
    try:
        rest = flags.FLAGS(argv)
    # ml_collections raises KeyError or AttributeError for a field that the configuration lacks.
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        _complain(error)
        sys.exit(EXIT_USAGE)
    if flags.FLAGS["help"].value:
        sys.stdout.write(_help())
        sys.exit(0)
    if len(rest) > 1:
        _complain(f"unexpected argument {rest[1]!r}; flags are written --name=value")
        sys.exit(EXIT_USAGE)
    return rest


def _help() -> str:
    """The entry point's own documentation and flags; absl's helpfull lists the libraries' too."""
    module = sys.modules["__main__"]
    return f"{module.__doc__.strip()}\n\nFlags:\n{flags.FLAGS.main_module_help().split(':', 2)[-1].strip()}\n"


def _guard(main: Callable[[list[str]], int]) -> Callable[[list[str]], None]:
    def guarded(argv: list[str]) -> None:
        try:
            status = main(argv)
        except UsageError as error:
            _complain(error)
            status = EXIT_USAGE
        sys.stdout.flush()
        sys.stderr.flush()
        sys.exit(status)

    return guarded


def _complain(error: object) -> None:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    name = os.path.basename(os.path.splitext(sys.argv[0])[0])
    print(f"launch.{name}: error: {' '.join(str(text).split())}", file=sys.stderr)
