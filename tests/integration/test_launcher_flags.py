"""Flags and presets that `launch.train` refuses."""

import pytest

from tests.integration.helpers import refused
from tests.integration.runs import train_flags

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
