"""Peak memory against what ``efm_jax.rl.memory.predict`` says before a run.

Parts: bytes of live arrays, looked at whenever a real run of the trainer calls its hooks, the most
  of each
part.  Temporaries: what the compiled programs need for intermediate results, by XLA's own account;
the prediction leaves them out.  All of it: how much a process grows while it trains on more data,
as the system sees it (on an accelerator, as the device's allocator does).  On the host that is also
what compilation takes and what the allocator keeps of freed temporaries, some hundreds of MB
whatever the data.
"""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efm_jax.rl.config import PHASES, QIPOConfig
from efm_jax.rl.memory import Memory, predict
from efm_jax.rl.trainer import Trainer
from efm_jax.types import Transitions

Rows = list[dict[str, Any]]

_MB = 1e6
_OBSERVATION_SIZE, _ACTION_SIZE = 17, 6  # HalfCheetah's
_WITH_A_COPY = ("state, evaluating", "state, saving")


@dataclasses.dataclass(frozen=True)
class Size:
    """A run: of few steps, because the number of steps takes no memory."""

    rows: int
    width: int
    seeds: int = 1

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.rows:,} rows, width {self.width}, seeds {self.seeds}"

    def config(self) -> QIPOConfig:
        # One step of the sampler: tables take as much memory as with more, and a fraction of the
        # time.
        return QIPOConfig(
            hidden_dims=(self.width,) * 3,
            critic_hidden_dims=(self.width,) * 3,
            solver="euler",
            sample_steps=1,
            behavior_steps=10,
            critic_steps=10,
            policy_steps=20,
            renew_every=10,
            log_every=5,
            checkpoint_every=10,
            eval_every=10,
        )

    def data(self) -> Transitions:
        """Standard normal numbers; terminations do not matter."""
        random = np.random.default_rng(0)
        states, actions, rewards, following = (
            random.standard_normal((self.rows, *size), np.float32)
            for size in ((_OBSERVATION_SIZE,), (_ACTION_SIZE,), (), (_OBSERVATION_SIZE,))
        )
        return Transitions(
            states, np.tanh(actions), rewards, following, np.zeros(self.rows, np.float32)
        )

    def trainer(self, data: Transitions) -> Trainer:
        return Trainer(self.config(), data, range(self.seeds))

    def predict(self, trainer: Trainer) -> Memory:
        return predict(self.config(), trainer.layout, self.rows, _OBSERVATION_SIZE, _ACTION_SIZE)


class Watch:
    """Hooks of a run that look at the device's live arrays; keeps the most bytes of each part.

    Args:
      rows: of the dataset on a device; arrays with such an axis after those of devices and seeds
        are tables, after that of devices the dataset, and everything else is the state.
    """

    def __init__(self, rows: int):
        self._rows = rows
        # Kept, so that no array to come has the id of one that is gone.
        self._before = {id(array): array for array in jax.live_arrays()}
        self.most = dict.fromkeys(("dataset", "tables", "state", *_WITH_A_COPY, "all at once"), 0)

    def look(self, with_a_copy: str | None = None) -> None:
        """Count what is there now and was not at the start, the state under another name beside its copy."""
        found = dict.fromkeys(self.most, 0)
        # By address: an array keeps the views of its shards that were asked for, and they count as
        # alive.
        new = {
            array.unsafe_buffer_pointer(): array
            for array in jax.live_arrays()
            if id(array) not in self._before
        }
        for array in new.values():
            found[self._part(array.shape)] += array.nbytes
        found["all at once"] = sum(found.values())
        if with_a_copy is not None:
            found[with_a_copy] = found.pop("state")
        self.most |= {name: max(self.most[name], size) for name, size in found.items()}

    def _part(self, shape: tuple[int, ...]) -> str:
        if len(shape) > 2 and shape[2] == self._rows:
            return "tables"
        return "dataset" if len(shape) > 1 and shape[1] == self._rows else "state"

    def on_phase(self, phase: str, done: int, total: int) -> None:
        self.look()

    def on_table(self, name: str, done: int, total: int) -> None:
        self.look()

    def on_renewal(self, step: int, summary: Any) -> None:
        self.look()

    def on_metrics(self, phase: str, step: int, values: Any) -> None:
        self.look()

    def on_evaluate(self, step: int, acting: Any) -> None:
        self.look(_WITH_A_COPY[0])

    def on_checkpoint(self, state: Any) -> None:
        self.look(_WITH_A_COPY[1])

    def stop_requested(self) -> bool:
        return False


