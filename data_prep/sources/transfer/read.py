"""Read a transfer data set: find its layout, read its lists, locate its images, compare with the published sizes."""

from __future__ import annotations

import csv
import json
import logging
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.catalog import WHOLE_FILE, Catalog, Sample
from data_prep.catalog.names import check_distinct_keys, format_examples
from data_prep.shards import images
from data_prep.sources.transfer.data_sets import PARTS, DataSetFacts, find_facts
from data_prep.sources.transfer.hold_out import hold_out_val
from data_prep.sources.transfer.layout import EncodedImages, Item, Layout, Listing, Source, find_marker
from hpcssl.data.image_files import formats
from hpcssl.errors import DataError

LOG = logging.getLogger("hpcssl")


def read_data_set(
    name: str, src: Path, scratch: Path, *, seed: int = 0, split: int = 1, partial: bool = False
) -> dict[str, Catalog]:
    """Read one of the transfer data sets.

    Args:
        name: Its name.
        src: The folder to which its archives unpack.
        scratch: File for images that must be encoded first.
        seed: Seed of what is held out for validation.
        split: The published split, from 1.
        partial: Whether images may be missing, as for a trial.

    Returns:
        The catalogs of train, val and test (and trainval of voc07), with the same classes.

    Raises:
        ConfigError: There is no such data set or split.
        DataError: Something is missing or does not fit.
    """
    facts = find_facts(name, split)
    layout, home = _find_layout(name, facts, src, split)
    with open(scratch, "wb") as file:
        source = Source(home, split, EncodedImages(file))
        try:
            listing = layout.read(source)
            _check_listing(listing)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError, csv.Error) as error:
            raise DataError(
                f"lists of {name} in {home}",
                got=f"something that cannot be understood ({type(error).__name__}: {error})",
                expected="the lists as published",
                fix=f"download them again from {facts.page}",
            ) from error
        samples, missing = _locate_images(listing.items, source)
    if missing and not partial:
        raise DataError(
            f"{name} in {home}",
            got=f"{len(missing)} of {len(listing.items)} listed images missing ({format_examples(missing)})",
            expected="every image",
            fix=f"unpack or download it again ({facts.page}), or give --partial for a trial with what is there",
        )
    items = [item for item in listing.items if item.source in samples]
    complete = not missing and len(items) == sum(facts.sizes)
    if facts.val != "list":
        items = hold_out_val(items, facts, name, seed, complete)
    _check_sizes(name, home, facts, listing.classes, items, partial)
    check_distinct_keys([item.source for item in items], home)
    provenance: dict[str, Any] = {"verb": "transfer", "dataset": name}
    provenance |= {"split": split} if facts.splits > 1 else {}
    provenance |= {} if complete else {"partial": True}
    return {
        folder: Catalog(
            listing.classes,
            sorted(samples[item.source] for item in items if item.part in parts),
            {**provenance, "part": folder},
        )
        for folder, parts in facts.folders.items()
    }


def _find_layout(name: str, facts: DataSetFacts, src: Path, split: int) -> tuple[Layout, Path]:
    """Return the layout that ``src`` has, and the folder that holds its markers. Raises DataError."""
    what, fix = f"{name} in {src}", f"unpack what {facts.page} offers, and give the folder that holds all of it"
    if not src.is_dir():
        raise DataError(
            what,
            got="a file" if src.exists() else "no such folder",
            expected="the unpacked archive",
            fix=fix if src.exists() else "check the path",
        )
    candidates: list[tuple[Path, list[str]]] = []  # folders, and the markers that each lacks
    for published in facts.layouts:
        layout = replace(published, markers=tuple(marker.format(split=split) for marker in published.markers))
        for home in (src, *(src / home for home in layout.homes)):
            missing = [marker for marker in layout.markers if find_marker(home, marker) is None]
            if not missing:
                return layout, home.absolute()
            candidates.append((home, missing))
    _refuse_pickles(what, src)
    home, missing = min(candidates, key=lambda candidate: len(candidate[1]))
    entries = sorted(os.listdir(home if home.is_dir() else src))
    examples = format_examples([marker.partition("|")[0] for marker in missing])
    raise DataError(
        what,
        got=f"no {examples} (it holds {format_examples(entries) or 'nothing'})",
        expected="the folder as published",
        fix=fix,
    )


