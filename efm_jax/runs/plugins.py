"""A user's modules, which register paths, losses, critics and agents when they are imported."""

import importlib
import sys
from collections.abc import Iterable


def load_plugins(modules: Iterable[str]) -> None:
    """Import modules by name, from where Python finds them.

    Raises:
      ValueError: one that cannot be imported, and why.
    """
    for name in modules:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"plugins: expected names of modules; got {name!r}")
        try:
            importlib.import_module(name)
        except Exception as error:  # a user's module may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"plugins: {name} cannot be imported: {reason}") from error


def check_loaded(modules: Iterable[str]) -> None:
    """Refuse a run's plugins that nobody has imported: a file does not choose code to run.

    Raises:
      ValueError: one that is not imported, and the flag that imports it.
    """
    modules = list(modules)
    if missing := [name for name in modules if name not in sys.modules]:
        raise ValueError(
            f"the run needs {', '.join(map(repr, missing))}: if you trust them, give "
            f"--plugins={','.join(map(str, modules))} (in Python: import them first)"
        )
