"""Devices that are only described, for which XLA compiles all the same, and their clocks.

Nothing runs on them: what a compiler says of a program (memory, kernels, what is sent between
devices, on TPUs estimated cycles) is known before a machine is paid for.
"""

import re
from collections.abc import MutableMapping
from typing import Any

import jax
from jax.experimental import topologies

from efm_jax.errors import install

# A TPU's clock in GHz: its peak (cloud.google.com/tpu/docs) over what its matrix units do in one
# cycle, 2 x 128^2 or on v6e 2 x 256^2 operations each.
_UNITS = {"v4": (275e12, 8 * 128**2), "v5e": (197e12, 4 * 128**2), "v5p": (459e12, 8 * 128**2)}
_UNITS |= {"v6e": (918e12, 4 * 256**2)}
# Dense operations a second, of bfloat16 and of float32 at JAX's default precision: TF32 on NVIDIA's
# GPUs (datasheets of A100, H100 and H200, half of the figures with sparsity, which they print
# alone), bfloat16 on TPUs.
_PEAKS = {
    r"NVIDIA A100(-\w+-\d+GB| 80GB PCIe)": (312e12, 156e12),
    r"NVIDIA (H100 80GB HBM3|H200)": (989.5e12, 494.5e12),
    "NVIDIA H100 PCIe": (756.5e12, 378e12),
    "TPU v4": _UNITS["v4"][:1] * 2,
    "TPU v5 lite": _UNITS["v5e"][:1] * 2,
    "TPU v5": _UNITS["v5p"][:1] * 2,
    "TPU v6 lite": _UNITS["v6e"][:1] * 2,
}
# NVIDIA's figures for an H100 SXM, in the text form of XLA's GpuTargetConfigProto.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0" name: "NVIDIA H100 80GB HBM3"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 2 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def prepare(environment: MutableMapping[str, str]) -> None:
    """Set what keeps a TPU's compiler from asking for a machine that is not here.

    Args:
      environment: of this process, before the first call of :func:`described`.
    """
    environment.setdefault("TPU_SKIP_MDS_QUERY", "1")
    environment.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def described(name: str) -> tuple[Any, ...]:
    """The devices of a machine that need not be here.

    Args:
      name: a slice of TPUs, such as ``v5e:1x1``, ``v6e:4x4``, ``v5p:2x2x1``, ``tpu7x:2x2x1``; or
        ``h100``.

    Raises:
      ValueError: a name that the compiler does not know, or a compiler that is not installed, with
        what to install.
    """
    try:
        if name == "h100":
            options = {"topology": "1x1x1", "target_config": _H100}
            return tuple(topologies.get_topology_desc("h100", "cuda", **options).devices)
        # Host by host, as they come, XLA refuses reductions over slices of several hosts.
        return tuple(sorted(_tpu_slice(name).devices, key=lambda device: device.id))
    except Exception as error:  # of several types, by what is missing
        package = "jax-cuda12-plugin and jax-cuda12-pjrt" if name == "h100" else "libtpu"
        hint = f"it needs {package}: {install(_extra(name))}"
        raise ValueError(
            f"topology: expected a TPU slice such as v6e:4x4, or h100, that can be compiled for; "
            f"got {name} ({hint}; {str(error).splitlines()[0]})"
        ) from error


def clock(name: str) -> float | None:
    """Cycles a second of a TPU, or None where it is not known."""
    peak, multipliers = _UNITS.get(name.partition(":")[0], (None, 1))
    return peak and peak / (2 * multipliers)


def peak(kind: str, dtype: str) -> float | None:
    """Operations a second that a chip's maker publishes for products of a type.

    Args:
      kind: JAX's ``device_kind``.
      dtype: ``float32`` or ``bfloat16``.

    Returns:
      None for another type, or a kind that is not known, such as a part of a GPU.
    """
    for name, (half, single) in _PEAKS.items():
        if re.fullmatch(name, kind):
            return {"bfloat16": half, "float32": single}.get(dtype)
    return None


def _extra(name: str) -> str:
    return "h100-compile" if name == "h100" else "tpu-compile"


def _tpu_slice(name: str) -> Any:
    try:
        return topologies.get_topology_desc(name, "tpu")
    except jax.errors.JaxRuntimeError:
        # Slices of less than a host's four chips say how many it has.
        numbers = [int(n) for n in re.findall(r"\d+", name.partition(":")[2])]
        bounds = tuple([*numbers, 1, 1][:3])
        return topologies.get_topology_desc(name, "tpu", chips_per_host_bounds=bounds)
