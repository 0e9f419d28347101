"""Options that several commands of ``hpcssl-shard`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hpcssl.errors import ConfigError


def source(text: str) -> Any:
    """The argument SRC of a command, with its help text."""
    return typer.Argument(metavar="SRC", help=text)


def output(text: str) -> Any:
    """The argument OUT of a command, with its help text."""
    return typer.Argument(metavar="OUT", help=text)


PerShard = Annotated[int, typer.Option(help="Samples in each shard; the last one holds the rest.")]
Workers = Annotated[int | None, typer.Option(help="Processes; by default one per usable core. The output is the same.")]
Seed = Annotated[int, typer.Option(help="Seed of the sample order, and of the draws of subsets and held-out parts.")]
SkipBad = Annotated[int, typer.Option(help="Leave out up to this many images that cannot be decoded, and list them.")]
SecondModality = Annotated[
    str,
    typer.Option(
        metavar="edges|none",
        help="Second modality to compute for each image: edges, a surrogate that adds a byte per pixel.",
    ),
]
TransferSet = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="food101, cifar10|100, birdsnap, sun397, cars, aircraft, voc07, dtd, pets, caltech101 or flowers.",
    ),
]
Labels = Annotated[
    Path | None, typer.Option(help="Lines `name class`, or a .csv or .tsv list, for images without class folders.")
]
Subdir = Annotated[str, typer.Option(help="Folder in SRC whose images are meant, such as train.")]
Part = Annotated[str, typer.Option(help="Part of a table with several, such as train.")]
ImageColumn = Annotated[str | None, typer.Option("--image", help="Column of the images in a table or a list.")]
LabelColumn = Annotated[str | None, typer.Option("--label", help="Column of the labels in a table or a list.")]
MultiLabel = Annotated[
    bool, typer.Option("--multi-label", help="Several labels per image: separated by ; or |, or in several rows.")
]
ClassesFrom = Annotated[
    str,
    typer.Option(
        metavar="auto|folders|none",
        help="Classes from the first folder of each name. auto: if each image lies exactly one folder below SRC.",
    ),
]
Val = Annotated[
    float | None, typer.Option(help="Write OUT/train and OUT/val with this share, by --seed, of every class.")
]
GroupBy = Annotated[
    str, typer.Option(metavar="folder|none", help="Keep the images of one folder in one part, with --val.")
]
Dedup = Annotated[
    bool, typer.Option("--dedup", help="Leave images of train out that nearly equal an image of val, with --val.")
]
DedupDistance = Annotated[
    int | None, typer.Option(help="With --dedup: bits, of 64, in which perceptual hashes may differ; by default 4.")
]
MinSide = Annotated[int, typer.Option(help="Leave out images whose smaller side has fewer pixels, and list them.")]
Classes = Annotated[Path | None, typer.Option(help="Class names, one per line: their order gives the class numbers.")]


def refuse_nested(src: Path, out: Path) -> None:
    """Refuse OUT inside SRC, which would be read as a class next time, and SRC inside OUT.

    Args:
        src: The source.
        out: The folder to write.

    Raises:
        ConfigError: One lies in the other.
    """
    a, b = src.resolve(), out.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise ConfigError(
            f"OUT {out}",
            got=f"a folder that is, lies in or holds SRC {src}",
            expected="a folder beside the source",
            fix="choose another OUT",
        )
