"""Several processes, one for each host: who this one is, and what the others say.

Every function here is a collective where there are several hosts: all of them must call it, in the
same order.  On one host nothing is sent.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils


def index() -> int:
    """Number of this host; host 0 writes files and talks to the user."""
    return jax.process_index()


def count() -> int:
    """Number of hosts."""
    return jax.process_count()


def gather(array: np.ndarray) -> list[np.ndarray]:
    """Every host's array, in the order of hosts.

    Args:
      array: any type; shapes may differ between hosts in the first axis only.
    """
    array = np.asarray(array)
    if count() == 1:
        return [array]
    # As bytes: on the way through JAX, float64 would lose half its digits.
    data = np.frombuffer(array.tobytes(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(data), np.int32)).reshape(-1)
    padded = np.zeros(max(1, int(sizes.max())), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    shape = (-1, *array.shape[1:]) if array.ndim else ()
    return [
        np.frombuffer(row[:size].tobytes(), array.dtype).reshape(shape)
        for row, size in zip(rows, sizes, strict=True)
    ]


def hosts_where(condition: bool) -> list[int]:
    """Numbers of the hosts on which ``condition`` holds; also a barrier."""
    return [host for host, value in enumerate(gather(np.asarray(condition))) if value]
