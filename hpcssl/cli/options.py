"""Options and arguments that several commands of ``hpcssl`` have, and what they stand for."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpcssl.errors import ConfigError, require_choice
from hpcssl.run_dir import RunDir

if TYPE_CHECKING:
    from hpcssl.nets.importers import WeightsSource


def _check_devices(value: str) -> str:
    require_choice("--devices", value, ("cpu", "gpu", "auto"))
    return value


Run = Annotated[Path, typer.Option("--run", help="Run folder.")]
OptionalRun = Annotated[Path | None, typer.Option("--run", help="Run folder.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe values to change.")]
Step = Annotated[
    str, typer.Option("--step", help="Which weights of the run: last, first or a number of steps; requires --run.")
]

Devices = Annotated[str, typer.Option("--devices", callback=_check_devices, help="cpu, gpu or auto.")]
# how to read a --weights file whose keys do not say it
Layout = Annotated[
    str | None, typer.Option("--layout", help="Layout of the --weights file, if its keys do not identify it.")
]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="Weights file of this project or of another known one.")
]
EncoderName = Annotated[
    str | None, typer.Option("--encoder", help="Encoder in the file: online or target; requires --weights.")
]
Mean = Annotated[
    str | None,
    typer.Option("--mean", metavar="R,G,B", help="Per-channel mean of the images in [0, 1]; requires --weights."),
]
Std = Annotated[
    str | None,
    typer.Option(
        "--std", metavar="R,G,B", help="Per-channel standard deviation of the images in [0, 1]; requires --weights."
    ),
]
Size = Annotated[
    int | None, typer.Option("--size", help="Width and height of the images in pixels; requires --weights.")
]


def weights_source(path: Path | None, **choices: Any) -> WeightsSource | None:
    """Return the ``WeightsSource`` that the options describe.

    Args:
        path: The file of ``--weights``; None without one.
        choices: The fields of ``WeightsSource`` by name; None for an option that was not given.

    Returns:
        None without a file.

    Raises:
        ConfigError: There is an option without a file, or a value that is no list of three numbers.
    """
    options = {name: value for name, value in choices.items() if value is not None}
    if path is None and options:
        raise ConfigError(
            "hpcssl",
            got=", ".join(f"--{name}" for name in options) + " without --weights",
            expected="a weights file that these options describe",
            fix="add --weights FILE; the files of a run need no description",
        )
    if path is None:
        return None
    if path.is_dir():
        raise ConfigError(
            f"--weights {path}",
            got="a folder",
            expected="a weights file",
            fix=f"for the encoder of a run, --run {path}; else name a file in the folder",
        )
    from hpcssl.nets.importers import WeightsSource

    for name in options.keys() & {"mean", "std"}:
        try:
            options[name] = tuple(float(number) for number in options[name].split(","))
        except ValueError as error:
            raise ConfigError(
                f"--{name}",
                got=repr(options[name]),
                expected="three numbers separated by commas",
                fix=f"--{name} 0.5,0.5,0.5",
            ) from error
    return WeightsSource(path, **options)


def chosen_encoder(command: str, run: Path | None, source: WeightsSource | None, step: str) -> WeightsSource | Path:
    """Return the weights file of ``--run`` and ``--step``, or the source of ``--weights``.

    Raises:
        ConfigError: Both are given, or neither; or a step of a file.
        EvalError: The run has no weights of this step.
        ResumeError: There is no such run.
    """
    if (run is None) == (source is None):
        raise ConfigError(
            command,
            got="both or neither of --run and --weights",
            expected="one of them",
            fix="--run DIR takes a run's encoder, --weights FILE that of any weights file",
        )
    if source is not None and step != "last":
        raise ConfigError(
            command,
            got=f"--step {step} with --weights",
            expected="a step only with --run, which has the weights of several steps",
            fix="leave --step out, or name the run with --run",
        )
    if source is not None:
        return source
    from hpcssl.nets.run_weights import find_weights

    assert run is not None
    return find_weights(existing_run(run), step)


def print_next(*words: object) -> None:
    """Print a useful next command to standard error, with its words quoted for a shell; nothing without words.

    Paths below the current folder are shortened.
    """
    here = Path.cwd()
    shown = [w.relative_to(here) if isinstance(w, Path) and w.is_relative_to(here) else w for w in words]
    if words:
        sys.stderr.write(f"Next: {shlex.join(map(str, shown))}\n")


def existing_run(path: Path) -> RunDir:
    """Return the run in a folder; raises ``ResumeError`` if there is none."""
    from hpcssl.api import Run as RunFolder

    return RunFolder(path).folder
