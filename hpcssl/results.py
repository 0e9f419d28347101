"""From run folders to tables: RESULTS.md, the terminal, CSV and JSON. Every number is read, none is typed in.

A *record* is one encoder of one run (the weights of one step, or the untrained ones of step 0) with everything that
was measured of it on one pair of data sets. Runs that differ in nothing but the seed give one more record, of means
and deviations.
"""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from hpcssl import config, files
from hpcssl.errors import EvalError
from hpcssl.files import RunDir

BEGIN = "<!-- measured by hpcssl results: begin (derived from run folders; edits in here are overwritten) -->"
END = "<!-- measured by hpcssl results: end -->"

_FIRST = ("recipe", "encoder", "method", "arch", "epochs", "batch")
_LAST = ("published", "seed", "world", "rank·h", "run", "weights", "commit")
_WIDE = ("last epoch", "NN top-5", "weighted top-5")  # endings of columns that only CSV and JSON show


def collect(runs: Sequence[Path | str]) -> list[dict]:
    """Records of the runs in the order given, untrained first, then by step; then the means over seeds.

    A record holds plain values under the columns' names, ``step``, and ``metrics`` (column -> percent).
    Raises ``EvalError`` for a path that is no run folder, or one without results.
    """
    records = [record for path in runs for record in _of_run(RunDir(path))]
    return records + _over_seeds(records)


def show(runs: Sequence[Path | str], *, write: Path | str | None = None, style: str = "table",
         terminal: bool = False, width: int | None = None) -> str:
    """What ``hpcssl results`` prints: ``style`` table, csv or json; a table is drawn for a terminal, else
    tab-separated and uncut. ``write``: the Markdown file to bring up to date as well."""
    records = collect(runs)
    if write is not None:
        write_markdown(write, records)
    if style == "json":
        return json.dumps(records, indent=2, ensure_ascii=False) + "\n"
    if style == "csv":
        return as_csv(records)
    return _drawn(records, width) if terminal else _plain(records)


# -- reading ------------------------------------------------------------------------------------------------


def _of_run(run: RunDir) -> list[dict]:
    what = f"run folder {run.root}"
    if not run.root.is_dir():
        raise EvalError(what, got="no such folder", expected="the folder of a run",
                        mend="check the path: it is what --run named")
    if not run.config.exists():
        raise EvalError(what, got="no config.yaml in it", expected="the folder of a run",
                        mend="name the run folders themselves, such as runs/demo")
    rows = [row for path in sorted(run.evals.glob("*.jsonl")) for row in files.read_lines(path)]
    if not rows:
        raise EvalError(what, got="no results yet", expected="rows in " + run.eval_rows("NAME").name,
                        mend=f"`hpcssl eval knn --run {run.root}` writes some")
    recipe = config.read_yaml(run.config)
    records: list[dict] = []
    seen = set()
    for row in sorted(rows, key=lambda row: (row["step"], row["time"])):
        if row["identity"] in seen:  # two jobs measured the same at the same time
            continue
        seen.add(row["identity"])
        _place(records, _about(run, recipe, row), _columns(row))
    return records


def _place(records: list[dict], about: dict, metrics: dict[str, float]) -> None:
    """Into the record of the same encoder and data, unless other options have already given it such a column."""
    for record in records:
        same = all(record[key] == about[key] for key in ("weights", "step", "data"))
        if same and not metrics.keys() & record["metrics"].keys():
            record["metrics"] |= metrics
            return
    records.append(about | {"metrics": metrics})


def _about(run: RunDir, recipe: dict, row: dict) -> dict:
    done = json.loads(run.done.read_text())["step"] if run.done.exists() else None
    science = {k: v for k, v in recipe.items() if k not in ("name", "about", "seed", "machine", "evals")}
    schedule, published = recipe.get("schedule") or {}, (recipe.get("about") or {}).get("published") or {}
    step = row["step"]
    trained = "trained" if step == done else f"step {step}"
    length = schedule.get("epochs") or (f"{schedule['steps']} steps" if schedule.get("steps") else "")
    world, hours = _cost(run)
    return {"recipe": recipe.get("name", ""), "encoder": "untrained" if step == 0 else trained, "step": step,
            "method": row["method"], "arch": row["arch"], "epochs": 0 if step == 0 else length,
            "batch": (recipe.get("optim") or {}).get("batch", ""), "seed": recipe.get("seed", 0),
            "published": ", ".join(f"{k} {v}" for k, v in published.items()) if step == done else "",
            "world": world, "rank·h": 0.0 if step == 0 else hours, "run": run.root.name,
            "weights": row["weights_sha256"][:12], "commit": row["commit"], "time": row["time"],
            "fingerprint": row["fingerprint"], "data": [row["train"], row["val"]],
            "science": config.fingerprint(science)}


def _columns(row: dict) -> dict[str, float]:
    """The row's metrics under the names of table columns: top-1 is what a column without a suffix means."""
    protocol = row["options"].get("protocol", "msf")
    name = row["eval"] if protocol == "msf" else f"{row['eval']} {protocol}"
    return {_column(name, metric): value for metric, value in row["metrics"].items()}


def _column(name: str, metric: str) -> str:
    neighbours = re.fullmatch(r"knn(\d+)(_weighted)?(_top5)?", metric)
    if neighbours:
        k, weighted, top5 = neighbours.groups()
        return f"{k}-NN" + (" weighted" if weighted else "") + (" top-5" if top5 else "")
    top = re.fullmatch(r"top(\d)(_last)?", metric)
    if top:
        return name + ("" if top[1] == "1" else f" top-{top[1]}") + (", last epoch" if top[2] else "")
    return metric.replace("_", " ")


