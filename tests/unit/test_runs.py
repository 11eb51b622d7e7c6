"""What a work directory tells of its run, and the picture of it."""

import dataclasses
import io
import math
import time

import jax
import matplotlib.image
import numpy as np
import optax
import pytest
from etils import epath

from efm_jax.envs import EvaluationError, Rollouts
from efm_jax.rl.agents import AgentParams, State
from efm_jax.rl.config import QIPOConfig
from efm_jax.runs.evaluation import Evaluator
from efm_jax.runs.learning_curve import draw_learning_curve
from efm_jax.runs.loading import restore
from efm_jax.runs.metrics import MetricsWriter
from efm_jax.runs.reader import Run, read_result
from efm_jax.runs.workdir import RunInfo, check_name
from efm_jax.runs.writer import RunWriter
from efm_jax.training.state import TrainState
from efm_jax.types import Normalizer
from tests.unit.test_metrics import SEEDS, add_returns, evaluation


def info(seeds=2):
    return RunInfo(
        config=QIPOConfig(),
        plugins=[],
        algorithm="qipo_ot",
        phase_steps=dict.fromkeys(("behavior", "critic", "policy"), 10_000),
        seed=SEEDS[0],
        num_seeds=seeds,
        dataset="data",
        fingerprint="f",
        transitions=10,
        dataset_return=3.0,
        observation_size=3,
        action_size=1,
        env_spec='{"id": "Pendulum-v1"}',
        reference_scores=None,
    )


def sample_run(workdir, phases, seeds, evaluated):
    info(seeds).save(workdir)
    writer = MetricsWriter(workdir, info(seeds).seeds, None)
    total = 0
    for phase in phases:
        for step in range(100, 1100, 100):
            values = {"loss": 1.0 / (step + 100 * np.arange(seeds)), "steps_per_second": 5.0}
            if phase == "policy":
                values |= {"ess": 900.0 / step, "top_weight": 0.5, "q_support": step}
            if phase != "behavior":
                values["q_data"] = np.linspace(1.0, 2.0, seeds)
            writer.write(total + step, phase, step, values)
            if evaluated and phase == "policy":
                returns = np.add.outer(step + np.arange(seeds), np.arange(4.0))
                add_returns(workdir, total + step, "policy", returns, info(seeds).seeds)
        total += 1000
        if evaluated and phase == "behavior":
            add_returns(workdir, total, "behavior", np.ones((seeds, 4)), info(seeds).seeds)


def test_a_run_is_read_as_far_as_it_has_come(tmp_path):
    folder = epath.Path(tmp_path)
    with pytest.raises(ValueError, match=r"nosuch: no such folder; holds no run"):
        Run.read(tmp_path / "nosuch")
    with pytest.raises(ValueError, match=r"holds no run \(no config\.json\)"):
        Run.read(tmp_path)
    info().save(folder)
    assert Run.read(tmp_path) == Run(folder, info(), [], [], [], None)
    sample_run(folder, ["behavior"], 2, True)
    (tmp_path / "result.json").write_text('{"steps": 3}')
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("1200,12")  # a run that is writing
    run = Run.read(str(tmp_path))
    assert (len(run.metrics), len(run.returns), run.result) == (20, 8, {"steps": 3})
    assert {row["seed"] for row in run.metrics + run.returns} == {"3", "4"}
    assert run.metrics[0]["loss"] == "0.01"
    with pytest.raises(ValueError, match="is a file"):
        Run.read(tmp_path / "config.json")


