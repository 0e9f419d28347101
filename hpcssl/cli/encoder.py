"""``hpcssl eval`` and ``hpcssl export``: what takes the encoder of a run, or a weights file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpcssl.cli.options import (
    Devices,
    EncoderName,
    Layout,
    Mean,
    OptionalRun,
    Size,
    Std,
    Step,
    Weights,
    chosen_encoder,
    print_next,
    weights_source,
)
from hpcssl.cli_runner import print_message
from hpcssl.distributed.launch import is_main_process
from hpcssl.errors import EXIT_DONE, EXIT_STOPPED, Stopped

if TYPE_CHECKING:
    from hpcssl.api import Records


def evaluate(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="knn, linear, finetune, svm, lowshot, transfer or detect.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options of the evaluation.")
    ] = None,
    run: OptionalRun = None,
    weights: Weights = None,
    train: Annotated[
        str | None, typer.Option(help="Folder or address of the shards to learn from; by default those of the run.")
    ] = None,
    val: Annotated[
        str | None, typer.Option(help="Folder or address of the shards to score on; by default those of the run.")
    ] = None,
    stage_dir: Annotated[
        str, typer.Option(help="Folder for the shards of an address; by default data.stage_dir of the run.")
    ] = "",
    devices: Devices = "auto",
    step: Step = "last",
    layout: Layout = None,
    encoder: EncoderName = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
) -> int:
    """Evaluate the encoder of a run, or a weights file.

    Identical evaluations return the stored result.
    """
    from hpcssl import api
    from hpcssl.signals import StopFlag

    source = weights_source(weights, layout=layout, encoder=encoder, mean=mean, std=std, size=size)
    stop = StopFlag().install(keyboard=True)  # to the end of the process
    try:
        rows = api.evaluate(
            name,
            *(overrides or []),
            run=run,
            weights=source,
            train=train,
            val=val,
            stage_dir=stage_dir,
            devices=devices,
            step=step,
            stop=stop,
        )
    except Stopped as stopped:
        if is_main_process():
            print_message(str(stopped))
        return EXIT_STOPPED
    if is_main_process():
        _print_scores(rows)
    return EXIT_DONE


def _print_scores(rows: Records) -> None:
    from hpcssl.evals.frozen.knn_options import ONE_LABEL

    for row in rows:
        scores = "\t".join(f"{k}={v:.2f}" for k, v in row["metrics"].items() if isinstance(v, float))
        which = row["weights"] if row["step"] is None else f"step={row['step']}"
        print(f"{row['eval']}\t{which}\t{scores}")
    if any("one_label" in row["metrics"] for row in rows):
        sys.stderr.write(f"one_label: {ONE_LABEL}\n")


def export(
    to: Annotated[Path, typer.Option("--to", help="File to write; a folder with --layout hf.")],
    run: OptionalRun = None,
    weights: Weights = None,
    layout: Annotated[
        str, typer.Option(help="Layout to write: hpcssl, torchvision, timm, detectron2, onnx or hf.")
    ] = "hpcssl",
    step: Step = "last",
    source_layout: Annotated[
        str | None,
        typer.Option("--from", help="Layout of the --weights file, if its keys do not identify it."),
    ] = None,
    encoder: EncoderName = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
) -> None:
    """Write the encoder of a run, or of a weights file, in a layout that other projects read."""
    source = weights_source(weights, layout=source_layout, encoder=encoder, mean=mean, std=std, size=size)
    chosen = chosen_encoder("hpcssl export", run, source, step)
    from hpcssl.inference import next_commands
    from hpcssl.inference.export import export as write

    write(chosen, to, layout)
    print(to)
    print_next(*next_commands.load_commands(chosen, to, layout))
