"""Changes of recipe values and options, as Python writes them: dotted names, nested dicts, ``key=value`` texts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpcssl import config
from hpcssl.errors import ConfigError

if TYPE_CHECKING:
    from hpcssl.train.recipe import RecipeSource


def collect_overrides(words: Sequence[str], values: Mapping[str, Any]) -> config.Values:
    """Merge all ways to write a change into nested dicts of plain values.

    Args:
        words: Items such as ``optim.lr=0.1``, as on the command line.
        values: Values by name. A name may have dots (``{"optim.lr": 0.1}``), and a value may be a dict
            (``{"optim": {"lr": 0.1}}``). They win over ``words``, and later ones over earlier ones.

    Raises:
        ConfigError: An item without a key and a value, or a value that cannot be written into a YAML file.
    """
    for word in words:
        if not isinstance(word, str):
            raise ConfigError(
                "overrides",
                got=repr(word),
                expected="texts such as 'optim.lr=0.1'",
                fix="give values by name: optim={'lr': 0.1}, or **{'optim.lr': 0.1}",
            )
    return config.merge(config.read_overrides(words), plain_values(values))


def plain_values(values: Mapping[str, Any]) -> config.Values:
    """Return nested dicts of plain values: dotted names are split, and paths become text.

    Raises:
        ConfigError: A name or a value that cannot be written into a YAML file.
    """
    return config.merge({}, *(config.nest(str(key), _plain(str(key), value)) for key, value in values.items()))


def _plain(key: str, value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return config.as_dict(value)
    if isinstance(value, Mapping):
        return plain_values(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_plain(key, item) for item in value]
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:  # a number of NumPy, as np.logspace gives
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"value of {key}",
        got=f"{value!r} of type {type(value).__name__}",
        expected="a number, a text, a path, None, or a list or dict of these",
        fix=f"convert it first, such as {key}=float(value)",
    )


def plain_source(recipe: RecipeSource | None, parent: str | None = None) -> RecipeSource:
    """Return what a recipe is composed from, with plain values where it is a dict; an empty name with a parent.

    Raises:
        ConfigError: There is neither a recipe nor a parent, or both; or the recipe has another type.
    """
    from hpcssl.train.recipe import Recipe

    if recipe is not None and parent is not None:
        raise ConfigError(
            "recipe",
            got=f"{recipe!r} and a parent",
            expected="one of them",
            fix="leave the recipe out: a branch has that of its parent, and values to change",
        )
    if parent is not None:
        return ""
    if isinstance(recipe, Mapping):
        return plain_values(recipe)
    if isinstance(recipe, Recipe | str | os.PathLike):
        return recipe
    raise ConfigError(
        "recipe",
        got=f"{recipe!r} of type {type(recipe).__name__}",
        expected="a name, a path, a dict of sections or a Recipe",
        fix="`hpcssl recipes` lists the names",
    )
