"""The samples of a source with their classes, in one order, before any image is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.catalog.compact import CompactRows, IntColumn, SharedColumn, TextColumn
from data_prep.catalog.names import sort_names

WHOLE_FILE = -1
"""``Sample.offset`` of an image in a file of its own: ``path`` is then the folder and ``source`` the file in it."""


class Sample(NamedTuple):
    """One image to write.

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


class SampleTable(CompactRows[Sample]):
    """Samples in about 40 bytes each, and their names."""

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        """Create the table with its first samples."""
        self.names = TextColumn()
        label, offset, size, mtime_ns = (IntColumn() for _ in range(4))
        path, *others = (SharedColumn() for _ in range(5))
        super().__init__(Sample._make, [self.names, label, path, offset, size, mtime_ns, *others], samples)


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


class FileTable(CompactRows[SourceFile]):
    """Files in about 32 bytes each, and their names."""

    def __init__(self, files: Iterable[SourceFile] = ()) -> None:
        """Create the table with its first files."""
        self.names = TextColumn()
        super().__init__(SourceFile._make, [self.names, *(IntColumn() for _ in range(3))], files)


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
    images: FileTable = field(default_factory=FileTable)
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
    samples: Sequence[Sample]
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


def make_catalog(listing: SourceListing, classes: list[str], labels: Sequence[int]) -> Catalog:
    """Sort the images of a listing by name.

    Args:
        listing: The source.
        classes: Class names.
        labels: Class number of every image of the listing.

    Raises:
        DataError: Two names would be the same in a shard.
    """
    samples = SampleTable()
    for row, key_suffix in sort_names(listing.images.names, listing.origin):
        file = listing.images[row]
        sample = Sample(file.name, labels[row], listing.path, file.offset, file.size, file.mtime_ns)
        samples.append(sample._replace(key_suffix=True) if key_suffix else sample)
    return Catalog(classes, samples, left_out=list(listing.left_out))


def sort_samples(samples: SampleTable, origin: object) -> SampleTable:
    """Sort samples by name, and set which of their keys keep the suffix.

    Args:
        samples: The samples.
        origin: The source, for the message.

    Raises:
        DataError: A name repeats, or three names differ by case alone.
    """
    rows = sort_names(samples.names, origin)
    return SampleTable(samples[row]._replace(key_suffix=key_suffix) for row, key_suffix in rows)
