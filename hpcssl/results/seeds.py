"""Means and deviations of scores over runs that differ only in the seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from hpcssl.results.columns import Record


def average_over_seeds(records: Sequence[Record]) -> list[Record]:
    """Average the scores of runs that differ only in the seed.

    Records with the same recipe apart from the seed, the same step and the same data sets form a group. A group with
    scores of two or more seeds gives a record of their means and sample deviations.

    Args:
        records: Records of single runs, as ``collect_records`` describes them.

    Returns:
        The new records, in the order of their groups.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault((record["result_fingerprint"], record["step"], *record["sets"]), []).append(record)
    return [mean for group in groups.values() for mean in _means(group)]


def _means(group: list[Record]) -> list[Record]:
    scores: dict[tuple[str, str], dict[Any, float]] = {}  # (column, options) -> seed -> score
    for record in group:
        for column, score in record["metrics"].items():
            scores.setdefault((column, record["options"][column]), {}).setdefault(record["seed"], score)
    layers: list[dict[str, list[float]]] = []  # a column with scores under two sets of options needs two records
    for (column, _), by_seed in scores.items():
        if len(by_seed) > 1:
            layer = next((layer for layer in layers if column not in layer), None)
            if layer is None:
                layers.append(layer := {})
            layer[column] = list(by_seed.values())
    names = list(dict.fromkeys(record["run"] for record in group))
    shared: tuple[str, ...] = (
        "recipe",
        "encoder",
        "step",
        "method",
        "arch",
        "data",
        "epochs",
        "batch",
        "changed",
        "newest",
        "sets",
    )
    shared += ("differs", "result_fingerprint")
    return [
        {key: group[0][key] for key in shared}
        | {
            "published": {column: value for r in group for column, value in r["published"].items() if column in layer},
            "seed": f"{len({r['seed'] for r in group})} seeds",
            "run": "mean of " + ", ".join(names),
            "metrics": {column: statistics.fmean(values) for column, values in layer.items()},
            "deviation": {column: statistics.stdev(values) for column, values in layer.items()},
            "n": {column: len(values) for column, values in layer.items()},
        }
        for layer in layers
    ]
