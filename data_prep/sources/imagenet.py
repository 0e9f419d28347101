"""ILSVRC 2012 (ImageNet) from its two official archives, read in place: a tar of class tars, and a flat tar."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path

from data_prep.catalog import Catalog, SourceFile, SourceListing, make_catalog
from data_prep.catalog.names import check_distinct_classes, format_examples
from data_prep.sources import folders, tars
from data_prep.sources.classes import Labels, classes_from_labels
from hpcssl.errors import ConfigError, DataError


def read_train(archive: Path, scratch: Path) -> Catalog:
    """List ILSVRC2012_img_train.tar, a tar of one tar per class; images are named as if it were unpacked.

    Args:
        archive: The archive.
        scratch: File to which a compressed archive is expanded.

    Raises:
        ConfigError: There is no such file.
        DataError: It is another or a damaged archive.
    """
    if not archive.is_file():
        raise ConfigError(
            f"TRAIN_TAR {archive}",
            got="no such file",
            expected="ILSVRC2012_img_train.tar as downloaded",
            fix="check the path",
        )
    plain = tars.expand(archive, scratch)
    listing = SourceListing(archive, os.fspath(plain))
    mtime_ns, size = archive.stat().st_mtime_ns, plain.stat().st_size
    class_tars = list(tars.iterate_members(plain, archive, 0, size))
    other = [name for name, _, _ in class_tars if not name.endswith(".tar")]
    if other or not class_tars:
        raise DataError(
            f"TRAIN_TAR {archive}",
            got=format_examples(other) or "no class archive",
            expected="one tar per class, such as n01440764.tar",
            fix="give the training archive first and the validation archive second",
        )
    for name, start, length in class_tars:
        wnid = posixpath.basename(name).removesuffix(".tar")
        listing.folders.add(wnid)
        for image, offset, image_size in tars.iterate_members(plain, archive, start, length, inner=name):
            file = SourceFile(f"{wnid}/{posixpath.basename(image)}", offset, image_size, mtime_ns)
            folders.add_file(listing, file, bytes)
    empty = sorted(listing.folders - {file.folder for file in listing.images})
    if empty:
        raise DataError(
            f"TRAIN_TAR {archive}",
            got=f"class archives without an image: {format_examples(empty)}",
            expected="images in every class archive",
            fix="download it again",
        )
    classes = sorted(listing.folders)
    check_distinct_classes(classes, f"class archives of {archive}")
    number = {name: i for i, name in enumerate(classes)}
    return make_catalog(listing, classes, [number[file.folder] for file in listing.images])


def read_val(archive: Path, scratch: Path, labels: Labels, labels_origin: str, classes: list[str]) -> Catalog:
    """List ILSVRC2012_img_val.tar, a flat tar of images.

    Args:
        archive: The archive.
        scratch: File to which a compressed archive is expanded.
        labels: WordNet id by file name.
        labels_origin: Where the labels come from, for messages.
        classes: The classes of the training set.

    Raises:
        ConfigError: There is no such file.
        DataError: The archive is damaged, or the labels do not fit.
    """
    if not archive.is_file():
        raise ConfigError(
            f"VAL_TAR {archive}",
            got="no such file",
            expected="ILSVRC2012_img_val.tar as downloaded",
            fix="check the path",
        )
    plain = tars.expand(archive, scratch)
    listing = SourceListing(archive, os.fspath(plain))
    for name, offset, size in tars.iterate_members(plain, archive, 0, plain.stat().st_size):
        file = SourceFile(posixpath.basename(name), offset, size, archive.stat().st_mtime_ns)
        folders.add_file(listing, file, bytes)
    return classes_from_labels(listing, labels, labels_origin, classes=classes)
