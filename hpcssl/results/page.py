"""RESULTS.md: a published part, made from ``hpcssl/published``, and a measured part, made from run folders.

Each stands between two markers of its own; all around them is left as it is. The measured part keeps the rows of runs
that are not named, since their folders may be elsewhere by now, and carries the sha256 of its table: rows that were
edited by hand are refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from hpcssl import files, published
from hpcssl.errors import EvalError
from hpcssl.results import columns
from hpcssl.results.tables import FIRST, LAST, cells

BEGIN = "<!-- measured by hpcssl results: begin (derived from run folders; do not edit in here) -->"
END = "<!-- measured by hpcssl results: end -->"
PUBLISHED_BEGIN = "<!-- published by hpcssl results: begin (derived from hpcssl/published; do not edit in here) -->"
PUBLISHED_END = "<!-- published by hpcssl results: end -->"

_SEAL = re.compile(r"<!-- table sha256 ([0-9a-f]{64}) -->")


def write(path: Path | str, records: Sequence[dict] | None, *, with_published: bool = False) -> None:
    """Bring ``path`` up to date: the measured part from ``records`` (None: left alone), and the published part where
    the file has one or ``with_published`` asks for it. Atomic.

    Raises ``EvalError`` for markers that form no pair, and for a measured table that was edited by hand.
    """
    path = Path(path)
    text = path.read_text() if path.exists() else "# Results\n"
    if with_published or PUBLISHED_BEGIN in text:
        head, _, rest = _cut(path, text, PUBLISHED_BEGIN, PUBLISHED_END)
        text = head + published_part() + rest
    if records is not None:
        head, old, rest = _cut(path, text, BEGIN, END)
        text = head + measured_part(records, keep=_read(path, old)) + rest
    files.atomic_write(path, text)


def _cut(path: Path, text: str, begin: str, end: str) -> tuple[str, str, str]:
    """What stands before, between and behind a pair of markers; without them, the end of the file."""
    if (text.count(begin), text.count(end)) not in ((0, 0), (1, 1)) or text.find(begin) > text.find(end):
        raise EvalError(f"{path}", got="markers that do not form one pair", expected="one begin before one end",
                        mend="delete both marker lines and what stands between them, then run the command again")
    if begin not in text:
        return text.rstrip("\n") + "\n\n", "", "\n"
    head, rest = text.split(begin)
    return head, *rest.split(end)


def rows_of(path: Path | str) -> list[dict[str, str]]:
    """The measured rows of a page, column -> cell. Raises ``EvalError`` where they were edited by hand."""
    path = Path(path)
    return _read(path, _cut(path, path.read_text(), BEGIN, END)[1])


# -- measured -----------------------------------------------------------------------------------------------


def measured_part(records: Sequence[dict], keep: Sequence[dict[str, str]] = ()) -> str:
    """The table between its markers: rows kept from before, then those of the records.

    ``keep``: rows as column -> cell. Of them, those of the records' runs go: a run's row by (recipe, run), a mean's if
    one of its runs is among them.
    """
    head, lines = cells(records)
    new = [dict(zip(head, line, strict=True)) for line in lines]
    named = {(row["recipe"], run) for row in new for run in _runs(row)}
    rows = [row for row in keep if not any((row.get("recipe"), run) in named for run in _runs(row))] + new
    scores = columns.in_order(name for row in rows for name in row if name not in FIRST + LAST)
    rule = ["---"] * len(FIRST) + ["---:"] * len(scores) + ["---"] * len(LAST)
    head = [*FIRST, *scores, *LAST]
    table = "\n".join(_line(line) for line in [head, rule, *([row.get(c, "") for c in head] for row in rows)])
    return "\n".join([BEGIN, "", "## Measured", "", table, "", *_notes(rows), "",
                      f"<!-- table sha256 {_digest(table)} -->", END])


def _runs(row: dict[str, str]) -> list[str]:
    return row.get("run", "").removeprefix("mean of ").split(", ")


def _notes(rows: Sequence[dict[str, str]]) -> list[str]:
    notes = ["Top-1 in percent unless a column says otherwise; changed: keys that differ from the packaged recipe; "
             "rank·h: wall-clock hours of training times processes (one GPU or CPU core each)."]
    if any(" ± " in cell for row in rows for cell in row.values()):
        notes[0] += " ±: sample deviation over the seeds."
    bracketed = dict.fromkeys(row["recipe"] for row in rows if any(_bracketed(row)))
    if bracketed:
        notes += ["", "In brackets the published value of the recipe's row, under the paper's own protocol:", ""]
    for recipe in bracketed:
        places = dict.fromkeys(anchor["source"] for title, anchor in columns.anchors(recipe).items()
                               if any(columns.quantity(column) == title for row in rows if row["recipe"] == recipe
                                      for column in _bracketed(row)))
        notes.append(f"- {recipe}: {'; '.join(places) or 'its own header'}")
    return notes


def _bracketed(row: dict[str, str]) -> list[str]:
    return [column for column, cell in row.items() if column not in FIRST + LAST and cell.endswith(")")]


def _line(cells_: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells_) + " |"


def _digest(table: str) -> str:
    return hashlib.sha256(table.encode()).hexdigest()


def _read(path: Path, part: str) -> list[dict[str, str]]:
    """Rows of a measured part. Raises ``EvalError`` where the table is not the one that was written."""
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    if not lines:
        return []
    seal = _SEAL.search(part)
    if seal is None or seal[1] != _digest("\n".join(lines)):
        raise EvalError(f"{path}, measured part", got="a table that was edited by hand",
                        expected="the rows that `hpcssl results` wrote",
                        mend="bring the file back from version control, or delete both marker lines with what stands "
                             "between them and name all run folders")
    head, _, *rows = ([cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
                      for line in lines)
    return [dict(zip(head, row, strict=True)) for row in rows]


# -- published ----------------------------------------------------------------------------------------------


def published_part() -> str:
    """Every published table between its markers."""
    out = [PUBLISHED_BEGIN, "", "## Published", "",
           "Percent; `linear`, k-NN and `% labels` are top-1 unless they say otherwise. In brackets the difference "
           "that the paper prints. `recipe`: the packaged recipe that is to reach the row.", ""]
    titles = published.titles()
    for document, title in titles.items():
        out += [f"### {title}", ""]
        for table in (t for t in published.tables() if t.document == document):
            out += [f"**{table.title}** ({table.source})", "", *_table(table), ""]
            out += [*(f"- {note}" for note in table.notes), ""] if table.notes else []
    return "\n".join([*out[:-1], "", PUBLISHED_END])


def _table(table: published.Table) -> list[str]:
    score = [column in published.TITLES for column in table.columns]
    head = [published.TITLES.get(column, column).removeprefix("transfer ") for column in table.columns]
    rows = [[row.get(column, "") for column in table.columns] for row in table.rows.values()]
    if table.columns[-1] == "recipe":
        rows = [[*row[:-1], row[-1] and f"`{row[-1]}`"] for row in rows]
    return [_line(line) for line in [head, ["---:" if right else "---" for right in score],
                                     *([cell.replace("*", "\\*") for cell in row] for row in rows)]]
