"""The claims of the papers (``hpcssl/published/claims.yaml``), as measured here: difference, deviation and seeds.

Scores come from records, in full precision, or from the measured rows of a page, with the decimals that it prints.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from hpcssl import config
from hpcssl.published.claims import Claim, read_claims
from hpcssl.results import columns, compare
from hpcssl.results.columns import Record
from hpcssl.results.records import describe_changes, result_keys

SCORES = ("1-NN", "20-NN", "one label", "linear")
"""The scores in which claims are compared; the papers state them for linear classification."""
MISSING = "not measured yet"
EXPLANATION = (
    "What the papers claim, and what the measured rows above say: the mean difference of the two settings in points of "
    "top-1, ± its sample deviation over the seeds that both have. `holds`: one-sided paired t-test, p < 0.05, not "
    "corrected for the number of comparisons. `does not hold here`: the mean difference is zero or negative. "
    "`undecided`: positive, but within the noise of the seeds, or with too few seeds to test. "
    f"`{MISSING}`: no seed of both. The papers state their differences for ImageNet and long trainings."
)

Setting = tuple[str, str]
"""A packaged recipe, and what is changed in it, as the column ``changed`` shows it."""
Scores = dict[tuple[Setting, str], dict[str, dict[int, float]]]
"""Score by setting and data set, column, and seed."""


@dataclass(frozen=True)
class CheckedClaim:
    """A claim and its comparisons.

    Attributes:
        claim: The claim.
        data: Name of the data set; empty if nothing was measured.
        comparisons: By score; scores that the settings do not share are absent.
    """

    claim: Claim
    data: str
    comparisons: dict[str, compare.Comparison]

    def to_json(self) -> dict[str, Any]:
        """Return the claim, where it is printed, and the comparisons."""
        table, printed = self.claim.printed()
        return {
            "claim": self.claim.claim,
            "first": self.claim.first,
            "second": self.claim.second,
            "source": f"{table.document} {table.source}",
            "printed_difference": None if printed is None else round(printed, 6),
            "note": self.claim.note,
            "data": self.data,
            "comparisons": [self.comparisons[name].to_json() for name in self.comparisons],
            "verdicts": {name: decide(one) for name, one in self.comparisons.items()},
        }


@cache
def resolve_setting(text: str) -> Setting:
    """Return the setting that a side of a claim names.

    Raises:
        ConfigError: There is no such recipe or key, or a value is not allowed.
    """
    from hpcssl.train import recipe as recipes

    name, *overrides = text.split()
    values = result_keys(config.as_dict(recipes.compose(name, overrides)))
    return name, " ".join(describe_changes(name, values))


def read_record_scores(records: Iterable[Record]) -> Scores:
    """Collect the scores of the newest encoders of runs. Of a seed that ran twice, the last run counts."""
    scores: Scores = {}
    for record in records:
        if record["newest"] and record["step"] > 0 and "n" not in record:
            setting = record["recipe"], " ".join(record["changed"])
            for column, value in record["metrics"].items():
                _add(scores, setting, record["data"], column, record["seed"], value)
    return scores


def read_page_scores(rows: Iterable[dict[str, str]]) -> Scores:
    """Collect the scores of trained encoders from the measured rows of a page; rows of means are left out."""
    scores: Scores = {}
    for row in rows:
        if row.get("encoder") == "trained" and row.get("seed", "").isdecimal():
            for column, cell in row.items():
                if columns.strip_protocol(column) in SCORES and cell:
                    value = float(cell.split()[0])
                    _add(scores, (row["recipe"], row["changed"]), row["data"], column, int(row["seed"]), value)
    return scores


def _add(scores: Scores, setting: Setting, data: str, column: str, seed: int, value: float) -> None:
    name = columns.strip_protocol(column)
    if name in SCORES:
        scores.setdefault((setting, data), {}).setdefault(column, {})[seed] = value


def check_claims(scores: Scores) -> list[CheckedClaim]:
    """Compare the two sides of every claim, on each data set that both were measured on."""
    checked = []
    for claim in read_claims():
        first, second = resolve_setting(claim.first), resolve_setting(claim.second)
        names = sorted({data for setting, data in scores if setting == first and (second, data) in scores})
        found = [
            CheckedClaim(claim, data, _compare(claim, scores[first, data], scores[second, data])) for data in names
        ]
        checked += [one for one in found if one.comparisons] or [CheckedClaim(claim, "", {})]
    return checked


def _compare(
    claim: Claim, ours: dict[str, dict[int, float]], theirs: dict[str, dict[int, float]]
) -> dict[str, compare.Comparison]:
    comparisons: dict[str, compare.Comparison] = {}
    for column in columns.sort_columns(ours):
        a, b = ours[column], theirs.get(column, {})
        seeds = sorted(a.keys() & b.keys())
        if seeds:
            comparisons.setdefault(
                columns.strip_protocol(column),
                compare.compare_scores(
                    column, (claim.first, claim.second), seeds, [a[s] for s in seeds], [b[s] for s in seeds]
                ),
            )
    return comparisons


def decide(comparison: compare.Comparison) -> str:
    """Return what a comparison says of the claim: ``holds``, ``does not hold here`` or ``undecided``."""
    if comparison.difference <= 0:
        return "does not hold here"
    return "holds" if comparison.p is not None and comparison.p < compare.CONFIDENT_P else "undecided"


def claim_cells(checked: Sequence[CheckedClaim]) -> list[list[str]]:
    """Return the table as cells: the titles, then a line for each claim."""
    lines = [["claim", "better", "than", "in the paper", *SCORES, "seeds", "data"]]
    for one in checked:
        claim, found = one.claim, one.comparisons
        place = f"{claim.source()} ({claim.note.rstrip('.')})" if claim.note else claim.source()
        counts = sorted({len(c.seeds) for c in found.values()})
        cells = [_cell(found[name]) if name in found else ("" if found else MISSING) for name in SCORES]
        line = [claim.claim, claim.first, claim.second, place, *cells, "–".join(map(str, counts)) or "0", one.data]
        lines.append(line)
    return lines


def _cell(comparison: compare.Comparison) -> str:
    spread = "" if comparison.deviation is None else f" ± {comparison.deviation:.1f}"
    return f"{comparison.difference:+.1f}{spread}, {decide(comparison)}"


def render_claims(scores: Scores, *, as_json: bool = False) -> str:
    """Return the claims as tab-separated lines, or as JSON."""
    checked = check_claims(scores)
    if as_json:
        return json.dumps([one.to_json() for one in checked], indent=2, ensure_ascii=False) + "\n"
    return "".join("\t".join(line) + "\n" for line in claim_cells(checked))
