"""Tables as accelerators keep them."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from efm_jax.rl.batch import Batch, TiledData, TiledRows, gather, with_tables


@pytest.mark.parametrize("row", [(), (1,), (3,), (17, 6), (64,), (65,), (130,), (4, 40)])
def test_indices_on_rows(row):
    rows = np.random.default_rng(0).standard_normal((50, *row)).astype(np.float32)
    table = jax.jit(TiledRows.from_rows)(rows)
    index = np.array([0, 49, 7, 7, 31])
    assert_array_equal(table[index], rows[index])
    assert table.lines.shape[0] % 8 == table.lines.shape[1] % 128 == 0
    if row:
        places = np.array([0, 0, 0, row[0] - 1, 0])
        assert_array_equal(table[index, places], rows[index, places])


def test_a_tiled_dataset_gives_batches():
    random = np.random.default_rng(0)
    sizes = (5,), (2,), (), (5,), ()
    rows = Batch(*(random.standard_normal((30, *n)).astype(np.float32) for n in sizes))
    support = random.standard_normal((30, 4, 2)).astype(np.float32)
    data = with_tables(TiledData.from_rows(rows), None, TiledRows.from_rows(support))
    index, expected = np.array([29, 3, 3]), with_tables(rows, None, support)
    assert data.size == 30
    jax.tree.map(assert_array_equal, gather(data, index), gather(expected, index))
