"""Rows of ``hpcssl recipes`` from the recipes themselves. ``python -m hpcssl.cli.recipe_table`` stores them."""

from __future__ import annotations

from pathlib import Path

from hpcssl.files import atomic_write
from hpcssl.recipes import table
from hpcssl.recipes.table import RecipeRow
from hpcssl.train import gpu_memory, recipe


def describe(name: str) -> RecipeRow:
    """Compose a packaged recipe, build its networks without their weights, and return its row."""
    composed = recipe.compose(name)
    schedule, about = composed.schedule, composed.about
    return RecipeRow(
        name=name,
        title=about.title,
        backbone=composed.model.arch,
        length=f"{schedule.epochs:g} epochs" if not schedule.steps else f"{schedule.steps} steps",
        published=dict(about.published),
        differs=list(about.differs),
        is_small=composed.model.stem == "small",
        memory=gpu_memory.measure(composed),
    )


def describe_all() -> list[RecipeRow]:
    """The rows of all packaged recipes, sorted by name. Takes some 15 seconds."""
    return [describe(name) for name in recipe.names()]


if __name__ == "__main__":
    atomic_write(Path(table.__file__).with_name(table.FILE), table.to_json(describe_all()))
