"""A trained policy as a function, and as a file that runs without this package."""

import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from efm_jax import load_policy
from tests.integration.helpers import refused
from tests.integration.runs import TOTAL, saved_steps

# What a stranger runs: JAX and NumPy, none of our code.
READER = """
import sys
import numpy as np
import jax
from jax import export

policy = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
for count in (1, 5):
    observations = np.linspace(-1, 1, 3 * count, dtype=np.float32).reshape(count, 3)
    np.save(sys.argv[2] + f"/{count}.npy", policy.call(observations, np.uint32(7)))
assert not [name for name in sys.modules if name.startswith(("efm_jax", "launch", "flax"))]
"""


@pytest.fixture
def run(finished):
    return finished[0]


def observations(count):
    return np.linspace(-1, 1, 3 * count, dtype=np.float32).reshape(count, 3)


def test_loaded_policy(run):
    policy = load_policy(str(run))
    actions = policy(observations(5), jax.random.key(7))
    assert actions.shape == (5, 1)
    assert np.abs(actions).max() <= 2  # Pendulum's torque
    np.testing.assert_array_equal(policy(observations(5), jax.random.key(7)), actions)
    assert np.abs(policy(observations(5), jax.random.key(8)) - actions).max() > 1e-4
    for other in (load_policy(str(run), seed_index=1), load_policy(str(run), name="behavior")):
        assert np.abs(other(observations(5), jax.random.key(7)) - actions).max() > 1e-4
    mean = load_policy(str(run), action_selection="mean", num_candidates=4)
    assert np.abs(mean(observations(5), jax.random.key(7)) - actions).max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed_index": 2}, r"seed_index: expected less than the run's 2 seeds; got 2"),
        ({"name": "critic"}, r"name: expected one of behavior, policy; got 'critic'"),
        ({"beta": 3.0}, r"option: expected one of action_selection, .*; got 'beta'"),
        ({"action_selection": "greedy"}, r"action_selection: "),
    ],
)
def test_wrong_arguments(run, options, message):
    with pytest.raises(ValueError, match=message):
        load_policy(str(run), **options)


def test_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run"):
        load_policy(str(tmp_path))


def test_exported_file_runs_in_a_clean_interpreter(launcher, run, tmp_path):
    result = launcher.run("export", f"--workdir={run}", f"--out={tmp_path}/policy.bin")
    assert result.status == 0, result.err
    assert result.line["platforms"] == ["cpu", "cuda", "tpu"]
    reader = [sys.executable, "-c", READER, tmp_path / "policy.bin", tmp_path]
    subprocess.run(reader, cwd=tmp_path, check=True, timeout=120)
    policy = load_policy(str(run))
    for count in (1, 5):
        expected = policy(observations(count), jax.random.key(np.uint32(7)))
        np.testing.assert_allclose(
            np.load(tmp_path / f"{count}.npy"), expected, rtol=1e-4, atol=1e-5
        )


def test_an_older_checkpoint_is_used_in_so_many_words(launcher, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    for file in (folder / "checkpoints" / str(TOTAL)).rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    before = saved_steps(folder)[-2]
    words = rf"checkpoints/{TOTAL} cannot be read: .*; {before} is used instead$"
    with pytest.warns(UserWarning, match=words):
        load_policy(str(folder))
    collected = [f"--policy={folder}", "--env=Pendulum-v1", "--episodes=1", "--dataset=efm/old-v0"]
    for name, flags in {"export": [f"--workdir={folder}"], "collect": collected}.items():
        result = launcher.run(name, *flags, env={"MINARI_DATASETS_PATH": str(tmp_path)})
        assert result.status == 0, result.err
        (line,) = result.complaints
        assert re.search(rf"^launch.{name}: .*{words}", line)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--workdir: expected the work directory"),
        (["--workdir=/nowhere/at/all"], "holds no run"),
        (
            ["--workdir={run}", "--platforms=abacus"],
            "expected some of cpu, cuda, rocm, tpu; got abacus",
        ),
        (
            ["--workdir={run}", "--seed_index=9"],
            "seed_index: expected less than the run's 2 seeds; got 9",
        ),
    ],
)
def test_bad_flags_write_nothing(launcher, run, flags, message):
    refused(launcher.run("export", *(flag.format(run=run) for flag in flags)), message)
    assert not (run / "policy.jax_export").exists()


def test_a_video_of_another_kind_is_refused(launcher, run, tmp_path):
    flags = f"--workdir={run}", "--episodes=1", f"--video={tmp_path}/film.txt"
    refused(launcher.run("evaluate", *flags), "film.txt")
    assert not (tmp_path / "film.txt").exists()
