"""Where curves go: every point once, in order, for each seed, over kills and restarts."""

import contextlib
import dataclasses
import importlib.machinery
import struct
import sys
import types

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from efm_jax.envs import Rollouts
from efm_jax.runs.loggers import LOGGERS, Loggers, check_loggers
from efm_jax.runs.writer import RunWriter
from tests.unit.test_metrics import SEEDS, evaluation
from tests.unit.test_runs import fresh_state, info


class Recorder:
    """The user's own logger, and what it was given."""

    def __init__(self, fails_at=None):
        self.points, self.closed, self._fails_at = [], 0, fails_at

    def __call__(self, seed, step, values):
        self.points.append((seed, step, values))
        if step == self._fails_at:
            raise ConnectionError("no route to host")

    def close(self):
        self.closed += 1


def killed_and_continued(chosen, folder, report=print):
    """Two starts of a run: the first dies after step 30, the second begins again at 20."""
    for steps in ((10, 20, 30), (30, 40)):
        writer = Loggers(chosen, epath.Path(folder), info(), report)
        for step in steps:
            writer.write(step, {"policy/loss": np.array([step, np.nan]), "policy/ess": 2.0})
        # The behavior model is evaluated at the end, at the step of its own phase.
        writer.write(15, {"behavior/return": np.array([5.0, 6.0])})
    writer.close()


def events(folder):
    """Events of all files in TensorBoard's order; each is length, checksum, data, checksum."""
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_has_a_folder_for_each_seed(tmp_path):
    killed_and_continued(["tensorboard"], tmp_path)
    for seed, ends in zip(SEEDS, (5.0, 6.0), strict=True):
        found = list(events(tmp_path / "tensorboard" / f"seed{seed}"))
        values = [(event.step, value) for event in found for value in event.summary.value]
        points = [(v.tag, step, v.simple_value) for step, v in values if not v.HasField("metadata")]
        curves = [(step, value) for tag, step, value in points if tag == "policy/loss"]
        expected = [(s, s if seed == SEEDS[0] else np.nan) for s in (10, 20, 30, 40)]
        np.testing.assert_array_equal(curves, expected)
        assert ("behavior/return", 15, ends) in points
        assert len(points) == 4 + 4 + 1
        # Once, and not again by the second start.
        [told] = [v.metadata for _, v in values if v.tag == "_hparams_/session_start_info"]
        for name in (b"beta", b"hidden_dims", b"[64, 64, 64]", b"dataset", b"seed"):
            assert name in told.plugin_data.content


def test_a_registered_logger_is_given_a_runs_points_once(tmp_path, monkeypatch):
    folder, normalizer, log = epath.Path(tmp_path) / "run", None, Recorder()
    monkeypatch.setitem(LOGGERS, "mine", lambda run: log)
    known = dataclasses.replace(info(), reference_scores=(0.0, 10.0))
    rollouts = Rollouts(np.array([[1.0, 3.0], [4.0, 4.0]]), np.full((2, 2), 7), np.eye(2))
    for _ in range(2):
        writer = RunWriter(folder, known, normalizer, print, 0.0, loggers=["mine"])
        writer.start(fresh_state(0.0))
        writer.metrics("critic", 5, {"loss": np.array([0.5, 0.25])})
        writer.evaluation(evaluation("policy", 12), rollouts, [0, 1])
        writer.evaluation(evaluation("policy", 13, problem="boom"), None, [0, 1])
        writer.close()
    step = info().phase_steps["behavior"] + 5
    of = "policy/return", "policy/length", "policy/success", "policy/score"
    assert log.points == [
        (3, step, {"critic/loss": 0.5}),
        (4, step, {"critic/loss": 0.25}),
        (3, 12, dict(zip(of, (2.0, 7.0, 0.5, 20.0), strict=True))),
        (4, 12, dict(zip(of, (4.0, 7.0, 0.5, 40.0), strict=True))),
    ]
    assert log.closed == 2