def _refuse_pickles(what: str, src: Path) -> None:
    """Refuse the Python version of CIFAR: its files are pickles, and loading a pickle may run any program in it."""
    for home in (src, src / "cifar-10-batches-py", src / "cifar-100-python"):
        if (home / "data_batch_1").is_file() or ((home / "meta").is_file() and (home / "train").is_file()):
            raise DataError(
                what,
                got="the Python version, pickled: reading a pickle can run any program",
                expected="the binary version, or folders train/CLASS and test/CLASS of images",
                fix="download the file named `…-binary.tar.gz` from the same page and unpack it",
            )


def _check_listing(listing: Listing) -> None:
    """Raise ValueError for a label, a target or a name that the lists of a data set cannot hold."""
    for item in listing.items:
        if item.targets is None and not 0 <= item.label < len(listing.classes):
            raise ValueError(f"{item.source} is of class {item.label} of {len(listing.classes)}, from 0")
        if item.targets is not None and not {-1, 0, 1}.issuperset(item.targets):
            raise ValueError(f"{item.source} is marked {item.targets}")
        if item.source.startswith("/") or ".." in item.source.split("/"):
            raise ValueError(f"{item.source} points outside of the folder")


def _locate_images(items: list[Item], source: Source) -> tuple[dict[str, Sample], list[str]]:
    """Return a sample for every item whose bytes are there, and the names of the others.

    Some sets name GIFs and BMPs ``.jpg`` (Oxford-IIIT Pet has eight): these are stored as PNG with the same pixels.
    """
    samples: dict[str, Sample] = {}
    missing: list[str] = []
    encoded: list[str] = []
    folder = os.fspath(source.home)
    for item in items:
        extra = None if item.targets is None else json.dumps({"targets": item.targets}, separators=(",", ":"))
        location = item.location
        if location is None:
            try:
                with open(source.home / item.source, "rb") as file:
                    status, start = os.fstat(file.fileno()), file.read(8)
                location = folder, WHOLE_FILE, status.st_size, status.st_mtime_ns
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                missing.append(item.source)
                continue
            except OSError:  # the writer reports it with its reason, like any file that it cannot read
                location, start = (folder, WHOLE_FILE, 0, 0), formats.PNG
            if formats.sniff_suffix(start) not in ("jpg", "png") and (
                body := _encode_as_png(source.home / item.source)
            ):
                location = source.encoded.add(body, location[-1])
                encoded.append(item.source)
        path, offset, size, mtime_ns = location
        samples[item.source] = Sample(item.source, item.label, path, offset, size, mtime_ns, extra_json=extra)
    if encoded:
        LOG.warning(
            "%d images are neither JPEG nor PNG inside, and are stored as PNG: %s.",
            len(encoded),
            format_examples(encoded),
        )
    return samples, missing


def _encode_as_png(path: Path) -> bytes | None:
    """Encode a GIF, BMP, TIFF or WebP file as PNG; None for any other file, which the writer reports."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=("GIF", "BMP", "TIFF", "WEBP")) as image:
                return images.encode_png(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError):
        return None


def _check_sizes(
    name: str, home: Path, facts: DataSetFacts, classes: list[str], items: list[Item], partial: bool
) -> None:
    """Refuse what has not the published size: fewer images only with ``partial``, more or an empty part never."""
    counts = np.array([sum(item.part == part for item in items) for part in PARTS])
    smaller = partial and len(classes) <= facts.classes and bool((counts <= facts.sizes).all())
    if (tuple(counts) == facts.sizes and len(classes) == facts.classes) or (smaller and counts.all()):
        return

    def describe(class_count: int, sizes: Any) -> str:
        return f"{class_count} classes, " + ", ".join(f"{part} {n}" for part, n in zip(PARTS, sizes, strict=True))

    expected = describe(facts.classes, facts.sizes)
    raise DataError(
        f"{name} in {home}",
        got=describe(len(classes), counts),
        expected=f"at most {expected}, and no part empty" if partial else expected,
        fix="check that it is this data set" + ("" if partial else ", whole; --partial allows less"),
    )
