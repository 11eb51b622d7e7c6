"""HTML that is escaped unless it says otherwise: elements made of texts and other elements."""

import html
from collections.abc import Iterable


class Html(str):
    """Text that is HTML already; every other string is escaped where it enters an element."""

    __slots__ = ()


Child = str | None | Iterable["Child"]

_VOID = ("br", "img", "meta")


def tag(name: str, *children: Child, **attributes: str | bool | None) -> Html:
    """An element, as in ``tag("a", "text", href="#x")``.

    Args:
      name: of the element.
      *children: texts, elements, or iterables of them; None is nothing.
      **attributes: True gives one without a value, False and None give none. ``class_`` is
        ``class``, and other underscores are hyphens.
    """
    parts = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(key)
        elif value is not None and value is not False:
            parts.append(f'{key}="{html.escape(value)}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening if name in _VOID else f"{opening}{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Html:
    """Texts and elements one after the other."""
    parts = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(html.escape(child))
        elif child is not None:
            parts.append(join(child))
    return Html("".join(parts))


def table(
    head: Iterable[Child],
    rows: Iterable[tuple[str | None, Iterable[Child]]],
    *,
    caption: str,
    numbers: Iterable[int] = (),
) -> Html:
    """A table in a region that scrolls by itself, its caption above; a row's first cell is its
    header.

    Args:
      head: the columns' headers.
      rows: pairs of a CSS class, or None, and the cells.
      caption: what the table shows, also the name of the region.
      numbers: columns whose cells are aligned to the right.
    """
    style = dict.fromkeys(numbers, "number")
    header = tag(
        "tr", [tag("th", cell, scope="col", class_=style.get(i)) for i, cell in enumerate(head)]
    )
    body = []
    for css, cells in rows:
        first, *rest = cells
        content = [tag("th", first, scope="row")]
        content += [tag("td", cell, class_=style.get(index)) for index, cell in enumerate(rest, 1)]
        body.append(tag("tr", content, class_=css))
    grid = tag("table", tag("thead", header), tag("tbody", body), aria_label=caption)
    # The caption stays outside, where it does not scroll; the region can be reached and scrolled by
    # keyboard.
    region = tag(
        "div", grid, class_="wide", role="region", tabindex="0", aria_label=f"Table: {caption}"
    )
    return join([tag("p", caption, class_="caption"), region])
