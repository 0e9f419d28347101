"""Sphinx extension: pages that are made from the code before the sources are read.

``reference/commands.md`` has the commands with their options; ``reference/recipe_keys.md`` every key of every recipe
section with its type, default and meaning, from the option classes; ``reference/recipes.md`` lists the packaged
recipes, and ``reference/collectives.md`` what a step of them sends between GPUs, as ``benchmarks/launches.py`` counted
it. The reference therefore cannot disagree with the program.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import typer
import typer.cli

import data_prep.cli
import hpcssl.cli
import slurm.cli
from hpcssl import config_docs
from hpcssl.evals.options import EvalsOptions
from hpcssl.methods import METHODS
from hpcssl.train import recipe as recipes
from hpcssl.train.recipe import Recipe

INTRODUCTION = """# Recipe keys

Every key of a recipe, made from the option classes in the code. `hpcssl show RECIPE --comments` prints the same text
above each key of one recipe. Sections nest with a dot on the command line: `optim.lr=0.1`.

`base: NAME` in a recipe file starts from another recipe; `name` is the recipe's own name and `seed` (an integer) the
seed of every random draw.
"""


def type_name(hint: object) -> str:
    """A type as a reader of YAML would call it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (list, dict, tuple):
        return f"{origin.__name__} of {', '.join(type_name(a) for a in arguments)}" if arguments else origin.__name__
    if arguments:  # a union
        return " or ".join(type_name(a) for a in arguments)
    names = {str: "text", float: "number", int: "integer", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def default_of(field: dataclasses.Field) -> str:
    """The default of a field, as YAML writes it."""
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    return repr(value).replace("'", '"') if isinstance(value, (str, list, dict)) else f"{value}"


def rows_of(schema: type, prefix: str) -> list[str]:
    """One table row per key below ``prefix``, nested sections included."""
    meanings, hints, rows = config_docs.field_docs(schema), typing.get_type_hints(schema), []
    for field in dataclasses.fields(schema):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hint):
            rows += rows_of(hint, f"{key}.")
            continue
        meaning = " ".join(meanings[field.name].split()).replace("``", "`").replace("|", "\\|")
        rows.append(f"| `{key}` | {type_name(hint)} | `{default_of(field)}` | {meaning} |")
    return rows


def table(schema: type, prefix: str) -> str:
    """A Markdown table of the keys of an option class."""
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows_of(schema, prefix)]) + "\n"


def keys_page() -> str:
    """The page of all recipe keys."""
    page, hints = [INTRODUCTION], typing.get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        if dataclasses.is_dataclass(hints[field.name]):
            page.append(f"## {field.name}\n\n{table(hints[field.name], f'{field.name}.')}")
        elif field.name == "method":
            page.append("## method\n\n`method.name` selects the method; each has keys of its own.\n")
            page += [f"### method.name={name}\n\n{table(options, 'method.')}" for name, (options, _) in METHODS.items()]
        elif field.name == "evals":
            page.append(f"## evals\n\n{table(EvalsOptions, 'evals.')}")
    return "\n".join(page)


def recipes_page() -> str:
    """The page of the packaged recipes."""
    rows = [
        "# Packaged recipes\n",
        "Percent, as the source prints them. `hpcssl show NAME` prints all keys of one.\n",
        "| recipe | what | published | source |",
        "|---|---|---|---|",
    ]
    for name in recipes.names():
        about = recipes.compose(name).about
        scores = ", ".join(f"{key} {value:g}" for key, value in about.published.items()) or "-"
        rows.append(f"| `{name}` | {about.title} | {scores} | {about.source} |")
    rows += ["\n## Differences from the originals\n", "What is known to differ, and why. All else is the original's.\n"]
    same: dict[tuple[str, ...], list[str]] = {}
    for name in recipes.names():
        if not name.startswith("digits_"):
            same.setdefault(tuple(recipes.compose(name).about.differs), []).append(f"`{name}`")
    for sentences, names in same.items():
        rows += [f"{', '.join(names)}:\n", *[f"- {sentence}" for sentence in sentences], ""]
    return "\n".join(rows) + "\n"


