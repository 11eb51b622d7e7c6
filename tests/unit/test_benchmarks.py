"""The suite's bookkeeping: products counted, turns taken, tables printed; no time is read."""

import dataclasses
import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.systems.benchmarks import __main__ as suite
from experiments.systems.benchmarks import phases, products, timing
from experiments.systems.benchmarks.products import Product


def test_products_of_loops_branches_and_batches():
    def function(a, b, c):
        def turn(x, _):
            return x @ b, None

        x, _ = jax.lax.scan(turn, a, length=3)
        return jax.jit(lambda y: y @ b)(x).sum() + jnp.einsum("kij,kjl->kil", c, c).sum()

    a, b, c = jnp.ones((5, 4)), jnp.ones((4, 4)), jnp.ones((2, 3, 3))
    found = products.products(function, a, b, c)
    assert found == {Product(1, 5, 4, 4): 4, Product(2, 3, 3, 3): 1}
    assert products.flops(found) == 4 * 2 * 5 * 4 * 4 + 2 * 2 * 3 * 3 * 3


def test_what_no_result_needs_is_not_counted():
    a = jnp.ones((3, 3))

    def function(a):
        jnp.zeros_like(a @ a)
        return a + 1

    assert not products.products(function, a)


@pytest.mark.parametrize("path", ["ot", "vp"])
def test_products_of_a_renewal_are_the_formula_s(path):
    work = dataclasses.replace(phases.workload(16, path, 64), rows=phases.RENEWAL_STATES)
    program = phases.renewal_program(work)
    counted = products.flops(products.products(program.function, *program.inputs))
    assert counted == phases.dense_of_renewal(work)


def test_the_repeated_product_is_computed_in_every_turn():
    a, b = jnp.ones((1, 8, 8)), jnp.full((1, 8, 8), 0.5)
    compiled = products._repeat.lower(a, b, "bmk,bkn->bmn", 5).compile()
    text = compiled.as_text()
    assert " dot(" in text or "custom-call" in text or "dot_general" in text
    assert "while" in text
    assert jnp.array_equal(products._repeat(a, b, "bmk,bkn->bmn", 5), b)


def test_every_alternative_has_its_turn():
    calls = []
    times = timing.in_turns(
        {name: lambda name=name: calls.append(name) for name in "ab"}, seconds=0.05
    )
    assert set(times) == {"a", "b"}
    assert all(0 < time.best <= time.median for time in times.values())
    switches = sum(first != second for first, second in itertools.pairwise(calls))
    assert switches >= 5


@pytest.mark.parametrize("phase", phases.PHASES)
def test_a_step_of_a_phase_runs_and_its_products_are_the_formula_s(phase):
    work = phases.workload(16, "ot", 64)
    program = phases.step_program(work, phase, 32, 2)
    _, metrics = program.call()
    assert jnp.isfinite(metrics["loss"])
    counted = products.flops(products.products(program.function, *program.inputs))
    assert counted == 32 * phases.dense_of_step(work, phase)


def test_tables():
    rows = [{"what": "a", "n": 1234, "x": 0.123456}, {"what": "b", "x": None, "y": 1.5e7}]
    lines = suite.markdown("Title", rows).splitlines()
    assert lines[0] == "### Title"
    assert lines[2:] == [
        "| what | n | x | y |",
        "| --- | --- | --- | --- |",
        "| a | 1,234 | 0.123 |  |",
        "| b |  |  | 1.50e+07 |",
    ]


def test_command(tmp_path):
    command = [sys.executable, "-m", "experiments.systems.benchmarks", f"--out={tmp_path}"]
    bad = subprocess.run(
        [*command, "--only=phases,speed"], capture_output=True, text=True, check=False
    )
    assert bad.returncode == 2
    assert "unknown 'speed'" in bad.stderr.splitlines()[-1]
    good = subprocess.run(
        [*command, "--quick", "--only=acting"], capture_output=True, text=True, check=False
    )
    assert good.returncode == 0, good.stderr
    record = json.loads((tmp_path / "benchmarks.json").read_text())
    assert record["quick"]
    (rows,) = record["tables"]["acting"].values()
    assert {row["method"] for row in rows} >= {"EFM", "ED", "CEP-guided"}
    assert all(row["ms, best"] > 0 for row in rows)
    assert "| states | method |" in (tmp_path / "benchmarks.md").read_text()
