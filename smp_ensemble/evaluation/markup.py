"""HTML from plain values. Text is escaped unless it is `Html` already, so names cannot become elements."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smp_ensemble.evaluation.stylesheet import CSS

if TYPE_CHECKING:
    from collections.abc import Sequence


class Html(str):
    """Text that is HTML; everything else is escaped where it enters a page."""

    __slots__ = ()


@dataclass(frozen=True)
class Picture:
    """A figure as a page shows it.

    Attributes:
        png: The file.
        says: What one sees, for those who do not.
    """

    png: bytes
    says: str


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it shows.
        best: Whether it is the best of its column: it is shaded.
    """

    text: str
    best: bool = False


def safe(text: str) -> Html:
    """The text as HTML: escaped, unless it is HTML.

    Example:
        >>> safe("<b>roof & wall</b>"), safe(Html("<b>roof</b>"))
        ('&lt;b&gt;roof &amp; wall&lt;/b&gt;', '<b>roof</b>')
    """
    return text if isinstance(text, Html) else Html(html.escape(text, quote=True))


def element(name: str, *parts: str, **attributes: str) -> Html:
    """An element with escaped attributes; `class_` is `class`, and `_` in names is `-`.

    Example:
        >>> element("p", "a < b", class_="how")
        '<p class="how">a &lt; b</p>'
    """
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{safe(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{written}>{''.join(safe(part) for part in parts)}</{name}>")


def section(name: str, heading: str, *parts: str, how: str = "") -> Html:
    """A part of the page with a heading, and how to read it.

    Args:
        name: Of the anchor.
        heading: Of the section.
        parts: What it consists of.
        how: What the numbers mean, in one or two sentences.
    """
    label = element("strong", "How to read this. ")
    reading = [element("p", label, how, class_="how")] if how else []
    return element("section", element("h2", heading), *parts, *reading, id=name)


def table(
    headings: Sequence[str], rows: Sequence[Sequence[Cell | str]], *, caption: str, strong: int | None = None
) -> Html:
    """A table in a box that scrolls sideways where it is too wide. The first column is text, the others are numbers.

    Args:
        headings: One for each column.
        rows: Cells; each row's first one is its heading.
        caption: What the table is.
        strong: Index of the row that stands out.
    """
    head = element("tr", *(element("th", heading, scope="col") for heading in headings))
    lines = []
    for index, (first, *others) in enumerate(rows):
        name = element("th", first if isinstance(first, str) else first.text, scope="row")
        attributes = {"class_": "strong"} if index == strong else {}
        lines.append(element("tr", name, *(_cell(cell) for cell in others), **attributes))
    parts = [element("caption", element("span", caption)), element("thead", head), element("tbody", *lines)]
    return element("div", element("table", *parts), class_="scroll", tabindex="0", role="region", aria_label=caption)


def picture(drawn: Picture, name: str) -> Html:
    """A figure, inside the page as a data URI; `name` is that of the file beside the page."""
    data, alt = base64.b64encode(drawn.png).decode("ascii"), safe(drawn.says)
    width, height = (int.from_bytes(drawn.png[at : at + 4], "big") for at in (16, 20))  # PNG's header
    image = Html(f'<img src="data:image/png;base64,{data}" alt="{alt}" width="{width}" height="{height}">')
    box = element("div", image, class_="scroll paper", tabindex="0", role="region", aria_label=alt)
    return element("figure", box, element("figcaption", f"Also as {name}."))


def document(title: str, *parts: str) -> str:
    """A whole page that needs nothing but itself: its policy forbids scripts and every request."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        Html('<link rel="icon" href="data:,">'),
        element("title", title),
        element("style", Html(CSS)),
    ]
    body = element("body", element("main", *parts))
    return f"<!doctype html>\n{element('html', element('head', *head), body, lang='en')}\n"


def _cell(cell: Cell | str) -> Html:
    cell = Cell(cell) if isinstance(cell, str) else cell
    return element("td", element("strong", cell.text), class_="best") if cell.best else element("td", cell.text)
