"""``hpcssl-shard``: the command line. Every command is a few lines around one function."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from data_prep import cli_images
from data_prep import cli_options as opt
from hpcssl import cli_runner
from hpcssl.errors import ConfigError, DataError
from hpcssl.terminal.help_pages import CommandGroup

app = typer.Typer(
    cls=CommandGroup,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    help="Write images as WebDataset shards with an index, choose parts of them, and check them.",
    epilog=cli_runner.EPILOG,
)


app.command()(cli_images.images)


@app.command()
def imagenet(
    train_tar: Annotated[
        Path, typer.Argument(metavar="TRAIN_TAR", help="ILSVRC2012_img_train.tar as downloaded: a tar of class tars.")
    ],
    val_tar: Annotated[Path, typer.Argument(metavar="VAL_TAR", help="ILSVRC2012_img_val.tar as downloaded: flat.")],
    out: Annotated[Path, opt.output("Writes OUT/train and OUT/val.")],
    labels: opt.Labels = None,
    devkit: Annotated[Path | None, typer.Option(help="ILSVRC2012_devkit_t12.tar.gz, instead of --labels.")] = None,
    samples_per_shard: opt.PerShard = 1000,
    workers: opt.Workers = None,
    seed: opt.Seed = 0,
    skip_bad: opt.SkipBad = 0,
    second_modality: opt.SecondModality = "none",
) -> None:
    """Write the two official archives of ImageNet, read without unpacking. --skip-bad counts for each of them."""
    from data_prep import build
    from data_prep.sources import imagenet as source
    from data_prep.sources.labels import read_devkit, read_labels

    options = build.WriteOptions(
        samples_per_shard=samples_per_shard,
        workers=workers,
        seed=seed,
        skip_bad=skip_bad,
        second_modality=second_modality,
    )
    if labels is not None and devkit is None:
        class_by_name, labels_file = read_labels(labels), labels
    elif devkit is not None and labels is None:
        class_by_name, labels_file = read_devkit(devkit), devkit
    else:
        raise ConfigError(
            "labels of the validation images",
            got="both --labels and --devkit" if labels else "none",
            expected="one of --labels FILE (`name class` lines) and --devkit FILE",
            fix="give ILSVRC2012_devkit_t12.tar.gz, which is on the same download page as the archives",
        )
    with ExitStack() as stack:
        works = {part: stack.enter_context(build.claim_folder(out / part)) for part in ("train", "val")}
        train = source.read_train(train_tar, works["train"] / "source.tar")
        val = source.read_val(val_tar, works["val"] / "source.tar", class_by_name, str(labels_file), train.classes)
        for part, catalog in (("train", train), ("val", val)):
            catalog.provenance.update(verb="imagenet", part=part)
            print(build.describe_summary(build.write_folder(works[part], catalog, options)))


@app.command()
def detection(
    name: Annotated[str, typer.Argument(metavar="voc|coco", help="voc: 07+12 trainval and 07 test; coco: 2017.")],
    src: Annotated[Path, opt.source("VOCdevkit, or the folder of train2017, val2017 and annotations.")],
    out: Annotated[Path, opt.output("Writes OUT/train and OUT/val.")],
    samples_per_shard: opt.PerShard = 1000,
    workers: opt.Workers = None,
    seed: opt.Seed = 0,
    skip_bad: opt.SkipBad = 0,
) -> None:
    """Write images with their boxes (and the masks of COCO) for `hpcssl eval detect`. --skip-bad counts per part."""
    from data_prep import build
    from data_prep.sources import detection as source

    options = build.WriteOptions(samples_per_shard=samples_per_shard, workers=workers, seed=seed, skip_bad=skip_bad)
    opt.refuse_nested(src, out)
    with ExitStack() as stack:
        works = {part: stack.enter_context(build.claim_folder(out / part)) for part in ("train", "val")}
        for part, catalog in source.read(name, src).items():
            catalog.provenance["part"] = part
            print(build.describe_summary(build.write_folder(works[part], catalog, options)))


@app.command()
def transfer(
    name: opt.TransferSet,
    src: Annotated[Path, opt.source("Folder to which the archives of the data set unpack.")],
    out: Annotated[Path, opt.output("Writes OUT/train, OUT/val and OUT/test with the published sizes.")],
    split: Annotated[int, typer.Option(help="Which published split: sun397 and dtd have 10, caltech101 5.")] = 1,
    partial: Annotated[bool, typer.Option("--partial", help="Allow fewer images than published, for a trial.")] = False,
    samples_per_shard: opt.PerShard = 1000,
    workers: opt.Workers = None,
    seed: opt.Seed = 0,
    skip_bad: opt.SkipBad = 0,
) -> None:
    """Write one of the transfer data sets with its published split. --skip-bad counts for each of the three parts."""
    from data_prep import build
    from data_prep.sources.transfer.data_sets import find_facts
    from data_prep.sources.transfer.read import read_data_set

    options = build.WriteOptions(samples_per_shard=samples_per_shard, workers=workers, seed=seed, skip_bad=skip_bad)
    facts = find_facts(name, split)
    opt.refuse_nested(src, out)
    with ExitStack() as stack:
        works = {folder: stack.enter_context(build.claim_folder(out / folder)) for folder in facts.folders}
        # images that must be encoded first go to the work folder that is removed last
        scratch = works[list(works)[-1]] / "source.tar"
        catalogs = read_data_set(name, src, scratch, seed=seed, split=split, partial=partial)
        for folder, catalog in catalogs.items():
            print(build.describe_summary(build.write_folder(works[folder], catalog, options)))


app.command()(cli_images.webdataset)


@app.command()
def digits(
    out: Annotated[Path, opt.output("Writes OUT/train (1,438 samples) and OUT/val (359).")],
    samples_per_shard: opt.PerShard = 200,
    workers: opt.Workers = 1,
    seed: opt.Seed = 0,
    second_modality: opt.SecondModality = "edges",
) -> None:
    """Write the 1,797 scanned digits of scikit-learn at 16x16, with their edges: real images without a download."""
    from data_prep import build
    from data_prep.sources import digits as source

    options = build.WriteOptions(
        samples_per_shard=samples_per_shard, workers=workers, seed=seed, second_modality=second_modality
    )
    with ExitStack() as stack:
        parts = source.split_digits()
        works = {part: stack.enter_context(build.claim_folder(out / part)) for part in parts}
        for part, numbers in parts.items():
            catalog = source.encode_digits(numbers, works[part] / "source.tar")
            catalog.provenance["part"] = part
            print(build.describe_summary(build.write_folder(works[part], catalog, options)))


@app.command()
def subset(
    src: Annotated[Path, opt.source("Shard folder to choose from.")],
    out: Annotated[Path, opt.output("Shard folder to write.")],
    list_: Annotated[Path | None, typer.Option("--list", help="Source names, keys or file names, by line.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of every class, drawn by --seed.")] = None,
    corrupt: Annotated[float | None, typer.Option(help="All samples, this share of labels wrong by --seed.")] = None,
    rest: Annotated[
        str,
        typer.Option(
            metavar="dropped|unlabeled", help="What becomes of the samples that --list or --fraction leave out."
        ),
    ] = "dropped",
    samples_per_shard: opt.PerShard = 1000,
    workers: opt.Workers = None,
    seed: opt.Seed = 0,
) -> None:
    """Write new shards out of old ones: a list, a share of every class, or all samples with corrupted labels.

    Samples that a list or a share leaves out are dropped, or kept without a label for semi-supervised training.
    """
    from data_prep import build
    from data_prep.subset import SubsetOptions, choose_samples
    from hpcssl.data.shards import ShardSet

    options = build.WriteOptions(samples_per_shard=samples_per_shard, workers=workers, seed=seed)
    choice = SubsetOptions(list=list_, fraction=fraction, corrupt=corrupt, rest=rest)
    opt.refuse_nested(src, out)
    shards = ShardSet.open(src)
    with build.claim_folder(out) as work:
        print(build.describe_summary(build.write_folder(work, choose_samples(shards, choice, seed), options)))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Shard folder.")],
    quick: Annotated[bool, typer.Option("--quick", help="Names, sizes, labels, offsets; no image is read.")] = False,
    workers: opt.Workers = None,
) -> None:
    """Compare a shard folder with its index; names each damaged shard and sample, and then exits with 1."""
    from data_prep.catalog.names import format_examples
    from data_prep.verify import describe_success, verify_folder

    shards, problems = verify_folder(folder, quick=quick, workers=workers)
    for problem in problems:
        print(problem)
    if problems:
        names = sorted({p.shard for p in problems})
        raise DataError(
            f"shard folder {shards.root}",
            got=f"{len(problems)} problems in {len(names)} files ({format_examples(names, 5)})",
            expected="what its index records",
            fix="run the command that wrote it again: damaged shards are written again, the others are kept",
        )
    print(describe_success(shards, quick=quick))


@app.command()
def page_index(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Shard folder.")]) -> None:
    """Replace index.npy by one small file per shard, for sets of tens of millions of images.

    A training then holds no entry per image in memory, and downloads the entries of a shard with the shard. Do it
    before the first run: the digest of the set changes, so that a run that was started before cannot continue on it.
    """
    from data_prep import pages

    shards = pages.page_index(folder)
    print(f"{shards.root}: {len(shards)} samples, an index of {len(shards.shards)} pages")


@app.command()
def show(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Shard folder.")]) -> None:
    """Counts, classes and sizes: tables on a terminal, one record per line on a pipe."""
    from data_prep.show import make_tables, read_records

    if not sys.stdout.isatty():
        for record in read_records(folder):
            print(*record, sep="\t")
        return
    from rich.console import Console

    console = Console()
    for table in make_tables(read_records(folder), str(folder)):
        console.print(table)


def main(argv: list[str] | None = None) -> None:
    """Run ``hpcssl-shard`` and exit with its code.

    Args:
        argv: Arguments without the program's name; None for those of this process.
    """
    argv = sys.argv[1:] if argv is None else argv
    sys.exit(cli_runner.run(app, argv or ["--help"], "hpcssl-shard"))
