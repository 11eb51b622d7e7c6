"""Compiles what a run will need, for devices that are here or only described; runs nothing."""

import os
import sys
import time

from efm_jax.rl.memory import Memory
from efm_jax.rl.programs import Programs
from efm_jax.rl.trainer import chunk_lengths
from efm_jax.training import compiled, machines

from .cli import Flags

FLAGS = Flags()
COMPILE_ONLY = FLAGS.bool(
    "compile_only", False, "Compile everything that the run will need, say what it takes, and stop."
)
TOPOLOGY = FLAGS.string(
    "topology",
    None,
    "With --compile_only: a machine that need not be here, such as v6e:4x4 or h100 "
    "(extras tpu-compile, h100-compile).",
)


def devices() -> tuple | None:
    """The described devices that were asked for, or None for those that are here.

    Raises:
      ValueError: a topology that cannot be compiled for, or one to train on.
    """
    if TOPOLOGY.value is None:
        return None
    if not COMPILE_ONLY.value:
        raise ValueError("--topology: expected --compile_only with it; got a run to train")
    machines.prepare(os.environ)
    return machines.described(TOPOLOGY.value)


def report(programs: Programs, memory: Memory) -> int:
    """Compile every program and print a line for each; returns the exit status."""
    most, config = 0, programs.config
    speed = machines.clock(TOPOLOGY.value or "")
    chunks = chunk_lengths(programs.agent)
    for name, steps, program in programs.all(chunks, config.eval_episodes):
        started = time.perf_counter()
        cost = compiled.read(program.lower().compile(), steps or 1)
        taken = time.perf_counter() - started
        most = max(most, cost.memory + (0 if program.has_dataset else memory.dataset))
        line = f"{name:<28} arguments {cost.arguments / 1e6:10,.1f} MB"
        line += f"  temporaries {cost.temporaries / 1e6:10,.1f} MB"
        if steps and speed and cost.total:
            line += f"  {speed / cost.total:10,.0f} steps/s"
        print(f"{line}  compiled in {taken:.1f} s", flush=True)
    count = len(programs.layout.devices)
    most = f"at most {most / 1e6:,.1f} MB in a program and the dataset"
    print(f"each of {count} devices: {most}; predicted {memory}")
    if speed:
        print("steps/s are the compiler's estimate; nothing was run")
    sys.stdout.flush()
    return 0
