"""`launch.train` and `launch.evaluate` as processes: what they print, leave, survive, refuse."""

import http.server
import json
import os
import shutil
import signal
import threading
import time

import matplotlib.image
import numpy as np
import pytest
from etils import epath
from PIL import Image

from efm_jax.runs.lock import Lock
from tests.integration.helpers import fresh
from tests.integration.runs import (
    CHEAP,
    CONFIG,
    ROWS,
    SEEDS,
    STEPS,
    TOTAL,
    arrays,
    arrays_of,
    saved_steps,
    table,
    train_flags,
)
from tests.unit.data_fixtures import write_d4rl


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished workdir, to be damaged."""
    return shutil.copytree(finished[0], tmp_path / "copy")


def damage(workdir, step):
    """Cut the largest file of a checkpoint in half."""
    files = [path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def cut(workdir, step):
    """Leave ten bytes of every file of a checkpoint: Orbax logs an error of its own about some."""
    for path in (workdir / "checkpoints" / str(step)).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])


def contents(folder):
    """Every file and folder, with its bytes; of the lock, in which a number goes up, that it is."""

    def read(path):
        return path.read_bytes() if path.is_file() and path.name != "lock" else None

    return {path: read(path) for path in folder.rglob("*")}


def test_train_prints_the_contract_line(finished):
    result = finished[1]
    line = result.line
    for name in (
        "dataset",
        "algorithm",
        "seeds",
        "steps",
        "dataset_return",
        "behavior_return",
        "policy_return",
        "behavior_score",
        "policy_score",
        "seconds",
    ):
        assert name in line
    assert (line["algorithm"], line["seeds"], line["steps"]) == ("qipo_ot", 2, TOTAL)
    assert json.loads((finished[0] / "result.json").read_text()) == line
    # 300 x 9 numbers; 300 x 2 seeds x (3 + 1) actions and Q-values.
    what = f"{finished[0]}: qipo_ot on {line['dataset']}, {ROWS} transitions; "
    assert f"\n{what}memory of each device: " in result.out
    assert "(dataset 10.8 kB, tables 19.2 kB, state " in result.out
    expected = np.mean([arrays()["rewards"][i : i + 100].sum() for i in (0, 100, 200)])
    assert line["dataset_return"] == pytest.approx(expected, rel=1e-5)
    assert line["behavior_score"] is None  # Pendulum has no reference scores
    assert line["policy_score"] is None
    assert result.complaints == []


def test_train_leaves_the_promised_files(finished):
    workdir = finished[0]
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["config"]["batch_size"] == 32
    assert saved["config"]["hidden_dims"] == [16]
    rows = table(workdir / "metrics.csv")
    for phase, steps in STEPS.items():
        found = [(int(row["step"]), int(row["seed"])) for row in rows if row["phase"] == phase]
        assert found == [(step, seed) for step in range(10, steps + 1, 10) for seed in (3, 4)]
    for row in rows:
        assert np.isfinite(float(row["loss"]))
        assert float(row["steps_per_second"]) > 0
    policy = [row for row in rows if row["phase"] == "policy"]
    assert all(1 <= float(row["ess"]) <= 4 and float(row["top_weight"]) <= 1 for row in policy)
    assert all(row["q_data"] and row["q_support"] for row in policy)
    for seed in (3, 4):
        [events] = (workdir / "tensorboard" / f"seed{seed}").iterdir()
        assert events.stat().st_size > 1000
    picture = matplotlib.image.imread(workdir / "learning_curve.png")
    assert picture.shape[0] > 100
    assert picture[..., :3].std() > 0.02  # not blank
    assert saved_steps(workdir) == [TOTAL - 20, TOTAL - 10, TOTAL]
    assert not list(workdir.glob("*.tmp"))


def test_returns_file_explains_the_printed_returns(finished):
    workdir, result = finished
    rows = table(workdir / "returns.csv")
    for name, step in (("behavior", STEPS["behavior"]), ("policy", TOTAL)):
        found = [row for row in rows if (row["policy"], int(row["total_step"])) == (name, step)]
        assert len(found) == 2 * CONFIG["eval_episodes"]
        assert {row["seed"] for row in found} == {"3", "4"}
        assert len({row["return"] for row in found}) == len(found)
        mean = np.mean([float(row["return"]) for row in found])
        assert mean == pytest.approx(result.line[f"{name}_return"], rel=1e-9)
    seeds = {
        name: {r["episode_seed"] for r in rows if r["policy"] == name}
        for name in ("behavior", "policy")
    }
    assert seeds["behavior"] == seeds["policy"]
    assert {int(row["total_step"]) for row in rows if row["policy"] == "policy"} == {110, TOTAL}


def test_second_run_does_nothing_again(launcher, dataset, finished, copy, tmp_path):
    """Nor does one of the same contents under another path, which are the same dataset."""
    before = table(copy / "metrics.csv"), table(copy / "returns.csv")
    moved = shutil.copy(dataset, tmp_path / "moved.hdf5")
    result = launcher.run("train", *train_flags(moved, copy, *SEEDS))
    assert result.status == 0, result.err
    same = ("behavior_return", "policy_return", "dataset_return", "steps", "seeds")
    assert {k: result.line[k] for k in same} == {k: finished[1].line[k] for k in same}
    assert table(copy / "metrics.csv") == before[0]
    assert sorted(map(str, table(copy / "returns.csv"))) == sorted(map(str, before[1]))


def test_a_finished_run_is_extended(launcher, dataset, copy):
    flags = train_flags(dataset, copy, *SEEDS, policy_steps=STEPS["policy"] + 10)
    result = launcher.run("train", *flags)
    assert result.status == 2
    assert "asked for 70; give --extend" in result.complaints[0]
    result = launcher.run("train", *flags, "--extend")
    assert (result.status, result.line["steps"]) == (0, TOTAL + 10)
    assert int(table(copy / "metrics.csv")[-1]["total_step"]) == TOTAL + 10
    assert json.loads((copy / "config.json").read_text())["config"]["policy_steps"] == 70


def test_evaluations_keep_names_of_their_own_and_are_filmed(launcher, finished, copy, tmp_path):
    before = (copy / "returns.csv").read_text()
    result = launcher.run("evaluate", f"--workdir={copy}")
    assert result.status == 0, result.err
    for name in ("behavior_return", "policy_return"):
        assert result.line[name] == pytest.approx(finished[1].line[name], rel=1e-6)
    flags = [f"--workdir={copy}", "--episodes=3", "--solver=rk4", "--sample_steps=4"]
    flags += ["--action_selection=mean", "--num_candidates=2"]
    film = tmp_path / "film.gif"
    longer = launcher.run("evaluate", *flags, f"--video={film}")
    assert longer.status == 0, longer.err
    with Image.open(film) as frames:
        assert frames.n_frames > 20
        assert len(np.unique(np.asarray(frames.convert("L")))) > 1
    assert longer.line["episodes"] == 3
    assert longer.line["policy_return"] != result.line["policy_return"]
    # What training measured stays, and every number leads to the rows it is the mean of.
    assert (copy / "returns.csv").read_text().startswith(before)
    played = {row["evaluation"]: row for row in table(copy / "evaluations.csv")}
    for line, by in (
        (finished[1].line, "train"),
        (result.line, "evaluate"),
        (longer.line, "evaluate"),
    ):
        for policy in ("behavior", "policy"):
            row = played[line["evaluations"][policy]]
            rows = [r for r in table(copy / "returns.csv") if r["evaluation"] == row["evaluation"]]
            assert np.mean([float(r["return"]) for r in rows]) == pytest.approx(
                line[f"{policy}_return"]
            )
            assert len(rows) == 2 * int(row["episodes"])
            assert (row["policy"], row["started_by"], row["status"]) == (policy, by, "done")
    assert len(played) == 3 + 2 + 2
    assert longer.line["evaluations"]["policy"] == "evaluate-2-policy"
    how = ("solver", "sample_steps", "episodes", "total_step")
    assert [played["evaluate-2-policy"][name] for name in how] == ["rk4", "4", "3", str(TOTAL)]
    assert played[f"train-policy-{TOTAL}"]["solver"] == "midpoint"
    # Where another process writes, the episodes are played and printed.
    before = contents(copy)
    lock = Lock(epath.Path(copy), print)
    result = launcher.run("evaluate", *flags)
    lock.close()
    assert (result.status, result.line["evaluations"]) == (0, {})
    assert result.line["policy_return"] == longer.line["policy_return"]
    assert len(result.complaints) == 1
    assert "writes in it" in result.complaints[0]
    assert "printed, not written" in result.complaints[0]
    assert contents(copy) == before


HELP = {"train": ["--dataset", "--seed", "--config.expectile (float, 0.7): iql"]}
HELP["evaluate"] = ["--episodes"]


@pytest.mark.parametrize("module", HELP)
def test_help(launcher, module):
    result = launcher.run(module, "--help")
    assert (result.status, result.complaints) == (0, [])
    for words in ("--workdir", *HELP[module]):
        assert words in result.out


def interrupt(process, workdir, moment, number):
    """Send a signal once a checkpoint of this step or later, or these words, are there."""
    end = time.monotonic() + 200
    while process.running and not (
        moment in process.err
        if isinstance(moment, str)
        else any(saved >= moment for saved in saved_steps(workdir))
    ):
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send(number)
    return process.wait()


# Of each phase the first checkpoint, which a SIGKILL follows, and the process that continues from
# it: stopped before its first step at the earliest, in the policy phase within a renewal period.
INTERRUPTIONS = [
    (10, signal.SIGKILL), ("continuing", signal.SIGINT),
    (50, signal.SIGKILL), ("continuing", signal.SIGTERM),
    (90, signal.SIGKILL), ("continuing", signal.SIGHUP),
]  # fmt: skip


def test_interrupted_run_ends_with_the_same_bits(launcher, dataset, finished, tmp_path):
    workdir = tmp_path / "run"
    flags = train_flags(dataset, workdir, *SEEDS)
    for moment, number in INTERRUPTIONS:
        result = interrupt(launcher.start("train", *flags), workdir, moment, number)
        if number == signal.SIGKILL:
            assert result.status == -signal.SIGKILL
        else:
            assert result.status == 128 + number, result.err
            assert f"stopped by {number.name}, saved in {workdir}" in result.complaints[-1]
            assert "Traceback" not in result.err
    result = launcher.run("train", *flags)
    assert result.status == 0, result.err
    assert f"continuing {workdir} from step" in result.err
    expected, found = arrays_of(finished[0], TOTAL), arrays_of(workdir, TOTAL)
    assert expected.keys() == found.keys()
    assert any("policy" in name and "params" in name for name in found)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert result.line["policy_return"] == finished[1].line["policy_return"]
    # What was logged is the same too, but for the clock.
    logs = []
    for place in (finished[0], workdir):
        rows = table(place / "metrics.csv")
        logs.append([{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows])
    assert logs[0] == logs[1]


def refused(result, *words):
    assert result.status == 2, (result.status, result.err)
    assert len(result.complaints) == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.complaints[0]


BAD_FLAGS = {
    "unknown field": (["--config.bta=3"], ["unknown field 'bta'; did you mean beta or beta_q?"]),
    "not a number": (["--config.beta=abc"], ["beta"]),
    "fraction of a step": (["--config.batch_size=1.5"], ["batch_size"]),
    "beta": (["--config.beta=-1"], ["beta", "-1"]),
    "nan": (["--config.beta=nan"], ["beta"]),
    "no steps": (["--config.behavior_steps=0"], ["behavior_steps", "0"]),
    "no support": (["--config.support_size=0"], ["support_size"]),
    "critic": (["--config.critic=sarsa"], ["critic", "softmax_q", "sarsa"]),
    "path": (["--config.path=linear"], ["path", "linear"]),
    "large batch": ([f"--config.batch_size={ROWS + 1}"], ["batch_size", str(ROWS)]),
    "reward transform": (["--config.reward_transform=log"], ["reward_transform", "log"]),
    "unknown flag": (["--nosuch=1"], ["nosuch"]),
    "positional": (["positional"], ["positional"]),
    "seed": (["--seed=-1"], ["seed"]),
    "seed above 32 bits": (["--seed=4294967296"], ["--seed", "4294967295"]),
    "seed above 64 bits": (["--seed=99999999999999999999999"], ["--seed", "4294967295"]),
    "second seed above 32 bits": (
        ["--seed=4294967295", "--num_seeds=2"],
        ["num_seeds", "4294967295", "4294967296"],
    ),
    "seeds": (["--num_seeds=0"], ["num_seeds"]),
    "logger": (["--loggers=tensorbord"], ["tensorbord", "did you mean tensorboard?"]),
    "preset": (["--config=experiments/configs/nosuch.py"], ["nosuch.py"]),
    "environment": (["--env=NoSuchEnv-v0"], ["NoSuchEnv-v0"]),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(launcher, dataset, tmp_path, case):
    flags, words = BAD_FLAGS[case]
    refused(launcher.run("train", *train_flags(dataset, tmp_path / "run"), *flags), *words)
    assert not (tmp_path / "run").exists()


def test_unknown_field_of_the_default_preset(launcher):
    refused(launcher.run("train", "--config.nosuch=3"), "nosuch")


def test_preset_that_is_no_preset(launcher, tmp_path):
    preset = tmp_path / "preset.py"
    for text in (
        "def get_config(:\n",
        "x = 1\n",
        "import nosuchmodule\n",
        "def get_config():\n    return 3\n",
    ):
        preset.write_text(text)
        refused(launcher.run("train", f"--config={preset}"), "preset.py")


@pytest.mark.parametrize(
    "value", ["{'a': 1}", "3", "ConfigDict({'a': 1})", "ConfigDict({'bet': 1})"]
)
def test_override_of_a_field_that_the_preset_lacks(launcher, tmp_path, value):
    preset = tmp_path / "preset.py"
    preset.write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n    return {value}\n"
    )
    result = launcher.run("train", f"--config={preset}", "--config.beta=1")
    refused(result, str(preset), "unknown field 'beta'")


def test_preset_with_a_key_error(launcher, tmp_path):
    preset = tmp_path / "preset.py"
    preset.write_text("def get_config():\n    return {}['key']\n")
    refused(launcher.run("train", f"--config={preset}", "--config.beta=1"), "KeyError", "'key'")


@pytest.mark.parametrize("more", [(), ("--config.beta=1",)])
def test_preset_that_is_no_file(launcher, tmp_path, more):
    refused(
        launcher.run("train", f"--config={tmp_path}", *more), f"--config={tmp_path}: is a folder"
    )
    refused(launcher.run("train", "--config=nosuch.py", *more), "--config=nosuch.py: no such file")
    refused(launcher.run("train", "--config=" + "x" * 300, *more), "x: file name too long")


def test_without_a_client_of_the_bucket(launcher, dataset):
    """etils asks fsspec for the client of gs://, which the extra gcs brings."""
    refused(launcher.run("train", *train_flags(dataset, "gs://bucket/run")), "efm-jax[gcs]")


