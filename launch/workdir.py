"""Work directories as the entry points see them."""

import json
from typing import Any

from etils import epath

from efm_jax.files import write_whole

RESULT_FILE = "result.json"  # the last line that launch.train printed; there when a run is done


def resolve(path: str) -> epath.Path:
    """The work directory that ``--workdir`` names, there or not; a ``ValueError`` if it is a file."""
    workdir = epath.Path(path).expanduser()
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={path}: is a file; expected a folder")
    return workdir


def write_json(path: epath.Path, values: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_whole(path, json.dumps(values, indent=2) + "\n")
