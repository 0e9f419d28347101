"""The orderings that the papers claim, as data: ``claims.yaml`` beside this module.

A claim says that one setting is better than another. Both sides are settings that can be trained here: a packaged
recipe, with ``key=value`` on top where no packaged recipe is the row. What the paper prints is not repeated: the
claim names a table, two of its rows and a column.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hpcssl import config
from hpcssl.published import TITLES, Table, find_table


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One ordering.

    Attributes:
        claim: The ordering, in words.
        first: The setting that is claimed to be better: a packaged recipe, then values to change.
        second: The setting that it is compared with.
        table: The table with the claim, as ``hpcssl.published.find_table`` names it.
        rows: The rows of the first and the second setting; empty if the table does not print both.
        column: The column of the scores; required with ``rows``.
        note: What the printed rows do not say.
    """

    claim: str
    first: str
    second: str
    table: str
    rows: list[str] = field(default_factory=list)
    column: str = ""
    note: str = ""

    def printed(self) -> tuple[Table, float | None]:
        """Return the table, and the difference of the two printed scores: first minus second, or None."""
        table = find_table(self.table)
        values = [table.value(row, self.column) for row in self.rows]
        numbers = [value.number for value in values if value is not None]
        return table, numbers[0] - numbers[1] if len(numbers) == 2 else None

    def source(self) -> str:
        """Return where the claim is printed, and by how much: ``MSF, Table 1, linear: +0.3``."""
        table, difference = self.printed()
        place = f"{table.document} {table.source.partition(';')[0]}"
        return place if difference is None else f"{place}, {TITLES[self.column]}: {difference:+.1f}"


@cache
def read_claims() -> tuple[Claim, ...]:
    """Read all claims, in the order of the file."""
    entries: Any = config.read_yaml(Path(__file__).with_name("claims.yaml"))["claims"]
    return tuple(Claim(**entry) for entry in entries)
