"""Peak memory against what ``efm_jax.rl.memory.predict`` says before a run.

Parts: bytes of live arrays, looked at whenever a real run of the trainer calls its hooks, the most
of each part.  Temporaries: what the compiled programs need for intermediate results, by XLA's own
account; the prediction leaves them out.  The compiler's time for each program is with an empty
persistent cache, and with the one that this left.
"""

import tempfile
import time
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from efm_jax.rl.batch import with_tables
from efm_jax.rl.config import PHASES, QIPOConfig
from efm_jax.rl.memory import predict
from efm_jax.rl.programs import Programs
from efm_jax.rl.trainer import Hooks
from efm_jax.training.parallel import Layout
from experiments.systems.benchmarks.timing import Rows, Tables
from experiments.systems.benchmarks.workload import Workload

_COPIES = ("state, evaluating", "state, saving")  # the state beside a copy of it


def workload(rows: int, width: int) -> Workload:
    """A run of few steps, because the number of steps takes no memory."""
    # One step of the sampler: tables take as much memory as with more, and a fraction of the time.
    config = QIPOConfig(
        hidden_dims=(width,) * 3, critic_hidden_dims=(width,) * 3, solver="euler", sample_steps=1,
        behavior_steps=10, critic_steps=10, policy_steps=20, renew_every=10, log_every=5,
        checkpoint_every=10, eval_every=10,
    )  # fmt: skip
    return Workload(config, rows)


class Watch(Hooks):
    """Looks at the device's live arrays; keeps the most bytes of each part.

    Arrays of the shapes of finished tables, or with an axis of the dataset's rows after those of
    devices and seeds, are tables; of the dataset's shapes, or with that axis after that of devices,
    the dataset; and everything else is the state.
    """

    def __init__(self, programs: Programs):
        self._rows, self._parts = programs.num_rows, {}
        for phase in PHASES:
            data = programs.on_devices(phase)[2]
            parts = {"tables": (data.next_actions, data.support)}
            parts["dataset"] = with_tables(data, None, None)
            for name, part in parts.items():
                self._parts |= {leaf.shape: name for leaf in jax.tree.leaves(part)}
        # Kept, so that no array to come has the id of one that is gone.
        self._before = {id(array): array for array in jax.live_arrays()}
        self.most = dict.fromkeys(("dataset", "tables", "state", *_COPIES, "all at once"), 0)

    def look(self, state: str = "state") -> None:
        """Count what is there now and was not at the start; ``state`` names that part."""
        found = dict.fromkeys(self.most, 0)
        new = (array for array in jax.live_arrays() if id(array) not in self._before)
        # By address, because the views of its shards that an array keeps count as alive.
        for array in {array.unsafe_buffer_pointer(): array for array in new}.values():
            axes = [i for i, size in enumerate(array.shape) if size == self._rows]
            other = "tables" if 2 in axes else "dataset" if 1 in axes else state
            found[self._parts.get(array.shape, other)] += array.nbytes
        found["all at once"] = sum(found.values())
        self.most = {name: max(self.most[name], size) for name, size in found.items()}

    def on_phase(self, *_: Any) -> None:
        self.look()

    on_table = on_renewal = on_metrics = on_phase

    def on_evaluate(self, *_: Any) -> None:
        self.look(_COPIES[0])

    def on_checkpoint(self, *_: Any) -> None:
        self.look(_COPIES[1])


def _row(run: str, part: str, predicted: float | None, measured: float | None) -> dict[str, Any]:
    """Numbers that are not known are None."""
    return {
        "run": run, "part": part, "predicted MB": predicted and predicted / 1e6,
        "measured MB": measured and measured / 1e6,
        "measured / predicted": measured / predicted if predicted and measured else None,
    }  # fmt: skip


def _name(work: Workload, layout: Layout) -> str:
    return f"{work.rows:,} rows, width {work.config.hidden_dims[0]}, seeds {layout.num_seeds}"


def measure_parts(work: Workload, layout: Layout) -> Rows:
    """A run's arrays on one device, at their most."""
    watch = Watch(work.programs(layout))
    trainer = work.trainer(layout)
    trainer.run(trainer.init_state(), watch)
    sizes = work.observation_size, work.action_size
    predicted = predict(work.config, layout, work.rows, *sizes)._asdict()
    del predicted["work"]  # of programs: the other table
    expected = predicted | dict.fromkeys(_COPIES, predicted["state"])
    expected["all at once"] = sum(predicted.values())
    found = [(part, size, watch.most[part]) for part, size in expected.items()]
    peak = (layout.devices[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak is not None:  # temporaries too, of everything that this process ran
        found.append(("the allocator's peak", expected["all at once"], peak))
    return [{
        "run": _name(work, layout), "part": part, "predicted MB": size / 1e6,
        "measured MB": most / 1e6, "measured / predicted": most / size,
    } for part, size, most in found]  # fmt: skip


def measure_programs(work: Workload, layout: Layout) -> Rows:
    """What the programs of a run hold beside their inputs and results, and their compilation."""
    lengths, rows, columns = {work.config.log_every}, {}, ("compile, s", "from the cache, s")
    for column in columns:
        jax.clear_caches()
        for name, _, program in work.programs(layout).all(dict.fromkeys(PHASES, lengths), 1):
            lowered, start = program.lower(), time.perf_counter()
            analysis = lowered.compile().memory_analysis()  # None where a backend does not give it
            row = rows.setdefault(name, {"run": _name(work, layout), "program": name})
            row["temporaries MB"] = analysis and analysis.temp_size_in_bytes / 1e6
            row[column] = time.perf_counter() - start
    total = {column: sum(row[column] for row in rows.values()) for column in columns}
    return [*rows.values(), {"run": _name(work, layout), "program": "all of them"} | total]


# Rows of the dataset, width and seeds of each run.
SIZES = {
    "full": ((20_000, 64, 1), (60_000, 256, 2)),
    "quick": ((2_000, 32, 1),),
    "device": ((1_000_000, 256, 1), (1_000_000, 256, 8)),
    "smoke": ((2_000, 32, 1),),
}


def run(sizes: tuple[tuple[int, int, int], ...]) -> Tables:
    """A table of arrays and one of programs."""
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        compilation_cache.reset_cache()
        for rows, width, seeds in sizes:
            work, layout = workload(rows, width), Layout.create("data", seeds, jax.devices()[:1])
            yield "Programs: temporaries, and XLA's compiler", measure_programs(work, layout)
            yield "Memory of one device: live arrays", measure_parts(work, layout)
