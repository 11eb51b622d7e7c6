"""What the tests of the library share: paths with their references, draws, mapped axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from efm_jax import paths
from tests.reference import paths as reference

PATHS = {
    "ot": (paths.conditional_ot(), reference.conditional_ot()),
    "vp_linear": (paths.vp_linear(), reference.vp_linear()),
    "vp_cosine": (paths.vp_cosine(), reference.vp_cosine()),
}
each_path = pytest.mark.parametrize(("path", "ref"), PATHS.values(), ids=PATHS)
OT, COSINE = PATHS["ot"][0], PATHS["vp_cosine"][0]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def on_devices(how, function, devices, *arguments):
    """Map over the leading axis of 4, which becomes the axis ``i``; each result from every part."""
    if how == "vmap":
        return jax.jit(jax.vmap(function, axis_name="i"))(*arguments)
    if how == "pmap":
        return jax.pmap(function, axis_name="i", devices=devices)(*arguments)
    mesh, spec = Mesh(np.array(devices), ("i",)), PartitionSpec("i")

    def body(*shards):
        found = function(*jax.tree.map(lambda shard: shard[0], shards))
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], found)

    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))(*arguments)
