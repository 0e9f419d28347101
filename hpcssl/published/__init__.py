"""The result tables of the papers as data: every value as printed, with its table and row.

One YAML file per document. The ``rows`` of a table are a block of text: its first line names the columns, and ``|``
separates the cells. A cell holds what is printed: ``72.4``, ``82.01 ± 0.13``, ``62.3 (+0.7)`` with the difference to
another row, or ``-`` if nothing is printed. Columns of scores have the names that the headers of the recipes use
(``linear_top1``), and the column ``recipe`` names the packaged recipe that is to reach the row. Further keys of a
table:

- ``means``: for a column, the columns whose mean it prints.
- ``bases``: for a row, the row to which its printed differences refer.
- ``misprints``: for a row, the columns whose printed mean or difference is wrong (the notes say by how much).
- ``notes``: inconsistencies of the table, and what was inferred.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from hpcssl import config
from hpcssl.errors import ConfigError, suggest

DOCUMENTS = ("msf", "cmsf", "nnclr", "bsim", "peers")

TITLES = {
    "linear_top1": "linear",
    "linear_top5": "linear top-5",
    "knn1_top1": "1-NN",
    "knn20_top1": "20-NN",
    "knn200_top1": "200-NN weighted",
    "svm_voc07": "SVM mAP",
    **{
        f"{kind}_{share}pct_top{k}": f"{kind} {share} %" + ("" if k == 1 else f" top-{k}")
        for kind in ("finetune", "linear")
        for share in (1, 10)
        for k in (1, 5)
    },
    **{f"lowshot{k}": f"SVM {k}-shot" for k in (1, 2, 4, 8, 16, 32, 64, 96)},
    **{
        name.lower().replace("-", ""): f"transfer {name}"
        for name in (
            "Food101",
            "CIFAR10",
            "CIFAR100",
            "Birdsnap",
            "SUN397",
            "Cars",
            "Aircraft",
            "VOC07",
            "DTD",
            "Pets",
            "Caltech-101",
            "Flowers",
        )
    },
    "transfer_mean": "transfer mean of 10",
    "voc_ap50": "detect AP50",
    "voc_ap": "detect AP",
    "voc_ap75": "detect AP75",
    "flops_e17": "FLOPs ×1e17",
    "memory_mb": "memory (MB)",
    "steps_per_s": "steps/s",
    "memory_gb": "memory (GB)",
}
"""Title of every column of scores; a measured column of the same title is the same quantity."""

IMAGES = {"cifar10": 50_000, "imagenette": 9_469}
"""Training images of the data sets that recipes are named after; all other recipes train on ImageNet."""
IMAGENET = 1_281_167

_NUMBER = r"\d+(?:\.\d+)?"
_VALUE = re.compile(rf"({_NUMBER})(?: ± ({_NUMBER}))?(?: \(([+-]{_NUMBER})\))?")


@dataclass(frozen=True)
class Value:
    """A printed score.

    Attributes:
        text: Number and deviation as printed.
        number: The number.
        decimals: Its printed decimals.
        deviation: The printed deviation, or None.
        difference: The printed difference to another row, or None.
    """

    text: str
    number: float
    decimals: int
    deviation: float | None = None
    difference: float | None = None

    @classmethod
    def parse(cls, text: str) -> Value | None:
        """Parse a cell; None for ``-`` and for words."""
        match = _VALUE.fullmatch(text)
        if not match:
            return None
        number, deviation, difference = match.groups()
        return cls(
            f"{number} ± {deviation}" if deviation else number,
            float(number),
            len(number.partition(".")[2]),
            *(None if x is None else float(x) for x in (deviation, difference)),
        )


@dataclass(frozen=True, kw_only=True)
class Table:
    """One printed table.

    Attributes:
        document: The document, a key of ``read_titles``.
        name: Key of the table in its file.
        title: What the table shows.
        source: Its number in the document.
        columns: Names of the columns.
        rows: Cells by row and column. A row is named by its first cell, with epochs and batch if that is ambiguous.
        means: For a column, the columns whose mean it prints.
        bases: For a row, the row to which its differences refer.
        misprints: For a row, the columns whose printed mean or difference is wrong.
        notes: Inconsistencies, and what was inferred.
    """

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
        """Return the value of a cell; None if nothing is printed there."""
        return Value.parse(self.rows[row].get(column, "-"))

    def recipes(self) -> Iterator[tuple[str, str]]:
        """Yield the recipe and the row, for each row that a packaged recipe is to reach."""
        for key, cells in self.rows.items():
            if cells.get("recipe"):
                yield cells["recipe"], key


@dataclass(frozen=True)
class PublishedScore:
    """A published score of a recipe, and where it is printed.

    Attributes:
        value: The score.
        table: The table that prints it.
        row: The row of the table.
    """

    value: Value
    table: Table
    row: str

    def __str__(self) -> str:
        return f"{self.table.document}, {self.table.source}, row {self.row}"


@cache
def read_tables() -> tuple[Table, ...]:
    """Read all tables, in the order of the documents."""
    files = (Path(__file__).with_name(f"{name}.yaml") for name in DOCUMENTS)
    return tuple(table for path in files for table in read_document(path))


def read_document(path: Path) -> list[Table]:
    """Read the tables of one YAML file; the head of this module describes it.

    Raises:
        ConfigError: The file cannot be read, or is no such document.
    """
    sheet = config.read_yaml(path)
    tables = []
    try:
        for key, about in sheet["tables"].items():
            columns, rows = _parse_rows(about.pop("rows"))
            tables.append(Table(document=sheet["document"], name=key, columns=columns, rows=rows, **about))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"tables {path}",
            got=f"{type(error).__name__}: {error}",
            expected="keys document and tables, and title, source and rows in each table",
            fix="write it like the files in hpcssl/published",
        ) from error
    return tables


def find_table(text: str) -> Table:
    """Find a table by name.

    Args:
        text: ``DOCUMENT.TABLE``, such as ``nnclr.table1``, ``nnclr.t1`` or ``msf.imagenet``; or ``FILE.yaml``, or
            ``FILE.yaml:TABLE`` where the file has several tables.

    Raises:
        ConfigError: There is no such table.
    """
    path, _, name = text.partition(":")
    if path.endswith((".yaml", ".yml")):
        tables = {table.name: table for table in read_document(Path(path))}
        if not name and len(tables) == 1:
            return next(iter(tables.values()))
        names = {f"{path}:{key}": table for key, table in tables.items()}
    else:
        names = {f"{table.document.lower()}.{table.name}": table for table in read_tables()}
    key = text if path.endswith((".yaml", ".yml")) else re.sub(r"\.table(?=\d)", ".t", text.lower())
    if key not in names:
        with_recipes = [name for name, table in names.items() if any(table.recipes())]
        raise ConfigError("table", got=repr(text), expected="a published table", fix=suggest(key, with_recipes))
    return names[key]


def read_titles() -> dict[str, str]:
    """Return the full title of every document."""
    sheets = (config.read_yaml(Path(__file__).with_name(f"{name}.yaml")) for name in DOCUMENTS)
    return {sheet["document"]: sheet["title"] for sheet in sheets}


def find_scores(recipe: str) -> dict[str, PublishedScore]:
    """Find the scores that a recipe is to reach.

    Args:
        recipe: Name of a packaged recipe.

    Returns:
        The score of each column, from the first table that prints one.
    """
    scores: dict[str, PublishedScore] = {}
    for table in read_tables():
        for name, row in table.recipes():
            if name == recipe:
                for column in table.columns:
                    value = table.value(row, column)
                    if value is not None and column in TITLES:
                        scores.setdefault(column, PublishedScore(value, table, row))
    return scores


def count_training_images(recipe: str) -> int:
    """Return the number of training images behind the published scores of a recipe."""
    return IMAGES.get(recipe.partition("_")[0], IMAGENET)


def _parse_rows(text: str) -> tuple[list[str], dict[str, dict[str, str]]]:
    head, *lines = ([cell.strip() for cell in line.split("|")] for line in text.strip().splitlines())
    cells = [dict(zip(head, line, strict=False)) for line in lines]
    keys = [row[head[0]] for row in cells]
    for column, words in (("epochs", "{} epochs"), ("batch", "batch {}")):
        counts = Counter(keys)
        keys = [
            f"{key}, {words.format(row[column])}" if counts[key] > 1 and column in row else key
            for key, row in zip(keys, cells, strict=True)
        ]
    return head, dict(zip(keys, cells, strict=True))
