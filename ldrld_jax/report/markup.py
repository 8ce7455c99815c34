"""HTML and SVG as strings that are safe by construction: all text is escaped."""

import base64
import html
import json
import re
from collections.abc import Sequence
from typing import Any


class Markup(str):
    """Text that is markup already."""


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """Formats an element; children that are not Markup are escaped, those and attributes that are None left out.

    Attributes are named as in Python: `class_` is class, `text_anchor` text-anchor; numbers lose their last digits.

    Example:
      >>> tag("text", "a < b", x=1.23456, text_anchor="end", class_="label")
      '<text x="1.23" text-anchor="end" class="label">a &lt; b</text>'
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    text = "".join(f' {key}="{html.escape(_text(value))}"' for key, value in given.items())
    return Markup(f"<{name}{text}>{join(children)}</{name}>")


def join(children: Any) -> Markup:
    """Joins several pieces."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(_text(c)) for c in children if c is not None))


def _text(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def figure(picture: Markup, caption: str, *beside: Markup, name: str, data: Any) -> Markup:
    """Formats a picture with its caption and a link that saves its data as a JSON file, which the page contains.

    Args:
      picture: drawn from `data`.
      caption: below it.
      beside: between the two, such as a legend.
      name: of the figure, for the file and for the link's name.
      data: what JSON can hold.
    """
    text = base64.b64encode(json.dumps(data).encode()).decode()
    link = tag("a", "JSON", href=f"data:application/json;base64,{text}", aria_label=f"JSON of {name}",
               download=re.sub(r"\W+", "-", name).strip("-") + ".json")  # fmt: skip
    return tag("figure", picture, *beside, tag("figcaption", caption, " ", link))


def grid(items: Sequence[Markup], *, wide: bool = False) -> Markup | None:
    """Places figures side by side, as many as there is room for; None without figures."""
    return tag("div", *items, class_="grid wide" if wide else "grid") if items else None


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, shares: Sequence[float] = ()
) -> Markup:
    """Formats a table in a box that scrolls sideways, by the keyboard too; the first cell of a row names it.

    Args:
      header: a name for each column.
      rows: their cells.
      caption: of the table, and the name of the box.
      shares: the length, 0 to 1, of a bar below each row's name.
    """
    columns = [[row[i] for row in rows] for i in range(len(header))]
    classes = ["number" if i and any(map(_is_number, column)) else None for i, column in enumerate(columns)]
    head = tag("tr", *(tag("th", name, scope="col", class_=kind) for name, kind in zip(header, classes, strict=True)))
    bars = [tag("span", style=f"--share:{share:.3f}", class_="bar", aria_hidden="true") for share in shares]
    names = [join([row[0], *bars[i : i + 1]]) for i, row in enumerate(rows)]
    cells = [[tag("td", cell, class_=_kind(cell)) for cell in row[1:]] for row in rows]
    body = [tag("tr", tag("th", name, scope="row"), *rest) for name, rest in zip(names, cells, strict=True)]
    table = tag("table", tag("caption", tag("span", caption)), tag("thead", head), tag("tbody", *body))
    return scrolling(table, caption)


def scrolling(table: Markup, name: str) -> Markup:
    """Puts a table into a box that scrolls in itself, by the keyboard too."""
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=name)


def _kind(text: str) -> str | None:
    """Returns the class of a cell: a number, or a text that is long enough to be broken into lines."""
    return "number" if _is_number(text) else "long" if len(text) > 24 else None


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?[\d.]+( (±|to) [\d.]+)?", text) is not None
