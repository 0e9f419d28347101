"""The published tables agree with themselves, with the recipes' headers and with RESULTS.md."""

from importlib import resources

import pytest

from hpcssl import config, published
from hpcssl.train import recipe

TABLES = published.tables()
NAMES = [f"{table.document} {table.name}" for table in TABLES]


def cells(table):
    for row in table.rows:
        for column in table.columns:
            value = table.value(row, column)
            if value is not None:
                yield row, column, value


@pytest.mark.parametrize("table", TABLES, ids=NAMES)
def test_means_and_differences_re_add(table):
    """To the printed precision: a mean to half a unit of its last digit, a difference exactly."""
    wrong = {}
    for row, column, value in cells(table):
        last = 10.0 ** -value.decimals
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
        assert all(table.value(row, column) for row in table.rows), "a mean that nobody re-added"
    for row in table.bases:
        assert any(value.difference is not None for at, _, value in cells(table) if at == row), row


@pytest.mark.parametrize("table", TABLES, ids=NAMES)
def test_tables_are_read_whole(table):
    """Every row as long as its head, every score a number, percent within 0 and 100, every column with a title."""
    assert table.title and table.source and set(table.bases) | set(table.bases.values()) <= set(table.rows)
    for row, found in table.rows.items():
        missing = set(table.columns) - set(found) - {"recipe"}
        assert not missing, f"{row}: no {missing}"
        for column in table.columns:
            if column in published.TITLES and found[column] != "-":
                value = table.value(row, column)
                assert value or found[column].startswith("~"), f"{row}, {column}: {found[column]!r} is no number"
                assert value is None or 0 < value.number < 100 or not column.endswith(("top1", "top5")), row


def test_values_are_read_as_printed():
    read = published.Value.read
    assert read("82.01 ± 0.13") == published.Value("82.01 ± 0.13", 82.01, 2, 0.13, None)
    assert read("40.3 (-27.6)") == published.Value("40.3", 40.3, 1, None, -27.6)
    assert read("62.3 (+0.7)").difference == 0.7
    assert [read(text) for text in ("-", "1K+130", "~101", "512*", "72.4x", "")] == [None] * 6


def test_figures_known_by_heart():
    """One value of each document, typed in here a second time."""
    by_name = dict(zip(NAMES, TABLES, strict=True))
    for name, row, column, number in (
            ("MSF imagenet", "MSF w/s (1M)", "linear_top1", 72.4),
            ("CMSF imagenet", "CMSF-2Q (128K)", "knn20_top1", 66.4),
            ("NNCLR t3", "NNCLR", "voc07", 83.0), ("NNCLR t9", "98304", "steps_per_s", 5.68),
            ("BSIM t4", "MoCoV2-WBSIM", "lowshot96", 83.7), ("BSIM t5", "BYOL-BSIM, 300 epochs", "linear_top1", 72.7),
            ("Peers cifar10_lightly", "NNCLR, 200 epochs, batch 512", "knn200_top1", 81.5)):
        assert by_name[name].value(row, column).number == number
    assert len(TABLES) == 9 + 16 + 7 + 5  # MSF 5, CMSF 4; NNCLR 1-10 with six of 7, and its text; BSIM 1-7; peers 5


def test_recipes_name_scores_that_stand_in_a_table():
    """A recipe's header (``about.published``) and the row whose column ``recipe`` names it print the same."""
    wrong = []
    for name in recipe.names():
        header = config.read_yaml(resources.files("hpcssl.recipes") / f"{name}.yaml")["about"]  # inherited from nobody
        found = published.of_recipe(name)
        for key, score in header.get("published", {}).items():
            if key not in found:
                wrong.append(f"{name}: no row of hpcssl/published/*.yaml with recipe {name} prints {key}")
            elif found[key].value.number != score:
                wrong.append(f"{name}: {key} is {score} in the recipe, {found[key].value.text} in {found[key]}")
    assert not wrong, "\n".join(wrong)


def test_rows_name_recipes_that_exist():
    names = set(recipe.names())
    for table in TABLES:
        unknown = {name for name, _ in table.recipes()} - names
        assert not unknown, f"{table.document} {table.name}: {unknown}"
