"""``hpcssl track``: the journal of a run in an experiment tracker."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def track(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    to: Annotated[str, typer.Option("--to", metavar="mlflow|trackio|wandb", help="The tracker.")],
    project: Annotated[str, typer.Option(help="Project, or experiment of MLflow.")] = "hpcssl",
    where: Annotated[
        str,
        typer.Option(
            help="Address of the tracker, such as sqlite:///mlflow.db; offline for wandb; a folder for trackio."
        ),
    ] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep sending until the run is finished.")] = False,
    every: Annotated[float, typer.Option(min=1.0, metavar="SECONDS", help="Time between looks with --follow.")] = 60.0,
) -> None:
    """Send the journal of RUN to an experiment tracker: steps that a checkpoint covers, each exactly once.

    Run it on a login node, as often as needed, also while the run trains: it continues where it was.
    """
    from hpcssl import config
    from hpcssl.run_dir import open_run
    from hpcssl.tracking import backends, sender

    folder = open_run(run)
    tracker = backends.open_tracker(to, folder, config.read_yaml(folder.config), project=project, where=where)

    def write(count: int) -> None:
        sys.stdout.write(f"{folder.root}: {count} steps sent to {to}\n")
        sys.stdout.flush()

    if follow:
        sender.send_until_finished(folder, to, tracker, write, every=every)
    else:
        write(sender.send_pending(folder, to, tracker))