COLLECTIVES = """# Collectives and launches per step

What one training step of a recipe at its real size does on each GPU, counted without one: `python -m benchmarks
launches` takes the step with tensors that have a shape but no values, in a process group that has no other members.
`make test-full` compares these figures with the code. None of them is a time.

- *Given*: bytes that a GPU passes to the collectives of the step. An all-gather returns that many from each GPU, an
  all-reduce as many as it was given.
- *Operations*: kernels and copies that the host launches, without views; *of plain encoders*: the same networks with
  `nn.BatchNorm2d` (`nn.SyncBatchNorm` where groups span GPUs) and plain SGD take 1.00; *without views*: the same
  without the operations of the augmentations.
- *Waits*: how often the host waits for the GPU within the step. One is the agreement of all ranks whether the step is
  taken.

Gradients are most of the bytes. The many small all-gathers are those of batch normalization over groups that span GPUs.
"""


def collectives_page() -> str:
    """The page of what a step sends and launches, from the stored counts."""
    stored = Path(__file__).parents[2] / "benchmarks" / "results" / "launches.json"
    counts = json.loads(stored.read_text())["recipes"]
    page = [COLLECTIVES]
    for ranks in sorted({ranks for rows in counts.values() for ranks in rows}, key=int):
        rows = {name: by_ranks[ranks] for name, by_ranks in counts.items() if ranks in by_ranks}
        kinds = sorted({kind for row in rows.values() for kind in row["collectives"]})
        head = ["recipe", "images per GPU", *[cell for kind in kinds for cell in (kind, "given")]]
        head += ["operations", "of plain encoders", "without views", "waits"]
        page += [f"\n## {ranks} GPU{'s' * (ranks != '1')}\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for name, row in rows.items():
            sent = [row["collectives"].get(kind, (0, 0, 0)) for kind in kinds]
            cells = [f"`{name}`", str(row["rows_per_gpu"])]
            cells += [cell for number, given, _ in sent for cell in (str(number), f"{given / 1e6:.2f} MB")]
            cells += [str(row["operations"]), f"{row['ratio']:.2f}", f"{row['ratio_without_views']:.2f}"]
            cells.append(str(sum(row["waits"].values())))
            page.append(f"| {' | '.join(cells)} |")
    return "\n".join(page) + "\n"


COMMANDS = """# Commands

All three commands print one line for an error and exit with 0 (done), 1 (failed), 2 (wrong usage) or 75 (stopped before
the end; the same command continues). `--debug` adds the traceback, `--version` prints the version.
"""


def commands_page() -> str:
    """The page of the three command lines, from the commands themselves."""
    page = [COMMANDS]
    for name, module in (("hpcssl", hpcssl.cli), ("hpcssl-submit", slurm.cli), ("hpcssl-shard", data_prep.cli)):
        command = typer.main.get_command(module.app)
        with command.make_context(name, [], resilient_parsing=True) as context:
            text = typer.cli.get_docs_for_click(obj=command, ctx=context, name=name)
        page.append("\n".join(f"#{line}" if line.startswith("#") else line for line in text.splitlines()) + "\n")
    return "\n".join(page)


def set_equations_apart(app, what, name, obj, options, lines: list[str]) -> None:
    """Show indented blocks of a module's docstring, which hold equations and tables, as they are written."""
    if what != "module":
        return
    result: list[str] = []
    for line in lines:
        indented, before = line.startswith("    "), result[-1] if result else ""
        if indented and not before and any(result):
            last = next(text for text in reversed(result) if text)
            if not last.startswith(" ") and not last.endswith("::"):
                result += ["::", ""]
        result.append(line)
    lines[:] = result


def write_pages(app) -> None:
    """Write the generated pages below the source folder; an unchanged page keeps its time stamp."""
    folder = Path(app.srcdir) / "reference"
    pages = (
        ("recipe_keys.md", keys_page()),
        ("recipes.md", recipes_page()),
        ("commands.md", commands_page()),
        ("collectives.md", collectives_page()),
    )
    for name, text in pages:
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def setup(app) -> dict:
    """Register the extension with Sphinx."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", set_equations_apart)
    return {"parallel_read_safe": True}
