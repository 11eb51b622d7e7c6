"""One record that critics and agents train on, and tables with a row for each of its rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from efm_jax.training.parallel import Layout


class Batch(NamedTuple):
    """Samples that share the leading axis: all ``N`` rows are the dataset, ``B`` of them a batch.

    A critic's target is ``rewards + discounts * value(next_observations)``.
    """

    observations: Array  # [B, S], normalized
    actions: Array  # [B, A], in [-1, 1]
    rewards: Array  # [B], discounted sum of the next n rewards
    next_observations: Array  # [B, S], n steps later
    discounts: Array  # [B], discount ** n, or 0 where the episode terminated within the n steps
    next_actions: Array | None = None  # [B, M, A] of the behavior model, for critics that ask
    support: Any = None  # an agent's own rows, such as support sets; policy phase only

    @property
    def size(self) -> int:
        """Number of samples (``len`` of a named tuple is its number of fields)."""
        return self.rewards.shape[0]


# All seeds share the dataset; what was computed by a seed's own parameters has a seed axis.
SEED_AXES = Batch._make((None, None, None, None, None, 0, 0))


def gather(rows: Any, indices: Array) -> Any:
    """Rows ``indices`` of every leaf."""
    return jax.tree.map(lambda leaf: leaf[indices], rows)


def draw_noise(key: Array, indices: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal ``[b, *shape]``; each row has a key folded from its place in the dataset."""

    def draw(index: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, index), shape)

    return jax.vmap(draw)(indices)


class Table:
    """Rows computed for the whole dataset, block by block, each device its own: memory is bounded.

    Args:
      layout: devices.
      rows: ``(params, key, renewal, batch [b], indices [b]) -> pytree of [b, ...]``, pure, of one
        seed; the indices are places in the whole dataset.
      num_rows: rows of the whole dataset.
      block: rows that a device computes at once.
    """

    def __init__(self, layout: Layout, rows: Callable[..., Any], num_rows: int, block: int):
        per_device = num_rows // layout.num_shards
        self._layout = layout
        self._num_rows = num_rows
        # The last block overlaps the one before it and writes the same values again.
        self._starts = [min(i, per_device - block) for i in range(0, per_device, block)]
        self._ends = [min(i + block, per_device) for i in range(0, per_device, block)]

        def compute(places: Array, params: Any, key: Array, renewal: Array, data: Batch) -> Any:
            axis = layout.axis_name
            first = 0 if axis is None else lax.axis_index(axis) * per_device
            return rows(params, key, renewal, gather(data, places), first + places)

        def empty(*inputs: Any) -> Any:
            shapes = jax.eval_shape(compute, jnp.arange(per_device), *inputs)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def fill(table: Any, start: Array, *inputs: Any) -> Any:
            def write(leaf: Array, new: Array) -> Array:
                return lax.dynamic_update_slice_in_dim(leaf, new.astype(leaf.dtype), start, axis=0)

            return jax.tree.map(write, table, compute(start + jnp.arange(block), *inputs))

        axes = (0, 0, None, SEED_AXES)
        self._empty = layout.map(empty, in_axes=axes)
        self._fill = layout.map(fill, in_axes=(0, None, *axes), donate=(0,))

    def fill(
        self,
        params: Any,
        keys: Array,
        renewal: int,
        data: Batch,
        report: Callable[[int, int], None] | None = None,
    ) -> Any:
        """All rows, on the devices; arguments as they lie there.

        Args:
          params: what ``rows`` takes.
          keys: root keys.
          renewal: number of the renewal.
          data: the dataset.
          report: told ``(done, total)`` rows after every block; may raise to stop.
        """
        inputs = params, keys, self._layout.replicate(jnp.asarray(renewal)), data
        table = self._empty(*inputs)
        for start, end in zip(self._starts, self._ends, strict=True):
            table = self._fill(table, self._layout.replicate(jnp.asarray(start)), *inputs)
            # Dispatch runs ahead of the devices: without waiting, a report would come too early.
            jax.block_until_ready(table)
            if report is not None:
                report(end * self._layout.num_shards, self._num_rows)
        return table
