"""``hpcssl init``: a recipe that fits a data set and a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="Folder that hpcssl-shard wrote: shards, or shards in train/ and val/."),
    ],
    method: Annotated[
        str, typer.Option(help="msf, cmsf_2q, nnclr, nnsiam, simclr, byol, simsiam, moco_v2, swav, ...")
    ] = "msf",
    gpus: Annotated[
        int | None, typer.Option(min=0, help="Number of GPUs; by default all of this machine. 0: the CPU.")
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(help="Length of the training. A few steps are taken to find out how many epochs fit."),
    ] = None,
) -> None:
    """Print a recipe that fits DATA and this machine, with the reason for each value: hpcssl init DATA > mine.yaml."""
    from hpcssl.planning import init as inits

    result = inits.make_recipe(data, method=method, gpus=gpus, hours=hours)
    inits.print_result(result, data)
