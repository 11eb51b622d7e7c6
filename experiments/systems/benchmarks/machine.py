"""What the numbers are measured on, and its best matrix products."""

import os
import pathlib
import platform
from importlib import metadata
from typing import Any

import jax

from efm_jax.training.machines import peak
from experiments.systems.benchmarks.phases import Product, seconds
from experiments.systems.benchmarks.timing import Tables

_VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")
# The size of a square product: large enough for the machine's best.
SIZES = {"full": 2048, "quick": 256, "device": 8192, "smoke": 256}


def machine() -> dict[str, Any]:
    """Devices, processor and versions."""
    installed = {found.name: found.version for found in metadata.distributions()}
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return {
        "device": ", ".join(sorted({device.device_kind for device in jax.devices()})),
        "devices": jax.device_count(), "backend": jax.devices()[0].client.platform_version,
        "memory for JAX, GB": limit and limit / 1e9,
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: installed.get(name) for name in _VERSIONS},
    }  # fmt: skip


def run(size: int) -> Tables:
    """Two tables."""
    yield "Machine", [{"": name, "value": str(value)} for name, value in machine().items()]
    for dtype in ("float32", "bfloat16"):
        square, kind = Product(1, size, size, size, dtype), jax.devices()[0].device_kind
        published, found = peak(kind, dtype), square.flops / seconds(square)
        yield "The largest product", [{
            "product": f"{size} x {size} x {size}", "dtype": dtype, "TFLOP/s": found / 1e12,
            "published peak, TFLOP/s": published and published / 1e12,
            "share of peak, %": published and 100 * found / published,
        }]  # fmt: skip
