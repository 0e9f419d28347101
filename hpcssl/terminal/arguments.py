"""Arguments that ``hpcssl`` and ``hpcssl-submit`` share."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from hpcssl.errors import ConfigError

Parent = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="RUN[@STEP]",
        help="Start from the complete state of a checkpoint of another run, with its recipe and the values given here, "
        "instead of RECIPE.",
    ),
]


def split_recipe(words: list[str], parent: str | None) -> tuple[str, list[str]]:
    """Separate the recipe from the values to change. With ``--from`` there is no recipe.

    Args:
        words: The arguments of the command.
        parent: The value of ``--from``; None without it.

    Returns:
        The recipe, empty with ``--from``; and the values.

    Raises:
        ConfigError: There is no recipe, or more than one, or one besides ``--from``.
    """
    recipes = [word for word in words if re.match(r"[A-Za-z_][\w.]*=", word) is None]
    count = 1 if parent is None else 0
    # keys without a value: refused where values are read, with a message of their own
    keys = [word for word in recipes[count:] if re.fullmatch(r"(?!.*\.ya?ml$)[A-Za-z_]\w*(\.\w+)+", word)]
    recipes = [word for word in recipes if word not in keys]
    if len(recipes) != count:
        if parent is not None:
            fix = "leave the recipe out, and give the values to change"
        elif recipes:
            fix = "leave out all but one"
        else:
            fix = "name one, such as digits_msf; `hpcssl recipes` lists them"
        raise ConfigError(
            "RECIPE",
            got=" and ".join([*(["--from"] if parent is not None else []), *recipes]) or "no recipe",
            expected="one recipe, or --from RUN[@STEP] with that run's recipe; then key=value",
            fix=fix,
        )
    return (recipes[0] if recipes else ""), [word for word in words if word not in recipes]
