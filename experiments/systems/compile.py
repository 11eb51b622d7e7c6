"""What compilers say of every program, for machines that are not here; nothing is measured.

    pip install -e '.[tpu-compile]'            # libtpu, about 700 MB
    python -m experiments.systems.compile [--quick] [--machines=v6e:1x1,v5e:2x2,h100]
        [--phases=behavior,policy] [--batch_sizes=256,4096] [--layouts=data,seeds] [--seeds=1]
        [--network=unet] [--dtype=bfloat16] [--sharding=mesh] [--hlo=DIR] [--out=runs/compile]

Compiles the programs that launch.train would run (3 layers of 256, OT path, M = 16, 17 + 6
dimensions, a million transitions, chunks of 100 steps; --network=unet: the published 512/256/128
with M = 64) and reads, per training step, cycles by the TPU compiler's own estimate and what they
go to, kernels, reductions over devices; and memory.  Prints a Markdown table; OUT gets
compile.json, compile.md and compile.png; status 1 where a compiler failed.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import pandas as pd

from efm_jax.errors import reason
from efm_jax.files import write_whole
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.programs import Program, Programs
from efm_jax.training import compiled, machines
from efm_jax.training.parallel import MODES, SHARDINGS, Layout
from experiments.figures import COLORS, drawn
from experiments.results import make_parser, parse_names

MACHINES = ("v5e:1x1", "v5e:2x4", "v6e:1x1", "v6e:4x4", "v5p:2x2x1", "tpu7x:2x2x1", "v5e:16x16")
MACHINES += ("h100",)
PHASES = ("behavior", "critic", "policy full", "policy resample", "support sets", "acting")
STEPS, ROWS, OBSERVATION_SIZE, ACTION_SIZE = 100, 1_000_000, 17, 6
_COLORS = dict(
    zip(compiled.KINDS, ("blue", "green", "yellow", "red", "purple", "gray"), strict=True)
)


def configuration(phase: str, batch_size: int, network: str, dtype: str) -> QIPOConfig:
    """Build the configuration that a phase is compiled for."""
    widths, support = ((512, 256, 128), 64) if network == "unet" else ((256,) * 3, 16)
    return QIPOConfig(
        hidden_dims=widths, critic_hidden_dims=(256,) * 3, network=network, dtype=dtype,
        support_size=support, batch_size=batch_size,
        estimator=phase.partition(" ")[2] if phase.startswith("policy") else "full",
    ).validate()  # fmt: skip


def program(phase: str, programs: Programs) -> tuple[int, Program]:
    """Find a phase's program and the number of its steps."""
    if phase == "acting":
        return 1, programs.acting(256)
    name = phase.partition(" ")[0]
    chunks = {"policy" if phase == "support sets" else name: {STEPS}}
    wanted = "support sets, a block" if phase == "support sets" else f"{name}, {STEPS} steps"
    found = {title: (steps or 1, one) for title, steps, one in programs.all(chunks, 1)}
    return found[wanted]


def measure(args: Any, machine: str, phase: str, mode: str, batch_size: int) -> dict[str, Any]:
    """Compile one program and read it; a row of the table."""
    devices = machines.described(machine)
    seeds = args.seeds * (len(devices) if mode == "seeds" else 1)
    layout = Layout.create(mode, seeds, devices, args.sharding)
    rows = ROWS - ROWS % layout.num_shards
    config = configuration(phase, batch_size, args.network, args.dtype)
    steps, one = program(phase, Programs(config, layout, rows, OBSERVATION_SIZE, ACTION_SIZE))
    lowered, started = one.lower(), time.perf_counter()
    done = lowered.compile()
    seconds, cost = time.perf_counter() - started, compiled.read(done, steps)
    if args.hlo:
        name = f"{machine}-{phase}-{mode}-{batch_size}.txt".replace(" ", "-").replace(":", "-")
        write_whole(args.hlo / name, done.as_text())
    clock = machines.clock(machine)
    return {
        "machine": machine, "phase": phase, "layout": mode, "batch": batch_size, "seeds": seeds,
        "cycles": round(cost.total) or None,
        **{kind: round(cost.cycles[kind]) if cost.total else None for kind in compiled.KINDS},
        "steps/s": clock / cost.total if clock and cost.total else None,
        "kernels": round(cost.kernels, 1), "sends": cost.collective_count,
        "sent kB": sum(cost.collectives.values()) / 1e3, "copies before": cost.before,
        "arguments MB": cost.arguments / 1e6, "temporaries MB": cost.temporaries / 1e6,
        "compile s": seconds,
    }  # fmt: skip


