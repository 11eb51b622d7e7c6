"""The house: a module imports from what stands above it, and nothing imports in a circle."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# What a package holds, from the ground up; efm_jax.data orders itself.
PACKAGES = {
    "": "types checks errors files arrays paths weights losses exact solvers sampling networks "
    "guidance "
    "distances envs data training rl runs",
    "envs": "flatten specs environments rollout scores play video pendulum pointmaze",
    "training": "hosts state packing step loop parallel machines compiled",
    "rl": "config batch model critics agents guard programs trainer memory",
    "rl.agents": "agent cloning qipo qgpo reweighting gaussian",
}
FILES = sorted((ROOT / "efm_jax").rglob("*.py")) + sorted((ROOT / "launch").rglob("*.py"))


def module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module(path) for path in FILES}


def imports(path):
    """Modules of the checkout that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            source = ".".join([*above, *([node.module] if node.module else [])])
            names = [source, *(f"{source}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name for name in names if name in NAMES and name != "efm_jax"}
    # `from package import module` is an import of the module, not of what the package binds.
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_a_place(package):
    prefix = f"efm_jax.{package}.".replace("..", ".")
    inside = {name.removeprefix(prefix).split(".")[0] for name in NAMES if name.startswith(prefix)}
    assert inside == set(PACKAGES[package].split())


@pytest.mark.parametrize("path", [path for path in FILES if "launch" not in path.parts], ids=module)
def test_imports_go_upward_only(path):
    mine = module(path).split(".")[1:]
    for name in imports(path):
        assert name.startswith("efm_jax.")
        theirs = name.split(".")[1:]
        depth = next(
            (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None
        )
        order = PACKAGES.get(".".join(mine[:depth]), "").split()
        if depth is not None and order:
            assert order.index(theirs[depth]) < order.index(mine[depth]), name


def test_no_circle():
    graph = {module(path): imports(path) for path in FILES}
    done, trail = set(), []

    def visit(name):
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name in done:
            return
        trail.append(name)
        for other in sorted(graph[name]):
            visit(other)
        done.add(trail.pop())

    for name in sorted(graph):
        visit(name)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_no_imports_for_type_checkers_alone(path):
    assert "TYPE_CHECKING" not in path.read_text()


def names(path):
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }


@pytest.mark.parametrize("path", [p for p in FILES if "launch" not in p.parts], ids=module)
def test_only_launch_reads_the_command_line_and_one_module_maps_devices(path):
    assert not names(path) & {"argv", "environ", "getenv", "FLAGS"}
    assert not names(path) & {"pmap", "Mesh"} or module(path) == "efm_jax.training.parallel"
