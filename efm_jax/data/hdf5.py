"""HDF5 files that may be hostile: numbers that lie in the file itself, no larger than memory.

Refused before anything of it is read: external links and soft links through them, virtual datasets
and external storage, which read other files; objects, references, texts and compounds in the place
of numbers; filters that HDF5 would look for in the system; sizes, whole or of a chunk, beyond the
memory that is free.  A file is opened by its path alone, because h5py reads a file object through
callbacks, and an external link or damage in it then ends the interpreter.
"""

import contextlib
import math
import mmap
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from efm_jax.data import validation
from efm_jax.data.rows import open_file, problems_of
from efm_jax.errors import DataError

# HDF5's own filters and h5py's lzf: deflate, shuffle, fletcher32, szip, nbit, scaleoffset.
_FILTERS = {1, 2, 3, 4, 5, 6, 32000}
_HEAP = b"GCOL\x01\x00\x00\x00"
_MOST_LINKS = 8  # soft links one after another
_CHUNK_SLACK = 1.1, 4096  # a chunk that does not compress grows by less than this


@contextlib.contextmanager
def open_hdf5(path: str, label: str | None = None) -> Iterator["Group"]:
    """The root group of a file, local or remote; a remote one is copied first."""
    label = label or path
    with contextlib.ExitStack() as stack:
        if "://" in path:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            local = folder / "data.hdf5"
            with open_file(path, "HDF5", label) as remote, local.open("wb") as copy:
                while block := remote.read(2**24):
                    copy.write(block)
        else:
            local = Path(path).expanduser()
            with open_file(path, "HDF5", label):  # says what is no file, or may not be read
                pass
        with problems_of(f"{label}: cannot be read as an HDF5 file"):
            file = stack.enter_context(h5py.File(local, "r"))
        yield Group(label, file)


class Group:
    """A group of a file; ``label`` is what messages begin with."""

    def __init__(self, label: str, group: h5py.Group) -> None:
        self.label, self._group = label, group

    def __contains__(self, name: str) -> bool:
        with problems_of(f"{self.label}: {name!r} cannot be read"):
            return self._group.get(name, getlink=True, default=None) is not None

    def keys(self) -> list[str]:
        """The names in the group."""
        with problems_of(f"{self.label}: the names in it cannot be read"):
            return list(self._group)

    def group(self, name: str, label: str | None = None) -> "Group":
        """A group in this one."""
        found = self._find(name)
        if not isinstance(found, h5py.Group):
            raise DataError(f"{self.label}: {name!r} is a dataset; expected a group")
        return Group(label or self.label, found)

    def array(self, name: str) -> "StoredArray":
        """A dataset in this group, checked but not read."""
        found = self._find(name)
        if not isinstance(found, h5py.Dataset):
            raise DataError(f"{self.label}: {name!r} is a group; expected a dataset")
        with problems_of(f"{self.label}: {name!r} cannot be read"):
            return StoredArray(self.label, name, found)

    def attribute(self, name: str) -> Any:
        """A single number or text, or None where there is none of that name."""
        with problems_of(f"{self.label}: attribute {name!r} cannot be read"):
            if name not in self._group.attrs:
                return None
            stored = self._group.attrs.get_id(name)
            if stored.shape not in (None, (), (1,)) or stored.dtype.itemsize > 4096:
                raise DataError(
                    f"{self.label}: attribute {name!r}: expected a single value; got shape "
                    f"{stored.shape} of {stored.dtype}"
                )
            if stored.dtype.kind == "O":
                _check_heaps(f"{self.label}: attribute {name!r}", self._group.file)
            return self._group.attrs[name]

    def _find(self, name: str) -> Any:
        with problems_of(f"{self.label}: {name!r} cannot be read"):
            return _follow(f"{self.label}: {name!r}", self._group, name)


def _follow(what: str, group: h5py.Group, path: str, links: int = _MOST_LINKS) -> Any:
    """The object at a path in the file, through hard links, and soft ones to such places."""
    place: Any = group.file if path.startswith("/") else group
    for name in filter(None, path.split("/")):
        if not isinstance(place, h5py.Group):
            raise DataError(f"{what} is not there")
        link = place.get(name, getlink=True, default=None)
        if link is None:
            raise DataError(f"{what} is not there")
        if isinstance(link, h5py.HardLink):
            place = place[name]
        elif isinstance(link, h5py.SoftLink) and links:
            place = _follow(what, place, link.path, links - 1)
        elif isinstance(link, h5py.SoftLink):
            raise DataError(f"{what} is a chain of more than {_MOST_LINKS} soft links")
        else:
            raise DataError(f"{what} is a link out of the file; only what is in it is read")
    return place


def _check_heaps(what: str, file: h5py.File) -> None:
    """Refuse damaged heaps of texts, in which HDF5 would search without an end."""
    with (
        open(file.filename, "rb") as handle,
        mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        if file.id.get_create_plist().get_sizes() != (8, 8):
            raise DataError(f"{what}: expected a file with addresses of 8 bytes")
        start = data.find(_HEAP)
        while start >= 0:
            place, end = start + 16, start + int.from_bytes(data[start + 8 : start + 16], "little")
            while place + 16 <= end <= len(data):
                number, size = struct.unpack_from("<H6xQ", data, place)
                # Object 0 is the free rest, whose size counts its own header.
                step = size if number == 0 else 16 + -(-size // 8) * 8
                if step < 16 or place + step > end:
                    raise DataError(f"{what}: the file's heap of texts is damaged")
                place += step
            start = data.find(_HEAP, start + 8)


class StoredArray:
    """A dataset of numbers, read by slices of its rows."""

    def __init__(self, label: str, name: str, dataset: h5py.Dataset) -> None:
        self._what, self._dataset = f"{label}: {name!r}", dataset
        self.shape: tuple[int, ...] = dataset.shape
        self.dtype: np.dtype = dataset.dtype
        if self.shape is None:
            raise DataError(f"{self._what}: expected an array; got nothing")
        if self.dtype.kind not in "biuf":
            raise DataError(f"{self._what}: expected real numbers; got type {self.dtype}")
        if dataset.is_virtual or dataset.external:
            raise DataError(f"{self._what} lies in other files; only what is in the file is read")
        properties = dataset.id.get_create_plist()
        filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
        unknown = set(filters) - _FILTERS
        if unknown:
            raise DataError(f"{self._what}: unknown filter {min(unknown)}; expected HDF5's own")
        self._chunk = math.prod(dataset.chunks or ()) * self.dtype.itemsize
        if dataset.chunks and filters:
            # Because a filter grows its output until the compressed bytes end, whatever the size.
            limit = _CHUNK_SLACK[0] * self._chunk + _CHUNK_SLACK[1]
            sizes = (dataset.id.get_chunk_info(i).size for i in range(dataset.id.get_num_chunks()))
            largest = max(sizes, default=0)
            if largest > limit:
                raise DataError(
                    f"{self._what}: a chunk of {self._chunk} bytes is stored in {largest}: damaged"
                )
        validation.check_memory(self._what, self.shape[1:], self.dtype)  # a single row

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        counts = [
            len(range(*part.indices(size))) for part, size in zip(index, self.shape, strict=False)
        ]
        shape = (*counts, *self.shape[len(index) :])
        validation.check_memory(self._what, shape, self.dtype, at_least=self._chunk)
        with problems_of(f"{self._what} cannot be read"):
            return self._dataset[index]
