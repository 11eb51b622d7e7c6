"""One record that critics and agents train on, and tables with a row for each of its rows."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
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


_ROWS, _LANES = 8, 128  # of a tile of a TPU's memory
_BLOCK = 1024  # rows that are made into lines at once


class TiledRows(struct.PyTreeNode):
    """An array of rows ``[N, *row]`` as a TPU gathers from it: lines that fill its memory's tiles.

    Arrays whose rows have few numbers it would copy to such a table, mostly padding, before every
    chunk of steps.  Indices on the rows work as on the array.
    """

    lines: Array  # [N / k or some more, 128 or a multiple], of k rows each, and zeros
    size: int = struct.field(pytree_node=False)  # N
    row: tuple[int, ...] = struct.field(pytree_node=False)

    @classmethod
    def from_rows(cls, rows: Array) -> "TiledRows":
        """The same numbers in lines."""
        table = cls(rows, rows.shape[0], rows.shape[1:])
        # As a TPU keeps it, and block by block: for all rows at once it would make an array of
        # whole tiles first, 128 numbers for each 6 of an action.
        columns = jnp.moveaxis(rows, 0, -1).reshape(-1, table.size)
        tile = _ROWS * table._count
        block = min(tile * max(_BLOCK // tile, 1), table.size)
        shape = jax.eval_shape(table._lines, columns)
        lines = jnp.zeros(shape.shape, shape.dtype) + 0 * columns[0, 0]  # of a device's own

        def written(lines: Array, start: int | Array, part: Array) -> Array:
            line = start // table._count
            return lax.dynamic_update_slice_in_dim(lines, table._lines(part), line, axis=0)

        def write(i: Array, lines: Array) -> Array:
            part = lax.dynamic_slice_in_dim(columns, i * block, block, axis=1)
            return written(lines, i * block, lax.optimization_barrier(part))

        lines = lax.fori_loop(0, table.size // block, write, lines)
        done = table.size - table.size % block
        return table.replace(
            lines=written(lines, done, columns[:, done:]) if done < table.size else lines
        )

    def _lines(self, columns: Array) -> Array:
        """Lines of some rows."""
        rows = columns.T
        rows = jnp.pad(rows, ((0, -len(rows) % (_ROWS * self._count)), (0, 0)))
        lines = rows.reshape(-1, self._count * rows.shape[1])
        return jnp.pad(lines, ((0, 0), (0, -lines.shape[1] % _LANES)))

    @property
    def _count(self) -> int:
        """Rows in a line."""
        return max(_LANES // math.prod(self.row), 1)

    def __getitem__(self, indices: Any) -> Array:
        """``rows[i]`` for ``i [b]``, or ``rows[i, j, ...]``."""
        indices, *rest = indices if isinstance(indices, tuple) else (indices,)
        width, place = math.prod(self.row), (indices % self._count)[:, None]
        # The barrier keeps what comes after from choosing another layout for the table.
        lines = lax.optimization_barrier(self.lines[indices // self._count])
        found = lines[:, :width]
        for i in range(1, self._count):
            found = jnp.where(place == i, lines[:, i * width : (i + 1) * width], found)
        found = found.reshape(-1, *self.row)
        return found[(jnp.arange(len(found)), *rest)] if rest else found


class TiledData(struct.PyTreeNode):
    """The dataset in one table, as an accelerator keeps it: see :class:`Batch`."""

    numbers: TiledRows  # observations, actions, rewards, next observations, discounts
    observation_size: int = struct.field(pytree_node=False)
    next_actions: Any = None  # as in Batch
    support: Any = None  # as in Batch

    @classmethod
    def from_rows(cls, rows: Batch) -> "TiledData":
        """The dataset without its tables."""
        numbers = jnp.concatenate([leaf.reshape(rows.size, -1) for leaf in rows[:5]], axis=1)
        return cls(TiledRows.from_rows(numbers), rows.observations.shape[1])

    @property
    def size(self) -> int:
        """Number of samples."""
        return self.numbers.size

    def __getitem__(self, indices: Array) -> Batch:
        rows, size = self.numbers[indices], self.observation_size
        action_size = rows.shape[1] - 2 * size - 2
        s, a, r, following, d = jnp.split(rows, np.cumsum([size, action_size, 1, size]), axis=1)
        tables = gather((self.next_actions, self.support), indices)
        return Batch(s, a, r[:, 0], following, d[:, 0], *tables)


def gather(rows: Any, indices: Array) -> Any:
    """Rows ``indices`` of every leaf, or of tiled tables."""

    def is_table(leaf: Any) -> bool:
        return isinstance(leaf, (TiledRows, TiledData))

    return jax.tree.map(lambda leaf: leaf[indices], rows, is_leaf=is_table)


def with_tables(data: Batch | TiledData, next_actions: Any, support: Any) -> Any:
    """The dataset with other tables."""
    change = data.replace if isinstance(data, TiledData) else data._replace
    return change(next_actions=next_actions, support=support)


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

        axes = (0, 0, None, None)
        self._empty = layout.map(empty, in_axes=axes)
        self._fill = layout.map(fill, in_axes=(0, None, *axes), donate=(0,))

    def shapes(self, params: Any, keys: Any, data: Any) -> Any:
        """Shapes of all rows, from those of the arguments of :meth:`fill`."""
        return jax.eval_shape(self._empty, params, keys, self._number, data)

    def programs(self, params: Any, keys: Any, data: Any) -> Iterator[tuple[str, tuple]]:
        """The compiled functions, each with the shapes of its inputs, from those of ``fill``."""
        inputs = params, keys, self._number, data
        yield "empty", (self._empty, inputs)
        yield "a block", (self._fill, (self.shapes(params, keys, data), self._number, *inputs))

    @property
    def _number(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(self._layout.local_devices),), jnp.int32)

    def fill(
        self,
        params: Any,
        keys: Array,
        renewal: int,
        data: Batch | TiledData,
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
