"""The suite's bookkeeping: products, bytes, turns, tables.  Nothing here reads a time."""

import dataclasses
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from efm_jax.rl.config import PHASES, QIPOConfig
from efm_jax.training import machines
from efm_jax.training.parallel import Layout
from experiments.systems.benchmarks import __main__ as suite
from experiments.systems.benchmarks import item, memory, peers, phases, sampling, scaling, timing
from experiments.systems.benchmarks.phases import Product, flops, products
from experiments.systems.benchmarks.workload import Workload
from tests.markdown import cells

SMALL = QIPOConfig(
    hidden_dims=(32, 24), critic_hidden_dims=(16, 20), support_size=4, batch_size=8, sample_steps=2
)


def workload(**changes):
    return Workload(dataclasses.replace(SMALL, **changes), 64, observation_size=3, action_size=2)


def test_products_of_loops_branches_and_batches():
    def function(a, b, c):
        def turn(x, _):
            return x @ b, None

        x, _ = jax.lax.scan(turn, a, length=3)
        return jax.jit(lambda y: y @ b)(x).sum() + jnp.einsum("kij,kjl->kil", c, c).sum()

    a, b, c = jnp.ones((5, 4)), jnp.ones((4, 4)), jnp.ones((2, 3, 3))
    found = products(function, a, b, c)
    assert found == {Product(1, 5, 4, 4): 4, Product(2, 3, 3, 3): 1}
    half = products(jnp.matmul, a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    assert half == {Product(1, 5, 4, 4, "bfloat16"): 1}
    assert flops(found) == 4 * 2 * 5 * 4 * 4 + 2 * 2 * 3 * 3 * 3
    # What no result needs is not counted.
    assert not products(lambda a: (a + 1, jnp.zeros_like(a @ a))[0], jnp.ones((3, 3)))


def test_the_repeated_product_is_computed_in_every_turn():
    a, b = jnp.ones((1, 8, 8)), jnp.full((1, 8, 8), 0.5)
    text = phases.repeat.lower(a, b, "bmk,bkn->bmn", 5).compile().as_text()
    assert " dot(" in text or "custom-call" in text or "dot_general" in text
    assert "while" in text
    assert jnp.array_equal(phases.repeat(a, b, "bmk,bkn->bmn", 5), b)


def test_every_alternative_has_its_turn():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.in_turns(functions, seconds=0.05)
    assert set(times) == {"a", "b"}
    assert all(0 < time.best <= time.median for time in times.values())
    assert sum(first != second for first, second in itertools.pairwise(calls)) >= 5


def test_the_json_of_a_process_and_its_failure(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a":\n 1}')
    assert timing.measured_apart("json.tool", "--compact", str(file)) == {"a": 1}
    with pytest.raises(RuntimeError, match=r"no\.such: .*No module named"):
        timing.measured_apart("no.such")


CASES = [(phase, {}) for phase in PHASES]
CASES += [("critic", {"critic": "iql", "critic_layer_norm": True}), ("policy", {"network": "unet"})]
CASES += [("policy", {"estimator": "resample", "layer_norm": True})]


@pytest.mark.parametrize(("phase", "changes"), CASES)
def test_a_step_s_products_are_the_dense_formula_s(phase, changes):
    work = workload(**changes)
    program = phases.step_program(work, phase, 2)
    assert jnp.isfinite(program.call()["loss"]).all()
    counted = flops(products(program.function, *program.inputs))
    assert counted == program.formula == 8 * work.dense_of_step(phase)


@pytest.mark.parametrize("path", ["ot", "vp"])
def test_a_renewal_s_products_are_the_dense_formula_s(path):
    work = phases.workload(16, path, "renewal", 64)
    program = phases.renewal_program(work)
    counted = flops(products(program.function, *program.inputs))
    assert counted == program.formula == work.dense_of_renewal(phases.RENEWAL_STATES)


def test_xla_counts_the_products_and_little_else():
    program = phases.step_program(workload(batch_size=512), "policy", 2)
    compiled = jax.jit(program.function).lower(*program.inputs).compile()
    assert 1 <= compiled.cost_analysis()["flops"] / program.formula < 1.4


@pytest.mark.parametrize("phase", PHASES)
def test_a_step_reduces_its_gradients_and_a_few_numbers(devices, phase):
    # The loss; the critic's mean of Q.  Weights are normalized in every state, and send nothing.
    numbers = {"behavior": 1, "critic": 2, "policy": 3}[phase]
    found = scaling.count_sent(workload(), phase, Layout.create("data", 1, devices))
    state, _ = workload().shapes(phase, 1)
    leaves = jax.tree.leaves(state.params)
    assert found["gradients, bytes"] == 4 * sum(leaf.size for leaf in leaves)
    assert found["besides, bytes"] == 4 * numbers
    assert found["reduced arrays"] == len(leaves) + numbers
    assert 1 <= found["all-reduces"] <= found["reduced arrays"]


def test_a_chunk_trains_on(devices):
    call = workload().training("critic", Layout.create("data", 2, devices), 3)
    losses = [call()["loss"] for _ in range(3)]
    assert losses[0].shape == (len(devices), 2)
    assert losses[2].mean() < losses[0].mean()


def test_memory_has_every_part_of_a_run():
    layout = Layout.create("data", 1, jax.devices()[:1])
    rows = memory.measure_parts(memory.workload(1024, 16), layout)
    found = {row["part"]: row["measured / predicted"] for row in rows}
    assert found["dataset"] == pytest.approx(1, rel=0.01)
    assert 1 <= found["state"] < 2
    assert found["tables"] == pytest.approx(1, rel=0.01)


def test_every_program_is_compiled():
    layout = Layout.create("data", 1, jax.devices()[:1])
    *rows, total = memory.measure_programs(memory.workload(64, 8), layout)
    chunks = {f"{phase}, 5 steps" for phase in PHASES}
    tables = {f"{name}, a block" for name in ("next actions", "support sets")}
    assert chunks | tables <= {row["program"] for row in rows}
    assert all(row["temporaries MB"] >= 0 for row in rows)
    assert total["compile, s"] == pytest.approx(sum(row["compile, s"] for row in rows))


def test_peers_train_as_the_trainer_does_on_an_accelerator():
    """Draws ahead and packed parameters change no number."""
    ours = peers.Ours(peers.QUICK._replace(hidden_dims=(8,), rows=64, chunk_rows=64))
    losses = []
    for ours.on_cpu in (True, False):
        call, steps = ours.train_scan(16)
        losses.append([float(call()) for _ in range(2)])
    assert steps == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != losses[0][1]


def test_shares_of_published_peaks():
    counts = phases.Counts({Product(1, 2, 3, 5): 2, Product(1, 2, 3, 5, "bfloat16"): 1})
    least = 60 * 2 / 156e12 + 60 / 312e12
    assert phases.share_of_peak(counts, "NVIDIA A100-SXM4-80GB", 1.0) == pytest.approx(100 * least)
    assert phases.share_of_peak(counts, "NVIDIA A100-SXM4-80GB MIG 1g.10gb", 1.0) is None
    assert machines.peak("TPU v5 lite", "float32") == machines.peak("TPU v5 lite", "bfloat16")
    assert machines.peak("NVIDIA H200", "float64") is None


def test_cheapest_setting_of_a_field():
    numbers = [("a", 4, 2.0), ("a", 8, 1.0), ("b", 4, 1.0), ("b", 8, 1.04)]
    numbers = [("midpoint", *each) for each in numbers]
    # dopri5 is best, but takes another number of evaluations in each problem.
    numbers += [("dopri5", "a", 90, 1.0), ("dopri5", "b", 91, 1.0)]
    names = "solver", "problem", "evaluations", "ratio to floor"
    rows = [dict(zip(names, each, strict=True), path="ot", field="exact") for each in numbers]
    found = {row["problem"]: row["evaluations"] for row in sampling.cheapest(rows)}
    assert found == {"a": 8, "b": 4, "all of them": 8}


def test_tables():
    rows = [{"what": "a", "n": 1234, "x": 0.123456}, {"what": "b", "x": None, "y": 1.5e7}]
    text = suite.markdown("Title", rows)
    assert text.startswith("### Title\n")
    head, *rows = cells(text)
    assert head == ["what", "n", "x", "y"]
    assert rows == [["a", "1,234", "0.1235", ""], ["b", "", "", "1.5e+07"]]


def test_peers_without_pytorch_are_incomplete(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(
        peers, "in_turns", lambda calls, _: dict.fromkeys(calls, timing.Timing(1, 1))
    )
    item.measure("peers", "smoke")
    *tables, end = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(table["rows"]) for table in tables] == [2, 1]
    assert end["status"] == "incomplete"
    assert end["reason"].endswith("None in sys.modules: pip install torch")


def test_the_smoke_list_measures_and_writes(tmp_path, monkeypatch, capsys):
    flags = "--device --smoke --only=machine --out"
    monkeypatch.setattr("sys.argv", ["benchmarks", *flags.split(), str(tmp_path)])
    assert suite.main() == 0
    record = json.loads((tmp_path / "benchmarks.json").read_text())
    assert record["items"]["machine"]["status"] == "done"
    assert {goal[""] for goal in record["goals"]} == {"not measured"}
    assert "### Goals" in capsys.readouterr().out


def test_an_item_prints_its_tables(capsys):
    item.measure("machine", "smoke")
    parts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [part["table"] for part in parts] == ["Machine", *["The largest product"] * 2]
    assert [part["rows"][0]["dtype"] for part in parts[1:]] == ["float32", "bfloat16"]
    assert all(part["rows"][0]["TFLOP/s"] > 0 for part in parts[1:])


def test_items_of_other_processes_end_as_they_do(monkeypatch, tmp_path):
    done = item.run("acting", "quick", 300, {})
    assert (done["status"], done["reason"]) == ("done", None)
    (rows,) = done["tables"].values()
    assert {row["method"] for row in rows} >= {"EFM", "ED", "CEP-guided"}
    assert all(row["ms, best"] > 0 for row in rows)
    failed = item.run("no_such", "smoke", 300, {})
    assert failed["status"] == "failed"
    assert failed["reason"].startswith("ModuleNotFoundError: No module named 'experiments")

    def instead(script):
        (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr("sys.executable", str(tmp_path / "python"))

    line = """echo '{"table": "a", "rows": [{"x": 1}]}'"""
    instead(f'{line}; {line}; echo "$WHY"; echo out of memory >&2; kill -9 $$')
    died = item.run("machine", "smoke", 300, {"WHY": "a note"})
    assert died["tables"] == {"a": [{"x": 1}, {"x": 1}]}
    assert died["notes"] == ["a note"]
    assert (died["status"], died["reason"]) == ("failed", "status -9: out of memory")
    instead(f"{line}; sleep 300 & sleep 300")
    stopped = item.run("machine", "smoke", 0.5, {})
    assert stopped["tables"] == {"a": [{"x": 1}]}
    assert (stopped["status"], stopped["reason"]) == ("stopped", "took longer than 0.0 minutes")
    assert stopped["seconds"] < 100


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run the command with items that are told, not measured; returns its status and record."""
    ran = []

    def run(*flags, **told):
        def answer(name, size, seconds, environment):
            ran.append((name, size, seconds))
            found = {"tables": {}, "notes": [], "status": "done", "reason": None, "seconds": 1.0}
            return found | told.get(name, {})

        monkeypatch.setattr(item, "run", answer)
        monkeypatch.setattr("sys.argv", ["benchmarks", f"--out={tmp_path}", *flags])
        ran.clear()
        status = suite.main()
        return status, json.loads((tmp_path / "benchmarks.json").read_text()), list(ran)

    return run


def seeds(ratio):
    return {"tables": {"Seeds": [{"seeds": 8, "time / of one seed": ratio, "phase": "critic"}]}}


def test_what_fails_does_not_end_the_list(command, tmp_path):
    reason = "ModuleNotFoundError: No module named 'torch'"
    told = {"scaling": seeds(1.9), "peers": {"status": "failed", "reason": reason}}
    status, record, ran = command("--device", "--budget_minutes=10", **told)
    assert status == 1
    assert ran[0][:2] == ("machine", "device")
    assert all(seconds <= 60 * suite.DEVICE[name] for name, _, seconds in ran)
    assert record["items"]["peers"]["reason"] == reason
    assert record["items"]["overhead"]["status"] == "done"
    reached = {(goal["goal"], goal["phase"]): goal[""] for goal in record["goals"]}
    assert reached["8 seeds beside one", "critic"] == "reached"
    assert reached["PyTorch, eager beside ours", None] == "not measured"
    text = (tmp_path / "benchmarks.md").read_text()
    assert f"peers: failed ({reason}), 1.0 s" in text
    assert "### Goals" in text
    # What was not done is done; what was, is kept.
    status, record, ran = command("--device", "--resume", scaling=seeds(3.0))
    assert (status, [name for name, *_ in ran]) == (0, ["peers"])
    assert record["goals"][0]["found"] == 1.9


def test_goals_and_items_that_do_not_fit(command):
    status, record, ran = command("--device", "--budget_minutes=2.5", scaling=seeds(2.1))
    assert status == 0
    assert record["items"]["phases"]["status"] == "skipped"
    assert record["items"]["phases"]["reason"] == "2.5 of up to 6 minutes are left"
    assert 149 < {name: seconds for name, _, seconds in ran}["scaling"] <= 150
    assert record["goals"][0][""] == "missed"
    assert sum(suite.DEVICE.values()) <= 25


def test_flags_of_the_command(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        command("--only=phases,speed")
    assert "unknown 'speed'" in capsys.readouterr().err.splitlines()[-1]
    _, _, ran = command("--quick", "--only=acting")
    assert [name for name, *_ in ran] == ["machine", "acting"]
    assert {size for _, size, _ in ran} == {"quick"}
    with pytest.raises(SystemExit, match="2"):
        command("--device", "--resume")
    assert "expected a file of the same list" in capsys.readouterr().err
