"""Many parameters in one buffer, for devices on which every small operation costs a launch."""

import dataclasses
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from efm_jax.training.state import TrainState

# Rows of a tile of a TPU's memory: parts that begin at its multiples are cut without a copy.
_TILE = 8


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where each leaf of a pytree lies in a buffer ``[rows, width]``.

    A leaf with an axis of the buffer's width is a block of rows, others are rows one after the
    other, whole tiles first; all are padded with zeros, which Adam, a norm and an average leave as
    they are.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tree: Any) -> "Packing | None":
        """The packing of a pytree; None for a single leaf, or where types differ."""
        leaves, structure = jax.tree.flatten(tree)
        if len(leaves) == 1 or len({leaf.dtype for leaf in leaves}) > 1:
            return None
        return cls(structure, tuple(leaf.shape for leaf in leaves))

    @property
    def _width(self) -> int:
        """The last axis that most numbers have."""
        sizes: Counter[int] = Counter()
        for shape in self.shapes:
            sizes[shape[-1] if shape else 1] += math.prod(shape)
        return max(sizes, key=lambda size: sizes[size])

    def _count(self, shape: tuple[int, ...]) -> int:
        """Rows of a leaf."""
        return -(-math.prod(shape) // self._width)

    @property
    def _order(self) -> list[int]:
        """Leaves of whole tiles first."""
        return sorted(
            range(len(self.shapes)), key=lambda i: self._count(self.shapes[i]) % _TILE > 0
        )

    def pack(self, tree: Any) -> "Packed":
        """The buffer of a pytree."""
        width, leaves = self._width, jax.tree.leaves(tree)
        large: list[Array] = []
        small: list[Array] = []
        for i in self._order:
            leaf, shape = leaves[i], self.shapes[i]
            if shape and width in shape:
                rows = jnp.moveaxis(leaf, _last(shape, width), -1).reshape(-1, width)
            elif leaf.size < width:
                rows = leaf.reshape(1, -1)
            else:
                rows = jnp.pad(leaf.ravel(), (0, -leaf.size % width)).reshape(-1, width)
            (small if self._count(shape) % _TILE else large).append(rows)
        size, start, total = sum(map(len, small)), 0, []
        size += -size % _TILE
        for part in small:
            # A sum of padded parts is one operation, a concatenation as many as there are parts.
            below, beside = size - start - len(part), width - part.shape[1]
            total.append(jnp.pad(part, ((start, below), (0, beside))))
            start += len(part)
        return Packed(jnp.concatenate([*large, sum(total)] if small else large), self)

    def unpack(self, rows: Array) -> Any:
        """The pytree of a buffer."""
        leaves: list[Any] = [None] * len(self.shapes)
        start, width = 0, self._width
        for i in self._order:
            shape = self.shapes[i]
            part = rows[start : (start := start + self._count(shape))]
            if shape and width in shape:
                axis = _last(shape, width)
                moved = (*shape[:axis], *shape[axis + 1 :], width)
                leaves[i] = jnp.moveaxis(part.reshape(moved), -1, axis)
            else:
                leaves[i] = part.ravel()[: math.prod(shape)].reshape(shape)
        return self.structure.unflatten(leaves)


class Packed(struct.PyTreeNode):
    """A pytree in one buffer."""

    rows: Array  # [rows, width]
    packing: Packing = struct.field(pytree_node=False)


def unpacked(tree: Any) -> Any:
    """The pytree, where it is packed."""
    return tree.packing.unpack(tree.rows) if isinstance(tree, Packed) else tree


def pack_like(tree: Any, like: Any) -> Any:
    """A pytree as another is, packed or not."""
    return like.packing.pack(tree) if isinstance(like, Packed) else tree


def pack_state(state: TrainState) -> TrainState:
    """A state with every tree of parameters packed, those of the optimizer too."""
    packing = Packing.of(state.params)
    if packing is None:
        return state

    def is_params(tree: Any) -> bool:
        return jax.tree.structure(tree) == packing.structure

    return jax.tree.map(
        lambda tree: packing.pack(tree) if is_params(tree) else tree, state, is_leaf=is_params
    )


def unpack_state(state: TrainState) -> TrainState:
    """The inverse of :func:`pack_state`."""
    return jax.tree.map(unpacked, state, is_leaf=lambda tree: isinstance(tree, Packed))


def _last(shape: tuple[int, ...], width: int) -> int:
    """The last axis of a width."""
    return max(i for i, size in enumerate(shape) if size == width)
