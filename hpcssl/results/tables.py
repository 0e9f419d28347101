"""Records as a table for a terminal or a pipe, as CSV and as JSON; the published scores as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from hpcssl import published
from hpcssl.results import columns
from hpcssl.results.columns import Record

FIRST = ("recipe", "encoder", "method", "arch", "data", "epochs", "batch", "changed")
_PROVENANCE = ("world", "rank·h", "weights", "commit")
_FILES_ONLY = ("effective",)
LAST = ("seed", "world", "rank·h", "run", "weights", "commit")


def table_cells(records: Sequence[Record], *, with_keys: bool = False) -> tuple[list[str], list[list[str]]]:
    """Format records for people: scores to one decimal, deviations, published values in brackets.

    Args:
        records: The records.
        with_keys: Also give each key in which runs of one recipe differ a column, instead of its place in ``changed``.

    Returns:
        The titles of the columns, and the cells of every record.
    """
    metrics = columns.sort_columns((name for r in records for name in r["metrics"]), wide=False)
    keys = list(dict.fromkeys(key for r in records for key in r["differs"])) if with_keys else []
    lines = [
        [
            *(_text(_changed_elsewhere(r, keys) if c == "changed" else r.get(c, "")) for c in FIRST),
            *(_text(r["differs"].get(key, "")) for key in keys),
            *(_score(r, name) for name in metrics),
            *(_text(r.get(c, "")) for c in LAST),
        ]
        for r in records
    ]
    return [*FIRST, *keys, *metrics, *LAST], lines


def _changed_elsewhere(record: Record, keys: Sequence[str]) -> list[str]:
    """What ``changed`` shows beside columns for keys."""
    return [text for text in record["changed"] if text.partition("=")[0] not in keys]


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _score(record: Record, name: str) -> str:
    """Format ``72.2 ± 0.1 [n 2] (72.4) *``.

    That is score, deviation, number of seeds if not all have it, published value, and a mark of the best in a ranking.
    """
    if name not in record["metrics"]:
        return ""
    text, n = f"{record['metrics'][name]:.1f}", record.get("n", {}).get(name)
    if n is not None:
        text += f" ± {record['deviation'][name]:.1f}" + (f" [n {n}]" if f"{n} seeds" != record["seed"] else "")
    published_score = record["published"].get(name)
    text += f" ({published_score['text']})" if published_score else ""
    return f"{text} *" if name in record.get("best", ()) else text


def to_tsv(records: Sequence[Record]) -> str:
    """Return one line per record, its columns separated by tabs."""
    head, lines = table_cells(records, with_keys=True)
    return "".join("\t".join(line) + "\n" for line in [head, *lines])


def draw_table(records: Sequence[Record], width: int | None = None) -> str:
    """Draw a table for a terminal, transposed if it is too wide otherwise.

    Columns that are empty or the same in every row, and those with the origin of a row, are left to files.

    Args:
        records: The records.
        width: Columns of the terminal; None to detect them.
    """
    from rich.console import Console
    from rich.table import Table

    # on a terminal the rows above a mean already show its runs
    head, lines = table_cells([r | {"run": "mean"} if "n" in r else r for r in records], with_keys=True)
    always = ("recipe", "encoder", "run", *head[len(FIRST) : -len(LAST)])
    kept = [
        i
        for i, name in enumerate(head)
        if any(line[i] for line in lines)
        and name not in _PROVENANCE
        and (name in always or len({line[i] for line in lines}) > 1)
    ]
    sheet: list[Sequence[str]] = [[line[i] for i in kept] for line in [head, *lines]]
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True)
    numbers = {i for i, at in enumerate(kept) if head[at] in always[3:]}
    transposed: list[Sequence[str]] = list(zip(*sheet, strict=True))
    if _width(sheet) > max(console.width, _width(transposed)):
        sheet, numbers = transposed, set(range(1, len(sheet)))
    table = Table(box=None, header_style="bold")
    for i, name in enumerate(sheet[0]):
        table.add_column(name, justify="right" if i in numbers else "left", overflow="fold")
    for line in sheet[1:]:
        table.add_row(*line)
    console.print(table)
    return out.getvalue()


def _width(sheet: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) + 2 for column in zip(*sheet, strict=True))


def to_csv(records: Sequence[Record]) -> str:
    """Return all columns as CSV in full precision, with columns for deviation, seeds and published value of scores."""
    sheet = []
    for r in records:
        line: dict[str, Any] = {c: _text(r.get(c, "")) for c in (*FIRST, "step")} | r["differs"]
        for name in columns.sort_columns(r["metrics"]):
            line[name] = r["metrics"][name]
            if "n" in r:
                line |= {f"{name} ±": r["deviation"][name], f"{name} n": r["n"][name]}
            if name in r["published"]:
                line[f"{name} published"] = r["published"][name]["value"]
        sheet.append(line | {c: _text(r.get(c, "")) for c in (*LAST, *_FILES_ONLY)})
    endings = ("", " ±", " n", " published")
    scores = [
        name + ending
        for name in columns.sort_columns(name for r in records for name in r["metrics"])
        for ending in endings
        if any(name + ending in line for line in sheet)
    ]
    keys = list(dict.fromkeys(key for r in records for key in r["differs"]))
    return _write_csv([*FIRST, "step", *keys, *scores, *LAST, *_FILES_ONLY], sheet)


def to_json(records: Sequence[Record]) -> str:
    """Return records as JSON."""
    return json.dumps(records, indent=2, ensure_ascii=False) + "\n"


def export_published(style: str) -> str:
    """Return the published scores, one record per printed value with its table and row.

    Args:
        style: ``csv`` or ``json``.
    """
    values = [
        {
            "document": table.document,
            "source": table.source,
            "row": row,
            "column": column,
            "value": value.number,
            "deviation": value.deviation,
            "difference": value.difference,
            "recipe": table.rows[row].get("recipe", ""),
        }
        for table in published.read_tables()
        for row in table.rows
        for column in table.columns
        if column in published.TITLES and (value := table.value(row, column)) is not None
    ]
    return to_json(values) if style == "json" else _write_csv(list(values[0]), values)


def _write_csv(head: list[str], lines: Iterable[dict[str, Any]]) -> str:
    out = io.StringIO()
    sheet = csv.DictWriter(out, head, restval="", lineterminator="\n")
    sheet.writeheader()
    sheet.writerows(lines)
    return out.getvalue()
