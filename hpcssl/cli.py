"""``hpcssl``: train, eval, export, digest, results, recipes, show."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hpcssl import door
from hpcssl.errors import ConfigError, ResumeError, nearest
from hpcssl.files import RunDir

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None,
                  help="Pre-train image encoders without labels, and tell how good they are.")

Run = Annotated[Path, typer.Option("--run", help="The run folder.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe values to change.")]


@app.command()
def train(recipe: str, overrides: Overrides = None, run: Run = ...) -> int:
    """Train RECIPE (a packaged name or a .yaml file) in a run folder; what the folder holds is resumed.

    One process, or one of several under torchrun or srun.
    """
    from hpcssl import run as runs
    from hpcssl.signals import StopFlag

    stop = StopFlag().install(keyboard=True)
    folder = RunDir(run)
    return runs.train(folder, runs.resolve(recipe, overrides or [], folder), stop=stop)


@app.command("eval")
def evaluate(name: str, overrides: Overrides = None, run: Annotated[Path | None, typer.Option("--run")] = None,
             weights: Annotated[Path | None, typer.Option(help="An exported weights file.")] = None,
             train: Annotated[Path | None, typer.Option(help="Shards to learn from.")] = None,
             val: Annotated[Path | None, typer.Option(help="Shards to score on.")] = None,
             devices: Annotated[str, typer.Option(help="cpu, gpu or auto.")] = "auto",
             step: Annotated[str, typer.Option(help="last, first or a number; with --run.")] = "last") -> int:
    """Evaluate a run's encoder, or a weights file, by NAME (knn, linear). Asking again gives the row that is there."""
    from hpcssl import run as runs

    return runs.evaluate(name, overrides or [], run=run, weights=weights, train=train, val=val, devices=devices,
                         step=step)


@app.command()
def export(run: Run, to: Annotated[Path, typer.Option("--to", help="The file to write.")],
           layout: Annotated[str, typer.Option(help="hpcssl or torchvision.")] = "hpcssl",
           step: Annotated[str, typer.Option(help="last, first or a number.")] = "last") -> None:
    """Write a run's encoder as one file for others to read."""
    from hpcssl.evals.run import weights_of
    from hpcssl.nets import weights

    source = weights_of(_existing(run), step)
    weights.export(source, to, layout)
    print(to)


@app.command()
def digest(run: Annotated[Path, typer.Argument(help="The run folder.")]) -> None:
    """Print one sha256 of the newest checkpoint's whole state; it is the same for any world size."""
    from hpcssl.train.checkpoint import digest_of

    print(digest_of(_existing(run)))


@app.command()
def results(runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
            write: Annotated[Path | None, typer.Option(help="Write the table into this markdown file.")] = None,
            as_csv: Annotated[bool, typer.Option("--csv")] = False,
            as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Print the measured rows of runs as a table, and write them into a RESULTS.md."""
    from hpcssl import results as tables

    if as_csv and as_json:
        raise ConfigError("hpcssl results", got="--csv and --json", expected="one of them", mend="leave one out")
    print(tables.show(runs, write=write, style="csv" if as_csv else "json" if as_json else "table",
                      terminal=sys.stdout.isatty()), end="")


@app.command()
def recipes() -> None:
    """List the packaged recipes with published score, global batch, epochs and bank."""
    from hpcssl import run as runs

    runs.list_recipes()


@app.command()
def show(what: Annotated[str, typer.Argument(metavar="RECIPE|RUN")], overrides: Overrides = None) -> None:
    """Print a recipe with every key resolved, or the one that a run folder was started with."""
    from hpcssl import config
    from hpcssl.train import recipe as recipes_

    if Path(what).is_dir():
        path = RunDir(what).config
        if not path.exists():
            raise ResumeError(f"folder {what}", got="no config.yaml", expected="a run folder or a recipe's name",
                              mend=nearest(what, recipes_.names()))
        print(path.read_text(), end="")
    else:
        print(config.to_yaml(recipes_.compose(what, overrides)), end="")


def _existing(path: Path) -> RunDir:
    if not path.is_dir():
        raise ResumeError(f"run folder {path}", got="no such folder", expected="a folder that `hpcssl train` made",
                          mend="check the path")
    return RunDir(path)


def main(argv: list[str] | None = None) -> None:
    sys.exit(door.run(app, argv, "hpcssl"))
