"""Checkpoints through Orbax: asynchronous, the last few kept, verified when read.

Orbax writes to a temporary folder and renames it, so a run killed in the middle of a save leaves
the previous checkpoint.  A digest of every array is saved beside them, because the format itself
does not notice every damaged byte.

A folder of somebody else's chooses no code: Orbax 0.12 looks up handlers and types by name in its
own registries, imports and unpickles nothing, and our items are read by our handlers.  It takes the
memory that arrays declare, and follows links; so declared sizes are compared first, and what is
read counts only with its digest, shapes and types.
"""

import contextlib
import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath

from efm_jax.errors import reason

# Bytes that arrays may declare beyond those wanted: the chunk of an empty one has an entry.
_SLACK = 2**20


class CheckpointError(ValueError):
    """Checkpoints are there, and none of them can be read."""


class Checkpointer:
    """Checkpoints of one run under ``directory``.

    Args:
      directory: local or ``gs://``; made if it is not there.
      max_to_keep: older checkpoints are deleted.
      report: called with one line about every checkpoint that cannot be read, when an older one
        can.
      read_only: nothing will be saved or deleted; nothing is made.

    Raises:
      OSError: the folder cannot be written, from here or from :meth:`save` and :meth:`close`.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        max_to_keep: int = 3,
        report: Callable[[str], None] = print,
        read_only: bool = False,
    ):
        self._directory = epath.Path(directory)
        self._report = report
        with _quiet():
            options = ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else max_to_keep,
                create=not read_only,
                read_only=read_only,
            )
            self._manager = ocp.CheckpointManager(self._directory.resolve(), options=options)

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint, complete or being saved; None where there is none."""
        return max(self._manager.all_steps(), default=None)

    def save(self, step: int, tree: Any) -> None:
        """Start saving a tree under a step number; returns once the tree has been copied.

        Does nothing where that step has been saved.  On several hosts all of them call it with the
        same tree, and the first writes.
        """
        if step in self._manager.all_steps():
            return
        # A copy, because on the CPU a device array may share its memory with the buffer that the
        # next chunk reuses.
        tree = jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave({"digest": _digest(tree)})
        )
        with self._written():  # also what the save before it met
            self._manager.save(step, args=args, force=True)

    def restore(self, template: Any, *, discard: bool = False) -> tuple[int, Any] | None:
        """Read the newest readable checkpoint: ``(step, tree)``, or None where there is none.

        Args:
          template: a tree of arrays of the structure, shapes and types that were saved.
          discard: delete newer checkpoints that cannot be read, so that the run can save them anew.

        Raises:
          CheckpointError: if there are checkpoints and none can be read.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                with _quiet():
                    tree = self._read(step, template)
            # Any error, because damage shows as whatever the reader of the damaged part raises.
            except Exception as error:
                place = self._directory / str(step)
                damaged[step] = f"checkpoint {place} cannot be read: {_first_line(error)}"
                continue
            for newer, problem in damaged.items():
                self._report(f"{problem}; {step} is used instead")
                if discard:
                    self._manager.delete(newer)
            return step, tree
        if damaged:
            newest = next(iter(damaged.values()))
            raise CheckpointError(
                newest + (f"; none of the {len(damaged)} can" if len(damaged) > 1 else "")
            )
        return None

    def _read(self, step: int, template: Any) -> Any:
        template = jax.tree.map(np.asarray, template)
        self._check_size(step, template)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(template), meta=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=args)
        tree = jax.tree.map(np.asarray, restored["state"])
        if _digest(tree) != restored["meta"]["digest"]:
            raise ValueError("its arrays do not match their digest")
        wanted, found = (
            jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), t) for t in (template, tree)
        )
        if wanted != found:
            raise ValueError("its arrays have other shapes or types than this configuration")
        return tree

    def _check_size(self, step: int, template: Any) -> None:
        """Refuse arrays that declare more memory, whole or in chunks, than the template's take."""
        folder = self._directory.resolve() / str(step) / "state"
        declared = 0
        leaves = jax.tree.leaves(ocp.StandardCheckpointHandler().metadata(folder).tree)
        if len(leaves) != len(jax.tree.leaves(template)):
            raise ValueError("its arrays are not those of this configuration, or of this version")
        for leaf in leaves:
            shapes = [leaf.shape, leaf.storage.chunk_shape if leaf.storage else ()]
            declared += max(map(math.prod, shapes)) * np.dtype(leaf.dtype).itemsize
        wanted = sum(leaf.nbytes for leaf in jax.tree.leaves(template))
        if declared > wanted + _SLACK:
            raise ValueError(f"its arrays take {declared:.3g} bytes; expected {wanted}")

    def wait(self) -> None:
        """Wait for saves in progress."""
        with self._written():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for saves in progress, and let go of the folder."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Name the folder in what a failed save raises, now or in the background."""
        try:
            with _quiet():
                yield
        except jax.errors.JaxRuntimeError:  # of another host that is gone, not of the folder
            raise
        # Any error, because a full disk is a ValueError of TensorStore, and others of others.
        except Exception as error:
            raise OSError(f"{self._directory}: cannot be written: {reason(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Orbax's log of a damaged file, because the checkpoint's report or error says it."""
    logger = absl_logging.get_absl_logger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _digest(tree: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(repr((jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype))).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
