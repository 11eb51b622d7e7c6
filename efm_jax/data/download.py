"""Files from the web: whole or not at all, with a progress bar, and one line when it fails."""

import contextlib
import http.client
import os
import secrets
import urllib.request
from pathlib import Path

from tqdm import tqdm

from efm_jax.errors import DataError, reason

# First bytes of the formats that are downloaded: a server's error page must not become a dataset.
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
NPZ_SIGNATURE = b"PK\x03\x04"

_CHUNK = 1 << 20
_TIMEOUT = 30.0  # seconds without a byte


def fetch(source: str, url: str, path: Path, signature: bytes) -> None:
    """Make sure that ``path`` is there, else download ``url`` to it; its folder is made.

    The bytes go to a name of their own beside ``path`` and are renamed when all have come, so that
    a killed or failed download never looks like a file, and two processes may download the same one
    at once.

    Args:
      source: the dataset's name, with which messages begin.
      url: what :func:`urllib.request.urlopen` opens (http, https, file).
      path: a local path.
      signature: the bytes that the file must begin with.

    Raises:
      DataError: no connection, no such file there, a download cut short or of another format, or a
        folder that cannot be written; nothing is left behind.
    """
    if path.exists():
        return
    draft = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(url, draft, path.name)
        _check_signature(draft, signature)
        os.replace(draft, path)
    # ValueError: an odd URL, or bytes that are not the file; HTTPException: an answer that is not
    # HTTP.
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(
            f"{source}: no such file {path}, and {url} could not be downloaded ({reason(error)})"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _download(url: str, draft: Path, name: str) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, draft.open("xb") as file:
        length = response.headers.get("Content-Length")
        total = int(length) if length is not None else None
        received = 0
        with tqdm(
            total=total, desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=None
        ) as bar:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    # read(n) of a connection that broke returns what came, without an error.
    if total is not None and received != total:
        raise OSError(f"the download broke off after {received} of {total} bytes")


def _check_signature(draft: Path, signature: bytes) -> None:
    with draft.open("rb") as file:
        start = file.read(len(signature))
    if start != signature:
        raise ValueError(f"expected a file that begins with {signature!r}; got {start!r}")
