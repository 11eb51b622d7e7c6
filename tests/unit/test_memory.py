"""The prediction of memory, against the bytes of what a run puts on its devices."""

import jax
import numpy as np
import pytest

from efm_jax.rl.memory import Memory, check_fits, device_limit, predict
from efm_jax.rl.trainer import Trainer
from tests.tiny import ROWS, A, S, config, transitions
from tests.tiny import layout as make_layout


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("parallel", "devices"), [("data", 1), ("data", 4), ("seeds", 2)])
@pytest.mark.parametrize("critic", ["softmax_q", "iql"])
def test_prediction_is_what_a_run_holds(parallel, devices, critic):
    layout = make_layout(devices, parallel, 4)
    options = config(critic=critic)
    trainer = Trainer(options, transitions(), range(4), layout)
    found = predict(options, layout, ROWS, S, A)
    state = layout.put_seeds(trainer.init_state())
    assert found.dataset == bytes_of(trainer.data) / devices
    assert found.state == bytes_of(state) / devices
    tables = [trainer.renew(state)[0]]
    if critic == "softmax_q":
        tables.append(trainer.next_actions(state))
    assert found.tables == max(map(bytes_of, tables)) / devices
    assert found.total == found.dataset + found.tables + found.state


@pytest.mark.parametrize(
    ("memory", "mode", "setting"),
    [
        (Memory(9, 1, 1), "data", "max_transitions, or more devices"),
        (Memory(9, 1, 1), "seeds", "parallel=data"),
        (Memory(1, 9, 1), "data", "support_size or num_seeds"),
        (Memory(1, 1, 9), "seeds", "num_seeds"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_setting_to_change(memory, mode, setting):
    layout = make_layout(2, mode, 2)
    check_fits(memory, 11, layout)
    check_fits(memory, None, layout)
    with pytest.raises(ValueError, match=rf"memory: a device needs .*; change {setting}"):
        check_fits(memory, 10, layout)


def test_sizes_read_well():
    assert str(Memory(1_234_000_000, 56_700_000, 8_900)) == (
        "1.3 GB (dataset 1.2 GB, tables 56.7 MB, state 8.9 kB)"
    )


def test_processor_devices_share_its_memory():
    one, four = (device_limit(make_layout(n)) for n in (1, 4))
    assert one == pytest.approx(4 * four, rel=1e-6)
    assert one > 10**9
    assert np.issubdtype(type(one), int)