def replaced(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


DAMAGE = {
    "half a config": (replaced("config.json", '"seed": 3', '"seed'), ["config.json"]),
    "another config": (lambda d: (d / "config.json").write_text("[1]"), ["config.json", "list"]),
    "no field": (replaced("config.json", '"dataset"', '"data"'), ["config.json", "'dataset'"]),
    "new field": (replaced("config.json", '"seed"', '"new": 1, "seed"'), ["config.json", "'new'"]),
    "text": (replaced("config.json", '"seed": 3', '"seed": "x"'), ["config.json", "'seed'", "'x'"]),
    "references": (replaced("config.json", "null", "[0.0, 0.0]"), ["reference_scores"]),
    "hyper-parameter": (replaced("config.json", '"beta": 10.0', '"beta": -1'), ["beta", "-1"]),
    "result": (lambda d: (d / "result.json").write_text("{"), ["result.json"]),
    "metric": (replaced("metrics.csv", "0.005,", "half,"), ["metrics.csv", "line 3, loss", "half"]),
    "step": (replaced("metrics.csv", "\n100,100,", "\n100,ten,"), ["metrics.csv", "step", "ten"]),
    "cells": (replaced("metrics.csv", "\n100,", "\n100,1,1,1,1,1,"), ["line 2", "cells"]),
    "no column": (replaced("metrics.csv", "phase", "stage"), ["metrics.csv", "'phase'"]),
    "return": (replaced("returns.csv", ",1.0,", ",,"), ["returns.csv", "empty return", "1000"]),
    "bytes": (lambda d: (d / "returns.csv").write_bytes(b"\xff\n"), ["returns.csv"]),
    "quotes": (replaced("returns.csv", "behavior", '"behavior"x'), ["returns.csv"]),
    "depth": (lambda d: (d / "config.json").write_text('{"a":' + "[" * 99999), ["nested too"]),
    "folder": (lambda d: [(d / "config.json").unlink(), (d / "config.json").mkdir()], ["a file"]),
    "steps": (replaced("config.json", '"critic": 10000', '"critic": "x"'), ["'phase_steps'"]),
    "phase": (replaced("config.json", '"critic": 10000', '"other": 1'), ["'phase_steps'"]),
    "seeds": (replaced("config.json", '"num_seeds": 2', '"num_seeds": 9999999'), ["'num_seeds'"]),
    "no number": (replaced("config.json", "3.0", "NaN"), ["'dataset_return'", "nan"]),
    "huge number": (replaced("config.json", "3.0", "1" + 400 * "0"), ["config.json"]),
    "foreign seed": (replaced("returns.csv", "behavior,3", "behavior,5"), ["line 2: seed 5"]),
    "twice": (replaced("metrics.csv", "\n100,100,behavior,4", "\n100,100,behavior,3"), ["repeats"]),
    "underscore": (replaced("metrics.csv", "0.005,", "0_5,"), ["line 3, loss", "0_5"]),
    "digits": (replaced("metrics.csv", "\n100,100,", "\n\u0661,100,"), ["line 2, total_step"]),
    "great step": (replaced("metrics.csv", "\n100,", f"\n{'9' * 400},"), ["line 2, total_step"]),
    "step of another": (
        replaced("evaluations.csv", "behavior,1000", "behavior,1001"),
        ["returns.csv", "'train-behavior-1000'", "another policy or step"],
    ),
    "no rows": (
        lambda d: (d / "returns.csv").write_text((d / "returns.csv").read_text().split("\n")[0]),
        ["no rows of evaluation 'train-behavior-1000'"],
    ),
    "status": (replaced("evaluations.csv", "done", "good"), ["evaluations.csv", "done, failed"]),
    "earlier version": (replaced("returns.csv", ",evaluation", ",x"), ["no column 'evaluation'"]),
    "result seconds": (lambda d: (d / "result.json").write_text('{"seconds": "1"}'), ["'seconds'"]),
    "result interval": (
        lambda d: (d / "result.json").write_text('{"policy_interval": [1, "x"]}'),
        ["'policy_interval'"],
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_files_that_cannot_be_understood(tmp_path, case):
    change, words = DAMAGE[case]
    sample_run(epath.Path(tmp_path), ["behavior"], 2, True)
    change(tmp_path)
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        Run.read(tmp_path)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_returns_that_no_finished_evaluation_explains_are_left_out(tmp_path):
    sample_run(epath.Path(tmp_path), ["behavior"], 2, True)
    add_returns(tmp_path, 1000, "behavior", np.ones((2, 1)), started_by="evaluate")
    with (tmp_path / "returns.csv").open("a") as file:
        file.write("1000,policy,3,7,1.0,3,evaluate-2-policy,\n")  # of a process that died
    run = Run.read(tmp_path)
    assert (len(run.returns), len(run.own_returns)) == (10, 8)
    assert {row["evaluation"] for row in run.own_returns} == {"train-behavior-1000"}


NAMES = {
    **dict.fromkeys(["a[b", "a]", "a*", "a?b", "a\\b", "gs:/x"], "cannot be read again"),
    "/".join(["x" * 250] * 15): "at most 3500 bytes",
    **dict.fromkeys(["a b", "$x", "gs:x", "\u00fc", "a#%b", "x" * 250, "gs://bucket/a[b]"]),
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:20])
def test_names_of_work_directories(tmp_path, name):
    folder = epath.Path(name if "://" in name else tmp_path / name)
    if NAMES[name] is None:
        check_name(folder)
        return
    with pytest.raises(ValueError, match=NAMES[name]):
        check_name(folder)
    for use in (restore, lambda path, say: RunWriter(path, info(), None, say, 0.0)):
        with pytest.raises(ValueError, match=NAMES[name]):
            use(folder, print)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named_at_once(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(OSError, match=str(tmp_path / "checkpoints")) as error:
        RunWriter(epath.Path(tmp_path), info(), None, print, 0.0)
    assert "\n" not in str(error.value)
    (tmp_path / "checkpoints").unlink()
    RunWriter(epath.Path(tmp_path), info(), None, print, 0.0).close()  # the lock was let go


def test_a_curve_that_cannot_be_drawn_spoils_no_result(tmp_path):
    lines = []
    odd = dataclasses.replace(info(), dataset="$x^{$", algorithm="\\frac")
    normalizer = Normalizer(*np.ones((4, 3), np.float32))
    writer = RunWriter(epath.Path(tmp_path), odd, normalizer, lines.append, 0.0)
    writer.start(fresh_state(0.0))
    writer.finish({"steps": 1})  # nothing was logged
    assert lines == [
        f"learning_curve.png was not drawn: ValueError: {tmp_path}: no finite number to draw"
    ]
    writer.metrics("behavior", 10, {"loss": np.ones(2)})
    writer.finish({"steps": 2})
    writer.close()
    assert len(lines) == 1
    assert read_result(tmp_path) == {"steps": 2}
    assert (tmp_path / "learning_curve.png").exists()


def test_result_alone(tmp_path):
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").write_text('{"steps": 3}')
    assert read_result(tmp_path) == {"steps": 3}


def picture(workdir):
    return matplotlib.image.imread(io.BytesIO(draw_learning_curve(Run.read(workdir))))[..., :3]


@pytest.mark.parametrize(
    ("phases", "seeds", "evaluated", "shape"),
    [
        (["behavior", "critic", "policy"], 3, True, (2, 2)),
        (["behavior", "critic"], 2, True, (1, 3)),
        (["behavior"], 1, False, (1, 1)),
        (["policy"], 1, False, (1, 3)),
    ],
)
def test_learning_curve_shows_every_panel_it_has(tmp_path, phases, seeds, evaluated, shape):
    sample_run(epath.Path(tmp_path), phases, seeds, evaluated)
    image = picture(tmp_path)
    rows, columns = shape
    height, width = image.shape[0] / rows, image.shape[1] / columns
    for row in range(rows):
        for column in range(columns):
            top, left = int((row + 0.15) * height), int((column + 0.15) * width)
            panel = image[top : top + int(0.7 * height), left : left + int(0.7 * width)]
            # Colored curves, not only gray grid lines and text.
            assert np.sum(panel.max(axis=-1) - panel.min(axis=-1) > 0.2) > 50


def test_curve_survives_non_finite_and_negative_values(tmp_path):
    info().save(epath.Path(tmp_path))
    writer = MetricsWriter(tmp_path, SEEDS, None)
    writer.write(1, "policy", 1, {"loss": [-1.0, np.inf], "ess": [np.nan, np.nan]})
    writer.write(2, "policy", 2, {"loss": [np.nan, np.nan], "ess": [np.nan, 2.0]})
    assert picture(tmp_path).std() > 0.01


def test_nothing_to_draw_is_an_error(tmp_path):
    info().save(epath.Path(tmp_path))
    writer = MetricsWriter(tmp_path, SEEDS, None)
    writer.write(1, "policy", 1, {"loss": np.nan})
    with pytest.raises(ValueError, match="no finite number"):
        draw_learning_curve(Run.read(tmp_path))


def fresh_state(value):
    def stage(steps):
        stage = TrainState.create({"w": np.full((2, 3), value, np.float32)}, optax.adam(1e-3))
        return stage.replace(step=np.full(2, steps))

    return State(stage(10), stage(5), stage(0), {"w": np.zeros((2, 3), np.float32)})


def test_one_writer_starts_a_run_and_another_continues_it(tmp_path):
    folder, normalizer = epath.Path(tmp_path) / "run", Normalizer(*np.ones((4, 3), np.float32))
    lines = []
    writer = RunWriter(folder, info(), normalizer, lines.append, time.perf_counter() - 100)
    assert writer.start(fresh_state(0.0)) is None
    total = QIPOConfig().behavior_steps
    writer.metrics("behavior", 10, {"loss": np.ones(2)})
    writer.renewal({"ess": np.full(2, 1.5)})
    writer.metrics("critic", 5, {"loss": np.ones(2)})
    writer.checkpoint(fresh_state(7.0))
    writer.close()
    assert Run.read(folder).result is None

    writer = RunWriter(folder, info(), normalizer, lines.append, time.perf_counter() - 50)
    assert 150 < writer.seconds < 160  # of both starts
    step, state = writer.start(fresh_state(0.0))
    assert (step, lines) == (15, [])
    jax.tree.map(np.testing.assert_array_equal, state, fresh_state(7.0))
    writer.renewal({"ess": np.full(2, 1.5)})
    writer.metrics("policy", 2, {"loss": np.ones(2)})
    rollouts = Rollouts(np.ones((2, 1)), np.ones((2, 1), int), np.ones((2, 1)))
    writer.evaluation(evaluation("policy", 12), rollouts, [0])
    writer.finish({"steps": 15, "policy_return": math.nan})
    writer.close()
    assert not (tmp_path / "run" / "lock").exists()
    run = Run.read(folder)
    # What was logged beyond the checkpoint went; a renewal's numbers go beside the policy's.
    logged = [(row["phase"], row["total_step"], row["ess"]) for row in run.metrics]
    assert logged[::2] == [("behavior", "10", ""), ("policy", str(2 * total + 2), "1.5")]
    assert (len(run.returns), run.result) == (2, {"steps": 15, "policy_return": None})
    assert matplotlib.image.imread(tmp_path / "run" / "learning_curve.png").std() > 0


def test_a_writer_refuses_the_folder_of_another_run(tmp_path):
    info().save(epath.Path(tmp_path))
    others = [{"seed": 4}, {"num_seeds": 1}, {"fingerprint": "g"}, {"env_spec": "{}"}]
    others += [{"dataset": "d", "fingerprint": "g"}]  # the name says it better
    for other in others:
        another, name = dataclasses.replace(info(), **other), next(iter(other))
        with pytest.raises(ValueError, match=f"holds a run with {name} = .*give another --workdir"):
            RunWriter(epath.Path(tmp_path), another, None, print, 0.0)
    moved = dataclasses.replace(info(), dataset="elsewhere", transitions=11)
    RunWriter(epath.Path(tmp_path), moved, None, print, 0.0).close()  # the fingerprint is the same


def test_parameters_that_are_not_finite_are_named():
    good, bad = {"w": np.ones((2, 3))}, {"w": np.array([[1.0, 2, 3], [1, np.nan, 3]])}
    evaluator = Evaluator(info(), None, None)
    evaluator.check_finite("behavior", AgentParams(good, bad, bad))
    problem = rf"policy: parameters \['w'\] of training seed {SEEDS[1]} are not finite"
    with pytest.raises(EvaluationError, match=problem):
        evaluator.check_finite("policy", AgentParams(good, good, bad))


def test_nothing_is_saved_before_the_start(tmp_path):
    writer = RunWriter(epath.Path(tmp_path / "run"), info(), None, print, 0.0)
    with pytest.raises(ValueError, match="expected start"):
        writer.finish({})
    writer.close()