def test_installed_preset_from_another_folder(launcher, tmp_path):
    flags = ["--dataset=nosuch.hdf5", "--config.beta=1"]
    preset = "experiments/configs/quick.py"
    for given in ([f"--config={preset}"], ["--config", preset]):
        # It comes as far as the dataset.
        refused(launcher.run("train", *given, *flags, cwd=tmp_path), "nosuch.hdf5: no such file")
    # One that is here comes first.
    (tmp_path / "experiments" / "configs").mkdir(parents=True)
    (tmp_path / preset).write_text("def get_config():\n    return 3\n")
    refused(
        launcher.run("train", f"--config={preset}", cwd=tmp_path), f"--config={preset}", "got int"
    )


def test_batch_that_does_not_divide_over_devices(launcher, dataset, tmp_path):
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    flags = train_flags(dataset, tmp_path / "run", batch_size=255)
    refused(launcher.run("train", *flags, env=env), "batch_size", "252", "256", "255")
    assert not (tmp_path / "run").exists()


def broken(name, index=None, value=None):
    def change(data):
        data[name][index] = value

    return change


def shorter(name):
    def change(data):
        data[name] = data[name][:-1]

    return change


def discrete(data):
    data["actions"] = np.zeros((ROWS, 1), np.int64)


def images(data):
    data["observations"] = np.zeros((ROWS, 4, 4, 3), np.uint8)