def test_a_logger_that_fails_is_left_out_and_said(tmp_path):
    lines, broken, other = [], Recorder(fails_at=20), lambda *point: points.append(point)
    points = []
    killed_and_continued([broken, other], tmp_path, lines.append)
    assert lines[0].startswith("logger Recorder failed, and is left out from now on: ConnectionErr")
    # Tried again by the second start.
    assert [step for seed, step, _ in broken.points if seed == SEEDS[1]] == [10, 30, 40, 15]
    assert [p[1] for p in points if p[0] == SEEDS[0]] == [10, 20, 30, 15, 40]


def wandb(runs):
    """What is used of W&B."""

    def init(*, id, resume, group, name, config, reinit):
        assert (resume, group, reinit) == ("allow", "run", "create_new")
        run = runs.setdefault(id, {"name": name, "seed": config["seed"], "points": []})
        axes = []

        def log(values):
            assert axes == [("total_step",), ("*", "total_step")]
            run["points"].append((values.pop("total_step"), values))

        define = lambda *name, **axis: axes.append((*name, *axis.values()))  # noqa: E731
        return types.SimpleNamespace(log=log, finish=lambda: None, define_metric=define)

    return {"init": init}


def mlflow(runs):
    """What is used of MLflow."""
    current = []

    @contextlib.contextmanager
    def start_run(run_name):
        current.append(runs.setdefault(f"id{len(runs)}", {"name": run_name, "points": []}))
        yield types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"id{len(runs) - 1}"))

    def log_metrics(values, step, run_id):
        runs[run_id]["points"].append((step, values))

    def log_params(values):
        current[-1]["seed"] = values["seed"]

    set_status = lambda run_id, status=None: runs[run_id]  # noqa: E731
    client = types.SimpleNamespace(update_run=set_status, set_terminated=set_status)
    functions = {"start_run": start_run, "log_metrics": log_metrics, "log_params": log_params}
    return functions | {"MlflowClient": lambda: client}


@pytest.mark.parametrize("stand_in", [wandb, mlflow], ids=lambda make: make.__name__)
def test_services_get_a_run_for_each_seed(tmp_path, monkeypatch, stand_in):
    runs, name = {}, stand_in.__name__
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="here")
    vars(module).update(stand_in(runs))
    monkeypatch.setitem(sys.modules, name, module)
    killed_and_continued([name], tmp_path / "run")
    for seed, run in zip(SEEDS, runs.values(), strict=True):
        assert (run["name"], run["seed"]) == (f"run-seed{seed}", seed)
        assert [step for step, _ in run["points"]] == [10, 20, 30, 15, 40]
        assert run["points"][3][1] == {"behavior/return": 5.0 if seed == SEEDS[0] else 6.0}
    monkeypatch.setattr(module, next(iter(stand_in(runs))), lambda **_: 1 / 0)
    with pytest.raises(ValueError, match=rf"^loggers: {name} cannot start: ZeroDivisionError"):
        Loggers([name], epath.Path(tmp_path), info(), print)


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^loggers: .*got 'tensorbord'; did you mean tensorboard"):
        check_loggers(["tensorbord"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(".")
    (tmp_path / "wandb").mkdir()  # W&B's own folder is not W&B
    monkeypatch.setattr(sys, "path", ["."])
    for name in ("wandb", "mlflow"):
        with pytest.raises(ValueError, match=rf"pip install 'efm-jax\[{name}\]'$"):
            check_loggers([name])
    with pytest.raises(ValueError, match="expected different names; got 'print' twice"):
        Loggers([print, print], epath.Path(tmp_path), info(), print)
    for text in ("[]", '{"mine": 1}', '{"mine": {"ids": {}, "last": {"loss": "1"}}}'):
        (tmp_path / "loggers.json").write_text(text)
        with pytest.raises(ValueError, match=r"loggers\.json"):
            Loggers([], epath.Path(tmp_path), info(), print)
