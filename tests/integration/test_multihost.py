"""Two processes on this machine as two hosts: the launcher, and what follows when one stops."""

import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest

from tests.integration.helpers import refused, xla_flags
from tests.integration.runs import STEPS, TOTAL, arrays_of, saved_steps, table, train_flags


def devices(count):
    return {"XLA_FLAGS": xla_flags(count)}


def start_hosts(launcher, datasets, workdir, *more, **config):
    """Two processes with two devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        launcher.start(
            "train",
            *train_flags(dataset, workdir, *more, **config),
            f"--coordinator_address=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={host}",
            env=devices(2),
        )
        for host, dataset in enumerate(datasets)
    ]


# Episodes that two hosts share unevenly, and a checkpoint at the end of each phase alone.
RUN = {"eval_episodes": 3, "policy_steps": 400, "eval_every": 200, "checkpoint_every": 400}
LAST = TOTAL - STEPS["policy"] + RUN["policy_steps"]


def assert_same_run(workdir, other, last):
    assert saved_steps(workdir)[-1] == saved_steps(other)[-1] == last
    found, expected = arrays_of(workdir, last), arrays_of(other, last)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        error = np.linalg.norm(found[name] - array) / max(np.linalg.norm(array), 1e-3)
        assert error < 1e-4, (name, error)
    for file, key in (("metrics.csv", "loss"), ("returns.csv", "return")):
        rows, wanted = table(workdir / file), table(other / file)
        skip = (key, "steps_per_second")
        labels = [
            name
            for name in ("phase", "step", "seed", "policy", "episode_seed")
            if name in wanted[0]
        ]
        assert [[r[n] for n in labels if n not in skip] for r in rows] == [
            [r[n] for n in labels if n not in skip] for r in wanted
        ]
        np.testing.assert_allclose(
            [float(r[key]) for r in rows], [float(r[key]) for r in wanted], rtol=1e-3, atol=1e-3
        )


def wait_for(there, hosts):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if there():
            return
        assert all(host.running for host in hosts)
        time.sleep(0.02)
    raise TimeoutError


def wait_for_steps(workdir, phase, hosts):
    metrics = workdir / "metrics.csv"
    phases = lambda: [row["phase"] for row in table(metrics)] if metrics.exists() else []  # noqa: E731
    wait_for(lambda: phase in phases(), hosts)


def check_preemption(launcher, dataset, workdir, uninterrupted):
    """One host's SIGTERM stops both; stopped once more, and continued: the same bits in the end."""
    shutil.copytree(uninterrupted, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(LAST))
    before = saved_steps(workdir)[-1]
    hosts = start_hosts(launcher, [dataset] * 2, workdir, **RUN)
    # Early in 400 steps: JAX looks for a signal about once a second, and hosts agree on a point
    # ahead of all of them.
    wait_for(lambda: f"continuing {workdir} from step {before}" in hosts[0].err, hosts)
    wait_for_steps(workdir, "policy", hosts)
    hosts[1].send(signal.SIGTERM)
    start = time.monotonic()
    results = [host.wait(60) for host in hosts]
    assert [result.status for result in results] == [143, 143], results[0].err + results[1].err
    assert time.monotonic() - start < 30
    assert "stopped by SIGTERM, saved in" in results[0].err
    saved = saved_steps(workdir)[-1]
    assert before < saved < LAST
    # While the table is computed again: there is nothing new to save, and one host may be done
    # while the other still compiles.
    hosts = start_hosts(launcher, [dataset] * 2, workdir, **RUN)
    wait_for(lambda: f"continuing {workdir} from step {saved}" in hosts[0].err, hosts)
    for host in hosts:
        host.send(signal.SIGTERM)
    results = [host.wait(60) for host in hosts]
    assert [result.status for result in results] == [143, 143], results[1].err
    assert saved <= saved_steps(workdir)[-1] < LAST
    again = [host.wait() for host in start_hosts(launcher, [dataset] * 2, workdir, **RUN)]
    assert [result.status for result in again] == [0, 0], again[0].err + again[1].err
    assert f"continuing {workdir}" in again[0].err
    found, expected = arrays_of(workdir, LAST), arrays_of(uninterrupted, LAST)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_two_hosts_equal_one_and_go_on_after_a_preemption(launcher, dataset, tmp_path):
    workdir = tmp_path / "two"
    results = [host.wait() for host in start_hosts(launcher, [dataset] * 2, workdir, **RUN)]
    assert [result.status for result in results] == [0, 0], results[0].err + results[1].err
    alone = launcher.run("train", *train_flags(dataset, tmp_path / "one", **RUN), env=devices(4))
    assert alone.status == 0, alone.err
    assert_same_run(workdir, tmp_path / "one", LAST)
    for key, value in alone.line.items():
        if key.endswith("return"):
            assert results[0].line[key] == pytest.approx(value, rel=1e-3)
    # Only the first host speaks.  Threads of Gloo may tear its lines apart.
    assert [
        line for line in results[1].out.splitlines() if not re.search("Gloo|peer ranks", line)
    ] == []
    assert "4 devices (cpu), 2 hosts" in results[0].out
    check_preemption(launcher, dataset, tmp_path / "again", workdir)


def test_seeds_over_hosts_equal_seeds_on_one_device(launcher, dataset, tmp_path):
    flags = ("--num_seeds=4", "--seed=5")
    hosts = start_hosts(launcher, [dataset] * 2, tmp_path / "two", "--parallel=seeds", *flags)
    alone = launcher.run("train", *train_flags(dataset, tmp_path / "one", *flags))
    results = [host.wait() for host in hosts]
    assert [r.status for r in (*results, alone)] == [0, 0, 0], (
        results[0].err + results[1].err + alone.err
    )
    assert_same_run(tmp_path / "two", tmp_path / "one", TOTAL)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_dies_stops_the_other(launcher, dataset, tmp_path, victim):
    hosts = start_hosts(launcher, [dataset] * 2, tmp_path / "run", behavior_steps=100_000)
    wait_for_steps(tmp_path / "run", "behavior", hosts)
    hosts[victim].send(signal.SIGKILL)
    assert hosts[victim].wait(30).status == -signal.SIGKILL
    survivor = hosts[1 - victim].wait(60)
    # Where the coordinator died, JAX may end the process, with a message of its own, before we can.
    assert survivor.status in ((1,) if victim else (1, -signal.SIGABRT))
    assert "another host stopped" in survivor.err or "another task died" in survivor.err


def test_what_one_host_cannot_read_stops_both(launcher, dataset, tmp_path):
    hosts = start_hosts(launcher, [dataset, tmp_path / "none.hdf5"], tmp_path / "run")
    results = [host.wait(60) for host in hosts]
    assert [result.status for result in results] == [2, 2]
    assert "none.hdf5: no such file" in results[1].err
    assert "host 1 cannot run this; its own output says why" in results[0].err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator_address=127.0.0.1:1"], "--num_processes: needed"),
        (
            ["--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=2"],
            "--process_id: expected less than the 2",
        ),
    ],
)
def test_flags_of_hosts(launcher, dataset, tmp_path, flags, message):
    refused(launcher.run("train", *train_flags(dataset, tmp_path / "run", *flags)), message)
