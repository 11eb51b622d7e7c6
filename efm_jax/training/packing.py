"""Many parameters in few buffers, for devices on which every small operation costs a launch."""

import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from efm_jax.training.state import TrainState

# Rows of a tile of a TPU's memory: parts that begin at its multiples are cut without a copy.
_TILE = 8


class Packed(NamedTuple):
    """The leaves of a pytree in one buffer."""

    rows: Array  # [rows, width]


class Packing:
    """Where each leaf of a pytree lies in a buffer ``[rows, width]`` of its type.

    A leaf with an axis of the buffer's width is a block of rows, others are rows one after the
    other; all are padded with zeros, which Adam, a norm and an average leave as they are.

    Args:
      like: the pytree, of arrays or shapes.
    """

    def __init__(self, like: Any):
        leaves, self._structure = jax.tree.flatten(like)
        self._shapes = [leaf.shape for leaf in leaves]
        sizes = Counter()
        for shape in self._shapes:
            sizes[shape[-1] if shape else 1] += math.prod(shape)
        self._width = max(sizes, key=lambda size: sizes[size])
        counts = [-(-math.prod(shape) // self._width) for shape in self._shapes]
        self._large = [i for i, count in enumerate(counts) if count % _TILE == 0]
        self._small = [i for i, count in enumerate(counts) if count % _TILE]

    @classmethod
    def of(cls, like: Any) -> "Packing | None":
        """A packing, or None where there is nothing to gain, or no one type for a buffer."""
        leaves = jax.tree.leaves(like)
        return cls(like) if len(leaves) > 1 == len({leaf.dtype for leaf in leaves}) else None

    def _rows(self, leaf: Array) -> Array:
        if leaf.ndim and self._width in leaf.shape:
            axis = max(i for i, size in enumerate(leaf.shape) if size == self._width)
            return jnp.moveaxis(leaf, axis, -1).reshape(-1, self._width)
        if leaf.size < self._width:
            return leaf.reshape(1, -1)
        return jnp.pad(leaf.ravel(), (0, -leaf.size % self._width)).reshape(-1, self._width)

    def pack(self, tree: Any) -> Packed:
        """The buffer of a pytree."""
        rows = [self._rows(leaf) for leaf in jax.tree.leaves(tree)]
        large = [rows[i] for i in self._large]
        small, start, total = [rows[i] for i in self._small], 0, 0
        size = sum(len(part) for part in small)
        size += -size % _TILE
        for part in small:
            # A sum of padded parts is one operation, a concatenation as many as there are parts.
            below, beside = size - start - len(part), self._width - part.shape[1]
            total += jnp.pad(part, ((start, below), (0, beside)))
            start += len(part)
        return Packed(jnp.concatenate([*large, total] if small else large))

    def unpack(self, packed: Packed) -> Any:
        """The pytree."""
        leaves: list[Any] = [None] * len(self._shapes)
        start, width = 0, self._width
        for i in [*self._large, *self._small]:
            shape, size = self._shapes[i], math.prod(self._shapes[i])
            stop = start + -(-size // width)
            part = packed.rows[start:stop]
            start = stop
            if shape and width in shape:
                axis = max(i for i, n in enumerate(shape) if n == width)
                moved = (*shape[:axis], *shape[axis + 1 :], width)
                leaves[i] = jnp.moveaxis(part.reshape(moved), -1, axis)
            else:
                leaves[i] = part.ravel()[:size].reshape(shape)
        return self._structure.unflatten(leaves)

    def pack_state(self, state: TrainState) -> TrainState:
        """A state with every tree of parameters packed, those of the optimizer too."""
        return self._replace(state, self.pack, self._structure)

    def unpack_state(self, state: TrainState) -> TrainState:
        """The inverse of :meth:`pack_state`."""
        return self._replace(state, self.unpack, jax.tree.structure(Packed._make((0,))))

    def _replace(self, state: TrainState, convert: Any, structure: Any) -> TrainState:
        def is_tree(tree: Any) -> bool:
            return jax.tree.structure(tree) == structure

        return jax.tree.map(
            lambda tree: convert(tree) if is_tree(tree) else tree, state, is_leaf=is_tree
        )
