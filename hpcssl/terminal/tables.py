"""Tables that fit a terminal without cutting anything off."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

GAP = 2
"""Spaces between two columns."""


def print_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    wrapped: Mapping[str, int] | None = None,
    optional: Sequence[str] = (),
    width: int | None = None,
    file: TextIO | None = None,
) -> list[str]:
    """Print a table. Cells are never cut off, and names never broken.

    If the terminal is too narrow, optional columns are left out first. If it still is, each row is printed as a block
    of lines, one per column.

    Args:
        head: Titles of the columns.
        rows: Cells of each row. A cell may have several lines.
        wrapped: Columns of prose, which are wrapped at spaces, with the least width of each.
        optional: Columns that may be left out; the first of them is left out first.
        width: Columns of the terminal; None to detect them.
        file: Where to print; standard output by default.

    Returns:
        The titles of the columns that were left out.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file or sys.stdout, width=width, markup=False, highlight=False, emoji=False)
    least = {
        title: min((wrapped or {}).get(title, 10**6), max(_width(cell) for cell in (title, *cells)))
        for title, *cells in zip(head, *rows, strict=True)
    }
    shown, left_out = list(head), []
    for title in optional:
        if _total(least, shown) > console.width:
            shown.remove(title)
            left_out.append(title)
    if _total(least, shown) > console.width:
        for row in rows:
            first, *others = zip(head, row, strict=True)
            console.print(Text(f"{first[0]} {first[1]}", style="bold"), soft_wrap=True)
            for title, cell in others:
                if cell:
                    text = f"{title}: " + cell.replace("\n", ", ")
                    console.print(Padding(Text(text, overflow="fold"), (0, 0, 0, GAP)))
        return []
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    for title in shown:
        table.add_column(title, no_wrap=title not in (wrapped or {}), min_width=least[title])
    for row in rows:
        table.add_row(*(Text(cell) for title, cell in zip(head, row, strict=True) if title in shown))
    console.print(table)
    return left_out


def _width(cell: str) -> int:
    return max(map(len, cell.split("\n")))


def _total(widths: Mapping[str, int], shown: Sequence[str]) -> int:
    return sum(widths[title] + GAP for title in shown) - GAP
