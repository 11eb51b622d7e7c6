"""A trained policy, sampler included, as bytes that run without this package."""

import jax
import jax.numpy as jnp
from jax import export

from efm_jax.runs.loading import load_policy
from efm_jax.runs.workdir import RunInfo, resolve

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_policy(
    workdir: str, *, platforms: tuple[str, ...] = ("cpu", "cuda", "tpu"), **options
) -> bytearray:
    """Lower the policy of a work directory to StableHLO, and serialize it by ``jax.export``.

    The bytes are read with ``jax.export.deserialize(data).call(observations, seed)``: observations
    ``[b, S]`` float32 in the environment's units for any ``b``, a ``uint32`` seed of the actions'
    noise, and the result ``[b, A]`` float32 in the environment's units.  Normalization and sampler
    are inside.

    Args:
      workdir: what ``launch.train`` left, local or ``gs://``.
      platforms: some of ``PLATFORMS``, which the policy will run on.
      **options: as in :func:`efm_jax.runs.loading.load_policy`.

    Raises:
      ValueError: as :func:`load_policy`; an unknown platform.
      ImportError: flatbuffers is not installed (the extra ``export``).
    """
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or not platforms:
        known, given = ", ".join(PLATFORMS), ", ".join(platforms) or "none"
        raise ValueError(f"platforms: expected some of {known}; got {given}")
    policy = load_policy(workdir, **options)
    info = RunInfo.read(resolve(workdir))

    def act(observations: jax.Array, seed: jax.Array) -> jax.Array:
        return policy(observations, jax.random.key(seed))

    (batch,) = export.symbolic_shape("b")
    shapes = (
        jax.ShapeDtypeStruct((batch, info.observation_size), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.uint32),
    )
    return export.export(jax.jit(act), platforms=platforms)(*shapes).serialize()
