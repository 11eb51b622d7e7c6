"""README and site: code runs, names exist, pages and notebooks are their scripts."""

import ast
import json
import pkgutil
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from tests.markdown import cells

ROOT = Path(__file__).resolve().parents[2]
PAGES = runpy.run_path(str(ROOT / "docs" / "pages.py"))


def test_the_readmes_loop_reaches_the_closed_form():
    """N(0, I) reweighted by exp(-0.5 ||x - 1||^2) is N(0.5, 0.5 I)."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    # What a thousand steps of a small network leave.
    np.testing.assert_allclose(names["samples"].mean(0), 0.5, atol=0.1)
    np.testing.assert_allclose(names["samples"].var(0), 0.5, atol=0.1)


@pytest.mark.parametrize("page", ["README.md", "docs/paper_map.md"])
def test_every_name_of_the_paper_map_exists(page):
    rows = [
        row
        for row in cells((ROOT / page).read_text())
        if re.match(r"(Thm|Alg|Cor|eq|Sec|Rem|Tab)", row[0])
    ]
    names = re.findall(r"`((?:efm_jax|experiments|launch)\.[\w.]+)`", str(rows))
    assert len(names) >= 4
    for name in names:
        pkgutil.resolve_name(name)
    for test in re.findall(r"`(tests/[^`]+)`", str(rows)):
        file, _, function = test.partition("::")
        found = ast.walk(ast.parse((ROOT / file).read_text()))
        names = {node.name for node in found if isinstance(node, ast.FunctionDef)}
        assert not function or function in names, test


@pytest.mark.parametrize("name", PAGES["TUTORIALS"])
def test_page_and_notebook_are_the_script(name):
    """Where not, run `python docs/pages.py NAME`."""
    page = (ROOT / "docs" / f"{name}.md").read_text()
    for kind, text in PAGES["cells"](name):
        assert (text if kind == "markdown" else f"```python\n{text}\n```") in page
    notebook = (ROOT / "docs" / "notebooks" / f"{name}.ipynb").read_text()
    assert json.loads(notebook)["nbformat"] == 4
    assert notebook == PAGES["notebook"](name)
    for picture in re.findall(r"!\[.*\]\((.*)\)", page):
        assert (ROOT / "docs" / picture).stat().st_size < 120 * 1024


@pytest.mark.parametrize("path", [ROOT / "README.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), link
