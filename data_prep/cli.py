"""``hpcssl-shard``: the command line. Every verb is a few lines around one function."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from hpcssl import door
from hpcssl.errors import ConfigError, DataError

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Write images as WebDataset shards with an index, choose parts of them, and check them.",
)

PerShard = Annotated[int, typer.Option(help="Samples in each shard; the last one holds the rest.")]
Workers = Annotated[int | None, typer.Option(help="Processes; by default one per usable core. Changes no byte.")]
Seed = Annotated[int, typer.Option(help="Of the order of the samples, and of what a subset or a held-out part draws.")]
SkipBad = Annotated[int, typer.Option(help="Leave out up to this many images that cannot be decoded, and list them.")]
Second = Annotated[str, typer.Option(metavar="edges|none", help="Second modality to compute for each image: edges, a "
                                     "surrogate that adds a byte per pixel.")]
Labels = Annotated[Path | None, typer.Option(help="Lines `name class`, for images without class folders.")]
Classes = Annotated[Path | None, typer.Option(help="Class names, one per line: their order gives the class numbers.")]


@app.command()
def images(
    src: Annotated[Path, typer.Argument(help="Folder SRC/CLASS/**.jpg|jpeg|png, or a .tar, .tar.gz, .tar.xz of one.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; the same command continues an unfinished one.")],
    under: Annotated[str, typer.Option(help="Sub-folder of SRC that holds the class folders, such as train.")] = "",
    samples_per_shard: PerShard = 1000, workers: Workers = None, seed: Seed = 0, classes: Classes = None,
    labels: Labels = None, skip_bad: SkipBad = 0, second: Second = "none",
) -> None:
    """Write a folder (or a tar) of images: one folder per class, or any tree with --labels."""
    from data_prep import build, catalogue, sources
    from data_prep.labels import read_labels

    options = build.Options(samples_per_shard=samples_per_shard, workers=workers, seed=seed, skip_bad=skip_bad,
                            second=second)
    _refuse_inside(src, out)
    named = read_labels(labels) if labels else None
    with build.claim(out) as work:
        found = sources.find(src, under, work / "source.tar")
        if named is None:
            todo = catalogue.by_folder(found, classes)
        else:
            todo = catalogue.by_labels(found, named, str(labels), classes_file=classes)
        todo.made["verb"] = "images"
        print(build.describe(build.write(work, todo, options)))


@app.command()
def imagenet(
    train_tar: Annotated[Path, typer.Argument(help="ILSVRC2012_img_train.tar as downloaded: a tar of class tars.")],
    val_tar: Annotated[Path, typer.Argument(help="ILSVRC2012_img_val.tar as downloaded: flat.")],
    out: Annotated[Path, typer.Argument(help="Writes OUT/train and OUT/val.")],
    labels: Labels = None,
    devkit: Annotated[Path | None, typer.Option(help="ILSVRC2012_devkit_t12.tar.gz, instead of --labels.")] = None,
    samples_per_shard: PerShard = 1000, workers: Workers = None, seed: Seed = 0, skip_bad: SkipBad = 0,
    second: Second = "none",
) -> None:
    """Write the two official archives of ImageNet, read without unpacking. --skip-bad counts for each of them."""
    from data_prep import build, sources
    from data_prep.labels import read_devkit, read_labels

    options = build.Options(samples_per_shard=samples_per_shard, workers=workers, seed=seed, skip_bad=skip_bad,
                            second=second)
    if (labels is None) == (devkit is None):
        raise ConfigError("labels of the validation images", got="both --labels and --devkit" if labels else "none",
                          expected="one of --labels FILE (`name class` lines) and --devkit FILE",
                          mend="give ILSVRC2012_devkit_t12.tar.gz, which lies beside the archives on the download page")
    named = read_labels(labels) if labels else read_devkit(devkit)
    with ExitStack() as stack:
        works = {part: stack.enter_context(build.claim(out / part)) for part in ("train", "val")}
        todo = {"train": sources.imagenet_train(train_tar, works["train"] / "source.tar")}
        todo["val"] = sources.imagenet_val(val_tar, works["val"] / "source.tar", named, str(labels or devkit),
                                           todo["train"].classes)
        for part, work in works.items():
            todo[part].made.update(verb="imagenet", part=part)
            print(build.describe(build.write(work, todo[part], options)))


@app.command()
def detection(
    name: Annotated[str, typer.Argument(metavar="voc|coco", help="voc: 07+12 trainval and 07 test; coco: 2017.")],
    src: Annotated[Path, typer.Argument(help="VOCdevkit, or the folder of train2017, val2017 and annotations.")],
    out: Annotated[Path, typer.Argument(help="Writes OUT/train and OUT/val.")],
    samples_per_shard: PerShard = 1000, workers: Workers = None, seed: Seed = 0, skip_bad: SkipBad = 0,
) -> None:
    """Write pictures with their boxes (and COCO's masks) for `hpcssl eval detect`. --skip-bad counts for each part."""
    from data_prep import boxes, build

    options = build.Options(samples_per_shard=samples_per_shard, workers=workers, seed=seed, skip_bad=skip_bad)
    _refuse_inside(src, out)
    with ExitStack() as stack:
        works = {part: stack.enter_context(build.claim(out / part)) for part in ("train", "val")}
        for part, todo in boxes.read(name, src).items():
            todo.made["part"] = part
            print(build.describe(build.write(works[part], todo, options)))


@app.command()
def transfer(
    name: Annotated[str, typer.Argument(metavar="NAME", help="food101, cifar10, cifar100, birdsnap, sun397, cars, "
                                        "aircraft, voc07, dtd, pets, caltech101 or flowers.")],
    src: Annotated[Path, typer.Argument(help="Folder that the data set's archives unpack to, as published.")],
    out: Annotated[Path, typer.Argument(help="Writes OUT/train, OUT/val and OUT/test with the published sizes.")],
    split: Annotated[int, typer.Option(help="Which published split: sun397 and dtd have 10, caltech101 5.")] = 1,
    partial: Annotated[bool, typer.Option("--partial", help="Allow fewer images than published, for a trial.")] = False,
    samples_per_shard: PerShard = 1000, workers: Workers = None, seed: Seed = 0, skip_bad: SkipBad = 0,
) -> None:
    """Write one of the transfer data sets with its published split. --skip-bad counts for each of the three parts."""
    from data_prep import build
    from data_prep import transfer as sets

    options = build.Options(samples_per_shard=samples_per_shard, workers=workers, seed=seed, skip_bad=skip_bad)
    sets.check(name, split)
    _refuse_inside(src, out)
    with ExitStack() as stack:
        works = {part: stack.enter_context(build.claim(out / part)) for part in sets.check(name, split).parts}
        # what must be encoded first lies in the last part's work folder, which outlives those of the others
        parts = sets.read(name, src, works[list(works)[-1]] / "source.tar", seed=seed, split=split, partial=partial)
        for part, todo in parts.items():
            print(build.describe(build.write(works[part], todo, options)))


@app.command()
def webdataset(
    src: Annotated[Path, typer.Argument(help="Folder of tars that others wrote: KEY.jpg|png with KEY.cls, a number.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; the same command continues an unfinished one.")],
    samples_per_shard: PerShard = 1000, workers: Workers = None, seed: Seed = 0, classes: Classes = None,
    skip_bad: SkipBad = 0, second: Second = "none",
) -> None:
    """Write shards with an index from WebDataset tars without one; members that lie apart are joined."""
    from data_prep import build
    from data_prep import webdataset as others

    options = build.Options(samples_per_shard=samples_per_shard, workers=workers, seed=seed, skip_bad=skip_bad,
                            second=second)
    _refuse_inside(src, out)
    with build.claim(out) as work:
        todo = others.read(src, classes)
        todo.made["verb"] = "webdataset"
        print(build.describe(build.write(work, todo, options)))


@app.command()
def digits(
    out: Annotated[Path, typer.Argument(help="Writes OUT/train (1,438 samples) and OUT/val (359).")],
    samples_per_shard: PerShard = 200, workers: Workers = 1, seed: Seed = 0, second: Second = "edges",
) -> None:
    """Write scikit-learn's 1,797 scanned digits at 16x16, with their edges: real images that need no download."""
    from data_prep import build
    from data_prep import digits as scans

    options = build.Options(samples_per_shard=samples_per_shard, workers=workers, seed=seed, second=second)
    with ExitStack() as stack:
        parts = scans.split()
        works = {part: stack.enter_context(build.claim(out / part)) for part in parts}
        for part, members in parts.items():
            todo = scans.catalogue(members, works[part] / "source.tar")
            todo.made["part"] = part
            print(build.describe(build.write(works[part], todo, options)))


@app.command()
def subset(
    src: Annotated[Path, typer.Argument(help="Shard folder to choose from.")],
    out: Annotated[Path, typer.Argument(help="Shard folder to write.")],
    list_: Annotated[Path | None, typer.Option("--list", help="Source names, keys or file names, by line.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of every class, drawn by --seed.")] = None,
    corrupt: Annotated[float | None, typer.Option(help="All samples, this share of labels wrong by --seed.")] = None,
    rest: Annotated[str, typer.Option(metavar="dropped|unlabelled", help="What becomes of the samples that --list or "
                                      "--fraction leave out.")] = "dropped",
    samples_per_shard: PerShard = 1000, workers: Workers = None, seed: Seed = 0,
) -> None:
    """Write new shards out of old ones: a list or a share of every class (the rest dropped, or kept without its label,
    for semi-supervised training), or all with corrupted labels."""
    from data_prep import build
    from data_prep import subset as parts
    from hpcssl.data.shards import ShardSet

    options = build.Options(samples_per_shard=samples_per_shard, workers=workers, seed=seed)
    choice = parts.Choice(list=list_, fraction=fraction, corrupt=corrupt, rest=rest)
    _refuse_inside(src, out)
    found = ShardSet.open(src)
    with build.claim(out) as work:
        print(build.describe(build.write(work, parts.choose(found, choice, seed), options)))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Shard folder.")],
    quick: Annotated[bool, typer.Option("--quick", help="Names, sizes, labels, offsets; no byte is read.")] = False,
    workers: Workers = None,
) -> None:
    """Compare a shard folder with its index; names each damaged shard and sample, and then exits with 1."""
    from data_prep import verify as checks

    found, problems = checks.verify(folder, quick=quick, workers=workers)
    for problem in problems:
        print(problem)
    if problems:
        shards = sorted({p.shard for p in problems})
        raise DataError(f"shard folder {found.root}", got=f"{len(problems)} problems in {len(shards)} files "
                        f"({', '.join(shards[:5])}{', …' if len(shards) > 5 else ''})",
                        expected="what its index records",
                        mend="run the command that wrote it again: what is damaged is written again, the rest is kept")
    how = "sizes, labels and offsets agree" if quick else "every byte agrees and every image decodes"
    print(f"{found.root}: {len(found)} samples of {len(found.classes)} classes in {len(found.shards)} shards; {how}")


@app.command()
def show(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Shard folder.")]) -> None:
    """Counts, classes and sizes: tables on a terminal, one record per line on a pipe."""
    from data_prep.show import records, tables

    if not sys.stdout.isatty():
        for record in records(folder):
            print(*record, sep="\t")
        return
    from rich.console import Console

    console = Console()
    for table in tables(records(folder), str(folder)):
        console.print(table)


def _refuse_inside(src: Path, out: Path) -> None:
    """OUT inside SRC would be read as a class next time; SRC inside OUT would be mixed with the shards."""
    a, b = src.resolve(), out.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise ConfigError(f"OUT {out}", got=f"a folder that is, lies in or holds SRC {src}",
                          expected="a folder beside the source", mend="choose another OUT")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    sys.exit(door.run(app, argv or ["--help"], "hpcssl-shard"))
