"""``hpcssl-shard images`` and ``webdataset``: images of the user, whole or divided into train and val."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep import cli_options as opt
from hpcssl.errors import DataError

if TYPE_CHECKING:
    from data_prep.build import WriteOptions
    from data_prep.catalog import Catalog
    from data_prep.split import SplitOptions


def images(
    src: Annotated[
        Path,
        opt.source(
            "Folder of images in any layout, a .tar[.gz|.xz] of one, Parquet or Arrow files, what save_to_disk wrote, "
            "or a .csv list."
        ),
    ],
    out: Annotated[Path, opt.output("Folder to write; the same command continues an unfinished one.")],
    subdir: opt.Subdir = "",
    part: opt.Part = "",
    image: opt.ImageColumn = None,
    label: opt.LabelColumn = None,
    labels: opt.Labels = None,
    multi_label: opt.MultiLabel = False,
    classes_from: opt.ClassesFrom = "auto",
    classes: opt.Classes = None,
    val: opt.Val = None,
    group_by: opt.GroupBy = "none",
    dedup: opt.Dedup = False,
    dedup_distance: opt.DedupDistance = None,
    min_side: opt.MinSide = 1,
    samples_per_shard: opt.PerShard = 1000,
    workers: opt.Workers = None,
    seed: opt.Seed = 0,
    skip_bad: opt.SkipBad = 0,
    second_modality: opt.SecondModality = "none",
) -> None:
    """Write images in any layout, with or without classes. Files that are left out are listed in OUT/left_out.csv."""
    from data_prep import build
    from data_prep.sources import own_images
    from data_prep.sources.labels import Columns
    from data_prep.split import SplitOptions

    options = build.WriteOptions(
        samples_per_shard=samples_per_shard,
        workers=workers,
        seed=seed,
        skip_bad=skip_bad,
        second_modality=second_modality,
        min_side=min_side,
    )
    split = SplitOptions(val=val, group_by=group_by, dedup=dedup, dedup_distance=dedup_distance)
    reading = own_images.SourceOptions(
        subdir=subdir,
        part=part,
        columns=Columns(image=image, label=label, multi_label=multi_label),
        labels=labels,
        classes=classes,
        classes_from=classes_from,
    )
    opt.refuse_nested(src, out)
    with ExitStack() as stack:
        works = _claim(stack, out, split)
        catalog, sentence = own_images.read_source(src, works[-1] / "source.tar", reading)
        print(f"{src}: {len(catalog.samples)} images, {sentence}", flush=True)
        _write(out, works, catalog, options, split)


def webdataset(
    src: Annotated[
        Path, opt.source("Folder of tars of other tools: an image in KEY.jpg, .png, .webp ... of each KEY.")
    ],
    out: Annotated[Path, opt.output("Folder to write; the same command continues an unfinished one.")],
    label: Annotated[
        str, typer.Option(metavar="cls|json:FIELD", help="The labels: KEY.cls, a number, or a field of KEY.json.")
    ] = "cls",
    classes: opt.Classes = None,
    val: opt.Val = None,
    dedup: opt.Dedup = False,
    dedup_distance: opt.DedupDistance = None,
    min_side: opt.MinSide = 1,
    samples_per_shard: opt.PerShard = 1000,
    workers: opt.Workers = None,
    seed: opt.Seed = 0,
    skip_bad: opt.SkipBad = 0,
    second_modality: opt.SecondModality = "none",
) -> None:
    """Write shards with an index from WebDataset tars without one; scattered members of a sample are joined."""
    from data_prep import build
    from data_prep.sources import webdataset as source
    from data_prep.split import SplitOptions

    options = build.WriteOptions(
        samples_per_shard=samples_per_shard,
        workers=workers,
        seed=seed,
        skip_bad=skip_bad,
        second_modality=second_modality,
        min_side=min_side,
    )
    split = SplitOptions(val=val, dedup=dedup, dedup_distance=dedup_distance)
    opt.refuse_nested(src, out)
    with ExitStack() as stack:
        works = _claim(stack, out, split)
        catalog = source.read(src, classes, label)
        catalog.provenance["verb"] = "webdataset"
        _write(out, works, catalog, options, split)


def _claim(stack: ExitStack, out: Path, split: SplitOptions) -> list[Path]:
    """Claim OUT, or OUT/train and OUT/val. What lies in the last work folder stays until everything is written."""
    from data_prep import build
    from hpcssl.data.shards import INDEX

    if split.val is None:
        return [stack.enter_context(build.claim_folder(out))]
    if (out / INDEX).exists():
        raise DataError(
            f"OUT {out}",
            got="shards that are not divided into train and val",
            expected="a new folder, or one that this command began",
            fix="choose another OUT, or leave --val out",
        )
    return [stack.enter_context(build.claim_folder(out / part)) for part in ("train", "val")]


def _write(out: Path, works: list[Path], catalog: Catalog, options: WriteOptions, split: SplitOptions) -> None:
    """Write a catalog, divided if ``split`` says so, and print what was written and how to go on."""
    from data_prep import build, index
    from data_prep.catalog import Catalog
    from data_prep.next_commands import next_commands
    from data_prep.split import remove_near_duplicates, split_catalog

    left_out = list(catalog.left_out)
    if sum(file.broken for file in left_out) > options.skip_bad:  # before hours of writing
        index.check_broken(left_out, options.skip_bad)
    parts = {"": catalog} if split.val is None else split_catalog(catalog, split, options.seed)
    if split.dedup:
        duplicates = remove_near_duplicates(parts, split, options.workers)
        left_out += duplicates
        print(f"{len(duplicates)} images of train are near-duplicates of an image of val, and are left out", flush=True)
    folders = [
        build.write_shards(work, Catalog(part.classes, part.samples, part.provenance), options)
        for work, part in zip(works, parts.values(), strict=True)
    ]
    left_out += [image for folder in folders for image in folder.rejected]
    index.write_left_out(out, left_out)
    index.check_broken(left_out, options.skip_bad)
    summaries = [build.write_index(folder) for folder in folders]
    for summary in summaries:
        print(build.describe_summary(summary))
    print("Next:")
    for command in next_commands([summary.out for summary in summaries]):
        print(f"  {command}")
