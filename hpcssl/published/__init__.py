"""The tables that the papers print, as data: every value as it stands there, with its table and row.

One YAML file per document. A table's ``rows`` are a block of text whose first line names the columns and whose cells
are parted by ``|``; a cell holds what is printed: ``72.4``, ``82.01 ± 0.13``, ``62.3 (+0.7)`` where the difference to
another row stands beside, ``-`` where nothing is printed. Columns of scores are named as the headers of the recipes
name them (``linear_top1``), and the column ``recipe`` names the packaged recipe that is to reach this row. Further
keys of a table:

``means``      column -> the columns whose mean it prints
``bases``      row -> the row that its printed differences are against
``misprints``  row -> columns whose printed mean or difference does not re-add (the notes say by how much)
``notes``      what a reader must know: inconsistencies, what was inferred
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from hpcssl import config

DOCUMENTS = ("msf", "cmsf", "nnclr", "bsim", "peers")

TITLES = {
    "linear_top1": "linear", "linear_top5": "linear top-5", "knn1_top1": "1-NN", "knn20_top1": "20-NN",
    "knn200_top1": "200-NN weighted", "svm_voc07": "SVM mAP",
    **{f"{kind}_{share}pct_top{k}": f"{kind} {share} %" + ("" if k == 1 else f" top-{k}")
       for kind in ("finetune", "linear") for share in (1, 10) for k in (1, 5)},
    **{f"lowshot{k}": f"SVM {k}-shot" for k in (1, 2, 4, 8, 16, 32, 64, 96)},
    **{name.lower().replace("-", ""): f"transfer {name}" for name in (
        "Food101", "CIFAR10", "CIFAR100", "Birdsnap", "SUN397", "Cars", "Aircraft", "VOC07", "DTD", "Pets",
        "Caltech-101", "Flowers")},
    "transfer_mean": "transfer mean of 10",
    "voc_ap50": "detect AP50", "voc_ap": "detect AP", "voc_ap75": "detect AP75",
    "flops_e17": "FLOPs ×1e17", "memory_mb": "memory (MB)", "steps_per_s": "steps/s", "memory_gb": "memory (GB)",
}
"""What tables call a column; a measured column of the same title is the same quantity."""

IMAGES = {"cifar10": 50_000, "imagenette": 9_469}
"""Training images of the sets that recipes are named after; the others' rows are of ImageNet."""
IMAGENET = 1_281_167

_NUMBER = r"\d+(?:\.\d+)?"
_VALUE = re.compile(rf"({_NUMBER})(?: ± ({_NUMBER}))?(?: \(([+-]{_NUMBER})\))?")


@dataclass(frozen=True)
class Value:
    """A printed score. ``text``: as printed; ``decimals``: of the number; the others None where none is printed."""

    text: str
    number: float
    decimals: int
    deviation: float | None = None
    difference: float | None = None

    @classmethod
    def read(cls, text: str) -> Value | None:
        """The number in a cell; None for ``-`` and for words."""
        found = _VALUE.fullmatch(text)
        if not found:
            return None
        number, deviation, difference = found.groups()
        return cls(f"{number} ± {deviation}" if deviation else number, float(number),
                   len(number.partition(".")[2]), *(None if x is None else float(x) for x in (deviation, difference)))


@dataclass(frozen=True, kw_only=True)
class Table:
    """One printed table. ``rows``: row key -> column -> cell; a key is the row's first cell, with epochs and batch
    where the first cell alone stands twice."""

    document: str
    name: str
    title: str
    source: str
    columns: list[str]
    rows: dict[str, dict[str, str]]
    means: dict[str, list[str]] = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)
    misprints: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def value(self, row: str, column: str) -> Value | None:
        return Value.read(self.rows[row].get(column, "-"))

    def recipes(self) -> Iterator[tuple[str, str]]:
        """(recipe, row key) of each row that a packaged recipe is to reach."""
        for key, cells in self.rows.items():
            if cells.get("recipe"):
                yield cells["recipe"], key


@dataclass(frozen=True)
class Anchor:
    """A published score of a recipe, and where it is printed."""

    value: Value
    table: Table
    row: str

    def __str__(self) -> str:
        return f"{self.table.document}, {self.table.source}, row {self.row}"


@cache
def tables() -> tuple[Table, ...]:
    """All tables in the order of the documents."""
    found = []
    for name in DOCUMENTS:
        sheet = config.read_yaml(Path(__file__).with_name(f"{name}.yaml"))
        for key, about in sheet["tables"].items():
            columns, rows = _rows(about.pop("rows"))
            found.append(Table(document=sheet["document"], name=key, columns=columns, rows=rows, **about))
    return tuple(found)


def titles() -> dict[str, str]:
    """Document -> its full title."""
    sheets = (config.read_yaml(Path(__file__).with_name(f"{name}.yaml")) for name in DOCUMENTS)
    return {sheet["document"]: sheet["title"] for sheet in sheets}


def of_recipe(recipe: str) -> dict[str, Anchor]:
    """Column -> the score that the recipe is to reach; the first table that prints one is taken."""
    found: dict[str, Anchor] = {}
    for table in tables():
        for name, row in table.recipes():
            if name == recipe:
                for column in table.columns:
                    value = table.value(row, column)
                    if value is not None and column in TITLES:
                        found.setdefault(column, Anchor(value, table, row))
    return found


def images_of(recipe: str) -> int:
    """Training images behind a recipe's published scores."""
    return IMAGES.get(recipe.partition("_")[0], IMAGENET)


def _rows(text: str) -> tuple[list[str], dict[str, dict[str, str]]]:
    head, *lines = ([cell.strip() for cell in line.split("|")] for line in text.strip().splitlines())
    cells = [dict(zip(head, line, strict=False)) for line in lines]
    keys = [row[head[0]] for row in cells]
    for column, words in (("epochs", "{} epochs"), ("batch", "batch {}")):
        times = Counter(keys)
        keys = [f"{key}, {words.format(row[column])}" if times[key] > 1 and column in row else key
                for key, row in zip(keys, cells, strict=True)]
    return head, dict(zip(keys, cells, strict=True))
