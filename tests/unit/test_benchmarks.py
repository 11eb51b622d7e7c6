"""The suite's bookkeeping: products, bytes, turns, tables.  Nothing here reads a time."""

import dataclasses
import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from efm_jax.rl.config import PHASES, QIPOConfig
from efm_jax.training.parallel import Layout
from experiments.systems.benchmarks import __main__ as suite
from experiments.systems.benchmarks import memory, phases, sampling, scaling, timing
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
    rows = memory.measure_parts(memory.workload(1024, 16), 1)
    found = {row["part"]: row["measured / predicted"] for row in rows}
    assert found["dataset"] == pytest.approx(1, rel=0.01)
    assert 1 <= found["state"] < 2
    assert found["tables"] == pytest.approx(1, rel=0.01)
    chunks = {f"temporaries, {phase}, 5 steps" for phase in PHASES}
    tables = {f"temporaries, {name}, a block" for name in ("next actions", "support sets")}
    assert chunks | tables <= found.keys()


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


def test_command(tmp_path):
    def suite(*flags):
        command = [sys.executable, "-m", "experiments.systems.benchmarks", f"--out={tmp_path}"]
        return subprocess.run([*command, *flags], capture_output=True, text=True, check=False)

    bad = suite("--only=phases,speed")
    assert bad.returncode == 2
    assert "unknown 'speed'" in bad.stderr.splitlines()[-1]
    good = suite("--quick", "--only=acting,phases")
    assert good.returncode == 0, good.stderr
    record = json.loads((tmp_path / "benchmarks.json").read_text())
    assert record["quick"]
    assert list(record["tables"]) == ["acting", "phases"]
    (rows,) = record["tables"]["acting"].values()
    assert {row["method"] for row in rows} >= {"EFM", "ED", "CEP-guided"}
    assert all(row["ms, best"] > 0 for row in rows)
    assert "### Actions from host to host" in (tmp_path / "benchmarks.md").read_text()
