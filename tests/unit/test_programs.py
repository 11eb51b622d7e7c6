"""The list of a run's programs."""

import dataclasses

import pytest

from efm_jax.rl.programs import Programs
from efm_jax.rl.trainer import chunk_lengths
from tests.tiny import ROWS, A, S, config, layout

TABLES = ["empty", "a block"]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_every_program_in_order_of_use(on_cpu):
    on = dataclasses.replace(layout(2, seeds=3), on_cpu=on_cpu)
    options = config(critic="softmax_q", behavior_steps=10, critic_steps=10, policy_steps=10)
    options = dataclasses.replace(options, log_every=4, checkpoint_every=10, renew_every=10)
    programs = Programs(options, on, ROWS, S, A)
    found = list(programs.all(chunk_lengths(programs.agent), 5))
    chunks = {f"{n} steps": n for n in (2, 4)}
    tiled = [] if on_cpu else ["dataset in tiles"]
    expected = [*tiled, *(f"behavior, {name}" for name in chunks)]
    expected += [f"next actions, {name}" for name in TABLES]
    expected += [] if on_cpu else ["next actions in tiles"]
    expected += [f"critic, {name}" for name in chunks]
    expected += ["begin policy", "copy of the policy"]
    expected += [f"support sets, {name}" for name in (*TABLES, "weigh")]
    expected += [*(f"policy, {name}" for name in chunks), "acting, 5 episodes"]
    assert [name for name, _, _ in found] == expected
    for name, steps, program in found:
        assert steps == chunks.get(name.partition(", ")[2], 0)
        program.lower()  # the shapes fit the functions
