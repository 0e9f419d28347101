"""The runs of a published table: its packaged recipes, with the evaluations that its columns need."""

from __future__ import annotations

from collections.abc import Sequence

from hpcssl.errors import ConfigError
from slurm.sweep.grid import Point

MAX_SEEDS = 100
"""Most seeds of a table."""
_EVALUATIONS = {  # beginning of a column's name: the evaluation, and the data that it needs beside the recipe's
    "linear_1pct": ("linear", "train=SUBSET_1PCT"),
    "linear_10pct": ("linear", "train=SUBSET_10PCT"),
    "linear": ("linear", ""),
    "knn": ("knn", ""),
    "finetune_1pct": ("finetune", "percent=1:train=SUBSET_1PCT"),
    "finetune_10pct": ("finetune", "percent=10:train=SUBSET_10PCT"),
    "svm_voc07": ("svm", "train=VOC/trainval:val=VOC/test"),
    "lowshot": ("lowshot", "train=VOC/trainval:val=VOC/test"),
    "voc_ap": ("detect", "train=VOC/trainval:val=VOC/test"),
}
_NO_SCORES = ("flops_e17", "memory_mb", "steps_per_s", "memory_gb")


def list_points(name: str, seeds: int) -> tuple[list[str], list[Point]]:
    """Return the columns of scores of a table, and its runs: one for each packaged recipe and seed.

    Args:
        name: See ``published.find_table``.
        seeds: Number of seeds, from 0.

    Returns:
        Names of columns, and points whose first value is the recipe.

    Raises:
        ConfigError: There is no such table, or no recipe reaches one of its rows.
    """
    from hpcssl import published

    if not 1 <= seeds <= MAX_SEEDS:
        raise ConfigError("option --seeds", got=seeds, expected=f"1 to {MAX_SEEDS}", fix="set --seeds 3")
    table = published.find_table(name)
    recipes = list(dict.fromkeys(recipe for recipe, _ in table.recipes()))
    columns = [column for column in table.columns if column in published.TITLES and column not in _NO_SCORES]
    if not recipes:
        raise ConfigError(
            f"table {name}",
            got="no packaged recipe for any of its rows",
            expected="a table with the column recipe",
            fix="`hpcssl results --published` prints the tables, and `hpcssl recipes` the recipes",
        )
    points = [Point(f"{recipe}_seed={seed}", (recipe, f"seed={seed}")) for recipe in recipes for seed in range(seeds)]
    return columns, points


def derive_evaluations(columns: Sequence[str]) -> str:
    """Return the text of ``--evals`` that fills the columns of a table.

    Raises:
        ConfigError: A column needs data that the recipes do not name.
    """
    names: dict[str, str] = {}
    for column in columns:
        found = next((value for start, value in _EVALUATIONS.items() if column.startswith(start)), None)
        name, data = found or ("transfer", "root=TRANSFER")
        text = f"{name}:{data}" if data else name
        names.setdefault(text, column)
    needed = [text for text in names if ":" in text]
    if needed:
        raise ConfigError(
            "option --evals",
            got=f"nothing, for the column {names[needed[0]]}",
            expected="evaluations with the folders of their data sets",
            fix=f'add --evals "{",".join(names)}" with your folders in place of the capitals',
        )
    return ",".join(names)
