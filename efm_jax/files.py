"""Files that are there whole or not at all, whatever happens to the process."""

import os

from etils import epath


def write_whole(path: epath.Path, content: str | bytes) -> None:
    """Write a file by a temporary name and a rename; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may write the same file at once.
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)