def cases(args: Any) -> Iterator[tuple[str, str, str, int]]:
    """List what is compiled; layouts are alike on one device."""
    for machine in args.machines:
        one = len(machines.described(machine)) == 1
        for phase in args.phases:
            single = phase in ("support sets", "acting")
            for mode in args.layouts[:1] if one or phase == "acting" else args.layouts:
                for size in args.batch_sizes[:1] if single else args.batch_sizes:
                    yield machine, phase, mode, size


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw cycles of a step as stacked bars, as shares, with the total beside each."""
    rows = [row for row in rows if row["cycles"] and row["phase"] not in ("support sets", "acting")]
    if not rows:
        return
    labels = [f"{r['machine']}, {r['phase']}, {r['layout']}, {r['batch']}" for r in rows]
    with drawn(path, 8, 1 + 0.22 * len(rows)) as figure:
        axes, left = figure.subplots(), [0.0] * len(rows)
        for kind, color in _COLORS.items():
            widths = [row[kind] / row["cycles"] for row in rows]
            axes.barh(labels, widths, left=left, color=COLORS[color], label=kind)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for place, row in enumerate(rows):
            axes.text(1.01, place, f"{row['cycles']:,}", va="center", fontsize=7)
        axes.set(xlim=(0, 1), xlabel="share of the cycles of a step (numbers: cycles), estimated")
        axes.invert_yaxis()
        axes.legend(ncols=6, loc="lower center", bbox_to_anchor=(0.4, 1))


def main() -> int:
    """Compile, print and write."""
    parser = make_parser(__doc__)
    parser.add_argument("--machines", default=",".join(MACHINES), help="TPU slices, or h100")
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--batch_sizes", default="256,4096", help="of the whole batch")
    parser.add_argument("--layouts", default=",".join(MODES))
    parser.add_argument("--sharding", default="pmap", choices=SHARDINGS)
    parser.add_argument("--seeds", type=int, default=1, help="a device, or in all with data")
    parser.add_argument("--network", default="mlp", choices=("mlp", "unet"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--quick", action="store_true", help="one machine, the smallest batch")
    parser.add_argument("--hlo", type=pathlib.Path, help="a folder for the compiled programs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/compile"))
    args = parser.parse_args()
    args.phases = parse_names(parser, "--phases", args.phases, PHASES)
    args.layouts = parse_names(parser, "--layouts", args.layouts, MODES)
    args.machines = args.machines.split(",")
    args.batch_sizes = [int(size) for size in args.batch_sizes.split(",")]
    if args.quick:
        args.machines, args.layouts, args.batch_sizes = ["v6e:1x1"], ["data"], [256]
    machines.prepare(os.environ)
    rows: list[dict[str, Any]] = []
    failed = 0
    try:
        for case in cases(args):
            try:
                rows.append(measure(args, *case))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            except jax.errors.JaxRuntimeError as error:  # the compiler's own; the rest goes on
                failed += 1
                print(f"failed: {case}: {reason(error)}", file=sys.stderr, flush=True)
    except ValueError as error:
        parser.error(str(error))
    table = pd.DataFrame(rows, dtype=object)
    table = table.where(table.notna(), None)
    text = table.to_markdown(index=False, floatfmt=",.4g", intfmt=",", missingval="")
    print(text)
    write_whole(args.out / "compile.json", json.dumps(rows, indent=1))
    write_whole(args.out / "compile.md", f"{text}\n")
    draw(rows, args.out / "compile.png")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
