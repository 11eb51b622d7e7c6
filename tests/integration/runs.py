"""A small run of the launcher: its data and flags, and what it leaves."""

import csv

import numpy as np
import orbax.checkpoint as ocp

STEPS = {"behavior": 40, "critic": 40, "policy": 60}
TOTAL = sum(STEPS.values())
CONFIG = {
    "hidden_dims": "(16,)",
    "critic_hidden_dims": "(16,)",
    "support_size": 3,
    "batch_size": 32,
    "sample_steps": 2,
    "renew_every": 20,
    "log_every": 10,
    "checkpoint_every": 10,
    "eval_every": 30,
    "eval_episodes": 2,
    **{f"{phase}_steps": steps for phase, steps in STEPS.items()},
}
# Half of the programs, for what does not depend on the algorithm.
CHEAP = {"policy": "gaussian", "critic": "iql"}
ROWS = 300
SEEDS = ("--seed=3", "--num_seeds=2")  # of the run that tests share


def arrays():
    """Rows in the layout of D4RL that fit Pendulum-v1."""
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((ROWS, 3)).astype(np.float32)
    return {
        "observations": observations,
        "next_observations": observations + np.float32(0.1),
        "actions": rng.uniform(-2, 2, (ROWS, 1)).astype(np.float32),
        "rewards": -rng.uniform(0, 1, ROWS).astype(np.float32),
        "terminals": np.zeros(ROWS, bool),
        "timeouts": np.arange(ROWS) % 100 == 99,
    }


def train_flags(dataset, workdir, *more, **config):
    fields = [f"--config.{name}={value}" for name, value in (CONFIG | config).items()]
    return [
        f"--dataset={dataset}",
        "--config=experiments/configs/quick.py",
        *fields,
        f"--workdir={workdir}",
        *more,
    ]


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def saved_steps(workdir):
    return sorted(
        int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()
    )


def arrays_of(workdir, step):
    """Every array of a checkpoint, read without our code."""
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(workdir / "checkpoints" / str(step) / "state")
    flat = ocp.tree.to_flat_dict(tree)
    return {"/".join(map(str, key)): np.asarray(value) for key, value in flat.items()}
