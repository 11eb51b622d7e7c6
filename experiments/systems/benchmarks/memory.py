"""Peak memory against what ``efm_jax.rl.memory.predict`` says before a run.

Parts: bytes of live arrays, looked at whenever a real run of the trainer calls its hooks, the most
of each part.  Temporaries: what the compiled programs need for intermediate results, by XLA's own
account; the prediction leaves them out.
"""

from typing import Any

import jax

from efm_jax.rl.config import PHASES, QIPOConfig
from efm_jax.rl.memory import predict
from efm_jax.rl.trainer import Hooks
from efm_jax.training.parallel import Layout
from experiments.systems.benchmarks.timing import Rows
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

    Arrays with an axis of the dataset's ``rows`` after those of devices and seeds are tables, after
    that of devices the dataset, and everything else is the state.
    """

    def __init__(self, rows: int):
        self._rows = rows
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
            found["tables" if 2 in axes else "dataset" if 1 in axes else state] += array.nbytes
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


def measure_parts(work: Workload, seeds: int) -> Rows:
    """A run's arrays on one device, at their most, and the temporaries of its programs."""
    layout = Layout.create("data", seeds, jax.devices()[:1])
    name = f"{work.rows:,} rows, width {work.config.hidden_dims[0]}, seeds {seeds}"
    watch = Watch(work.rows)
    trainer = work.trainer(layout)
    trainer.run(trainer.init_state(), watch)
    sizes = work.observation_size, work.action_size
    predicted = predict(work.config, layout, work.rows, *sizes)._asdict()
    expected = predicted | dict.fromkeys(_COPIES, predicted["state"])
    expected["all at once"] = sum(predicted.values())
    rows = [_row(name, part, size, watch.most[part]) for part, size in expected.items()]
    used = temporaries(work, layout).items()
    return rows + [_row(name, f"temporaries, {program}", None, size) for program, size in used]


def temporaries(work: Workload, layout: Layout) -> dict[str, int | None]:
    """Bytes that the programs of a run hold beside their inputs and results."""
    lengths = {work.config.log_every}
    programs = work.programs(layout).all(dict.fromkeys(PHASES, lengths), 1)
    return {name: _temporary_bytes(program.lower()) for name, _, program in programs}


def _temporary_bytes(lowered: Any) -> int | None:
    """XLA's account, None where a backend does not give it."""
    analysis = lowered.compile().memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def run(quick: bool) -> dict[str, Rows]:
    """The table."""
    rows = []
    for size, width, seeds in [(2_000, 32, 1)] if quick else [(20_000, 64, 1), (60_000, 256, 2)]:
        rows += measure_parts(workload(size, width), seeds)
    return {"Memory of one device: live arrays and temporaries": rows}
