"""Checkpoints: exact, the last few kept, damage noticed."""

import json
import logging
import shutil
import sys

import jax
import numpy as np
import optax
import pytest
import tensorstore

from efm_jax.runs.checkpoint import Checkpointer, CheckpointError
from efm_jax.training.state import TrainState


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "state": TrainState.create(
            {"w": rng.standard_normal((64, 8)).astype(np.float32)}, optax.adam(1e-3)
        ),
        "count": np.int32(seed),
        "pair": (rng.standard_normal(3).astype(np.float32), np.array([True, False])),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints 20, 30 and 40 of five that were saved."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpointer = Checkpointer(folder / "c", max_to_keep=3)
    for step in (0, 10, 20, 30, 40):
        checkpointer.save(step, tree(step))
    checkpointer.close()
    return folder / "c"


@pytest.fixture
def checkpoints(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "c")


def restore(folder, **options):
    lines = []
    checkpointer = Checkpointer(folder, report=lines.append)
    try:
        return checkpointer.restore(tree(0), **options), lines
    finally:
        checkpointer.close()


def assert_same_tree(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


def test_newest_checkpoint_comes_back_exactly(saved):
    (step, found), lines = restore(saved)
    assert (step, lines) == (40, [])
    assert_same_tree(found, tree(40))


def test_the_last_few_are_kept(saved):
    assert sorted(int(p.name) for p in saved.iterdir() if p.name.isdigit()) == [20, 30, 40]


def test_nothing_saved_is_none(tmp_path):
    assert restore(tmp_path / "new") == (None, [])


def test_saving_copies_what_training_reuses(tmp_path):
    values = {"w": np.ones(5_000_000, np.float32)}
    checkpointer = Checkpointer(tmp_path / "c")
    checkpointer.save(1, values)
    values["w"][:] = 7
    checkpointer.close()
    checkpointer = Checkpointer(tmp_path / "c")
    _, found = checkpointer.restore(values)
    checkpointer.close()
    assert (found["w"] == 1).all()


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(path, kind):
    data = path.read_bytes()
    if kind == "deleted":
        path.unlink()
    elif kind == "halved":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        path.write_bytes(
            data[:middle] + bytes(b ^ 0x5A for b in data[middle : middle + 4]) + data[middle + 4 :]
        )


@pytest.mark.parametrize("kind", ["halved", "deleted", "flipped"])
def test_any_damaged_file_of_the_newest(checkpoints, kind):
    """What comes back is exactly what was saved: then, or one checkpoint before."""
    newest = checkpoints / "40"
    fell_back = 0
    for path in files(newest):
        data = path.read_bytes()
        if not data:
            continue
        damage(path, kind)
        (step, found), lines = restore(checkpoints)
        path.write_bytes(data)
        assert step in (30, 40), path
        assert_same_tree(found, tree(step))
        if step == 30:
            fell_back += 1
            assert len(lines) == 1
            assert str(newest) in lines[0]
            assert "\n" not in lines[0]
        else:
            assert lines == []
    assert fell_back >= 3


def test_data_of_the_newest_deleted(checkpoints):
    shutil.rmtree(checkpoints / "40" / "state")
    (step, _), lines = restore(checkpoints)
    assert step == 30
    assert len(lines) == 1


def test_two_damaged(checkpoints):
    for step in (40, 30):
        for path in files(checkpoints / str(step)):
            damage(path, "halved")
    (step, found), lines = restore(checkpoints)
    assert step == 20
    assert_same_tree(found, tree(20))
    assert [("/40 " in line, "/30 " in line) for line in lines] == [(True, False), (False, True)]


@pytest.mark.parametrize("bad", [(40,), (40, 30), (40, 30, 20)])
def test_one_line_about_each_unreadable_checkpoint(checkpoints, caplog, bad):
    """Orbax, which logs an error of its own, is silent; when none is good, one error says so."""
    for step in bad:
        for path in files(checkpoints / str(step)):
            path.write_bytes(path.read_bytes()[:10])
    lines = []
    checkpointer = Checkpointer(checkpoints, report=lines.append)
    if len(bad) < 3:
        assert checkpointer.restore(tree(0))[0] == max({20, 30, 40} - set(bad))
        assert len(lines) == len(bad)
    else:
        with pytest.raises(CheckpointError, match=r"/40 cannot be read.*none of the 3 can"):
            checkpointer.restore(tree(0))
        assert lines == []
    checkpointer.close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_levels_of_the_log_are_left_alone(checkpoints):
    level = logging.getLogger("absl").level
    restore(checkpoints)
    assert logging.getLogger("absl").level == level


def test_discarding_lets_the_run_save_again(checkpoints):
    for path in files(checkpoints / "40"):
        damage(path, "halved")
    checkpointer = Checkpointer(checkpoints, report=lambda _: None)
    step, _ = checkpointer.restore(tree(0), discard=True)
    assert step == 30
    checkpointer.save(40, tree(41))
    checkpointer.close()
    (step, found), lines = restore(checkpoints)
    assert (step, lines) == (40, [])
    assert_same_tree(found, tree(41))


@pytest.mark.parametrize("discard", [False, True])
def test_all_damaged_is_an_error_that_deletes_nothing(checkpoints, discard):
    for path in files(checkpoints):
        damage(path, "halved")
    with pytest.raises(CheckpointError, match=r"cannot be read") as caught:
        restore(checkpoints, discard=discard)
    assert "\n" not in str(caught.value)
    assert {p.name for p in checkpoints.iterdir()} >= {"20", "30", "40"}


def test_another_structure_is_an_error(saved):
    checkpointer = Checkpointer(saved, report=lambda _: None)
    with pytest.raises(CheckpointError):
        checkpointer.restore(tree(0) | {"count": np.zeros(3, np.int32)})
    checkpointer.close()


def test_arrays_of_another_version_are_one_line(saved):
    checkpointer = Checkpointer(saved)
    with pytest.raises(CheckpointError, match="not those of this configuration"):
        checkpointer.restore({"more": np.zeros(3), **tree(0)})
    checkpointer.close()


@pytest.mark.parametrize("field", ["shape", "chunks"])
def test_an_array_that_declares_terabytes_is_not_read(checkpoints, field):
    base = {"driver": "ocdbt", "base": f"file://{checkpoints}/40/state/"}
    store = tensorstore.KvStore.open(base).result()
    key = next(key for key in store.list().result() if key.endswith(b"params.w/.zarray"))
    store[key] = json.dumps(json.loads(store[key]) | {field: [10**13, 8]}).encode()
    (step, found), (line,) = restore(checkpoints)
    assert step == 30
    assert_same_tree(found, tree(30))
    assert "/40 cannot be read: its arrays take 3.2e+14 bytes; expected 8218;" in line


def test_metadata_names_no_code(checkpoints, tmp_path, monkeypatch):
    """Neither a handler's nor a type's name is imported, nor are keys paths out of the folder."""
    (tmp_path / "trap.py").write_text("import pathlib\npathlib.Path('sprung').write_text('')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for step, name, old, new in (
        (
            40,
            "_CHECKPOINT_METADATA",
            "orbax.checkpoint._src.handlers.json_checkpoint_handler",
            "trap",
        ),
        (40, "state/_METADATA", '"np.ndarray"', '"trap.Trap"'),
        (30, "state/_METADATA", '"key": "count"', '"key": "../../../trap"'),
    ):
        path = checkpoints / str(step) / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    (step, found), lines = restore(checkpoints)
    assert_same_tree(found, tree(step))
    assert step == 20
    assert len(lines) == 2
    assert not (tmp_path / "sprung").exists()
    assert "trap" not in sys.modules


def test_a_save_that_fails_names_the_folder(tmp_path, monkeypatch):
    """As on a full disk, where TensorStore raises a ValueError in the background."""
    checkpointer = Checkpointer(tmp_path / "c")

    def fail(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Failed writing\n[OS error 28: No space left]")

    for method in ("save", "wait_until_finished"):
        monkeypatch.setattr(checkpointer._manager, method, fail)
    for act in (lambda: checkpointer.save(1, tree(1)), checkpointer.wait):
        with pytest.raises(OSError, match=r"/c: cannot be written: .*No space left") as error:
            act()
        assert "\n" not in str(error.value)


def test_a_reader_makes_nothing(tmp_path):
    (tmp_path / "c").mkdir()
    Checkpointer(tmp_path / "c", read_only=True).close()
    assert list((tmp_path / "c").iterdir()) == []
