"""``hpcssl embed`` and ``hpcssl search``: what an encoder is used for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

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
from hpcssl.errors import ConfigError


def embed(
    images: Annotated[Path, typer.Argument(metavar="IMAGES|SHARDS", help="Folder of images, or a shard folder.")],
    to: Annotated[Path, typer.Option("--to", help="File to write: .parquet, or .npy with a .npy.csv of names.")],
    run: OptionalRun = None,
    weights: Weights = None,
    step: Step = "last",
    batch: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 128,
    devices: Devices = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    normalize: Annotated[
        bool, typer.Option("--normalize/--no-normalize", help="Whether to scale features to unit length.")
    ] = False,
    skip_bad: Annotated[
        int, typer.Option(min=0, help="Number of images that may be damaged; they are listed, and have no row.")
    ] = 0,
    layout: Layout = None,
    encoder: EncoderName = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
) -> None:
    """Write the features of images, in any layout of folders or in shards.

    The same command continues one that was killed, and the file is the same.
    """
    source = weights_source(weights, layout=layout, encoder=encoder, mean=mean, std=std, size=size)
    chosen = chosen_encoder("hpcssl embed", run, source, step)
    from hpcssl.inference.embed import embed as compute
    from hpcssl.journal import set_up_logging
    from hpcssl.signals import StopFlag

    stop = StopFlag().install(keyboard=True)
    set_up_logging()
    result = compute(
        chosen,
        images,
        to,
        batch=batch,
        devices=devices,
        precision=precision,
        normalize=normalize,
        skip_bad=skip_bad,
        stop=stop.is_set,
    )
    print(f"{to}\t{len(result)} images")
    print_next("hpcssl", "search", to, "--row", 0, "--to", to.with_name(f"{to.stem}-hits.png"))


def search(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File that `hpcssl embed` wrote.")],
    query: Annotated[
        list[Path] | None, typer.Option("--query", metavar="IMAGE", help="Image to search for; may be repeated.")
    ] = None,
    row: Annotated[int | None, typer.Option(help="Row of FILE to search for, from 0.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of images to find.")] = 8,
    to: Annotated[Path | None, typer.Option("--to", help="Picture to draw, .png.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Where the images of FILE lie now, if not where they were; for --to.")
    ] = None,
    run: OptionalRun = None,
    weights: Weights = None,
    step: Step = "last",
    devices: Devices = "auto",
) -> None:
    """Find the images that are nearest to an image, by the cosine of their features.

    A query is embedded with the weights that FILE records; --run or --weights name the place where they lie now.
    """
    if bool(query) == (row is not None):
        raise ConfigError(
            "hpcssl search",
            got="both or neither of --query and --row",
            expected="one of them",
            fix="--query IMAGE searches for an image file, --row 0 for the first image of the features",
        )
    for has_no_effect, got, fix in (
        (query is None and (run is not None or weights is not None), "--run or --weights with --row", "leave them out"),
        (query is None and devices != "auto", f"--devices {devices} with --row", "leave it out"),
        (run is None and weights is None and step != "last", f"--step {step} without --run", "add --run RUN"),
        (images is not None and to is None, "--images without --to", "add --to PICTURE.png, or leave it out"),
    ):
        if has_no_effect:
            raise ConfigError("hpcssl search", got=got, expected="only options that have an effect", fix=fix)
    source = weights_source(weights)
    chosen = None if run is None and source is None else chosen_encoder("hpcssl search", run, source, step)
    from hpcssl.inference import embeddings, search
    from hpcssl.inference.next_commands import export_commands
    from hpcssl.terminal.tables import print_table

    table = embeddings.read(file)
    if row is not None:
        hits = search.search_row(table, row, top)
    else:
        hits = search.search_images(table, query or [], top, weights=chosen, devices=devices)
    if to is not None:
        search.draw_hits(table, hits, images, to, row=row)
    head, lines = ["query", "rank", "cosine", "row", "image"], []
    for at, name in enumerate(hits.queries):
        for rank, (hit, cosine) in enumerate(zip(hits.rows[at], hits.similarity[at], strict=True), 1):
            lines.append([name, str(rank), f"{cosine:.4f}", str(hit), table.keys[hit]])
    if sys.stdout.isatty():
        print_table(head, lines)
    else:
        sys.stdout.writelines("\t".join(line) + "\n" for line in [head, *lines])
    print_next(*export_commands(table.metadata))
