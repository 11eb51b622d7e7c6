"""How tests compile: fast, and one program once, whichever of their processes needs it."""

import importlib.metadata

# For XLA: each program runs for a moment.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# Each in one piece: pieces for several threads cost half as much again.
QUICK_TO_COMPILE += " --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith(
    "0.10."
):  # others end at a flag that they do not know
    QUICK_TO_COMPILE += (
        " --xla_cpu_use_fusion_emitters=false"  # which set up MLIR for every program
    )


def share(folder):
    """Environment of processes that load from a folder what one of them has compiled.

    One that is killed leaves a part of a program, which another one compiles for itself; JAX's
    words about it are no complaint of ours.
    """
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONWARNINGS": "ignore:Error reading persistent,ignore:Error writing persistent",
    }
