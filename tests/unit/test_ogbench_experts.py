"""Data of OGBench's own experts, regenerated; needs the package."""

import importlib
import sys

import numpy as np
import pytest
from etils import epath
from numpy.testing import assert_array_equal

from efm_jax.data import DataError, load_dataset, ogbench_experts
from efm_jax.data.ogbench_experts import parse_name, regenerate

MAZE = "pointmaze-medium-stitch-v0.npz"


@pytest.fixture
def short(monkeypatch):
    """Episodes of five steps."""
    if sys.version_info >= (3, 13):  # the extra `test` has it where it has wheels
        pytest.importorskip("ogbench")
    whole = parse_name
    monkeypatch.setattr(ogbench_experts, "parse_name", lambda name: whole(name)._replace(steps=5))


@pytest.mark.parametrize(
    ("name", "env"),
    [
        (MAZE, "pointmaze-medium-singletask-task3-v0"),
        ("cube-single-play-v0.npz", "cube-single-singletask-task2-v0"),
        ("scene-noisy-v0.npz", "scene-singletask-v0"),
        ("puzzle-3x3-noisy-v0.npz", "puzzle-3x3-singletask-v0"),
    ],
)
def test_the_loader_reads_what_experts_play(short, tmp_path, name, env):
    before = np.random.get_state()[1].copy()
    made = regenerate(epath.Path(tmp_path / name), seed=4, steps=6)
    assert (made["episodes"], made["steps"]) == (2, 10)
    assert_array_equal(np.random.get_state()[1], before)
    dataset = load_dataset(str(tmp_path / name), env=env)
    versions = {p: importlib.metadata.version(p) for p in ("ogbench", "mujoco")}
    words = ", ".join(f"{key} {value}" for key, value in {"seed": 4, **versions}.items())
    assert dataset.name == f"{tmp_path / name} (regenerated: {words})"
    assert dataset.transitions.size == 10
    assert set(dataset.transitions.rewards) <= {*range(-9, 1)}


def test_more_steps_begin_with_the_same_and_a_killed_run_goes_on(short, tmp_path):
    path, fresh = epath.Path(tmp_path / MAZE), epath.Path(tmp_path / "fresh" / MAZE)
    regenerate(path, seed=0, steps=5)
    first = dict(np.load(path))
    next(tmp_path.glob("*.episodes*/00000.npz")).unlink()
    regenerate(path, seed=0, steps=15)
    regenerate(fresh, seed=0, steps=15)
    for name, column in np.load(path).items():
        assert_array_equal(column, np.load(fresh)[name])
        assert_array_equal(column[: len(first[name])], first[name])
    with pytest.raises(DataError, match="expected no file, or one of this origin"):
        regenerate(path, seed=1, steps=5)


def test_what_has_no_scripted_expert_is_refused():
    assert parse_name("pointmaze-teleport-stitch-v0") == ("pointmaze-teleport", "stitch", 200)
    assert parse_name("cube-triple-noisy-v0").episodes == 3000
    for name in ("antmaze-large-navigate-v0", "cube-single-stitch-v0", "pointmaze-giant-play-v0"):
        with pytest.raises(DataError, match="expected a dataset of scripted experts"):
            parse_name(name)
