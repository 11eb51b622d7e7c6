"""The job files of `launch/cluster`: they parse, name flags that exist, and start what they say."""

import importlib
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from efm_jax.rl.config import QIPOConfig

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER = REPOSITORY / "launch" / "cluster"
SLURM, TPU_VM = CLUSTER / "slurm_array.sh", CLUSTER / "tpu_vm.sh"
# Stands in for a program: appends its arguments to calls.jsonl, then does what $NAME_DOES says.
PROGRAM = """#!/usr/bin/env bash
python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$(basename "$0")" "$@" >> "$CALLS"
does=$(basename "$0")_DOES
eval "${!does:-}"
"""


@pytest.fixture
def run(tmp_path):
    """Run bash where `programs` are stand-ins: its exit status, their calls, its complaints."""
    folder, calls = tmp_path / "bin", tmp_path / "calls.jsonl"
    folder.mkdir()

    def run(*args, programs, **variables):
        for name in programs:
            (folder / name).write_text(PROGRAM)
            (folder / name).chmod(0o755)
        calls.write_text("")
        environment = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), **variables}
        done = subprocess.run(
            ["bash", *map(str, args)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
        called = [json.loads(line) for line in calls.read_text().splitlines()]
        return done.returncode, called, done.stderr

    return run


def defined_flags(module):
    """Name the flags of an entry point."""
    shown = importlib.import_module(f"launch.{module}").FLAGS.help()
    return set(re.findall(r"^ *--(?:\[no\])?(\w+):", shown, re.M))


def test_defined_flags():
    assert {"workdir", "seed", "num_seeds"} <= defined_flags("train")
    assert {"root", "seeds", "jobs"} <= defined_flags("sweep")
    assert "seeds" not in defined_flags("train")


def check_flags(module, words):
    """Every `--flag` among the words of a command is one of the entry point's."""
    for word in words:
        if not word.startswith("--"):
            continue
        name = word[2:].split("=")[0]
        if name.startswith("config."):
            assert name.removeprefix("config.") in QIPOConfig.__dataclass_fields__, word
        else:
            assert name in defined_flags(module), word


def commands(text):
    """`(module, words)` of every `launch.MODULE ...` in a text, over continued lines."""
    text = re.sub(r"\\\n[#\s]*", " ", text)
    return [
        (module, words.split())
        for module, words in re.findall(
            r"python -m launch\.(train|sweep|evaluate)\b([^\n`|&;#]*)", text
        )
    ]


def load(name):
    return yaml.safe_load((CLUSTER / name).read_text())


def test_every_file_is_checked():
    names = {path.name for path in CLUSTER.iterdir() if not path.name.endswith(".md")}
    assert names == {"jobset.yaml", "skypilot.yaml", "slurm_array.sh", "tpu_vm.sh"}


@pytest.mark.parametrize(
    "path",
    [
        *sorted(CLUSTER.iterdir()),
        REPOSITORY / "README.md",
        *sorted(REPOSITORY.glob("docs/**/*.md")),
    ],
    ids=lambda path: path.name,
)
def test_commands_name_flags_that_exist(path):
    for module, words in commands(path.read_text()):
        check_flags(module, words)


def test_commands_are_found():
    assert commands("# python -m launch.sweep --a=1 \\\n#   --b | x --c\n") == [
        ("sweep", ["--a=1", "--b"])
    ]
    assert commands(SLURM.read_text())


def test_jobset():
    spec = load("jobset.yaml")["spec"]
    [replicated] = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    check_flags("train", container["args"])
    assert "--multihost" in container["args"]
    selector = job["template"]["spec"]["nodeSelector"]
    x, y = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
    hosts, chips = job["parallelism"], container["resources"]["limits"]["google.com/tpu"]
    assert job["completions"] == hosts
    assert hosts * chips == x * y
    # Exit status 2, bad flags, ends it; any other starts all hosts again.
    [rule] = job["podFailurePolicy"]["rules"]
    codes = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert rule["onExitCodes"] == codes
    assert spec["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")


@pytest.mark.parametrize("gpu", [True, False])
def test_skypilot(tmp_path, gpu):
    task = load("skypilot.yaml")
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [143]
    check_flags("train", shlex.split(task["envs"]["FLAGS"]))
    for step in ("setup", "run"):
        (tmp_path / step).write_text(task[step])
    # The programs of setup and run print what they were called with.
    for name in ("python3", ".venv/bin/python", "nvidia-smi"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n')
        path.chmod(0o755)
    if not gpu:
        (tmp_path / "nvidia-smi").unlink()
    flags = task["envs"]["FLAGS"]
    environment = {"PATH": str(tmp_path), "FLAGS": flags, "WORKDIR": "gs://a b/c"}

    def lines(step):
        done = subprocess.run(
            ["/bin/bash", step], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert ("jax[cuda12]" if gpu else "jax[tpu]") in lines("setup")
    called = lines("run")
    assert called == ["-m", "launch.train", "--workdir=gs://a b/c", *shlex.split(flags)]
    check_flags("train", called)


@pytest.mark.parametrize("path", [SLURM, TPU_VM], ids=lambda path: path.name)
def test_script_syntax(path):
    assert os.access(path, os.X_OK)
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (2, False), (143, True)])
def test_slurm_runs_its_line_and_requeues_what_was_saved(run, tmp_path, status, requeued):
    jobs = tmp_path / "jobs.txt"
    lines = ["first", 'bash -c \'echo "$0" > "a  b"; exit ' + str(status) + "' '$x  y'", "third"]
    jobs.write_text("\n".join(lines) + "\n")
    task = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "77", "srun_DOES": 'exec "$@"'}
    code, calls, _ = run(SLURM, jobs, programs=["srun", "scontrol"], **task)
    assert code == status
    assert (tmp_path / "a  b").read_text() == "$x  y\n"
    assert calls[0][0] == "srun"
    assert calls[1:] == ([["scontrol", "requeue", "77"]] if requeued else [])


@pytest.mark.parametrize("task", ["1{w made\n};1", "1e touch made\n1", "", "0", "-1", "1,2", "x"])
def test_slurm_task_that_is_no_line_number(run, tmp_path, task):
    (tmp_path / "jobs.txt").write_text("first\n")
    code, calls, errors = run(SLURM, "jobs.txt", programs=["srun"], SLURM_ARRAY_TASK_ID=task)
    assert (code, calls) == (2, [])
    assert "expected a line number" in errors
    assert not (tmp_path / "made").exists()


def test_slurm_without_such_a_line(run, tmp_path):
    (tmp_path / "jobs.txt").write_text("first\n")
    code, calls, errors = run(
        SLURM, "jobs.txt", programs=["srun", "scontrol"], SLURM_ARRAY_TASK_ID="2", SLURM_JOB_ID="77"
    )
    assert (code, calls) == (2, [])
    assert "jobs.txt: no line 2" in errors


SLICE = {"TPU": "qipo", "ZONE": "z", "TYPE": "v6e-16", "IMAGE": "us-docker.pkg.dev/p/r/qipo:tpu"}


@pytest.mark.parametrize(
    ("state", "steps"),
    [
        ("", ["describe", "create", "ssh"]),
        ("READY", ["describe", "ssh"]),
        ("PREEMPTED", ["describe", "delete", "create", "ssh"]),
    ],
)
def test_tpu_vm(run, state, steps):
    described = f"[[ $4 != describe ]] || echo {state}" if state else "[[ $4 != describe ]]"
    flags = ["--workdir=gs://b/a run", "--num_seeds=16", "--parallel=seeds"]
    code, calls, errors = run(TPU_VM, *flags, programs=["gcloud"], gcloud_DOES=described, **SLICE)
    assert code == 0, errors
    assert [call[4] for call in calls] == steps
    assert all(call[:4] == ["gcloud", "compute", "tpus", "tpu-vm"] for call in calls)
    assert all(call[5:7] == ["qipo", "--zone=z"] for call in calls)
    if "create" in steps:
        assert "--accelerator-type=v6e-16" in calls[steps.index("create")]
    assert calls[-1][7] == "--worker=all"
    # What every host then does.
    [remote] = [
        word.removeprefix("--command=") for word in calls[-1] if word.startswith("--command=")
    ]
    code, calls, errors = run(
        "-c", remote, programs=["gcloud", "sudo"], sudo_DOES="[[ $2 != stop ]]"
    )
    assert code == 0, errors
    docker = [call[2:] for call in calls if call[:2] == ["sudo", "docker"]]
    # Nothing to remove where none ran.
    assert [call[0] for call in docker] == ["login", "stop", "run"]
    assert docker[0][-1] == "us-docker.pkg.dev"
    started = docker[-1].index(SLICE["IMAGE"])
    assert docker[-1][started + 1 :] == ["--multihost", *flags]
    check_flags("train", docker[-1][started + 1 :])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("IMAGE", "host.dev;touch made/x:1"),
        ("IMAGE", "$(touch made)/x"),
        ("IMAGE", "host.dev/x:1 --privileged"),
        ("IMAGE", "host.dev/x\nreboot"),
        ("IMAGE", "qipo:tpu"),
        ("TPU", "--help"),
        ("ZONE", "a b"),
        ("TYPE", "`x`"),
    ],
)
def test_tpu_vm_refuses_words_that_are_no_names(run, name, value):
    code, calls, errors = run(TPU_VM, programs=["gcloud"], **{**SLICE, name: value})
    assert (code, calls) == (2, [])
    assert f"{name}={value}: expected" in errors


def test_tpu_vm_needs_its_variables(run):
    code, calls, errors = run(TPU_VM, programs=["gcloud"], **{**SLICE, "IMAGE": ""})
    assert (code, calls) == (1, [])
    assert "IMAGE" in errors
