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
# how to read a --weights file where its keys do not say it
Weights = Annotated[Path | None, typer.Option("--weights", help="A weights file: ours or another project's.")]
Which = Annotated[str | None, typer.Option("--encoder", help="online or target; with --weights.")]
Mean = Annotated[str | None, typer.Option("--mean", metavar="R,G,B", help="Of the images, 0-1; with --weights.")]
Std = Annotated[str | None, typer.Option("--std", metavar="R,G,B", help="Of the images, 0-1; with --weights.")]
Size = Annotated[int | None, typer.Option("--size", help="Pixels a side; with --weights.")]


@app.command()
def train(recipe: str, overrides: Overrides = None, run: Run = ..., allow_pipe: Annotated[bool, typer.Option(
        "--allow-pipe", help="data.train may be pipe:COMMAND, a shell command of your own.")] = False) -> int:
    """Train RECIPE (a packaged name or a .yaml file) in a run folder; what the folder holds is resumed.

    One process, or one of several under torchrun or srun.
    """
    from hpcssl import run as runs
    from hpcssl.signals import StopFlag

    stop = StopFlag().install(keyboard=True)
    folder = RunDir(run)
    made = runs.resolve(recipe, overrides or [], folder, allow_pipe=allow_pipe)
    return runs.train(folder, made, stop=stop, allow_pipe=made.data.train if allow_pipe else "")


@app.command("eval")
def evaluate(name: str, overrides: Overrides = None, run: Annotated[Path | None, typer.Option("--run")] = None,
             weights: Weights = None,
             train: Annotated[Path | None, typer.Option(help="Shards to learn from.")] = None,
             val: Annotated[Path | None, typer.Option(help="Shards to score on.")] = None,
             devices: Annotated[str, typer.Option(help="cpu, gpu or auto.")] = "auto",
             step: Annotated[str, typer.Option(help="last, first or a number; with --run.")] = "last",
             layout: Annotated[str | None, typer.Option(help="Of the --weights file, where its keys do not tell.")]
             = None, encoder: Which = None, mean: Mean = None, std: Std = None, size: Size = None) -> int:
    """Evaluate a run's encoder, or a weights file, by NAME: knn, linear, finetune, svm, lowshot, transfer, detect.

    Asking again gives the row that is there.
    """
    from hpcssl import run as runs

    source = _source(weights, layout=layout, encoder=encoder, mean=mean, std=std, size=size)
    if run is not None:
        _existing(run)
    return runs.evaluate(name, overrides or [], run=run, weights=source, train=train, val=val, devices=devices,
                         step=step)


@app.command()
def export(to: Annotated[Path, typer.Option("--to", help="The file to write.")],
           run: Annotated[Path | None, typer.Option("--run", help="The run folder.")] = None, weights: Weights = None,
           layout: Annotated[str, typer.Option(help="hpcssl, torchvision, timm or detectron2.")] = "hpcssl",
           step: Annotated[str, typer.Option(help="last, first or a number; with --run.")] = "last",
           read_as: Annotated[str | None, typer.Option("--from", help="The layout of the --weights file.")] = None,
           encoder: Which = None, mean: Mean = None, std: Std = None, size: Size = None) -> None:
    """Write the encoder of a run, or of a weights file of ours or of another project, as one file for others to read.
    """
    from hpcssl.evals.run import weights_of
    from hpcssl.nets import exporters

    source = _source(weights, layout=read_as, encoder=encoder, mean=mean, std=std, size=size)
    if (run is None) == (source is None):
        raise ConfigError("hpcssl export", got="both or neither of --run and --weights", expected="one of them",
                          mend="--run DIR writes a run's encoder, --weights FILE any other one")
    exporters.export(source or weights_of(_existing(run), step), to, layout)
    print(to)


@app.command()
def digest(run: Annotated[Path, typer.Argument(help="The run folder.")]) -> None:
    """Print one sha256 of the newest checkpoint's whole state; it is the same for any world size."""
    from hpcssl.train.checkpoint import digest_of

    print(digest_of(_existing(run)))


@app.command()
def results(runs: Annotated[list[Path] | None, typer.Argument(help="Run folders.")] = None,
            write: Annotated[Path | None, typer.Option(help="Bring this RESULTS.md up to date as well.")] = None,
            as_csv: Annotated[bool, typer.Option("--csv")] = False,
            as_json: Annotated[bool, typer.Option("--json")] = False,
            steps: Annotated[bool, typer.Option(help="Tables with the encoders between the first and the last.")]
            = False,
            published: Annotated[bool, typer.Option("--published", help="What the papers print, instead.")] = False,
            plots: Annotated[Path | None, typer.Option(help="Draw learning curves into this folder, instead.")] = None,
            gallery: Annotated[Path | None, typer.Option(help="Draw validation images with their nearest training "
                                                              "images into this .png, of one run, instead.")] = None,
            ) -> None:
    """Tables and pictures of what runs measured, beside what the papers print."""
    from hpcssl.results import door as show

    show.main(runs or [], write=write, as_csv=as_csv, as_json=as_json, steps=steps, published=published, plots=plots,
              gallery=gallery)


@app.command()
def recipes(gpus: Annotated[int | None, typer.Option(min=1, help="Estimate the memory of one of so many.")] = None
            ) -> None:
    """List the packaged recipes with published score, global batch, epochs, bank and estimated GPU memory per rank."""
    from hpcssl import run as runs

    runs.list_recipes(gpus)


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


def _source(path: Path | None, **choices):
    """The ``Source`` that the options describe, or None without a file. Raises ``ConfigError``."""
    given = {name: value for name, value in choices.items() if value is not None}
    if path is None and given:
        raise ConfigError("hpcssl", got=", ".join(given) + " without --weights", expected="a file to read so",
                          mend="add --weights FILE; a run's own files say how they are read")
    if path is None:
        return None
    from hpcssl.nets.importers import Source

    for name in given.keys() & {"mean", "std"}:
        try:
            given[name] = tuple(float(number) for number in given[name].split(","))
        except ValueError as error:
            raise ConfigError(f"--{name}", got=repr(given[name]), expected="three numbers with commas",
                              mend=f"--{name} 0.5,0.5,0.5") from error
    return Source(path, **given)


def _existing(path: Path) -> RunDir:
    if not path.is_dir():
        raise ResumeError(f"run folder {path}", got="no such folder", expected="a folder that `hpcssl train` made",
                          mend="check the path")
    return RunDir(path)


def main(argv: list[str] | None = None) -> None:
    sys.exit(door.run(app, argv, "hpcssl"))
