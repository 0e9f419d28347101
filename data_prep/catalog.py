"""The samples of a source with their classes, in one order, before any image is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from hpcssl.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2")
"""Suffixes that are no part of a KEY. The list is fixed, so that keys depend on no version of Pillow."""
WHOLE_FILE = -1
"""``Sample.offset`` of an image in a file of its own: ``path`` is then the folder and ``source`` the file in it."""


class Sample(NamedTuple):
    """One image to write. A tuple, since ImageNet has 1.3 million of them; catalogs sort by its fields.

    Attributes:
        source: Name in the source, with its suffix and ``/`` between folders.
        label: Class number; -1 without a label.
        path: Archive that holds the bytes, or the source folder if ``offset`` is ``WHOLE_FILE``.
        offset: First byte in the archive, or ``WHOLE_FILE``.
        size: Bytes.
        mtime_ns: Modification time in ns: on resume it tells whether the bytes may have changed.
        second: Offset and size of the second modality in ``path``, or its bytes; None without one.
        original_label: The label before it was corrupted.
        extra_json: Further fields of KEY.json, such as boxes, as the text of a JSON object.
        key_suffix: Whether its KEY keeps the suffix, because another sample has the same name without it.
    """

    source: str
    label: int
    path: str
    offset: int
    size: int
    mtime_ns: int
    second: tuple[int, int] | bytes | None = None
    original_label: int | None = None
    extra_json: str | None = None
    key_suffix: bool = False


class LeftOut(NamedTuple):
    """A file of a source that is not written.

    Attributes:
        source: Its name in the source.
        reason: Why.
        broken: Whether it should have been an image, which is an error beyond ``--skip-bad``.
    """

    source: str
    reason: str
    broken: bool = False


class SourceFile(NamedTuple):
    """A file of a source.

    Attributes:
        name: Name in the source, with ``/`` between folders.
        offset: First byte in the archive, or ``WHOLE_FILE``.
        size: Bytes.
        mtime_ns: Modification time in ns, of the archive if it lies in one.
    """

    name: str
    offset: int
    size: int
    mtime_ns: int

    @property
    def folder(self) -> str:
        """The first part of the name."""
        return self.name.split("/", 1)[0]


@dataclass
class SourceListing:
    """The files of a folder or an archive.

    Attributes:
        origin: The source, for messages.
        path: ``Sample.path`` of its images.
        images: Its images, by their names or by their first bytes.
        folders: First parts of the names of all folders.
        left_out: All other files.
    """

    origin: Path
    path: str
    images: list[SourceFile] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    left_out: list[LeftOut] = field(default_factory=list)


@dataclass
class Catalog:
    """The samples of a shard folder, in the order of their names.

    Attributes:
        classes: Class names; their order gives the class numbers.
        samples: The samples.
        provenance: How they were chosen: command, data set, part, ...; it enters the index.
        left_out: What the source holds besides.
    """

    classes: list[str]
    samples: list[Sample]
    provenance: dict[str, Any] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)

    def names_digest(self) -> str:
        """Return the sha256 of the names, labels, further fields and classes."""
        rows = (
            json.dumps((s.source, s.label, s.original_label, *(() if s.extra_json is None else (s.extra_json,))))
            for s in self.samples
        )
        return sha256_of_lines([json.dumps(self.classes), *rows])

    def sizes_digest(self) -> str:
        """Return the sha256 of the names and sizes: what is known of the content without reading it."""
        return sha256_of_lines(json.dumps((s.source, s.size, s.second and s.second[1])) for s in self.samples)


def sha256_of_lines(lines: Iterable[str]) -> str:
    """Return the sha256 of lines of text, each with a newline behind it."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def make_catalog(listing: SourceListing, classes: list[str], labels: list[int]) -> Catalog:
    """Sort the images of a listing by name.

    Args:
        listing: The source.
        classes: Class names.
        labels: Class number of every image of the listing.

    Raises:
        DataError: Two names would be the same in a shard.
    """
    samples = [
        Sample(file.name, label, listing.path, file.offset, file.size, file.mtime_ns)
        for file, label in zip(listing.images, labels, strict=True)
    ]
    return Catalog(classes, sort_samples(samples, listing.origin), left_out=list(listing.left_out))


