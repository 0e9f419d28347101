"""Records as a table for the terminal or a pipe, as CSV and as JSON; the published tables likewise."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence

from hpcssl import published
from hpcssl.results import columns

FIRST = ("recipe", "encoder", "method", "arch", "data", "epochs", "batch", "changed")
_PROVENANCE = ("world", "rank·h", "weights", "commit")
LAST = ("seed", "world", "rank·h", "run", "weights", "commit")


def cells(records: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of what people read: scores to one decimal, deviations, published values in brackets."""
    metrics = columns.in_order((name for r in records for name in r["metrics"]), wide=False)
    lines = [[*(_text(r.get(c, "")) for c in FIRST), *(_score(r, name) for name in metrics),
              *(_text(r.get(c, "")) for c in LAST)] for r in records]
    return [*FIRST, *metrics, *LAST], lines


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _score(record: dict, name: str) -> str:
    """``72.2 ± 0.1 (72.4)``: measured, deviation over seeds, published; ``n`` where not all seeds have it."""
    if name not in record["metrics"]:
        return ""
    text, n = f"{record['metrics'][name]:.1f}", record.get("n", {}).get(name)
    if n is not None:
        text += f" ± {record['deviation'][name]:.1f}" + (f" [n {n}]" if f"{n} seeds" != record["seed"] else "")
    anchor = record["published"].get(name)
    return text + (f" ({anchor['text']})" if anchor else "")


def as_plain(records: Sequence[dict]) -> str:
    """One line per record, uncut, separated by tabs."""
    head, lines = cells(records)
    return "".join("\t".join(line) + "\n" for line in [head, *lines])


def as_drawn(records: Sequence[dict], width: int | None = None) -> str:
    """A table for a terminal ``width`` columns wide (None: as wide as it is), upright or on its side as it fits.

    What is the same of every row, or says nothing, and where a row comes from are left to the files.
    """
    from rich.console import Console
    from rich.table import Table

    # which runs a mean is of stands above it, in a terminal
    head, lines = cells([r | {"run": "mean"} if "n" in r else r for r in records])
    always = ("recipe", "encoder", "run", *head[len(FIRST):-len(LAST)])
    kept = [i for i, name in enumerate(head) if any(line[i] for line in lines) and name not in _PROVENANCE
            and (name in always or len({line[i] for line in lines}) > 1)]
    sheet = [[line[i] for i in kept] for line in [head, *lines]]
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True)
    numbers = {i for i, at in enumerate(kept) if head[at] in always[3:]}
    turned = list(zip(*sheet, strict=True))
    if _width(sheet) > max(console.width, _width(turned)):
        sheet, numbers = turned, set(range(1, len(sheet)))
    table = Table(box=None, header_style="bold")
    for i, name in enumerate(sheet[0]):
        table.add_column(name, justify="right" if i in numbers else "left", overflow="fold")
    for line in sheet[1:]:
        table.add_row(*line)
    console.print(table)
    return out.getvalue()


def _width(sheet: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) + 2 for column in zip(*sheet, strict=True))


def as_csv(records: Sequence[dict]) -> str:
    """All columns, full precision; deviation, seeds and published value of a score stand in columns of their own."""
    sheet = []
    for r in records:
        line = {c: _text(r.get(c, "")) for c in (*FIRST, "step")}
        for name in columns.in_order(r["metrics"]):
            line[name] = r["metrics"][name]
            if "n" in r:
                line |= {f"{name} ±": r["deviation"][name], f"{name} n": r["n"][name]}
            if name in r["published"]:
                line[f"{name} published"] = r["published"][name]["value"]
        sheet.append(line | {c: _text(r.get(c, "")) for c in LAST})
    beside = ("", " ±", " n", " published")
    scores = [name + ending for name in columns.in_order(name for r in records for name in r["metrics"])
              for ending in beside if any(name + ending in line for line in sheet)]
    return _sheet([*FIRST, "step", *scores, *LAST], sheet)


def as_json(records: Sequence[dict]) -> str:
    return json.dumps(records, indent=2, ensure_ascii=False) + "\n"


def published_as(style: str) -> str:
    """The published scores as ``csv`` or ``json``: one record per printed value, with its table and row."""
    values = [{"document": table.document, "source": table.source, "row": row, "column": column, "value": value.number,
               "deviation": value.deviation, "difference": value.difference,
               "recipe": table.rows[row].get("recipe", "")}
              for table in published.tables() for row in table.rows for column in table.columns
              if column in published.TITLES and (value := table.value(row, column)) is not None]
    return as_json(values) if style == "json" else _sheet(list(values[0]), values)


def _sheet(head: list[str], lines: Iterable[dict]) -> str:
    out = io.StringIO()
    sheet = csv.DictWriter(out, head, restval="", lineterminator="\n")
    sheet.writeheader()
    sheet.writerows(lines)
    return out.getvalue()
