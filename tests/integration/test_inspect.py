"""`launch.inspect` as a process."""

import json

import numpy as np
from matplotlib import image

from tests.integration.helpers import refused
from tests.integration.runs import arrays
from tests.unit.data_fixtures import d4rl_arrays, write_d4rl
from tests.unit.test_data_attacks import SPEC, minari_with


def test_summary_and_picture(launcher, dataset, tmp_path):
    result = launcher.run("inspect", f"--dataset={dataset}", f"--plot={tmp_path}/new/summary.png")
    assert result.status == 0
    assert result.complaints == []
    line = result.line
    assert (line["dataset"], line["environment"]) == (dataset, "Pendulum-v1")
    assert (line["transitions"], line["episodes"]) == (300, 3)
    expected = arrays()["rewards"].reshape(3, 100).sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose(line["returns"]["mean"], expected.mean(), rtol=1e-6)
    assert line["references"] is None
    assert line["scores"] is None
    # Its observations are noise: none is where the one before led.
    assert line["ends"]["trajectories"] == 300
    assert any("not marked" in problem for problem in line["problems"])
    text = result.out
    for problem in line["problems"]:
        assert f"  - {problem}" in text
    for part in ("transitions   300\n", "no reference returns are known", "at bounds"):
        assert part in text
    assert line["plot"] == f"{tmp_path}/new/summary.png"
    assert image.imread(line["plot"]).shape[1] > 1000
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["summary.png"]


def test_classic_name_in_the_folder_of_d4rl(launcher, tmp_path):
    rows = d4rl_arrays([0, 0, 1, 0, 0, 1], [0] * 6, observation_size=29, action_size=8)
    rows["rewards"] = np.array([0, 0, 1, 0, 0, 0], np.float32)
    rows["timeouts"] = np.array([0, 0, 1, 0, 0, 1], bool)
    name = "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5"
    write_d4rl(tmp_path / name, rows)
    env = {"D4RL_DATASET_DIR": str(tmp_path)}
    result = launcher.run("inspect", "--dataset=antmaze-umaze-v2", env=env)
    assert result.status == 0
    assert result.line["references"] == [0.0, 1.0]
    assert result.line["scores"]["mean"] == 50.0
    assert result.line["rewards"]["values"] == [0.0, 1.0]
    assert "plot" not in result.line
    assert json.loads(result.out.splitlines()[-1]) == result.line


def test_bad_input(launcher, dataset, tmp_path):
    (tmp_path / "file").touch()
    for flags, word in (
        ([f"--dataset={tmp_path}/absent.hdf5"], "no such file"),
        ([f"--dataset={dataset}", "--env=Nothing-v3"], "Nothing-v3"),
        ([f"--dataset={dataset}", "--plot=summary.pdf"], "--plot: expected a path ending in .png"),
        ([f"--dataset={dataset}", f"--plot={tmp_path}/file/a.png"], "file"),
        (["--dataset=hopper-mediun-v2"], "hopper-medium-v2"),
        (["--nonsense"], "nonsense"),
    ):
        result = launcher.run("inspect", *flags)
        refused(result, word)
        assert result.out == ""


def test_help(launcher):
    result = launcher.run("inspect", "--help")
    assert result.status == 0
    for part in ("hopper-medium-v2", "--plot", "--env"):
        assert part in result.out


def test_metadata_that_chooses_code_is_refused_in_one_line(launcher, tmp_path, monkeypatch):
    (minari := tmp_path / "minari").mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(minari))
    name = minari_with(tmp_path, env_spec=json.dumps(SPEC | {"entry_point": "os:_exit"}))
    for module in ("inspect", "train"):
        env = {"MINARI_DATASETS_PATH": str(minari)}
        done = launcher.run(module, f"--dataset={name}", cwd=tmp_path, env=env)
        refused(done, "os:_exit")
        assert list(tmp_path.iterdir()) == [minari]
