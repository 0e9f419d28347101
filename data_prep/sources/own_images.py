"""Images as people have them: a folder or a tar of any layout, a table, or a list, with or without classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from data_prep.catalog import Catalog, SourceListing
from data_prep.catalog.names import format_examples
from data_prep.sources import folders, lists, tables
from data_prep.sources.classes import AUTO, CLASSES_FROM, Labels, choose_classes, classes_from_labels
from data_prep.sources.labels import LIST_SUFFIXES, Columns, read_labels
from hpcssl.errors import ConfigError, require_choice


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How to read a source.

    Attributes:
        subdir: Only the files of a folder or tar below this folder; empty for all.
        part: The part of a table to read, such as ``train``; empty if it has one part.
        columns: The columns of a table or a list.
        labels: A list of labels; None for the classes of the source itself.
        classes: A list of the class names that sets their order; None for alphabetical order.
        classes_from: Whether folders are classes: ``auto``, ``folders`` or ``none``.
    """

    subdir: str = ""
    part: str = ""
    columns: Columns = field(default_factory=Columns)
    labels: Path | None = None
    classes: Path | None = None
    classes_from: str = AUTO

    def __post_init__(self) -> None:
        require_choice("--classes-from", self.classes_from, CLASSES_FROM)
        if self.labels is not None and self.classes_from != AUTO:
            raise _unused("--classes-from", self.classes_from, f"no --labels beside it (there is {self.labels})")


def read_source(src: Path, scratch: Path, options: SourceOptions) -> tuple[Catalog, str]:
    """List the images of a source, and decide about their classes.

    Args:
        src: A folder, a tar, a table or a list.
        scratch: File for an archive that must be expanded, or for the images of a table.
        options: How to read it.

    Returns:
        The catalog, and one sentence that says what was understood.

    Raises:
        ConfigError: Options that do not fit the source, or a list of labels that cannot be read.
        DataError: The source is absent, damaged or empty, or its labels do not fit.
    """
    columns, names, labels = options.columns, None, None
    paths = tables.find_tables(src, options.part)
    is_list = src.suffix.lower() in LIST_SUFFIXES and src.is_file()
    _refuse_unused(options, is_table=bool(paths), is_list=is_list)
    label_source = str(options.labels)
    if paths:
        listing, labels, names, column = tables.read_tables(src, paths, columns, scratch)
        label_source = f"column {column} of {src}"
    elif is_list:
        listing, labels = lists.read_list(src, columns)
        label_source = f"list {src}"
    else:
        listing = folders.list_source(src, options.subdir, scratch)
    if options.labels is not None:
        labels, names, label_source = read_labels(options.labels, columns), None, str(options.labels)
    if labels is None or options.classes_from != AUTO:
        if columns.multi_label:
            raise _unused("--multi-label", "set", "labels in a list or a table")
        reason = "no column of labels" if paths or is_list else None
        catalog, sentence = choose_classes(listing, options.classes_from, options.classes, reason=reason)
    else:
        catalog, sentence = _label(listing, labels, names, label_source, options)
    catalog.provenance["verb"] = "images"
    return catalog, sentence


def _label(
    listing: SourceListing, labels: Labels, names: list[str] | None, label_source: str, options: SourceOptions
) -> tuple[Catalog, str]:
    catalog = classes_from_labels(
        listing,
        labels,
        label_source,
        classes=names if options.classes is None else None,
        classes_file=options.classes,
    )
    several = any(sample.extra_json for sample in catalog.samples)
    kind = "several classes for each image, of " if several else ""
    examples = format_examples(catalog.classes)
    return catalog, f"{kind}{len(catalog.classes)} classes from {label_source} ({examples})"


def _refuse_unused(options: SourceOptions, *, is_table: bool, is_list: bool) -> None:
    """Raise ConfigError for an option that this kind of source does not have."""
    has_columns = is_table or is_list
    labels_columns = options.labels is not None and options.labels.suffix.lower() in LIST_SUFFIXES
    for option, value, fits, expected in (
        ("--subdir", options.subdir, not has_columns, "a folder or a tar of images as SRC"),
        ("--part", options.part, is_table, "a table as SRC"),
        ("--image", options.columns.image, has_columns or labels_columns, "a table or a list"),
        ("--label", options.columns.label, has_columns or labels_columns, "a table or a list"),
    ):
        if value and not fits:
            raise _unused(option, value, expected)


def _unused(option: str, value: object, expected: str) -> ConfigError:
    return ConfigError(option, got=value, expected=expected, fix=f"leave {option} out, or check SRC")
