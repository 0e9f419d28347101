"""RESULTS.md: a published part, made from ``hpcssl/published``, and a measured part, made from run folders.

A third part, the claims of the papers, is made from the measured rows of the page. Each lies between two markers; the
rest of the file is left unchanged. The measured part keeps the rows of runs that are not named, since their folders
may have been moved, and carries the sha256 of its table: rows that were edited by hand are refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from hpcssl import files, published
from hpcssl.errors import EvalError
from hpcssl.evals.frozen.knn_options import ONE_LABEL
from hpcssl.results import claims, columns
from hpcssl.results.columns import Record
from hpcssl.results.tables import FIRST, LAST, table_cells

BEGIN = "<!-- measured by hpcssl results: begin (derived from run folders; do not edit in here) -->"
END = "<!-- measured by hpcssl results: end -->"
CLAIMS_BEGIN = "<!-- claims by hpcssl results: begin (derived from the measured rows; do not edit in here) -->"
CLAIMS_END = "<!-- claims by hpcssl results: end -->"
PUBLISHED_BEGIN = "<!-- published by hpcssl results: begin (derived from hpcssl/published; do not edit in here) -->"
PUBLISHED_END = "<!-- published by hpcssl results: end -->"

_SEAL = re.compile(r"<!-- table sha256 ([0-9a-f]{64}) -->")


def update_page(
    path: Path | str, records: Sequence[Record] | None, *, with_published: bool = False, with_claims: bool = False
) -> None:
    """Bring a page up to date, atomically.

    Args:
        path: The page; it is created if it is absent.
        records: Records for the measured part; None to leave it unchanged.
        with_published: Add the published part if the page has none; one that is there is always updated.
        with_claims: The same of the claims, which follow from the measured rows.

    Raises:
        EvalError: The markers form no pair, or the measured table was edited by hand.
    """
    path = Path(path)
    text = path.read_text() if path.exists() else "# Results\n"
    if with_published or PUBLISHED_BEGIN in text:
        head, _, rest = _split_at_markers(path, text, PUBLISHED_BEGIN, PUBLISHED_END)
        text = head + format_published() + rest
    if records is not None:
        head, old, rest = _split_at_markers(path, text, BEGIN, END)
        text = head + format_measured(records, keep=_parse_rows(path, old)) + rest
    if with_claims or CLAIMS_BEGIN in text:
        rows = _parse_rows(path, _split_at_markers(path, text, BEGIN, END)[1])
        head, _, rest = _split_at_markers(path, text, CLAIMS_BEGIN, CLAIMS_END)
        text = head + format_claims(rows) + rest
    files.atomic_write(path, text)


def _split_at_markers(path: Path, text: str, begin: str, end: str) -> tuple[str, str, str]:
    """Return the text before, between and behind a pair of markers; without them, split at the end of the file."""
    if (text.count(begin), text.count(end)) not in ((0, 0), (1, 1)) or text.find(begin) > text.find(end):
        raise EvalError(
            f"{path}",
            got="markers that do not form one pair",
            expected="one begin before one end",
            fix="delete both marker lines and the text between them, then run the command again",
        )
    if begin not in text:
        return text.rstrip("\n") + "\n\n", "", "\n"
    head, rest = text.split(begin)
    inner, tail = rest.split(end)
    return head, inner, tail


def read_measured_rows(path: Path | str) -> list[dict[str, str]]:
    """Read the measured rows of a page.

    Returns:
        The cells of each row, by column.

    Raises:
        EvalError: The rows were edited by hand.
    """
    path = Path(path)
    return _parse_rows(path, _split_at_markers(path, path.read_text(), BEGIN, END)[1])


# -- measured -----------------------------------------------------------------------------------------------


def format_measured(records: Sequence[Record], keep: Sequence[dict[str, str]] = ()) -> str:
    """Format the measured table between its markers: rows that are kept, then those of the records.

    Args:
        records: The new records.
        keep: Rows of the page, as the cells by column. Rows of the same recipe and run as a record are dropped, and
            means over such a run.
    """
    head, lines = table_cells(records)
    new = [dict(zip(head, line, strict=True)) for line in lines]
    replaced = {(row["recipe"], run) for row in new for run in _run_names(row)}
    rows = [row for row in keep if not any((row.get("recipe"), run) in replaced for run in _run_names(row))] + new
    scores = columns.sort_columns(name for row in rows for name in row if name not in FIRST + LAST)
    rule = ["---"] * len(FIRST) + ["---:"] * len(scores) + ["---"] * len(LAST)
    titles = [*FIRST, *scores, *LAST]
    table = "\n".join(
        _markdown_row(line) for line in [titles, rule, *([row.get(c, "") for c in titles] for row in rows)]
    )
    return "\n".join(
        [BEGIN, "", "## Measured", "", table, "", *_footnotes(rows), "", f"<!-- table sha256 {_sha256(table)} -->", END]
    )


def _run_names(row: dict[str, str]) -> list[str]:
    return row.get("run", "").removeprefix("mean of ").split(", ")


def _footnotes(rows: Sequence[dict[str, str]]) -> list[str]:
    notes = [
        "Top-1 in percent unless a column says otherwise; changed: keys that differ from the packaged recipe; "
        "rank·h: wall-clock hours of training times processes (one GPU or CPU core each)."
    ]
    if any(row.get("one label") for row in rows):
        notes[0] += f" One label: {ONE_LABEL}."
    if any(" ± " in cell for row in rows for cell in row.values()):
        notes[0] += " ±: sample deviation over the seeds."
    recipes = dict.fromkeys(row["recipe"] for row in rows if any(_columns_with_published(row)))
    if recipes:
        notes += ["", "In brackets the published value of the recipe's row, under the paper's own protocol:", ""]
    for recipe in recipes:
        sources = dict.fromkeys(
            score["source"]
            for title, score in columns.published_scores(recipe).items()
            if any(
                columns.strip_protocol(column) == title
                for row in rows
                if row["recipe"] == recipe
                for column in _columns_with_published(row)
            )
        )
        notes.append(f"- {recipe}: {'; '.join(sources) or 'its own header'}")
    return notes + _differences(rows)


def _differences(rows: Sequence[dict[str, str]]) -> list[str]:
    """Return what differs from the originals of the packaged recipes among the rows."""
    from hpcssl.train import recipe as recipes

    packaged = [name for name in dict.fromkeys(row["recipe"] for row in rows) if name in recipes.names()]
    differs = {name: recipes.compose(name).about.differs for name in packaged}
    notes = [f"- {name}: {' '.join(sentences)}" for name, sentences in differs.items() if sentences]
    return ["", "What differs from the original of a recipe:", "", *notes] if notes else []


def _columns_with_published(row: dict[str, str]) -> list[str]:
    return [column for column, cell in row.items() if column not in FIRST + LAST and cell.endswith(")")]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _sha256(table: str) -> str:
    return hashlib.sha256(table.encode()).hexdigest()


def _parse_rows(path: Path, part: str) -> list[dict[str, str]]:
    """Return the rows of a measured part. Raises EvalError if its table was edited by hand."""
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    if not lines:
        return []
    seal = _SEAL.search(part)
    if seal is None or seal[1] != _sha256("\n".join(lines)):
        raise EvalError(
            f"{path}, measured part",
            got="a table that was edited by hand",
            expected="the rows that `hpcssl results` wrote",
            fix="restore the file from version control, or delete both marker lines with the text between them and "
            "name all run folders",
        )
    head, _, *rows = (
        [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines
    )
    return [dict(zip(head, row, strict=True)) for row in rows]


# -- claims -------------------------------------------------------------------------------------------------


def format_claims(rows: Sequence[dict[str, str]]) -> str:
    """Format the claims of the papers, as the measured rows of a page decide them, between the markers.

    Args:
        rows: Measured rows, as ``read_measured_rows`` returns them.
    """
    head, *lines = claims.claim_cells(claims.check_claims(claims.read_page_scores(rows)))
    ruler = ["---:" if title in claims.SCORES else "---" for title in head]
    table = [_markdown_row(line) for line in [head, ruler, *lines]]
    return "\n".join([CLAIMS_BEGIN, "", "## Claims", "", claims.EXPLANATION, "", *table, "", CLAIMS_END])


# -- published ----------------------------------------------------------------------------------------------


def format_published() -> str:
    """Format every published table, between the markers."""
    out = [
        PUBLISHED_BEGIN,
        "",
        "## Published",
        "",
        "Percent; `linear`, k-NN and `% labels` are top-1 unless they say otherwise. In brackets the difference "
        "that the paper prints. `recipe`: the packaged recipe that is to reach the row.",
        "",
    ]
    titles = published.read_titles()
    for document, title in titles.items():
        out += [f"### {title}", ""]
        for table in (t for t in published.read_tables() if t.document == document):
            out += [f"**{table.title}** ({table.source})", "", *_format_table(table), ""]
            out += [*(f"- {note}" for note in table.notes), ""] if table.notes else []
    return "\n".join([*out[:-1], "", PUBLISHED_END])


def _format_table(table: published.Table) -> list[str]:
    numeric = [column in published.TITLES for column in table.columns]
    head = [published.TITLES.get(column, column).removeprefix("transfer ") for column in table.columns]
    rows = [[row.get(column, "") for column in table.columns] for row in table.rows.values()]
    if table.columns[-1] == "recipe":
        rows = [[*row[:-1], row[-1] and f"`{row[-1]}`"] for row in rows]
    return [
        _markdown_row(line)
        for line in [
            head,
            ["---:" if right else "---" for right in numeric],
            *([cell.replace("*", "\\*") for cell in row] for row in rows),
        ]
    ]