def _cost(run: RunDir) -> tuple[int | str, float | str]:
    """Ranks of the last attempt, and hours times ranks over all attempts that wrote down their end."""
    world, hours, begun = "", 0.0, {}
    for line in files.read_lines(run.attempts):
        if line.get("event") == "start":
            begun[line["attempt"]] = line
            world = line.get("world", world)
        elif line.get("event") == "end" and line["attempt"] in begun:
            start = begun.pop(line["attempt"])
            hours += (_seconds(line["time"]) - _seconds(start["time"])) / 3600 * start.get("world", 1)
    # an attempt that was killed wrote no end: the cost is at least the rest
    return world, f"≥ {hours:.3g}" if begun else float(f"{hours:.3g}")


def _seconds(time: float | str) -> float:
    return datetime.fromisoformat(time).timestamp() if isinstance(time, str) else float(time)


def _over_seeds(records: list[dict]) -> list[dict]:
    """Mean and sample deviation of records that differ in the seed alone, two or more seeds."""
    groups: dict[tuple, dict] = {}
    for record in records:
        key = (record["science"], record["step"], *record["data"], *sorted(record["metrics"]))
        groups.setdefault(key, {})[record["seed"]] = record
    found = []
    for group in groups.values():
        if len(group) < 2:
            continue
        first = next(iter(group.values()))
        values = {name: [record["metrics"][name] for record in group.values()] for name in first["metrics"]}
        found.append({key: first[key] for key in ("recipe", "encoder", "step", "method", "arch", "epochs", "batch",
                                                   "published", "science", "data")} | {
            "seed": f"{len(group)} seeds", "run": f"mean of {len(group)} runs",
            "metrics": {name: statistics.fmean(v) for name, v in values.items()},
            "deviation": {name: statistics.stdev(v) for name, v in values.items()}})
    return found


# -- writing ------------------------------------------------------------------------------------------------


def as_csv(records: Sequence[dict]) -> str:
    """All columns, full precision; the deviation of a mean stands in a column of its own."""
    metrics = _metric_columns(records, wide=True)
    spread = [name for name in metrics if any(name in r.get("deviation", {}) for r in records)]
    out = io.StringIO()
    sheet = csv.writer(out, lineterminator="\n")
    sheet.writerow([*_FIRST, "step", *metrics, *(f"{name} ±" for name in spread), *_LAST])
    for r in records:
        sheet.writerow([*(r.get(c, "") for c in (*_FIRST, "step")), *(r["metrics"].get(m, "") for m in metrics),
                        *(r.get("deviation", {}).get(m, "") for m in spread), *(r.get(c, "") for c in _LAST)])
    return out.getvalue()


def markdown(records: Sequence[dict]) -> str:
    """The measured part: a table between its two markers."""
    header, lines = _table(records)
    metrics = len(header) - len(_FIRST) - len(_LAST)
    rule = ["---"] * len(_FIRST) + ["---:"] * metrics + ["---"] * len(_LAST)
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in [header, rule, *lines]]
    note = ("Top-1 in percent unless a column says otherwise; rank·h: wall-clock hours of training times processes "
            "(one GPU or CPU core each).")
    return "\n".join([BEGIN, "", "## Measured", "", *rows, "", note, "", END])


def write_markdown(path: Path | str, records: Sequence[dict]) -> None:
    """Replace what stands between the markers of ``path``; all around it stays. Atomic.

    A file without markers gets the part at its end. Raises ``EvalError`` where one marker stands without the other.
    """
    path = Path(path)
    before = path.read_text() if path.exists() else "# Results\n"
    if (before.count(BEGIN), before.count(END)) not in ((0, 0), (1, 1)) or before.find(BEGIN) > before.find(END):
        raise EvalError(f"{path}", got="markers that do not form one pair", expected="one begin before one end",
                        mend="delete both marker lines and what stands between them, then run the command again")
    if BEGIN in before:
        head, rest = before.split(BEGIN)
        text = head + markdown(records) + rest.split(END)[1]
    else:
        text = before.rstrip("\n") + "\n\n" + markdown(records) + "\n"
    files.atomic_write(path, text)


def _table(records: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    metrics = _metric_columns(records, wide=False)
    lines = []
    for r in records:
        spread = r.get("deviation", {})
        values = ["" if m not in r["metrics"] else f"{r['metrics'][m]:.1f}"
                  + (f" ± {spread[m]:.1f}" if m in spread else "") for m in metrics]
        lines.append([*(str(r.get(c, "")) for c in _FIRST), *values, *(str(r.get(c, "")) for c in _LAST)])
    return [*_FIRST, *metrics, *_LAST], lines


def _metric_columns(records: Sequence[dict], *, wide: bool) -> list[str]:
    """Columns that some record has, in the order in which they were first met."""
    found = dict.fromkeys(name for r in records for name in r["metrics"])
    return [name for name in found if wide or not name.endswith(_WIDE)]


def _plain(records: Sequence[dict]) -> str:
    header, lines = _table(records)
    return "".join("\t".join(line) + "\n" for line in [header, *lines])


def _drawn(records: Sequence[dict], width: int | None) -> str:
    from rich.console import Console
    from rich.table import Table

    header, lines = _table(records)
    # a column that says the same of every row, or nothing, is left to the files
    kept = [i for i, name in enumerate(header) if any(line[i] for line in lines)
            and (len(lines) == 1 or name in ("recipe", "encoder", "run") or i >= len(_FIRST)
                 or len({line[i] for line in lines}) > 1)]
    table = Table(box=None, header_style="bold")
    for i in kept:
        right = len(_FIRST) <= i < len(header) - len(_LAST)
        table.add_column(header[i], justify="right" if right else "left", overflow="fold")
    for line in lines:
        table.add_row(*(line[i] for i in kept))
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True).print(table)
    return out.getvalue()
