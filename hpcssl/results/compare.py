"""Comparison of settings: the keys in which runs differ, a ranking by one score, and tests of claims over seeds.

A *setting* is what runs that differ only in the seed share.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpcssl.errors import ConfigError, EvalError, suggest
from hpcssl.results import columns
from hpcssl.results.columns import Record

CONFIDENT_P = 0.05
"""Probability below which a claim counts as supported, as is usual."""


def find_differing_keys(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return the dotted keys whose values differ between runs of the same recipe, sorted.

    Between two recipes almost every key may differ, and the name of the recipe says it.

    Args:
        runs: Name of the recipe and flat values of each run.
    """
    first: dict[str, Mapping[str, Any]] = {}
    differing: set[str] = set()
    for name, values in runs:
        other = first.setdefault(name, values)
        differing |= {key for key in {*values, *other} if values.get(key) != other.get(key)}
    return sorted(differing)


# -- ranking ------------------------------------------------------------------------------------------------


def rank_settings(records: Sequence[Record], column: str) -> list[Record]:
    """Return one record per setting, the best first: the mean over its seeds, or its only run.

    The newest encoders are ranked. Each record gets ``best``: the columns in which its score is within the deviation of
    the best one on the same data, or is the best one. Settings without a score in the column come last.

    Args:
        records: The records, as ``collect_records`` returns them.
        column: Name of a column of scores.

    Raises:
        ConfigError: No record has such a score.
    """
    newest = [record for record in records if record["newest"] and record["step"] > 0]
    known = list(dict.fromkeys(name for record in newest for name in record["metrics"]))
    if column not in known:
        raise ConfigError(
            "option --sort",
            got=repr(column),
            expected="a column of scores",
            fix=suggest(column, known) if known else "evaluate a trained encoder: `hpcssl eval knn --run RUN`",
        )
    averaged = {_setting(record) for record in newest if "n" in record}
    chosen = [record for record in newest if "n" in record or _setting(record) not in averaged]
    chosen.sort(key=lambda record: -record["metrics"].get(column, -math.inf))
    bounds: dict[tuple[str, str], float] = {}
    for record in sorted(chosen, key=lambda record: -len(record["metrics"])):
        for name in record["metrics"]:
            key = (record["data"], name)
            if key not in bounds:
                rivals = [r for r in chosen if r["data"] == record["data"] and name in r["metrics"]]
                best = max(rivals, key=lambda r: r["metrics"][name])
                bounds[key] = best["metrics"][name] - best.get("deviation", {}).get(name, 0.0)
    return [
        record | {"best": [name for name, value in record["metrics"].items() if value >= bounds[record["data"], name]]}
        for record in chosen
    ]


def _setting(record: Record) -> tuple[Any, ...]:
    return (record["result_fingerprint"], record["step"], *record["sets"])


