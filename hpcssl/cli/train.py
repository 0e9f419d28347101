"""``hpcssl train`` and ``hpcssl digest``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpcssl.cli.options import Overrides, Run, print_next
from hpcssl.errors import EXIT_DONE, EXIT_STOPPED, TrainingStopped
from hpcssl.run_dir import RunDir
from hpcssl.terminal.arguments import Parent, split_recipe

if TYPE_CHECKING:
    from hpcssl.signals import StopFlag


def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Name of a packaged recipe, or a .yaml file.")
    ] = None,
    overrides: Overrides = None,
    run: Run = ...,  # type: ignore[assignment]  # Typer's way to require an option after an optional argument
    parent: Parent = None,
    allow_pipe: Annotated[
        bool, typer.Option("--allow-pipe", help="Let data.train be pipe:COMMAND, which runs a shell command of yours.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Take a few steps, print speed, memory and length, and write nothing to the run folder."
        ),
    ] = False,
) -> int:
    """Train a recipe in a run folder, or resume the training that the folder holds.

    Run it as one process, or as one of several under srun or torchrun. torchrun has an option that begins with --run,
    and needs two dashes: torchrun --nproc-per-node 2 -m -- hpcssl train RECIPE --run DIR.
    """
    from hpcssl import api
    from hpcssl.data.address import is_remote
    from hpcssl.distributed.launch import is_main_process
    from hpcssl.signals import StopFlag
    from hpcssl.train.attempt.record import process_start

    stop = StopFlag().install(keyboard=True)  # to the end of the process
    name, values = split_recipe([*([recipe] if recipe else []), *(overrides or [])], parent)
    if dry_run:
        _dry_run(name, values, RunDir(run), parent, allow_pipe, stop)
        return EXIT_DONE
    source, began = (None if parent else name), process_start()
    try:
        trained = api.train(source, *values, run=run, parent=parent, allow_pipe=allow_pipe, stop=stop, began=began)
    except TrainingStopped:  # which the log has said
        return EXIT_STOPPED
    images = trained.config.data.train
    if is_main_process() and not is_remote(images):
        from hpcssl.inference.next_commands import embed_command

        print_next(*embed_command(run, Path(images)))
    return EXIT_DONE


def _dry_run(recipe: str, values: list[str], run: RunDir, parent: str | None, allow_pipe: bool, stop: StopFlag) -> None:
    """Build and measure what the same command without ``--dry-run`` would train."""
    from hpcssl.planning import dry_run
    from hpcssl.preparation import branches

    resolved, start = branches.resolve(recipe, values, run, parent=parent, allow_pipe=allow_pipe)
    report = dry_run.dry_run(
        resolved,
        run,
        stop=stop.is_set,
        allow_pipe=resolved.data.train if allow_pipe else "",
        first_step=start.saved.step if start else 0,
    )
    if report is not None:
        dry_run.print_report(report)


def digest(run: Run) -> None:
    """Print one sha256 of the whole state in the newest checkpoint; it is the same for any number of processes."""
    from hpcssl.api import Run as RunFolder

    print(RunFolder(run).digest)
