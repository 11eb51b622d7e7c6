"""What is installed: every command, presets by name, one version, all that setup.py reads."""

import importlib
import re
import runpy
from pathlib import Path

import pytest
import setuptools

import efm_jax
from launch import cli

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = sorted(
    path.parent.name if path.stem == "__main__" else path.stem
    for path in (REPOSITORY / "launch").rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)


@pytest.fixture
def stated(monkeypatch):
    """What setup.py says to setuptools."""
    said = {}
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(setuptools, "setup", lambda **words: said.update(words))
    runpy.run_path("setup.py")
    return said


def test_every_command_is_installed_and_all_load_in_one_process(stated):
    scripts = dict(line.split(" = efm_jax.") for line in stated["entry_points"]["console_scripts"])
    assert sorted(scripts) == sorted(f"efm-{name}" for name in COMMANDS)
    for place in scripts.values():
        module, attribute = place.split(":")
        assert callable(getattr(importlib.import_module(module), attribute))


def test_commands_keep_flags_of_one_name_apart():
    commands = {name: importlib.import_module(f"launch.{name}") for name in ("collect", "evaluate")}
    sets = {name: command.FLAGS for name, command in commands.items()}
    for name, value in (("collect", "3"), ("evaluate", "4")):
        assert sets[name].parse([name, f"--episodes={value}", "--env=X", "left"]) == [name, "left"]
    assert [sets[name].values.episodes for name in sets] == [3, 4]
    assert "--solver" in sets["evaluate"].help()
    assert "--env" in sets["evaluate"].help()
    assert "--solver" not in sets["collect"].help()


def test_packages_lie_in_one_folder_with_all_their_files(stated):
    installed = set()
    for package in stated["packages"]:
        assert package.split(".")[0] == "efm_jax"
        folder = package
        for above, place in stated["package_dir"].items():
            if f"{package}.".startswith(f"{above}."):
                folder = place + package.removeprefix(above)
        for pattern in ("*.py", *stated["package_data"].get(package, [])):
            installed.update((REPOSITORY / folder.replace(".", "/")).glob(pattern))
    for folder in ("efm_jax", "launch", "experiments/configs"):
        files = {path for path in (REPOSITORY / folder).rglob("*.*") if path.suffix != ".pyc"}
        assert files
        assert files <= installed


def test_version_and_what_the_source_archive_needs(stated):
    assert stated["version"] == efm_jax.__version__
    read = re.findall(r'HERE / "([^"]+)"', (REPOSITORY / "setup.py").read_text())
    carried = {*(REPOSITORY / "MANIFEST.in").read_text().split(), "README.md"}
    assert {name for name in read if not name.startswith("efm_jax/")} <= carried
    assert all((REPOSITORY / name).exists() for name in stated["license_files"])


def test_a_preset_has_a_path_and_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = REPOSITORY / "experiments" / "configs"
    for name in ("quick", "d4rl/antmaze"):
        for given in (name, f"experiments/configs/{name}.py", str(folder / f"{name}.py")):
            assert Path(cli.find_preset(given)) == folder / f"{name}.py"
    (tmp_path / "quick").write_text("")
    assert cli.find_preset("quick") == "quick"
    assert cli.find_preset("nosuch") == "nosuch"
