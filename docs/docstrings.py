"""Docstrings as the site shows them: examples are code, roles such as ``:func:`` are links."""

import logging
import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|const):`(~?)([\w.]+)`")
# What it warns of ends a strict build.
_log = logging.getLogger("mkdocs.plugins.docstrings")


class Docstrings(griffe.Extension):
    """Rewrite the docstrings of a package from Sphinx's roles and "Example" to what is rendered."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Go through all modules, classes and functions once they are read."""
        _rewrite(pkg)


def _rewrite(item: griffe.Object) -> None:
    if item.docstring is not None:
        text = _ROLE.sub(lambda role: _link(item, *role.groups()), item.docstring.value)
        item.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    for member in item.members.values():
        if not member.is_alias:
            _rewrite(member)


def _link(item: griffe.Object, tilde: str, name: str) -> str:
    """A link, where the site has a place for it, to what a role in a docstring names."""
    scope, path = item, name.removeprefix(f"{item.package.path}.").lstrip(".")
    while path.split(".")[0] not in scope.members and scope.parent is not None:
        scope = scope.parent
    shown = f"<code>{name.rsplit('.', 1)[-1] if tilde else name}</code>"
    try:
        target = scope[path].canonical_path
    except KeyError:
        _log.warning("%s: :role:`%s` names nothing", item.path, name)
        return shown
    return f'<autoref optional identifier="{target}">{shown}</autoref>'
