"""Files from the web, by pooch: whole or not at all, and one line when it fails."""

import os
import sys
from pathlib import Path

from efm_jax.errors import DataError, reason

# First bytes of the formats that are downloaded: a server's error page must not become a dataset.
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
NPZ_SIGNATURE = b"PK\x03\x04"

_TIMEOUT = 30.0  # seconds without a byte


def fetch(source: str, url: str, path: Path, signature: bytes) -> None:
    """Make sure that ``path`` is there, else download ``url`` to it; its folder is made.

    The bytes go to a name of their own beside ``path`` and are renamed when all have come, so that
    a failed download never looks like a file, and two processes may download the same one at once.
    A terminal shows the progress.

    Args:
      source: the dataset's name, with which messages begin.
      url: http or https.
      path: a local path.
      signature: the bytes that the file must begin with.

    Raises:
      DataError: no connection, no such file there, a download cut short or of another format, or a
        folder that cannot be written; nothing is left behind.
    """
    import pooch  # here, because it is slow and only a download needs it

    pooch.get_logger().setLevel("WARNING")  # it would tell the file's hash
    http = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=_TIMEOUT)

    def download(url: str, draft: str, _: object) -> None:
        os.unlink(draft)  # because pooch has made it for its owner alone
        http(url, draft, None)
        with open(draft, "rb") as file:
            start = file.read(len(signature))
        if start != signature:
            raise ValueError(f"expected a file that begins with {signature!r}; got {start!r}")

    try:
        pooch.retrieve(
            url,
            known_hash=None,
            fname=path.name,
            path=path.parent,
            downloader=download,  # pyright: ignore[reportArgumentType] its type names arguments that pooch passes by place
        )
    except (OSError, ValueError) as error:  # requests' own are OSErrors
        raise DataError(
            f"{source}: no such file {path}, and {url} could not be downloaded ({reason(error)})"
        ) from error
