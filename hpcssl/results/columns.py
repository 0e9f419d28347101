"""Names and order of the columns of the tables.

A known score has the name that the papers use (``20-NN``, ``linear``, ``SVM mAP``), by which its published value is
found. Any other is named EVALUATION[:PROTOCOL] METRIC, so that a new evaluation needs no entry here. A protocol is
named if it is not the default of the evaluation. Options that change what is measured follow it, as in
``linear:byol(epochs=2)``; such a score has no published value. A name without an ending means top-1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hpcssl import config, published
from hpcssl.evals.registry import EVALS

Record = dict[str, Any]
"""Values by the names of columns, and more; ``hpcssl.results.records.collect_records`` documents them."""

OWN_DATA = ("finetune", "svm", "lowshot", "transfer", "detect")
"""Evaluations with data sets of their own, which the column names; those of the others have a column of their own."""

_DEFAULT_PROTOCOLS = {
    "knn": "msf",
    "linear": "msf",
    "finetune": "bsim",
    "svm": "oss",
    "lowshot": "oss",
    "transfer": "logistic",
    "detect": "voc_c4",
}
_EVALUATION_TITLES = {"svm": "SVM", "lowshot": "SVM", "knn": ""}
_ON_VOC = ("svm", "lowshot", "detect")  # on VOC, unless the column names another data set
_METRIC_TITLES: dict[str, dict[str, str]] = {
    "knn": {r"knn(\d+)(_weighted)?(_top5)?": r"\1-NN\2\3"},
    "svm": {r"svm_map": "mAP"},
    "lowshot": {r"lowshot_k(\d+)(_std)?": r"\1-shot\2"},
    "transfer": {r"transfer_mean(\d+)": r"mean of \1"}
    | {
        key: title.removeprefix("transfer ")
        for key, title in published.TITLES.items()
        if title.startswith("transfer ") and not key.startswith("transfer")
    },
}
_UNNAMED_OPTIONS = (
    "protocol",
    "percent",
    "root",
    "sets",
    "k",
    "shots",
    "seed",
    "forward_batch",
    "precision",
    "feature_dtype",
    "view",
    "interpolation",
)
"""Options that are part of the name already, or that no published protocol fixes."""
_ORDER = tuple(
    re.compile(pattern)
    for pattern in (
        r"(knn\S* )?(\d+-NN|one label)",
        r"linear",
        r"finetune",
        r"SVM\S* mAP",
        r"SVM",
        r"transfer",
        r"detect",
    )
)
_FILES_ONLY = re.compile(r"(last|best) epoch$|(NN|weighted) top-5$| std$")
_ON_TRAINING_SET = re.compile(r"\d+-NN|linear( top-5)?$")


def scores_by_column(row: dict[str, Any]) -> dict[str, float]:
    """Return the scores of a result row by the names of their columns; values that are not numbers are left out."""
    evaluation, protocol = row["eval"], row["options"].get("protocol") or ""
    name = _EVALUATION_TITLES.get(evaluation, evaluation)
    if protocol and protocol != _DEFAULT_PROTOCOLS.get(evaluation):
        name = f"{name or evaluation}:{protocol}"
    name += _changed_options(row)
    return {
        " ".join(filter(None, (name, _label_share(row), _metric_title(evaluation, metric)))).replace(" ,", ",")
        + _data_suffix(row): value
        for metric, value in row["metrics"].items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _changed_options(row: dict[str, Any]) -> str:
    """Return the options that differ from the defaults, ``(epochs=2;lr=1.0)``; the metrics of k-NN name its options."""
    if row["eval"] not in EVALS or row["eval"] == "knn":
        return ""
    defaults = config.as_dict(EVALS[row["eval"]].options())
    changed = [
        f"{key}={value}"
        for key, value in sorted(row["options"].items())
        if key in defaults and key not in _UNNAMED_OPTIONS and value != defaults[key]
    ]
    return f"({';'.join(changed)})".replace(" ", "") if changed else ""


def _metric_title(evaluation: str, metric: str) -> str:
    for pattern, title in _METRIC_TITLES.get(evaluation, {}).items():
        metric = re.sub(f"^{pattern}$", title, metric)
    metric = re.sub(r"_(last|best)$", r" , \1 epoch", metric).replace("_", " ")
    metric = re.sub(r"^top1\b", "", metric)
    return re.sub(r"\btop(\d)", r"top-\1", metric).strip()


def _label_share(row: dict[str, Any]) -> str:
    """Return the share of the labels, ``1 %``, by the option, the details of the row or the name of the folder."""
    if row["eval"] != "finetune":
        return ""
    by_name = re.search(r"(?<!\d)(1|10)[-_ ]?(?:pct|percent)", row.get("train_name", ""))
    share = row["options"].get("percent") or row.get("details", {}).get("percent") or (by_name and by_name[1])
    return f"{share} %" if share else ""


def _data_suffix(row: dict[str, Any]) -> str:
    """Return `` on NAME`` for an evaluation on other data than that of the papers."""
    data = row.get("train_name", "")
    usual = "voc" in data.lower() if row["eval"] in _ON_VOC else row["eval"] != "finetune" or _label_share(row)
    return "" if usual or not data else f" on {data.partition('/')[0]}"


def strip_protocol(column: str) -> str:
    """Return a column without its protocol: the title of the published column of the same quantity."""
    return re.sub(r"^(\w+):[^\s,(]+(?![^\s,])", r"\1", column).removeprefix("knn ")


def published_scores(recipe: str, header: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Return the scores that a recipe is to reach.

    Args:
        recipe: Name of the recipe.
        header: Its section ``about``, whose scores count where the tables of the papers print none.

    Returns:
        ``value``, ``text`` and ``source`` of the score, by the title of the column.
    """
    printed = {
        published.TITLES[column]: {"value": score.value.number, "text": score.value.text, "source": str(score)}
        for column, score in published.find_scores(recipe).items()
    }
    header = header or {}
    in_header = {
        published.TITLES[key]: {"value": score, "text": str(score), "source": header.get("source", "")}
        for key, score in (header.get("published") or {}).items()
        if key in published.TITLES
    }
    return in_header | printed


def needs_training_set(title: str) -> bool:
    """Return whether a published score is only comparable on the labels of the set that the recipe trains on."""
    return _ON_TRAINING_SET.match(title) is not None


def sort_columns(columns: Iterable[str], *, wide: bool = True) -> list[str]:
    """Sort columns by evaluation, each once; those of one evaluation keep their order.

    Args:
        columns: Names of columns.
        wide: Include those that only files show.
    """

    def rank(column: str) -> int:
        return next((i for i, pattern in enumerate(_ORDER) if pattern.match(column)), len(_ORDER))

    return [name for name in sorted(dict.fromkeys(columns), key=rank) if wide or not _FILES_ONLY.search(name)]


def name_first_encoder(recipe: dict[str, Any]) -> str:
    """What the encoder of step 0 is: ``untrained``, or ``given`` for that of ``model.weights``."""
    return "given" if (recipe.get("model") or {}).get("weights") else "untrained"