def empty(data):
    for name in data:
        data[name] = data[name][:0]


def wide(data):
    for name in ("observations", "next_observations"):
        data[name] = np.concatenate([data[name]] * 2, axis=1)


BAD_DATA = {
    "nan observation": (broken("observations", (7, 2), np.nan), ["observations[7][2]"]),
    "infinite next observation": (
        broken("next_observations", (5, 1), np.inf),
        ["next_observations[5][1]"],
    ),
    "nan action": (broken("actions", (11, 0), np.nan), ["actions[11]"]),
    "infinite reward": (broken("rewards", 13, -np.inf), ["rewards[13]"]),
    "action outside": (broken("actions", (17, 0), 2.5), ["actions[17]", "2.5"]),
    "lengths": (shorter("rewards"), ["rewards", "299", "300"]),
    "discrete": (discrete, ["discrete"]),
    "images": (images, ["images"]),
    "empty": (empty, ["empty"]),
    "another environment": (wide, ["Pendulum-v1", "6"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(launcher, tmp_path, case):
    change, words = BAD_DATA[case]
    data = arrays()
    change(data)
    path = write_d4rl(tmp_path / "bad.hdf5", data, env_id="Pendulum-v1")
    refused(launcher.run("train", *train_flags(path, tmp_path / "run")), "bad.hdf5", *words)
    assert not (tmp_path / "run").exists()


def test_datasets_that_are_not_there(launcher, tmp_path):
    text = tmp_path / "text.hdf5"
    text.write_text("not HDF5")
    for name in (tmp_path / "nosuch.hdf5", text, tmp_path, "nosuch", "nosuch/thing-v0"):
        # Offline, so that the Minari id fails at once whatever the network.
        env = {"HF_HUB_OFFLINE": "1"}
        refused(launcher.run("train", *train_flags(name, tmp_path / "run"), env=env), str(name))
    assert not (tmp_path / "run").exists()


def test_minari_id_that_the_server_does_not_know(tmp_path):
    """In a fresh process, where the client's import comes with the download."""

    class Server(http.server.BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self):
            # The client logs and repeats a request that fails so, then ends at one that fails for
            # good.
            Server.asked += self.path.startswith("/api/datasets")
            self.send_response(503 if Server.asked == 1 else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_VERBOSITY": "",
            "HF_HOME": str(tmp_path / "hub"),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "MINARI_DATASETS_PATH": str(tmp_path / "minari"),
            "MINARI_REMOTE": "hf://farama-minari",
        }
        flags = train_flags("nosuch/thing-v0", tmp_path / "run")
        refused(fresh("train", *flags, env=env), "nosuch/thing-v0: no such dataset", "404")
        server.shutdown()
    assert Server.asked == 2


def test_attribute_that_is_no_text(launcher, tmp_path):
    path = write_d4rl(tmp_path / "bad.hdf5", arrays(), env_id=np.array([b"Pendulum-v1"]))
    refused(
        launcher.run("train", *train_flags(path, tmp_path / "run")), "bad.hdf5", "env_id", "text"
    )


def test_workdir_that_is_a_file(launcher, dataset, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    refused(launcher.run("train", *train_flags(dataset, path)), f"--workdir={path}: is a file")
    refused(launcher.run("evaluate", f"--workdir={path}"), f"--workdir={path}: is a file")
    assert path.read_text() == "mine"


def test_checkpoints_without_the_config_file(launcher, dataset, copy):
    (copy / "config.json").unlink()
    before = contents(copy)
    for flags in (train_flags(dataset, copy, *SEEDS), train_flags(dataset, copy, *SEEDS, beta=3)):
        refused(
            launcher.run("train", *flags),
            str(copy),
            "checkpoints are there",
            "config.json is missing",
        )
    refused(launcher.run("evaluate", f"--workdir={copy}"), "config.json is missing")
    assert contents(copy) == before


def test_workdir_of_another_run(launcher, dataset, finished, tmp_path):
    other = write_d4rl(
        tmp_path / "other.hdf5", arrays() | {"rewards": np.ones(ROWS)}, env_id="Pendulum-v1"
    )
    workdir = finished[0]
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    refused(
        launcher.run("train", *train_flags(dataset, workdir, *SEEDS, beta=3)), "beta", str(workdir)
    )
    refused(launcher.run("train", *train_flags(other, workdir, *SEEDS)), "dataset", str(workdir))
    refused(
        launcher.run("train", *train_flags(dataset, workdir, "--seed=4", "--num_seeds=2")), "seed"
    )
    refused(launcher.run("train", *train_flags(dataset, workdir, "--seed=3")), "num_seeds")
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def test_a_second_process_is_refused(launcher, dataset, copy):
    lock = Lock(epath.Path(copy), print)
    before = contents(copy)
    words = str(copy), f"process {os.getpid()} on", "writes in it"
    refused(launcher.run("train", *train_flags(dataset, copy, *SEEDS)), *words)
    assert contents(copy) == before
    lock.close()


def test_a_full_disk_and_failed_evaluations_are_no_errors_of_the_user(launcher, dataset, tmp_path):
    """Status 1, because clusters give up at 2; mended, the same command goes on."""
    workdir, broken = tmp_path / "run", {"BREAK": "raises"}
    flags = "--plugins=tests.extension.faulty", "--env=Broken-v0"
    flags = train_flags(dataset, workdir, *flags, **CHEAP)
    full = launcher.run("train", *flags, env={"BREAK": "file size"})
    [complaint] = full.complaints
    assert (full.status, "cannot be written" in complaint) == (1, True), full.err
    stopped = launcher.run("train", *flags, "--stop_on_failed_evaluation", env=broken)
    assert (stopped.status, saved_steps(workdir)[-1]) == (1, TOTAL - 30), stopped.err
    result = launcher.run("train", *flags, env=broken)
    assert (result.status, saved_steps(workdir)[-1]) == (1, TOTAL), result.err
    cause = (
        "environment Broken-v0 failed at step 2 of the episode with seed 1000000: RuntimeError: "
    )
    assert cause + "the simulator fell over" in result.complaints[1]
    assert [line.split(" ", 2)[1] for line in result.complaints] == [
        "continuing",
        "failed:",
        "failed:",
    ]
    found = [(row["evaluation"], row["status"]) for row in table(workdir / "evaluations.csv")]
    names = [f"policy-{TOTAL - 30}", f"behavior-{STEPS['behavior']}", f"policy-{TOTAL}"]
    assert found == [(f"train-{name}", "failed") for name in names]
    assert not (workdir / "result.json").exists()
    mended = launcher.run("train", *flags)
    assert mended.status == 0, mended.err
    found = [(row["evaluation"], row["status"]) for row in table(workdir / "evaluations.csv")]
    statuses = ["failed", "done", "done"]
    assert found == [(f"train-{n}", s) for n, s in zip(names, statuses, strict=True)]


def test_same_file_with_other_contents_is_another_dataset(launcher, finished, copy, tmp_path):
    changed = tmp_path / "small.hdf5"
    write_d4rl(changed, arrays() | {"rewards": np.ones(ROWS)}, env_id="Pendulum-v1")
    info = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(info | {"dataset": str(changed)}))
    refused(launcher.run("train", *train_flags(changed, copy, *SEEDS)), "fingerprint")


def test_damaged_config_file(launcher, dataset, copy):
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text[: len(text) // 2])
    refused(launcher.run("train", *train_flags(dataset, copy, *SEEDS)), "config.json")
    refused(launcher.run("evaluate", f"--workdir={copy}"), "config.json")


def test_two_damaged_checkpoints_are_two_lines(launcher, dataset, finished, copy):
    """The newest that can be read is used, and continued to the same bits."""
    damage(copy, TOTAL)
    cut(copy, TOTAL - 10)
    results = {
        "evaluate": launcher.run("evaluate", f"--workdir={copy}"),
        "train": launcher.run("train", *train_flags(dataset, copy, *SEEDS)),
    }
    for name, result in results.items():
        assert result.status == 0, result.err
        assert len(result.complaints) == (3 if name == "train" else 2), result.err
        for step, line in zip((TOTAL, TOTAL - 10), result.complaints, strict=False):
            assert f"checkpoints/{step} cannot be read" in line
    trained = results["train"]
    assert trained.complaints[2].endswith(f"continuing {copy} from step {TOTAL - 20}")
    assert trained.line["policy_return"] == finished[1].line["policy_return"]
    expected, found = arrays_of(finished[0], TOTAL), arrays_of(copy, TOTAL)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("how", [damage, cut])
def test_all_checkpoints_damaged(launcher, dataset, copy, how):
    for step in saved_steps(copy):
        how(copy, step)
    before = contents(copy / "checkpoints")
    refused(launcher.run("evaluate", f"--workdir={copy}"), f"checkpoints/{TOTAL} cannot")
    refused(
        launcher.run("train", *train_flags(dataset, copy, *SEEDS)), f"checkpoints/{TOTAL} cannot"
    )
    # Nothing may have been deleted, nor training begun anew: a second time finds the same.
    assert contents(copy / "checkpoints") == before


def test_evaluate_refuses(launcher, finished, copy, tmp_path):
    refused(launcher.run("evaluate"), "--workdir")
    refused(launcher.run("evaluate", f"--workdir={tmp_path / 'nosuch'}"), "nosuch")
    assert not (tmp_path / "nosuch").exists()
    refused(launcher.run("evaluate", f"--workdir={finished[0]}", "--episodes=0"), "episodes")
    shutil.rmtree(copy / "checkpoints")
    before = contents(copy)
    refused(launcher.run("evaluate", f"--workdir={copy}"), "checkpoint")
    assert contents(copy) == before


def test_non_finite_loss_stops_and_keeps_the_last_checkpoint(launcher, dataset, tmp_path):
    workdir = tmp_path / "run"
    flags = train_flags(dataset, workdir, critic_learning_rate=1e30, **CHEAP)
    for _ in range(2):
        result = launcher.run("train", *flags)
        assert result.status == 1, result.err
        assert "Traceback" not in result.err
        assert "critic" in result.complaints[-1]
        assert "step 2" in result.complaints[-1] or "step 3" in result.complaints[-1]
        assert saved_steps(workdir) == [20, 30, 40]
        assert all(np.isfinite(value).all() for value in arrays_of(workdir, 40).values())
    assert f"continuing {workdir} from step 40" in result.err
    assert "the checkpoint of step 40 is kept" in result.complaints[-1]
    flags = train_flags(dataset, tmp_path / "early", behavior_learning_rate=1e38, **CHEAP)
    early = launcher.run("train", *flags)
    assert (early.status, saved_steps(tmp_path / "early")) == (1, [])
    assert "no checkpoint had been saved yet" in early.complaints[-1]
