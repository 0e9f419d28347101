"""Tables of scores beside the published values."""

from __future__ import annotations

from collections.abc import Sequence

from hpcssl.errors import EvalError
from hpcssl.evals.frozen.knn_options import ONE_LABEL
from hpcssl.report.facts import RunFacts
from hpcssl.report.markup import paragraph, section, table
from hpcssl.results import columns
from hpcssl.results.columns import Record
from hpcssl.results.records import collect_records, select_shown


def describe_scores(runs: Sequence[RunFacts]) -> str:
    """Write the scores of the first and last encoders of runs, and the published ones."""
    scored = [run for run in runs if any(run.run.evals.glob("*.jsonl"))]
    try:
        records = select_shown(collect_records([run.run.root for run in scored])) if scored else []
    except EvalError:  # files without a usable row
        records = []
    if not records:
        return section("Scores", paragraph("No evaluation has stored a score yet.", class_="dim"))
    names = columns.sort_columns((name for record in records for name in record["metrics"]), wide=False)
    body = _by_score(records, names) if len(runs) == 1 else _by_run(records, names)
    notes = [paragraph(f"one label: {ONE_LABEL}", class_="dim")] if "one label" in names else []
    sources = dict.fromkeys(
        f"{record['recipe']}: {score['source']}" for record in records for score in record["published"].values()
    )
    if sources:
        notes += [paragraph(f"Published values of {source}.", class_="dim") for source in sources]
    else:
        text = (
            "No published value: one is shown beside a finished run of an unchanged packaged recipe on a training set "
            "of the paper's size."
        )
        notes.append(paragraph(text, class_="dim"))
    return section("Scores", body, *notes)


def _by_score(records: Sequence[Record], names: Sequence[str]) -> str:
    """One run: a row per score, a column per encoder, then the published value and the difference."""
    rows = []
    for name in names:
        published = next((r["published"][name] for r in reversed(records) if name in r["published"]), None)
        measured = records[-1]["metrics"].get(name)
        ends = ["", ""]
        if published is not None and measured is not None:
            ends = [published["text"], f"{measured - published['value']:+.1f}"]
        rows.append([name, *(_score(record, name) for record in records), *ends])
    is_published = any(row[-1] for row in rows)
    head = ["score in %", *(record["encoder"] for record in records), "published", "difference"]
    kept = len(head) if is_published else -2
    return table(head[:kept], [row[:kept] for row in rows], "Scores of the first and the last encoder")


def _by_run(records: Sequence[Record], names: Sequence[str]) -> str:
    """Several runs: a row per encoder or mean over seeds, a column per score."""
    rows = [
        [record["run"], record["encoder"], str(record["seed"]), *(_score(record, n, published=True) for n in names)]
        for record in records
    ]
    return table(["run", "encoder", "seed", *names], rows, "Scores in %, with the published value in brackets")


def _score(record: Record, name: str, *, published: bool = False) -> str:
    if name not in record["metrics"]:
        return ""
    text = f"{record['metrics'][name]:.1f}"
    if name in record.get("deviation", {}):
        text += f" ± {record['deviation'][name]:.1f}"
    return text + (f" ({record['published'][name]['text']})" if published and name in record["published"] else "")