def sort_samples(samples: list[Sample], origin: object) -> list[Sample]:
    """Sort samples by name. Where names differ by case or suffix alone, all but the first keep the suffix in their KEY.

    Cameras write IMG_1.HEIC beside IMG_1.JPG; on some file systems keys that differ by case alone are one file.

    Args:
        samples: The samples.
        origin: The source, for the message.

    Raises:
        DataError: A name repeats, or three names differ by case alone.
    """
    keys: dict[str, str] = {}
    result = []
    for sample in sorted(samples):
        for key_suffix in (False, True):
            key = sample_key(sample.source, keep_suffix=key_suffix).casefold()
            other = keys.setdefault(key, sample.source)
            if other is sample.source:
                result.append(sample._replace(key_suffix=key_suffix))
                break
            if other == sample.source or key_suffix:
                raise _name_clash(origin, sample.source, other)
    return result


# -- names --------------------------------------------------------------------------------------------------


def sample_key(source: str, *, keep_suffix: bool = False) -> str:
    """Return the KEY of a sample: its source name without the suffix, escaped so that every reader keeps it.

    WebDataset readers split at the first dot of the last part and skip names like ``__x__``. So dots there, leading
    double underscores and control characters are percent-escaped; ``source_stem`` undoes it.

    Args:
        source: Its name in the source.
        keep_suffix: Whether the suffix stays: ``Sample.key_suffix``.
    """
    stem = source if keep_suffix else drop_suffix(source)
    folder, slash, base = stem.rpartition("/")
    key = _ESCAPED.sub(_escape, folder) + slash + _ESCAPED.sub(_escape, base).replace(".", "%2E")
    return "%5F" + key[1:] if key.startswith("__") else key


_ESCAPED = re.compile(r"[%\x00-\x1f\x7f]")


def _escape(match: re.Match[str]) -> str:
    return f"%{ord(match.group()):02X}"


def source_stem(key: str) -> str:
    """Return the source name, without its suffix, that ``sample_key`` escaped."""
    return unquote(key, errors="surrogateescape")


def drop_suffix(name: str) -> str:
    """Return a file name without the suffix of an image; other suffixes stay."""
    base, dot, suffix = name.rpartition(".")
    return base if dot and f".{suffix.lower()}" in SUFFIXES else name


def format_examples(names: Sequence[str], limit: int = 3) -> str:
    """Return the first names as text for a message: ``a, b, c and 7 more``."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def check_distinct_keys(sources: list[str], origin: object) -> None:
    """Check that no two keys are equal or differ by case alone: on some file systems these are one file.

    Args:
        sources: Source names of all samples.
        origin: The source, for the message.

    Raises:
        DataError: Two names clash.
    """
    first: dict[str, str] = {}
    for source in sources:
        other = first.setdefault(drop_suffix(source).casefold(), source)
        if other is not source:
            raise _name_clash(origin, source, other)


def _name_clash(origin: object, source: str, other: str) -> DataError:
    return DataError(
        f"names in {origin}",
        got=f"{source} twice" if other == source else f"{other} and {source}",
        expected="names that differ by more than case or suffix",
        fix="rename or remove one of them",
    )


def check_distinct_classes(names: list[str], what: str) -> None:
    """Check that no class names differ by case alone: they are one folder on some machines and two on others.

    Args:
        names: Class names.
        what: What they belong to, for the message.

    Raises:
        DataError: Two names clash.
    """
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(name.casefold(), name)
        if other != name:
            raise DataError(
                what,
                got=f"{other} and {name}",
                expected="classes whose names differ by more than case",
                fix="merge or rename one of them",
            )