def _row(size: Size, part: str, predicted: float | None, measured: float | None) -> dict[str, Any]:
    row = {"run": size.name, "part": part, "predicted MB": predicted and predicted / _MB}
    row["measured MB"] = None if measured is None else measured / _MB
    return row | {"measured / predicted": measured / predicted if predicted and measured else None}


def measure_parts(size: Size) -> Rows:
    """A run's arrays on one device, at their most, and the temporaries of its programs."""
    data = size.data()
    watch = Watch(size.rows // jax.device_count())
    trainer = size.trainer(data)
    predicted = size.predict(trainer)
    trainer.run(trainer.init_state(), watch)
    count = jax.device_count()
    rows = [
        _row(size, name, value, watch.most[name] / count)
        for name, value in predicted._asdict().items()
    ]
    for name in _WITH_A_COPY:
        rows.append(_row(size, name, predicted.state, watch.most[name] / count))
    rows.append(_row(size, "all at once", predicted.total, watch.most["all at once"] / count))
    for phase, used in temporaries(trainer).items():
        rows.append(_row(size, f"temporaries, {phase}", None, used))
    return rows


def temporaries(trainer: Trainer) -> dict[str, int | None]:
    """Bytes that the compiled chunk of each phase, and the program that fills a policy's table, hold."""
    found = {}
    for key, program in trainer._programs.items():
        if isinstance(key, tuple) and key[0] in PHASES:  # a chunk's phase and length
            found[f"{key[0]} step"] = _temporary_bytes(program)
    algorithm, block = trainer.algorithm, trainer.table_block
    state = jax.eval_shape(trainer.init_state)
    samples = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((block, *leaf.shape[2:]), leaf.dtype),
                           trainer._samples)  # fmt: skip
    rows = jax.jit(jax.vmap(algorithm.policy_rows, (0, 0, None, None, None)))
    lowered = rows.lower(state, trainer._keys, 0, samples, jnp.arange(block))
    return found | {f"{block:,} rows of the policy's table": _temporary_bytes(lowered.compile())}


def _temporary_bytes(compiled: Any) -> int | None:
    """XLA's account, None where a backend does not give it."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def _resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM``, this process's memory now or at its most, in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


def _forget_peak() -> None:
    """Let the peak be counted from now on."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def measure_peak(size: Size, first: Size) -> dict[str, float]:
    """Growth of this process's peak while it runs ``size``, after a run of ``first`` that loads
    everything.

    On the host the data are there before: what grows is the trainer's.
    """
    data = size.data()
    trainer = first.trainer(first.data())
    trainer.run(trainer.init_state(), Watch(first.rows))
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" not in stats:
        _forget_peak()
        before = _resident("VmRSS")
    trainer = size.trainer(data)
    predicted = size.predict(trainer).total
    trainer.run(trainer.init_state(), Watch(size.rows))
    if "peak_bytes_in_use" in stats:
        peak = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
        return {"predicted": predicted, "measured": peak - stats["bytes_in_use"]}
    return {"predicted": predicted, "measured": _resident("VmHWM") - before}


# Runs whose arrays are counted; the larger run whose peak is, and the one before it.
_COUNTED, _LARGE, _FIRST = (
    (Size(20_000, 64), Size(60_000, 256, 2)),
    Size(500_000, 64),
    Size(5_000, 64),
)


def peak_in_a_process() -> dict[str, float]:
    """:func:`measure_peak` in a process of its own, which other rows have not grown.

    Raises:
      RuntimeError: with the end of the process's messages, if it fails.
    """
    # This process may have reserved most of an accelerator's memory.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", __spec__.name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory of a process: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(quick: bool) -> dict[str, Rows]:
    """The table; a quick one is without the growth of a process."""
    rows = [
        row for size in ([Size(2_000, 32)] if quick else _COUNTED) for row in measure_parts(size)
    ]
    if not quick:
        found = peak_in_a_process()
        rows.append(_row(_LARGE, "growth of the process", found["predicted"], found["measured"]))
    return {"Memory of one device: live arrays, temporaries, and the peak of a process": rows}


if __name__ == "__main__":
    print(json.dumps(measure_peak(_LARGE, _FIRST)))
