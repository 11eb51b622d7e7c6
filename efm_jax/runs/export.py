"""A trained policy, sampler included, as bytes that run without this package."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from efm_jax.runs.loading import Policy, load_policy

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_policy(
    policy: Policy | str, *, platforms: tuple[str, ...] = ("cpu", "cuda", "tpu"), **options: Any
) -> bytearray:
    """Lower a policy to StableHLO, and serialize it by ``jax.export``.

    The bytes are read with ``jax.export.deserialize(data).call(observations, seed)``: observations
    ``[b, S]`` float32 in the environment's units for any ``b``, a ``uint32`` seed of the actions'
    noise, and the result ``[b, A]`` float32 in the environment's units.  Normalization and sampler
    are inside.

    Args:
      policy: one that was trained or loaded, or a work directory, local or ``gs://``.
      platforms: some of ``PLATFORMS``, which the policy will run on.
      **options: of a work directory, as in :func:`efm_jax.load_policy`.

    Raises:
      ValueError: as :func:`load_policy`; an unknown platform, or options of a policy.
      ImportError: flatbuffers is not installed (the extra ``export``).
    """
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or not platforms:
        known, given = ", ".join(PLATFORMS), ", ".join(platforms) or "none"
        raise ValueError(f"platforms: expected some of {known}; got {given}")
    if isinstance(policy, Policy) and options:
        raise ValueError(f"{min(options)}: expected with a work directory; got it with a policy")
    loaded = policy if isinstance(policy, Policy) else load_policy(policy, **options)

    def act(observations: jax.Array, seed: jax.Array) -> jax.Array:
        return loaded(observations, jax.random.key(seed))

    (batch,) = export.symbolic_shape("b")
    shapes = (
        jax.ShapeDtypeStruct((batch, loaded.observation_size), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.uint32),
    )
    return export.export(jax.jit(act), platforms=platforms)(*shapes).serialize()
