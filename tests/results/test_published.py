"""The published tables: sums, completeness, and agreement with the headers of the recipes."""

from importlib import resources

import pytest

from hpcssl import config, published
from hpcssl.train import recipe

TABLES = published.read_tables()
NAMES = [f"{table.document} {table.name}" for table in TABLES]


def cells(table):
    for row in table.rows:
        for column in table.columns:
            value = table.value(row, column)
            if value is not None:
                yield row, column, value


@pytest.mark.parametrize("table", TABLES, ids=NAMES)
def test_printed_means_and_differences_follow_from_printed_values(table):
    """A mean to half a unit of its last printed digit, a difference exactly, except for the listed misprints."""
    wrong = {}
    for row, column, value in cells(table):
        last = 10.0**-value.decimals
        if column in table.means:
            parts = [table.value(row, part).number for part in table.means[column]]
            if abs(sum(parts) / len(parts) - value.number) > last / 2 + 1e-9:
                wrong.setdefault(row, []).append(column)
        if value.difference is not None:
            base = table.value(table.bases[row], column)
            if abs(value.number - base.number - value.difference) > 1e-9:
                wrong.setdefault(row, []).append(column)
    assert wrong == table.misprints
    for column in table.means:
        assert all(table.value(row, column) for row in table.rows), "a mean of a value that is missing"
    for row in table.bases:
        assert any(value.difference is not None for at, _, value in cells(table) if at == row), row


@pytest.mark.parametrize("table", TABLES, ids=NAMES)
def test_tables_are_complete(table):
    """Every row has a value for each column, and every score is a number, percentages between 0 and 100."""
    assert table.title and table.source and set(table.bases) | set(table.bases.values()) <= set(table.rows)
    for row, printed in table.rows.items():
        missing = set(table.columns) - set(printed) - {"recipe"}
        assert not missing, f"{row}: no {missing}"
        for column in table.columns:
            if column in published.TITLES and printed[column] != "-":
                value = table.value(row, column)
                assert value or printed[column].startswith("~"), f"{row}, {column}: {printed[column]!r} is no number"
                assert value is None or 0 < value.number < 100 or not column.endswith(("top1", "top5")), row


def test_printed_values_are_parsed():
    read = published.Value.parse
    assert read("82.01 ± 0.13") == published.Value("82.01 ± 0.13", 82.01, 2, 0.13, None)
    assert read("40.3 (-27.6)") == published.Value("40.3", 40.3, 1, None, -27.6)
    assert read("62.3 (+0.7)").difference == 0.7
    assert [read(text) for text in ("-", "1K+130", "~101", "512*", "72.4x", "")] == [None] * 6


def test_one_value_of_each_document():
    """Values that are written here a second time, so that a shifted row or column is noticed."""
    by_name = dict(zip(NAMES, TABLES, strict=True))
    for name, row, column, number in (
        ("MSF imagenet", "MSF w/s (1M)", "linear_top1", 72.4),
        ("CMSF imagenet", "CMSF-2Q (128K)", "knn20_top1", 66.4),
        ("NNCLR t3", "NNCLR", "voc07", 83.0),
        ("NNCLR t9", "98304", "steps_per_s", 5.68),
        ("BSIM t4", "MoCoV2-WBSIM", "lowshot96", 83.7),
        ("BSIM t5", "BYOL-BSIM, 300 epochs", "linear_top1", 72.7),
        ("Peers cifar10_lightly", "NNCLR, 200 epochs, batch 512", "knn200_top1", 81.5),
    ):
        assert by_name[name].value(row, column).number == number
    assert len(TABLES) == 9 + 16 + 7 + 5  # MSF 5, CMSF 4; NNCLR 1-10 with six of 7, and its text; BSIM 1-7; peers 5


def test_published_scores_in_recipes_equal_those_in_the_tables():
    """The header of a recipe (``about.published``) and the table row that names the recipe print the same number."""
    wrong = []
    for name in recipe.names():
        header = config.read_yaml(resources.files("hpcssl.recipes") / f"{name}.yaml")[
            "about"
        ]  # without that of its base
        scores = published.find_scores(name)
        for key, score in header.get("published", {}).items():
            if key not in scores:
                wrong.append(f"{name}: no row of hpcssl/published/*.yaml with recipe {name} prints {key}")
            elif scores[key].value.number != score:
                wrong.append(f"{name}: {key} is {score} in the recipe, {scores[key].value.text} in {scores[key]}")
    assert not wrong, "\n".join(wrong)


def test_recipes_named_in_tables_exist():
    names = set(recipe.names())
    for table in TABLES:
        unknown = {name for name, _ in table.recipes()} - names
        assert not unknown, f"{table.document} {table.name}: {unknown}"
