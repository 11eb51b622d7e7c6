"""What every experiment does with its command line and its files."""

import argparse
import fcntl
import io
import pathlib
from collections.abc import Container

import numpy as np
import pandas as pd

from efm_jax.files import write_whole


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser that shows a module's documentation as it is."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter)


def parse_names(
    parser: argparse.ArgumentParser, flag: str, text: str, known: Container[str]
) -> list[str]:
    """Split names at commas; one that is not known ends the program."""
    names = text.split(",")
    for name in names:
        if name not in known:
            parser.error(f"{flag}: unknown {name!r}; expected {', '.join(known)}")
    return names


def read_rows(path: pathlib.Path, fields: list[str]) -> pd.DataFrame:
    """Read a CSV file; no rows where there is no file."""
    if not path.exists():
        return pd.DataFrame(columns=fields)
    names = dict.fromkeys(("dataset", "method", "problem", "arm"), str)
    return pd.read_csv(path, dtype=names, float_precision="round_trip")


def append_rows(path: pathlib.Path, rows: pd.DataFrame) -> None:
    """Append rows to a CSV file, one process at a time, without columns that the file lacks."""
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        is_new = path.stat().st_size == 0
        columns = rows.columns if is_new else pd.read_csv(path, nrows=0).columns
        rows.reindex(columns=columns).to_csv(file, header=is_new, index=False)


def write_arrays(path: pathlib.Path, tree: list | dict) -> None:
    """Write a list or dict of arrays to an .npz file that is there whole or not at all."""
    arrays = tree if isinstance(tree, dict) else dict(enumerate(tree))
    arrays = {str(name): np.asarray(leaf) for name, leaf in arrays.items()}
    np.savez_compressed(buffer := io.BytesIO(), **arrays)
    write_whole(path, buffer.getvalue())


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Read what :func:`write_arrays` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)
