"""``hpcssl results``, ``hpcssl recipes`` and ``hpcssl show``: what prints tables and recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hpcssl.cli.options import Overrides
from hpcssl.errors import ConfigError, ResumeError, suggest
from hpcssl.run_dir import RunDir


def results(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders, or folders with runs.")] = None,
    write: Annotated[Path | None, typer.Option(help="Also update the tables in this RESULTS.md.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    steps: Annotated[
        bool, typer.Option("--steps", help="Include the encoders between the first and the last step.")
    ] = False,
    sort: Annotated[
        str,
        typer.Option(
            metavar="COLUMN",
            help="Rank settings by a score, such as linear or 1-NN: means over seeds, with * at what is within the "
            "deviation of the best.",
        ),
    ] = "",
    claim: Annotated[
        str,
        typer.Option(
            metavar='"A > B"',
            help="Compare two recipes, methods or values: difference, deviation and a paired test over seeds.",
        ),
    ] = "",
    claims: Annotated[
        bool,
        typer.Option(
            "--claims", help="Print what the papers claim, and whether these runs show it; with --write, of a page."
        ),
    ] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Print the results of the papers instead of those of runs.")
    ] = False,
    plots: Annotated[Path | None, typer.Option(help="Draw learning curves into this folder instead.")] = None,
    gallery: Annotated[
        Path | None,
        typer.Option(
            help="Draw validation images with their nearest training images into this .png instead; takes one run."
        ),
    ] = None,
) -> None:
    """Print tables or draw pictures of the results of runs, beside the results of the papers."""
    from hpcssl.results import command

    command.main(
        runs or [],
        write=write,
        as_csv=as_csv,
        as_json=as_json,
        steps=steps,
        sort=sort,
        claim=claim,
        claims=claims,
        published=published,
        plots=plots,
        gallery=gallery,
    )


def recipes(
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of GPUs for which the memory of one is estimated; none is for recipes with smaller batches.",
        ),
    ] = None,
) -> None:
    """List the packaged recipes: published scores, batch, length, memory bank, and estimated memory per GPU."""
    from hpcssl.recipes.table import RecipeRow, read_rows

    rows = read_rows()
    if rows is None:  # somebody has changed a recipe
        from hpcssl.cli import recipe_table

        rows = recipe_table.describe_all()

    def cells(row: RecipeRow) -> list[str]:
        ranks, memory = gpus or row.usual_gpus, row.memory
        return [
            row.name,
            row.backbone,
            str(memory.batch),
            row.length,
            str(memory.bank_rows) if memory.bank_rows else "-",
            f"{memory.of_rank(ranks).total / 2**30:.1f} GiB x {ranks}" if ranks <= memory.batch else "-",
            " ".join(f"{name} {score:g}" for name, score in row.published.items()) or "-",
            row.title,
            " ".join(row.differs) or "-",
        ]

    head = ["recipe", "backbone", "batch", "length", "bank", "memory per GPU", "published", "what", "differs in"]
    if not sys.stdout.isatty():
        sys.stdout.writelines("\t".join(line) + "\n" for line in [head, *map(cells, rows)])
        return
    from hpcssl.terminal.tables import print_table

    left_out = print_table(
        head[:-1],
        [cells(row)[:-1] for row in rows],
        wrapped={"published": 24, "what": 24},
        optional=("backbone", "bank", "what", "published", "memory per GPU", "length"),
    )
    if left_out:
        print(f"Left out, as the terminal is narrow: {', '.join(left_out)}.")
    print("`hpcssl recipes | cat` prints all columns, `hpcssl show NAME` all keys of one recipe.")


def show(
    what: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="Recipe, .yaml file or run folder.")],
    overrides: Overrides = None,
    comments: Annotated[bool, typer.Option("--comments", help="Print the meaning of each key above it.")] = False,
    views: Annotated[
        Path | None,
        typer.Option(
            "--views", metavar="DATA", help="Draw the recipe's views of images of this folder; requires --to."
        ),
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", help="The .png file of --views.")] = None,
) -> None:
    """Print a recipe with all of its keys, or the one that a run folder was started with.

    With --views, draw a picture of its augmented views instead. DATA are shards or any folder of images.
    """
    if views is not None or to is not None:
        _show_views(what, overrides, views, to)
        return
    from hpcssl import config, config_docs
    from hpcssl.evals.options import EvalsOptions, parse_evals_section
    from hpcssl.train import recipe as recipes_

    def text(recipe: recipes_.Recipe) -> str:
        parse_evals_section(recipe.evals, recipe.name)
        return config_docs.commented_yaml(recipe, {"evals": EvalsOptions}) if comments else config.to_yaml(recipe)

    if not Path(what).is_dir():
        print(text(recipes_.compose(what, overrides or [])), end="")
        return
    path = _recorded_recipe(what)
    if overrides:
        raise ConfigError(
            f"hpcssl show {what}",
            got=f"values to change: {' '.join(overrides)}",
            expected="none, since a run keeps the recipe that it was started with",
            fix="leave them out; --views draws a run's recipe with other values",
        )
    print(text(recipes_.read(path)) if comments else path.read_text(), end="")


def _recorded_recipe(folder: str) -> Path:
    """The file with the recipe of a run. Raises ``ResumeError`` if the folder holds no run."""
    from hpcssl.train import recipe as recipes_

    path = RunDir(folder).config
    if not path.exists():
        raise ResumeError(
            f"folder {folder}",
            got="no config.yaml",
            expected="a run folder, or the name of a recipe",
            fix=suggest(folder, recipes_.names()),
        )
    return path


def _show_views(what: str, overrides: list[str] | None, data: Path | None, to: Path | None) -> None:
    from hpcssl.planning.view_picture import draw_views
    from hpcssl.train import recipe as recipes_

    if data is None or to is None:
        raise ConfigError(
            "hpcssl show",
            got="one of --views and --to",
            expected="both or neither of them",
            fix="hpcssl show RECIPE --views DATA --to views.png",
        )
    is_run = Path(what).is_dir()
    source = str(_recorded_recipe(what)) if is_run else what
    print(draw_views(recipes_.compose(source, overrides or [], run_exists=is_run), data, to))
