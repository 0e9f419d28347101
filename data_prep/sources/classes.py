"""Classes of a source: from its folders, or from a list of labels."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.catalog import Catalog, SampleTable, SourceListing, make_catalog
from data_prep.catalog.names import check_distinct_classes, drop_suffix, format_examples
from hpcssl.errors import ConfigError, DataError

LOG = logging.getLogger("hpcssl")

AUTO, FOLDERS, NONE = "auto", "folders", "none"
CLASSES_FROM = (AUTO, FOLDERS, NONE)
"""Values of ``--classes-from``."""
Labels = Mapping[str, str | tuple[str, ...]]
"""Class of each image by its name, empty for an image without one; a tuple where images have several at once."""


def choose_classes(
    listing: SourceListing, choice: str, classes_file: Path | None = None, *, reason: str | None = None
) -> tuple[Catalog, str]:
    """Decide whether the folders of a source are classes.

    Args:
        listing: The source.
        choice: ``folders`` or ``none``; ``auto`` for classes only where every image lies exactly one folder below the
            source, in two folders or more.
        classes_file: A list of the class names that sets their order; None for alphabetical order.
        reason: Why ``auto`` finds no classes, where that does not depend on the folders.

    Returns:
        The catalog, and one sentence that says what was understood, and why.

    Raises:
        DataError: No images; or with ``folders``, images outside of any folder or empty folders.
        ConfigError: The list of classes does not fit.
    """
    require_images(listing)
    reason = "as --classes-from says" if choice == NONE else reason or _why_no_classes(listing)
    if choice == AUTO and reason is None:
        listing.folders = {file.folder for file in listing.images}  # one without images is no class
    if choice == FOLDERS or reason is None:
        catalog = classes_from_folders(listing, classes_file)
        hint = "; --classes-from none ignores them" if choice == AUTO else ""
        return (
            catalog,
            f"{len(catalog.classes)} classes, one for each folder ({format_examples(catalog.classes)}){hint}",
        )
    if classes_file is not None:
        raise ConfigError(
            f"--classes {classes_file}",
            got=f"names of classes, for images without classes ({reason})",
            expected="images in class folders, or --labels",
            fix="give --classes-from folders if the first folder of each name is the class, or leave --classes out",
        )
    hint = "; --labels or --classes-from folders can give them" if choice == AUTO else ""
    return make_catalog(listing, [], [-1] * len(listing.images)), f"no classes: {reason}{hint}"


def _why_no_classes(listing: SourceListing) -> str | None:
    """Return why the folders of a source are not taken for classes; None if they are."""
    other = next((file.name for file in listing.images if file.name.count("/") != 1), None)
    if other is not None:
        return f"{other} does not lie exactly one folder below the source"
    return "all images lie in one folder" if len({file.folder for file in listing.images}) < 2 else None


def classes_from_folders(listing: SourceListing, classes_file: Path | None = None) -> Catalog:
    """Take the first folder of every name as the class, as ImageFolder of torchvision does.

    Args:
        listing: The source.
        classes_file: A list of the class names that sets their order; None for alphabetical order.

    Raises:
        DataError: Images without a class folder, empty class folders, or no images.
        ConfigError: The list of classes does not fit.
    """
    loose = sorted(file.name for file in listing.images if "/" not in file.name)
    if loose and len(loose) == len(listing.images):
        raise DataError(
            f"source {listing.origin}",
            got=f"{len(loose)} images directly in it ({format_examples(loose)})",
            expected="one folder per class, or a file of labels",
            fix="sort them into class folders, or give --labels FILE with `name class` lines",
        )
    require_images(listing)
    if loose:
        raise DataError(
            f"source {listing.origin}",
            got=f"images outside of any class folder: {format_examples(loose)}",
            expected="every image in the folder of its class",
            fix="move them into class folders or away",
        )
    names = sorted(listing.folders)
    check_distinct_classes(names, f"class folders of {listing.origin}")
    filled = {file.folder for file in listing.images}
    empty = [name for name in names if name not in filled]
    if empty:
        raise DataError(
            f"source {listing.origin}",
            got=f"class folders without an image: {format_examples(empty)}",
            expected="at least one image in every class folder",
            fix="add the missing images, or remove these folders",
        )
    classes = order_classes(names, classes_file)
    number = {name: i for i, name in enumerate(classes)}
    return make_catalog(listing, classes, [number[file.folder] for file in listing.images])


def classes_from_labels(
    listing: SourceListing,
    labels: Labels,
    labels_origin: str,
    *,
    classes: list[str] | None = None,
    classes_file: Path | None = None,
) -> Catalog:
    """Look up the class of every image by its name, or its classes where it may have several.

    Args:
        listing: The source.
        labels: Class name by image name, with or without its suffix. With tuples of names, the samples get targets: 1
            for each class of the image, -1 for the others.
        labels_origin: Where the labels come from, for messages.
        classes: A fixed list of classes, such as that of the training set; other classes are refused.
        classes_file: A list of the class names that sets their order; None for alphabetical order.

    Raises:
        DataError: Images without a label, unknown classes, or no images.
        ConfigError: The list of classes does not fit.
    """
    require_images(listing)
    names = [file.name for file in listing.images]
    found = [_require_label(labels, names, i, labels_origin, listing) for i in range(len(names))]
    image_classes = [((label,) if label else ()) if isinstance(label, str) else label for label in found]
    unused = len(labels) - len(set(names) & labels.keys() | {drop_suffix(name) for name in names} & labels.keys())
    if unused:
        LOG.warning("%s labels %d names that %s does not hold.", labels_origin, unused, listing.origin)
    if classes is None:
        distinct = {name for names in image_classes for name in names}
        are_numbers = all(name.isdecimal() for name in distinct)  # labels that are numbers keep their order
        present = sorted(distinct, key=int) if are_numbers else sorted(distinct)
        check_distinct_classes(present, f"classes of {labels_origin}")
        classes = present if classes_file is None else order_classes(present, classes_file)
    number = {name: i for i, name in enumerate(classes)}
    unknown = sorted({name for names in image_classes for name in names if name not in number})
    if unknown:
        raise DataError(
            f"labels of {labels_origin}",
            got=f"unknown classes {format_examples(unknown)}",
            expected=f"classes among the {len(classes)} known ones ({format_examples(classes)})",
            fix="correct these lines, or take the file that belongs to this data set",
        )
    if all(isinstance(label, str) for label in found):
        return make_catalog(listing, classes, [number[names[0]] if names else -1 for names in image_classes])
    targets = {
        image: encode_targets([number[name] for name in names], len(classes))
        for image, names in zip(names, image_classes, strict=True)
    }
    catalog = make_catalog(listing, classes, [-1] * len(names))
    catalog.samples = SampleTable(s._replace(extra_json=targets[s.source]) for s in catalog.samples)
    return catalog


def encode_targets(present: Sequence[int], classes: int) -> str:
    """Return the text of ``Sample.extra_json`` for an image of several classes: 1 for each of them, -1 for the others.

    Args:
        present: Numbers of its classes.
        classes: Number of all classes.
    """
    chosen = set(present)
    return json.dumps({"targets": [1 if n in chosen else -1 for n in range(classes)]}, separators=(",", ":"))


def _require_label(
    labels: Labels, names: list[str], i: int, origin: str, listing: SourceListing
) -> str | tuple[str, ...]:
    """Return the class of image i. Raises DataError, which counts all images without one."""

    def label_of(name: str) -> str | tuple[str, ...] | None:
        return labels.get(name, labels.get(drop_suffix(name)))

    label = label_of(names[i])
    if label is not None:
        return label
    unlabeled = sorted(name for name in names if label_of(name) is None)
    raise DataError(
        f"labels of {origin}",
        got=f"no label for {len(unlabeled)} images: {format_examples(unlabeled)}",
        expected=f"a line `name class` for every image of {listing.origin}, with the name that it has there",
        fix="add the missing lines, or remove these images",
    )


def order_classes(names: list[str], classes_file: Path | None) -> list[str]:
    """Sort class names, or return those of ``--classes`` in its order if it names exactly the same classes.

    Args:
        names: The classes of the source.
        classes_file: The list that sets the order; None for alphabetical order.

    Raises:
        ConfigError: The list cannot be read, or names other classes.
    """
    if classes_file is None:
        return sorted(names)
    listed = read_names(classes_file, "--classes")
    repeated = sorted({name for name in listed if listed.count(name) > 1})
    if repeated:
        raise ConfigError(
            f"--classes {classes_file}",
            got=f"{format_examples(repeated)} more than once",
            expected="each class on one line",
            fix="remove the repeated lines",
        )
    missing, unknown = sorted(set(names) - set(listed)), sorted(set(listed) - set(names))
    if missing or unknown:
        problems = [f"it misses {format_examples(missing)}"] if missing else []
        problems += [f"it adds {format_examples(unknown)}"] if unknown else []
        raise ConfigError(
            f"--classes {classes_file}",
            got=" and ".join(problems),
            expected=f"exactly the {len(names)} classes of the source",
            fix="correct the list, or leave --classes out",
        )
    return listed


def read_names(path: Path, option: str, *, strip: bool = True) -> list[str]:
    """Read the lines of a text file that are not blank.

    Args:
        path: The file, in UTF-8.
        option: The option that names it, for messages.
        strip: Whether to remove blanks around each line.

    Raises:
        ConfigError: The file is absent, empty or not text.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = str(error.strerror) if isinstance(error, OSError) else "bytes that are not UTF-8 text"
        raise ConfigError(
            f"{option} {path}", got=reason, expected="a readable text file", fix="check the path"
        ) from error
    if not lines:
        raise ConfigError(
            f"{option} {path}",
            got="no line with text",
            expected="one entry per line",
            fix="check that it is the right file",
        )
    return [line.strip() for line in lines] if strip else lines


def require_images(listing: SourceListing) -> None:
    """Raise DataError for a source without images."""
    if listing.images:
        return
    names = sorted(file.source for file in listing.left_out)
    if names:
        got = f"no image among its {len(names)} files ({format_examples(names)})"
    else:
        got = f"{len(listing.folders)} folders without any file" if listing.folders else "nothing in it"
    tars_only = bool(names) and all(name.endswith(".tar") for name in names)
    raise DataError(
        f"source {listing.origin}",
        got=got,
        expected="images",
        fix="use `hpcssl-shard webdataset` for tars of images" if tars_only else "check the path",
    )
