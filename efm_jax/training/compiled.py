"""What a compiled program will do, read from the compiler's own text; nothing is measured.

On TPUs every instruction carries the compiler's estimate of its cycles.  Loops count as often as
they turn.
"""

import collections
import math
import re
from typing import Any, NamedTuple

KINDS = ("products", "draws", "copies", "collectives", "optimizer", "rest")
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)
# What a GPU launches; a TPU's instructions are those with an estimate.
_LAUNCHED = {"concatenate", "convolution", "copy", "custom-call", "dot", "dynamic-slice", "fusion"}
_LAUNCHED |= {"dynamic-update-slice", "gather", "pad", "reduce", "reduce-window", "scatter"}
_LAUNCHED |= {"select", "sort", "transpose"}
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """A line of a program."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 where it gives none."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found else 0

    @property
    def kind(self) -> str:
        """One of ``KINDS``."""
        scope = re.search(r'op_name="([^"]*)"', self.rest)
        scopes = scope[1] if scope else ""
        opcode = self.opcode.removesuffix("-start").removesuffix("-done")
        if opcode in _COLLECTIVES:
            return "collectives"
        products = opcode in ("dot", "convolution") or "gemm" in self.rest
        if products or "kind=kOutput" in self.rest:
            return "products"
        if "draw/" in scopes or "threefry" in scopes:
            return "draws"
        if "optimizer/" in scopes:
            return "optimizer"
        if opcode in ("copy", "transpose", "slice", "pad", "broadcast", "reshape") or re.match(
            "copy|transpose|slice|pad|constant_dynamic|dynamic-slice|bitcast", self.name
        ):
            return "copies"
        return "rest"

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


class Cost(NamedTuple):
    """A program by its compiler; cycles, kernels and collectives of one of its steps."""

    kernels: float
    cycles: dict[str, float]  # of KINDS; zeros where the compiler gives no estimate
    collectives: dict[str, float]  # bytes by opcode
    collective_count: float
    before: int  # cycles of the copies outside all loops
    types: frozenset[str]
    arguments: int  # bytes on each device
    temporaries: int
    aliased: int  # bytes of arguments whose memory results take over
    results: int

    @property
    def total(self) -> float:
        """All cycles of a step."""
        return sum(self.cycles.values())

    @property
    def memory(self) -> int:
        """Bytes on each device while it runs."""
        return self.arguments + self.temporaries + self.results - self.aliased


def computations(text: str) -> dict[str, list[Instruction]]:
    """Find the computations of a compiled program, the entry under the name ``ENTRY``."""
    found: dict[str, list[Instruction]] = {}
    lines: list[Instruction] = []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = found["ENTRY" if line.startswith("ENTRY") else header[1]] = []
        elif instruction := _INSTRUCTION.match(line):
            lines.append(Instruction(*instruction.groups()))
    return found


def read(compiled: Any, steps: int = 1) -> Cost:
    """Read a compiled program.

    Args:
      compiled: what ``lowered.compile()`` returned.
      steps: training steps that one call makes.
    """
    text, memory = compiled.as_text(), compiled.memory_analysis()
    found = computations(text)
    cycles, sent = collections.Counter(), collections.Counter()
    kernels = count = before = 0

    def walk(name: str, times: int) -> None:
        nonlocal kernels, count, before
        for line in found[name]:
            if line.opcode == "while":
                body, condition = line.called("body"), line.called("condition")
                walk(str(body), times * turns(found, line, str(condition)))
            elif line.opcode in ("call", "conditional", "async-start", "call-start"):
                inside = line.called("to_apply") or line.called("calls")
                walk(inside, times) if inside in found else None
            else:
                cycles[line.kind] += times * line.cycles
                launched = line.cycles > 0 or line.opcode in _LAUNCHED
                collective = line.kind == "collectives" and not line.opcode.endswith("-done")
                kernels += times * (launched or collective)
                if collective:
                    count += times
                    sent[line.opcode.removesuffix("-start")] += times * size(line.shape)
                if name == "ENTRY" and line.kind == "copies":
                    before += line.cycles

    walk("ENTRY", 1)
    return Cost(
        kernels / steps,
        {kind: cycles[kind] / steps for kind in KINDS},
        {name: number / steps for name, number in sent.items()},
        count / steps,
        before,
        frozenset(kind for kind, _ in _SHAPE.findall(text)),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.output_size_in_bytes,
    )


def turns(found: dict[str, list[Instruction]], loop: Instruction, condition: str) -> int:
    """How often a loop turns: what the compiler says, or the number it counts up to."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    lines = [line for line in found[condition] if line.opcode == "constant"]
    limits = [int(m[0]) for line in lines if (m := re.match(r"\d+", line.rest))]
    if len(limits) != 1:
        raise ValueError(f"compiled: expected a loop that counts to a number; got {condition}")
    return limits[0]


def size(shape: str) -> int:
    """Bytes of a shape in a program's text, or of all shapes in a tuple; without padding."""
    parts = (
        _BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _SHAPE.findall(shape)
    )
    return sum(parts)
