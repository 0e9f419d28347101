"""What the columns of the tables are called, and in which order they stand.

A known score has the papers' name (``20-NN``, ``linear``, ``SVM mAP``), by which it finds its published value; any
other is called EVALUATION[:PROTOCOL] METRIC, so that a new evaluation shows without a word here. A protocol is named
where it is not the evaluation's usual one, and options that change what is measured behind it, as in
``linear:byol(epochs=2)``: such a score has no published value. Top-1 is what a name without an ending means.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hpcssl import config, published
from hpcssl.evals.run import EVALS

OWN_DATA = ("finetune", "svm", "lowshot", "transfer", "detect")
"""Evaluations with data sets of their own, which the column tells; those of the others stand beside the encoder."""

_USUAL = {"knn": "msf", "linear": "msf", "finetune": "bsim", "svm": "oss", "lowshot": "oss", "transfer": "logistic",
          "detect": "voc_c4"}
_BASE = {"svm": "SVM", "lowshot": "SVM", "knn": ""}
_HOME = ("svm", "lowshot", "detect")  # on VOC, unless a column says otherwise
_METRICS = {
    "knn": {r"knn(\d+)(_weighted)?(_top5)?": r"\1-NN\2\3"},
    "svm": {r"svm_map": "mAP"},
    "lowshot": {r"lowshot_k(\d+)(_std)?": r"\1-shot\2"},
    "transfer": {r"transfer_mean(\d+)": r"mean of \1"}
    | {key: title.removeprefix("transfer ") for key, title in published.TITLES.items()
       if title.startswith("transfer ") and not key.startswith("transfer")},
}
_FREE = ("protocol", "percent", "root", "sets", "k", "seed", "batch", "precision", "store", "view", "interpolation")
"""Options that the name says anyhow, or that no published protocol fixes."""
_ORDER = tuple(re.compile(pattern) for pattern in (
    r"(knn\S* )?(\d+-NN|one label)", r"linear", r"finetune", r"SVM\S* mAP", r"SVM", r"transfer", r"detect"))
_WIDE = re.compile(r"(last|best) epoch$|(NN|weighted) top-5$| std$")
_OF_TRAINING_SET = re.compile(r"\d+-NN|linear( top-5)?$")


def of_row(row: dict) -> dict[str, float]:
    """The scores of an evaluation's row under the names of their columns; what is no number is left out."""
    evaluation, protocol = row["eval"], row["options"].get("protocol") or ""
    name = _BASE.get(evaluation, evaluation)
    if protocol and protocol != _USUAL.get(evaluation):
        name = f"{name or evaluation}:{protocol}"
    name += _changed(row)
    return {" ".join(filter(None, (name, _share(row), _metric(evaluation, metric)))).replace(" ,", ",")
            + _elsewhere(row): value for metric, value in row["metrics"].items()
            if isinstance(value, int | float) and not isinstance(value, bool)}


def _changed(row: dict) -> str:
    """The options that are not the evaluation's usual ones, ``(epochs=2;lr=1.0)``; a k-NN's stand in its metrics."""
    if row["eval"] not in EVALS or row["eval"] == "knn":
        return ""
    usual = config.as_dict(EVALS[row["eval"]].options())
    odd = [f"{key}={value}" for key, value in sorted(row["options"].items())
           if key in usual and key not in _FREE and value != usual[key]]
    return f"({';'.join(odd)})".replace(" ", "") if odd else ""


def _metric(evaluation: str, metric: str) -> str:
    for pattern, words in _METRICS.get(evaluation, {}).items():
        metric = re.sub(f"^{pattern}$", words, metric)
    metric = re.sub(r"_(last|best)$", r" , \1 epoch", metric).replace("_", " ")
    metric = re.sub(r"^top1\b", "", metric)
    return re.sub(r"\btop(\d)", r"top-\1", metric).strip()


def _share(row: dict) -> str:
    """Of the labels, where the evaluation is on one: its option, its row's details or its folder's name say it."""
    if row["eval"] != "finetune":
        return ""
    named = re.search(r"(?<!\d)(1|10)[-_ ]?(?:pct|percent)", row.get("train_name", ""))
    share = row["options"].get("percent") or row.get("details", {}).get("percent") or (named and named[1])
    return f"{share} %" if share else ""


def _elsewhere(row: dict) -> str:
    """`` on NAME`` of an evaluation on other data than the papers'."""
    data = row.get("train_name", "")
    at_home = "voc" in data.lower() if row["eval"] in _HOME else row["eval"] != "finetune" or _share(row)
    return "" if at_home or not data else f" on {data.partition('/')[0]}"


def quantity(column: str) -> str:
    """The column without its protocol: what a published column of that title is the same quantity as."""
    return re.sub(r"^(\w+):[^\s,(]+(?![^\s,])", r"\1", column).removeprefix("knn ")


def anchors(recipe: str, header: dict | None = None) -> dict[str, dict]:
    """Title of a column -> ``value``, ``text`` and ``source`` of the score that a recipe is to reach: what the tables
    print, and what its header (``about``) says where they print none."""
    found = {published.TITLES[column]: {"value": anchor.value.number, "text": anchor.value.text, "source": str(anchor)}
             for column, anchor in published.of_recipe(recipe).items()}
    header = header or {}
    said = {published.TITLES[key]: {"value": score, "text": str(score), "source": header.get("source", "")}
            for key, score in (header.get("published") or {}).items() if key in published.TITLES}
    return said | found


def of_training_set(title: str) -> bool:
    """Whether a published score is of the labels that the recipe trains on, and so means nothing on others."""
    return _OF_TRAINING_SET.match(title) is not None


def in_order(columns: Iterable[str], *, wide: bool = True) -> list[str]:
    """Each once, by evaluation; within one, as they were first met. ``wide``: also those that only files show."""
    def place(column: str) -> int:
        return next((i for i, pattern in enumerate(_ORDER) if pattern.match(column)), len(_ORDER))

    return [name for name in sorted(dict.fromkeys(columns), key=place) if wide or not _WIDE.search(name)]