# -- claims -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One score of two settings.

    Attributes:
        column: Name of the score.
        first: What the claim names first.
        second: What it names second.
        first_mean: Mean score of the first, over the shared seeds.
        second_mean: That of the second.
        difference: ``first_mean - second_mean``.
        deviation: Sample deviation of the differences of single seeds; None with one seed.
        seeds: The seeds that both have.
        p: Probability of a difference as large if there were none: one-sided paired t-test over the seeds (Student
            1908). None if it cannot be computed: with one seed, or if the difference is the same for every seed.
        verdict: What follows, in words.
    """

    column: str
    first: str
    second: str
    first_mean: float
    second_mean: float
    difference: float
    deviation: float | None
    seeds: list[int]
    p: float | None
    verdict: str

    def line(self) -> str:
        """Return the comparison in one line."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.2f}"
        p = "" if self.p is None else f", p = {self.p:.2g}"
        return (
            f"{self.column}: {self.first} {self.first_mean:.2f}, {self.second} {self.second_mean:.2f}, "
            f"difference {self.difference:+.2f}{spread} over {len(self.seeds)} seeds{p}: {self.verdict}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return its attributes."""
        return asdict(self)


def check_claim(records: Sequence[Record], claim: str) -> list[Comparison]:
    """Compare two settings in every column that both have.

    Args:
        records: The records, as ``collect_records`` returns them.
        claim: ``A > B`` or ``A < B``. A and B are names of recipes or methods, parts of names of recipes, values such
            as ``optim.lr=0.1`` or ``lr=0.1``, or several of these, separated by spaces.

    Raises:
        ConfigError: The claim is malformed, or a side names no setting or several.
        EvalError: The two settings have no score of the same seed, data and options.
    """
    match = re.fullmatch(r"\s*([^<>]*[^<>\s])\s*([<>])\s*([^<>]*[^<>\s])\s*", claim)
    if match is None:
        raise ConfigError(
            "option --claim", got=repr(claim), expected="two settings with > or < between", fix='write "msf > simclr"'
        )
    names = (match[1], match[3]) if match[2] == ">" else (match[3], match[1])
    runs = [record for record in records if record["newest"] and record["step"] > 0 and "n" not in record]
    first, second = (_find_setting(runs, name) for name in names)
    comparisons = []
    for column in columns.sort_columns(name for record in first for name in record["metrics"]):
        ours, theirs = _scores_by_seed(first, column), _scores_by_seed(second, column)
        options = {key[1:] for key in ours} & {key[1:] for key in theirs}
        for key in sorted(options):
            a, b = ({k[0]: v for k, v in side.items() if k[1:] == key} for side in (ours, theirs))
            seeds = sorted(a.keys() & b.keys())
            if seeds:
                comparisons.append(compare_scores(column, names, seeds, [a[s] for s in seeds], [b[s] for s in seeds]))
    if not comparisons:
        raise EvalError(
            f"claim {claim!r}",
            got="no score that both sides have of the same seed, data and options",
            expected="runs with the same seeds, and the same evaluations",
            fix="run the missing seeds and evaluations",
        )
    return comparisons


def _find_setting(runs: Sequence[Record], text: str) -> list[Record]:
    """The runs of the one setting that a text names."""
    chosen = list(runs)
    for word in re.split(r"[\s,]+", text.strip()):
        chosen = _select(chosen, word)
    settings = {record["result_fingerprint"]: describe_setting(record) for record in chosen}
    if len(settings) != 1:
        known = sorted({describe_setting(record) for record in runs})
        got = f"{text!r}, which names {' and '.join(sorted(settings.values())) or 'no setting'}"
        fix = f"name one of: {'; '.join(known)}"
        raise ConfigError("option --claim", got=got, expected="one setting on each side", fix=fix)
    return chosen


def describe_setting(record: Record) -> str:
    """Return the recipe and the values in which the record differs from the other runs: ``digits_msf lr=0.1``."""
    values = [f"{key}={value}" for key, value in record["differs"].items()]
    return " ".join([record["recipe"], *values])


def _select(runs: Sequence[Record], word: str) -> list[Record]:
    key, sign, value = word.partition("=")
    if sign:
        return [
            record
            for record in runs
            if any(f".{name}".endswith(f".{key}") and _is_value(value, own) for name, own in record["differs"].items())
        ]
    by_rule = (
        [record for record in runs if record["recipe"] == word],
        [record for record in runs if record["method"] == word],
        [record for record in runs if word in record["recipe"]],
    )
    return next((chosen for chosen in by_rule if chosen), [])


def _is_value(text: str, value: object) -> bool:
    if value is None or isinstance(value, bool):  # written as in recipes, or as the tables print them
        return text.lower() in ({"null", "none"} if value is None else {str(value).lower()})
    try:
        return float(text) == float(str(value))
    except ValueError:
        return text == str(value)


def _scores_by_seed(runs: Iterable[Record], column: str) -> dict[tuple[Any, ...], float]:
    """Scores by seed, options of the evaluation and data sets. Of a seed that ran twice, the first run counts."""
    scores: dict[tuple[Any, ...], float] = {}
    for record in runs:
        if column in record["metrics"]:
            key = (record["seed"], record["options"][column], *record["sets"])
            scores.setdefault(key, record["metrics"][column])
    return scores


def compare_scores(
    column: str, names: tuple[str, str], seeds: list[int], ours: list[float], theirs: list[float]
) -> Comparison:
    """Compare the scores of two settings over the seeds that both have.

    Args:
        column: Name of the score.
        names: What the two settings are called.
        seeds: The shared seeds.
        ours: Scores of the first setting, in percent, in the order of the seeds.
        theirs: Scores of the second one.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    difference = statistics.fmean(differences)
    deviation = statistics.stdev(differences) if len(seeds) > 1 else None
    p = None
    if deviation is not None and deviation > 1e-9 * max(1.0, abs(difference)):
        from scipy import stats

        p = float(stats.ttest_rel(ours, theirs, alternative="greater").pvalue)
    if len(seeds) == 1:
        verdict = "one seed has no test"
    elif p is None:
        verdict = "the same difference for every seed, which has no test" if difference else "no difference"
    else:
        verdict = "supported" if p < CONFIDENT_P else "not supported"
    means = statistics.fmean(ours), statistics.fmean(theirs)
    return Comparison(column, *names, *means, difference, deviation, seeds, p, verdict)
