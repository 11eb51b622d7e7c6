"""Files that are there whole or not at all, and JSON that every parser reads."""

import contextlib
import json
import math
import os
import threading
from typing import Any

from etils import epath


def write_whole(path: epath.Path, content: str | bytes) -> None:
    """Write a file by a temporary name and a rename; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes or threads may write the same file at once.
    temporary = path.parent / f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(Exception):  # because a full disk has no room for halves
            temporary.unlink(missing_ok=True)
        # Some errors of the system, such as a full disk's, name no file.
        raise OSError(f"{path}: cannot be written: {error.strerror or error}") from error


def to_json(values: Any, indent: int | None = None) -> str:
    """Write JSON; numbers that are not finite become null, because JSON has no other name."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
