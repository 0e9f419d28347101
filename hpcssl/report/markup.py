"""Pieces of an HTML page. Everything is written so that an XML parser reads it too: each element is closed."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

VOID = ("img", "link", "meta", "br")
"""Elements without content."""


def escape(text: object) -> str:
    """Escape text for an element or a quoted attribute. Characters that no page may hold are replaced."""
    allowed = "".join(c if c >= " " or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return html.escape(allowed)


def element(name: str, /, *content: str, **attributes: object) -> str:
    """Write an element.

    Args:
        name: Its name.
        content: Markup inside it, one line each.
        attributes: Attributes; ``class_`` stands for ``class``, and other underscores for hyphens. None leaves one out.
    """
    words = [f"{key.rstrip('_').replace('_', '-')}='{escape(v)}'" for key, v in attributes.items() if v is not None]
    head = " ".join([name, *words])
    return f"<{head}/>" if name in VOID else f"<{head}>" + "\n".join(content) + f"</{name}>"


def paragraph(text: object, **attributes: object) -> str:
    """Write plain text as a paragraph."""
    return element("p", escape(text), **attributes)


def section(title: str, *content: str) -> str:
    """Write a section with a heading. Nothing without content."""
    return element("section", element("h2", escape(title)), *content) if content else ""


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "", *, numbers: bool = True) -> str:
    """Write a table that scrolls by itself where it is too wide for the screen.

    Args:
        head: Titles of the columns, as plain text.
        rows: The cells. A ``Markup`` is written as it is, anything else as text; numbers are aligned to the right.
        caption: What the table shows, for people who hear it.
        numbers: Whether a column holds values that are compared, so that numbers are aligned.
    """
    titles = element("tr", *(element("th", escape(title), scope="col") for title in head))
    body = [
        element("tr", *(_cell(value, is_first=k == 0, numbers=numbers) for k, value in enumerate(row)))
        for row in rows
        if any(row)
    ]
    inner = [element("caption", escape(caption))] if caption else []
    inner += [element("thead", titles), element("tbody", *body)]
    label = caption or ", ".join(title for title in head if title)
    return element("div", element("table", *inner), class_="scroll", tabindex="0", role="region", aria_label=label)


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def _cell(value: object, *, is_first: bool, numbers: bool) -> str:
    is_number = numbers and _looks_like_number(str(value))
    text = value if isinstance(value, Markup) else escape(value)
    if is_first:
        return element("th", text, scope="row")
    return element("td", text, class_="number" if is_number else None)


def _looks_like_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d[\d.,:/?%± ()+-]*", text) is not None


def details(summary: str, *content: str) -> str:
    """Write content that is folded until its summary is chosen."""
    return element("details", element("summary", escape(summary)), *content)
