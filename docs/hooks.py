"""Hooks of the site's build: the home page is the README, formulas become MathML."""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

README = Path(__file__).resolve().parent.parent / "README.md"
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the README, whose links start at the repository, in place of the home page's text."""
    if page.file.src_uri != "index.md":
        return markdown
    return README.read_text(encoding="utf-8").replace("](docs/", "](")


def on_page_content(content: str, **_: Any) -> str:
    """Write formulas as MathML, which browsers draw without a script."""

    def formula(found: re.Match) -> str:
        kind = "inline" if found[1] == "span" else "block"
        return convert(html.unescape(found[2]), display=kind)

    return _FORMULA.sub(formula, content)
