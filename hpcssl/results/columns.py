"""What the columns of the tables are called, and in which order they stand.

A known score has the papers' name (``20-NN``, ``linear``, ``SVM mAP``), by which it finds its published value; any
other is called EVALUATION[:PROTOCOL] METRIC, so that a new evaluation shows without a word here. Top-1 is what a name
without an ending means.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hpcssl import published

_DEFAULT = {"linear": "msf", "svm": "oss", "lowshot": "oss", "detect": "voc_c4"}  # the protocol that a bare name means
_BASE = {"svm": "SVM", "lowshot": "SVM"}
_METRICS = {"svm": {r"svm_map": "mAP"}, "lowshot": {r"lowshot_k(\d+)(_std)?": r"\1-shot\2"}}
_ORDER = tuple(re.compile(pattern) for pattern in (
    r"\d+-NN|one label", r"linear", r"finetune", r"SVM\S* mAP", r"SVM", r"transfer", r"detect"))
_WIDE = re.compile(r"last epoch$|(NN|weighted) top-5$| std$")
_OF_TRAINING_SET = re.compile(r"\d+-NN|linear( top-5)?$")
_OF_VOC = re.compile(r"SVM|detect")


def of_row(row: dict) -> dict[str, float]:
    """The scores of an evaluation's row under the names of their columns; what is no number is left out."""
    evaluation, protocol = row["eval"], row["options"].get("protocol") or ""
    name = _BASE.get(evaluation, evaluation)
    if protocol and protocol != _DEFAULT.get(evaluation):
        name = f"{name}:{protocol}"
    return {_called(evaluation, name, metric): value for metric, value in row["metrics"].items()
            if isinstance(value, int | float) and not isinstance(value, bool)}


def _called(evaluation: str, name: str, metric: str) -> str:
    if evaluation == "knn":
        neighbours = re.fullmatch(r"knn(\d+)(_weighted)?(_top5)?", metric)
        if neighbours:
            k, weighted, top5 = neighbours.groups()
            return f"{k}-NN" + (" weighted" if weighted else "") + (" top-5" if top5 else "")
        return metric.replace("_", " ")
    top = re.fullmatch(r"top(\d)(_last)?", metric)
    if top:
        return name + ("" if top[1] == "1" else f" top-{top[1]}") + (", last epoch" if top[2] else "")
    for pattern, words in _METRICS.get(evaluation, {}).items():
        metric = re.sub(f"^{pattern}$", words, metric)
    return f"{name} {metric.replace('_', ' ')}"


def quantity(column: str) -> str:
    """The column without its protocol: what a published column of that title is the same quantity as."""
    return re.sub(r"^(\w+):\S+", r"\1", column)


def anchors(recipe: str, *, same_labels: bool = True, data: str = "VOC07") -> dict[str, published.Anchor]:
    """Title of a column -> the published score of a recipe.

    ``same_labels`` False: scored with other labelled images than the training's, so that k-NN and linear of the
    recipe's row are other quantities; ``data``: the data's name, without ``voc`` in which SVM and detection are.
    """
    found = {published.TITLES[column]: anchor for column, anchor in published.of_recipe(recipe).items()}
    return {title: anchor for title, anchor in found.items()
            if (same_labels or not _OF_TRAINING_SET.match(title))
            and ("voc" in data.lower() or not _OF_VOC.match(title))}


def in_order(columns: Iterable[str], *, wide: bool = True) -> list[str]:
    """Each once, by evaluation; within one, as they were first met. ``wide``: also those that only files show."""
    def place(column: str) -> int:
        return next((i for i, pattern in enumerate(_ORDER) if pattern.match(column)), len(_ORDER))

    return [name for name in sorted(dict.fromkeys(columns), key=place) if wide or not _WIDE.search(name)]
