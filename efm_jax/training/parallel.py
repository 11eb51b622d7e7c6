"""Devices: the only module that calls ``pmap``, makes meshes, replicates or shards.

Training functions are written for one seed on one device.  Here they gain two leading axes: seeds
(``vmap``, inner) and devices (``pmap``, outer), laid out in one of two ways.  One device is the
case D = 1 of the same code.  On several hosts the device axis spans the devices of all of them, and
each host holds the part of it that belongs to its own devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efm_jax import checks
from efm_jax.training import hosts

# The mapped axis over which a global batch is split.
DEVICE_AXIS = "devices"
MODES = ("data", "seeds")
# How a function is put on devices: by pmap, or by jit with a mesh and named shardings.
SHARDINGS = ("pmap", "mesh")
Device = Any  # jax.Device, which a checker takes for a variable


@dataclasses.dataclass(frozen=True)
class Layout:
    """How seeds, data and batches lie on D devices.

    ``data``: a device holds every seed's state and 1/D of the data (and of support sets), and
    computes its part of every batch; weights, losses and gradients are reduced over devices.
    ``seeds``: a device holds 1/D of the seeds and all the data; nothing is sent between devices.
    """

    mode: str
    num_seeds: int
    devices: tuple[Device, ...]  # of all hosts
    on_cpu: bool  # whether programs are made for processors: results differ by rounding alone
    sharding: str = "pmap"  # of SHARDINGS; the same numbers

    @classmethod
    def create(
        cls,
        mode: str = "data",
        num_seeds: int = 1,
        devices: Sequence[Device] | None = None,
        sharding: str = "pmap",
    ) -> "Layout":
        """A layout over the given devices, by default all there are.

        Raises:
          ValueError: an unknown mode or sharding, seeds that do not divide over the devices, or a
            mesh over several hosts.
        """
        checks.check_choice("parallel", mode, MODES)
        checks.check_choice("sharding", sharding, SHARDINGS)
        if sharding == "mesh" and hosts.count() > 1:
            raise ValueError(
                f"sharding: expected pmap on several hosts; got mesh on {hosts.count()}"
            )
        if devices is None:  # host by host, because a host's rows are those of consecutive devices
            devices = sorted(jax.devices(), key=lambda device: device.process_index)
        if hosts.count() < len({device.process_index for device in devices}):
            sharding = "mesh"  # pmap would compile for this host's devices of a described machine
        on_cpu = devices[0].platform == "cpu"
        layout = cls(mode, num_seeds, tuple(devices), on_cpu, sharding)
        if mode == "seeds":
            check_divides("num_seeds", num_seeds, len(layout.devices), "devices")
        return layout

    @property
    def axis_name(self) -> str | None:
        """The axis that collectives of a training step reduce over."""
        return DEVICE_AXIS if self.mode == "data" else None

    @property
    def num_shards(self) -> int:
        """Parts that data and batches are split into."""
        return len(self.devices) if self.mode == "data" else 1

    @property
    def seeds_per_device(self) -> int:
        """Seeds that one device trains."""
        return self.num_seeds if self.mode == "data" else self.num_seeds // len(self.devices)

    @property
    def local_devices(self) -> tuple[Device, ...]:
        """This host's devices; of a machine that is only described, all of them."""
        if hosts.count() == 1:
            return self.devices
        return tuple(device for device in self.devices if device.process_index == hosts.index())

    def host_rows(self, num_rows: int) -> slice:
        """The rows that this host holds of a table with ``num_rows``.

        Raises:
          ValueError: if the rows do not divide over the devices.
        """
        if self.mode == "seeds":
            return slice(0, num_rows)
        check_divides("max_transitions", num_rows, len(self.devices), "devices", most=num_rows)
        first = self.devices.index(self.local_devices[0])
        share = num_rows // len(self.devices)
        return slice(first * share, (first + len(self.local_devices)) * share)

    def replicate(self, tree: Any) -> Any:
        """Copy a tree to each of this host's devices: leaves gain a leading device axis."""
        # pmap wants at least one argument with a mapped axis.
        places = jnp.arange(len(self.local_devices))
        return self._to_all(places, tree)

    def put_seeds(self, tree: Any) -> Any:
        """Spread a tree with a leading axis of all seeds: ``[S, ...] -> [devices, seeds, ...]``."""
        if self.mode == "data":
            return self.replicate(tree)
        first = self.devices.index(self.local_devices[0]) * self.seeds_per_device
        return self._split(
            tree, slice(first, first + len(self.local_devices) * self.seeds_per_device)
        )

    def put_rows(self, tree: Any) -> Any:
        """Spread this host's rows (see :meth:`host_rows`): ``[n, ...] -> [devices, rows, ...]``."""
        return self.replicate(tree) if self.mode == "seeds" else self._split(tree, slice(None))

    def get_seeds(self, tree: Any) -> Any:
        """The inverse of :meth:`put_seeds`, on every host; arrays ``[S, ...]``."""
        if self.mode == "data":
            return _without_device_axis(jax.tree.map(lambda leaf: leaf.addressable_data(0), tree))
        return jax.tree.map(
            lambda leaf: np.concatenate(
                hosts.gather(np.asarray(leaf).reshape(-1, *leaf.shape[2:]))
            ),
            tree,
        )

    def map(
        self, function: Callable, *, in_axes: tuple | None = None, donate: tuple[int, ...] = ()
    ) -> Callable:
        """Map a function of one seed on one device over both axes and compile it.

        Args:
          function: may use collectives over :attr:`axis_name`.
          in_axes: for each argument, 0 where it has a seed axis and None where all seeds share it,
            or a tree of these; by default all have one.
          donate: positions of arguments whose buffers may be reused for the results.

        Returns:
          The compiled function; every argument and result has a leading axis of this host's
          devices.
        """

        def over_seeds(*args: Any) -> Any:
            axes = (0,) * len(args) if in_axes is None else in_axes
            if self.seeds_per_device > 1:
                return jax.vmap(function, axes)(*args)
            # An axis of one seed would be in the way of the compiler.
            args = jax.tree.map(_first, axes, args, is_leaf=lambda axis: axis is None)
            return jax.tree.map(lambda leaf: leaf[None], function(*args))

        return self._pmap(over_seeds, axis_name=DEVICE_AXIS, donate_argnums=donate)

    def map_devices(self, function: Callable, *, donate: tuple[int, ...] = ()) -> Callable:
        """Map a function of one device's arrays, without axes of seeds, and compile it."""
        return self._pmap(function, donate_argnums=donate)

    def _split(self, tree: Any, part: slice) -> Any:
        count = len(self.local_devices)
        tree = jax.tree.map(lambda leaf: leaf[part].reshape(count, -1, *leaf.shape[1:]), tree)
        return self._to_each(tree)

    # Kept, because every new pmap is traced and compiled again.
    @functools.cached_property
    def _to_all(self) -> Callable:
        return self._pmap(lambda _, leaves: leaves, in_axes=(0, None))

    @functools.cached_property
    def _to_each(self) -> Callable:
        return self._pmap(lambda leaves: leaves)

    def _pmap(self, function: Callable, **options: Any) -> Callable:
        if self.sharding == "mesh":
            return self._on_mesh(function, **options)
        return jax.pmap(function, devices=self.devices, **options)

    def _on_mesh(
        self,
        function: Callable,
        *,
        axis_name: str = DEVICE_AXIS,
        in_axes: tuple | int = 0,
        donate_argnums: tuple[int, ...] = (),
    ) -> Callable:
        """What ``pmap`` does, of arrays with named shardings."""
        mesh = jax.sharding.Mesh(np.array(self.devices), (axis_name,))

        def on_mesh(*args: Any) -> Any:
            axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)

            def of_one(*args: Any) -> Any:
                args = jax.tree.map(_first, axes, args, is_leaf=lambda axis: axis is None)
                return jax.tree.map(lambda leaf: leaf[None], function(*args))

            split, whole = jax.P(axis_name), jax.P()
            specs = tuple(whole if axis is None else split for axis in axes)
            options = {"mesh": mesh, "in_specs": specs, "out_specs": split, "check_vma": False}
            return jax.shard_map(of_one, **options)(*args)

        return jax.jit(on_mesh, donate_argnums=donate_argnums)


def _first(axis: int | None, tree: Any) -> Any:
    """The first entry of each leaf along ``axis``, or all of it."""
    return tree if axis is None else jax.tree.map(lambda leaf: leaf[0], tree)


@jax.jit
def _without_device_axis(tree: Any) -> Any:
    """Of one device's part ``[1, ...]``; one program for all leaves."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def compile_ahead(mapped: Any, *inputs: Any) -> Callable:
    """Compile what :meth:`Layout.map` returned before its first call, so that a call's time is its
    own.

    On several hosts it is left to compile at its first call: JAX's compiled ``pmap`` does not take
    the arrays of one host.
    """
    return mapped.lower(*inputs).compile() if hosts.count() == 1 else mapped


def check_divides(name: str, value: int, parts: int, noun: str, *, most: int | None = None) -> None:
    """Refuse a number that is no multiple of ``parts``; name the multiples beside it."""
    below = value // parts * parts
    if below == value:
        return
    fitting = [str(n) for n in (below, below + parts) if n > 0 and (most is None or n <= most)]
    hint = f", as {' or '.join(fitting)}" if fitting else ""
    raise ValueError(f"{name}: expected a multiple of the {parts} {noun}{hint}; got {value}")
