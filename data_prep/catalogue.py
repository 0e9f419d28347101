"""What will be written: the samples of a source with their classes, in one order, before any byte is read."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from hpcssl.data.shards import IMAGE_SUFFIXES
from hpcssl.errors import ConfigError, DataError

log = logging.getLogger("hpcssl")
WHOLE = -1
"""``Sample.offset`` of a file of its own: ``path`` is then the folder and ``source`` the file in it."""


class Sample(NamedTuple):
    """One image to write. A tuple, since ImageNet has 1.3 million of them."""

    source: str  # name in the source tree, with its suffix
    label: int  # class number, -1 without a label
    path: str  # archive that holds the bytes, or the source folder (WHOLE)
    offset: int
    size: int
    stamp: int  # modification time in ns: tells on resume whether the bytes may have changed
    second: tuple[int, int] | bytes | None = None  # offset and size of the second modality in ``path``, or itself
    original_label: int | None = None  # the label before it was corrupted
    more: str | None = None  # what else KEY.json says of it, such as boxes: a JSON object as text


@dataclass
class Catalogue:
    """Samples in the order of their names. ``made`` says by what they were chosen: it enters the index."""

    classes: list[str]
    samples: list[Sample]
    made: dict = field(default_factory=dict)

    def names_digest(self) -> str:
        """sha256 over the names, labels, notes and classes."""
        rows = (json.dumps((s.source, s.label, s.original_label, *(() if s.more is None else (s.more,))))
                for s in self.samples)
        return digest_lines([json.dumps(self.classes), *rows])

    def sizes_digest(self) -> str:
        """sha256 over the names and sizes: what can be known of the content without reading it."""
        return digest_lines(json.dumps((s.source, s.size, s.second and s.second[1])) for s in self.samples)


def digest_lines(lines: Iterable[str]) -> str:
    whole = hashlib.sha256()
    for line in lines:
        whole.update(line.encode() + b"\n")
    return whole.hexdigest()


@dataclass
class Found:
    """What a folder or an archive holds: ``members`` are (name, offset, size, stamp), names with '/'."""

    where: Path  # for messages
    path: str  # for Sample.path
    members: list[tuple[str, int, int, int]] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)  # first parts of the names of all folders
    others: list[str] = field(default_factory=list)  # files that are no images by their name

    def take(self, name: str, offset: int, size: int, stamp: int) -> None:
        """File one regular file under the images or the others; hidden ones (macOS' ``._x.jpg``) are others."""
        hidden = "/." in f"/{name}"
        if "/" in name and not hidden:
            self.folders.add(name.split("/", 1)[0])
        if name.lower().endswith(IMAGE_SUFFIXES) and not hidden:
            self.members.append((name, offset, size, stamp))
        else:
            self.others.append(name)


def key_of(source: str) -> str:
    """The sample's KEY: its source name without the suffix, as every webdataset reader will read it back.

    Readers split at the first dot of the last part and skip names that begin like ``__x__``; so dots there, leading
    underscores and control characters are percent-escaped, and ``source_stem`` undoes it.
    """
    stem = drop_suffix(source)
    folder, slash, base = stem.rpartition("/")
    key = _AWKWARD.sub(_escape, folder) + slash + _AWKWARD.sub(_escape, base).replace(".", "%2E")
    return "%5F" + key[1:] if key.startswith("__") else key


_AWKWARD = re.compile(r"[%\x00-\x1f\x7f]")


def _escape(match: re.Match) -> str:
    return f"%{ord(match.group()):02X}"


def source_stem(key: str) -> str:
    """The source name, without its suffix, that ``key_of`` escaped."""
    return unquote(key, errors="surrogateescape")


def drop_suffix(name: str) -> str:
    base, dot, suffix = name.rpartition(".")
    return base if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES else name


def some(names: Sequence[str], at_most: int = 3) -> str:
    """The first few names for a sentence: ``a, b, c and 7 more``."""
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")


def by_folder(found: Found, classes_file: Path | None = None) -> Catalogue:
    """Classes are the first folders of the names (ImageFolder). Raises DataError, ConfigError."""
    _say_ignored(found)
    loose = sorted(m[0] for m in found.members if "/" not in m[0])
    if loose and len(loose) == len(found.members):
        raise DataError(f"source {found.where}", got=f"{len(loose)} images directly in it ({some(loose)})",
                        expected="one folder per class, or a file of labels",
                        mend="sort them into class folders, or give --labels FILE with `name class` lines")
    _refuse_none(found)
    if loose:
        raise DataError(f"source {found.where}", got=f"images outside of any class folder: {some(loose)}",
                        expected="every image in its class's folder", mend="move them into class folders or away")
    names = sorted(found.folders)
    refuse_case(names, f"class folders of {found.where}")
    filled = {m[0].split("/", 1)[0] for m in found.members}
    empty = [name for name in names if name not in filled]
    if empty:
        raise DataError(f"source {found.where}", got=f"class folders without an image: {some(empty)}",
                        expected="at least one .jpg, .jpeg or .png in every class folder",
                        mend="add the missing images, or remove these folders")
    classes = _ordered(names, classes_file)
    number = {name: i for i, name in enumerate(classes)}
    return catalogue(found, classes, [number[m[0].split("/", 1)[0]] for m in found.members])


def by_labels(found: Found, labels: dict[str, str], labels_from: str, *, classes: list[str] | None = None,
              classes_file: Path | None = None) -> Catalogue:
    """Classes come from ``labels`` (name, with or without suffix -> class). Raises DataError, ConfigError.

    ``classes`` is a list that is already fixed (the training set's): a class outside of it is refused.
    """
    _say_ignored(found)
    _refuse_none(found)
    given = [labels.get(m[0], labels.get(drop_suffix(m[0]))) for m in found.members]
    bare = sorted(m[0] for m, label in zip(found.members, given, strict=True) if label is None)
    if bare:
        raise DataError(f"labels of {labels_from}", got=f"no label for {len(bare)} images: {some(bare)}",
                        expected=f"a line `name class` for every image of {found.where}, named as there",
                        mend="add the missing lines, or remove these images")
    spare = len(labels) - len({m[0] for m in found.members} & labels.keys() |
                              {drop_suffix(m[0]) for m in found.members} & labels.keys())
    if spare:
        log.warning("%s labels %d names that %s does not hold", labels_from, spare, found.where)
    if classes is None:
        refuse_case(sorted(set(given)), f"classes of {labels_from}")
        classes = _ordered(sorted(set(given)), classes_file)
    number = {name: i for i, name in enumerate(classes)}
    strange = sorted({name for name in given if name not in number})
    if strange:
        raise DataError(f"labels of {labels_from}", got=f"unknown classes {some(strange)}",
                        expected=f"classes among the {len(classes)} known ones ({some(classes)})",
                        mend="correct these lines, or take the file that belongs to this data set")
    return catalogue(found, classes, [number[name] for name in given])


def catalogue(found: Found, classes: list[str], labels: list[int]) -> Catalogue:
    """Put the members in the order of their names and refuse names that would meet in a shard."""
    samples = [Sample(name, label, found.path, offset, size, stamp)
               for (name, offset, size, stamp), label in zip(found.members, labels, strict=True)]
    samples.sort()
    refuse_clashes([sample.source for sample in samples], found.where)
    return Catalogue(classes, samples)


def refuse_clashes(sources: list[str], where: object) -> None:
    """No two keys may be equal, nor differ by case alone: unpacked on some file systems they would be one file."""
    seen: dict[str, str] = {}
    for source in sources:
        other = seen.setdefault(drop_suffix(source).casefold(), source)
        if other is not source:
            raise DataError(f"names in {where}", got=f"{source} twice" if other == source else f"{other} and {source}",
                            expected="names that differ by more than upper and lower case or the suffix",
                            mend="rename or remove one of them")


def refuse_case(names: list[str], what: str) -> None:
    """Class names that differ by case alone are one folder on some machines and two on others."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise DataError(what, got=f"{other} and {name}",
                            expected="classes whose names differ by more than upper and lower case",
                            mend="merge or rename one of them")


def _ordered(names: list[str], classes_file: Path | None) -> list[str]:
    """Sorted class names, or those of ``--classes`` in its order when it names exactly the same classes."""
    if classes_file is None:
        return sorted(names)
    listed = read_names(classes_file, "--classes")
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise ConfigError(f"--classes {classes_file}", got=f"{some(twice)} more than once",
                          expected="each class on one line", mend="remove the repeated lines")
    missing, added = sorted(set(names) - set(listed)), sorted(set(listed) - set(names))
    if missing or added:
        parts = [f"it misses {some(missing)}"] * bool(missing) + [f"it adds {some(added)}"] * bool(added)
        raise ConfigError(f"--classes {classes_file}", got=" and ".join(parts),
                          expected=f"exactly the {len(names)} classes of the source",
                          mend="correct the list, or leave --classes out")
    return listed


def read_names(path: Path, option: str) -> list[str]:
    """The non-empty lines of a text file. Raises ConfigError for a file that is absent, empty or no text."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "bytes that are no UTF-8 text"
        raise ConfigError(f"{option} {path}", got=reason, expected="a text file that can be read",
                          mend="check the path") from error
    lines = [line for line in lines if line]
    if not lines:
        raise ConfigError(f"{option} {path}", got="no line with text", expected="one entry per line",
                          mend="check that it is the right file")
    return lines


def _refuse_none(found: Found) -> None:
    if found.members:
        return
    got = f"no image among its {len(found.others)} files ({some(sorted(found.others))})" if found.others else (
        f"{len(found.folders)} folders without any file" if found.folders else "nothing in it")
    raise DataError(f"source {found.where}", got=got, expected="images named .jpg, .jpeg or .png",
                    mend="check the path: SRC is the folder that holds the class folders")


def _say_ignored(found: Found) -> None:
    if found.others and found.members:
        log.warning("left out %d files of %s that are no images by their name: %s", len(found.others), found.where,
                    some(sorted(found.others)))
