"""Names of samples: their order, their keys in a shard, and names that clash."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from data_prep.catalog.compact import TextColumn
from hpcssl.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2")
"""Suffixes that are no part of a KEY. The list is fixed, so that keys depend on no version of Pillow."""


def sort_names(names: TextColumn, origin: object) -> Iterator[tuple[int, bool]]:
    """Sort names. Where they differ by case or suffix alone, all but the first keep the suffix in their KEY.

    Cameras write IMG_1.HEIC beside IMG_1.JPG; on some file systems keys that differ by case alone are one file.

    Args:
        names: Source names.
        origin: The source, for the message.

    Yields:
        The row of the next name, and whether its KEY keeps the suffix.

    Raises:
        DataError: A name repeats, or three names differ by case alone.
    """
    order = names.argsort()
    close = _close_names(names, order)
    keys: dict[str, str] = {}
    for place, row in enumerate(map(int, order)):
        if place not in close:
            yield row, False
            continue
        name = names[row]
        for keep_suffix in (False, True):
            key = _folded_key(name, keep_suffix)
            if key not in keys:
                keys[key] = name
                yield row, keep_suffix
                break
            if keys[key] == name or keep_suffix:
                raise _name_clash(origin, name, keys[key])


def _folded_key(name: str, keep_suffix: bool) -> str:
    return sample_key(name, keep_suffix=keep_suffix).casefold()


def _close_names(names: TextColumn, order: npt.NDArray[np.int64]) -> set[int]:
    """Return the places in the order of all names whose key another one may take, by hashes of the keys."""
    hashes = np.fromiter((hash(_folded_key(names[row], False)) for row in map(int, order)), np.int64, len(order))
    in_order = np.sort(hashes)
    taken = set(in_order[1:][in_order[1:] == in_order[:-1]].tolist())
    found: set[int] = set()
    while taken:  # a key with its suffix may be that of a third name without its own
        new = set(np.flatnonzero(np.isin(hashes, list(taken))).tolist()) - found
        found |= new
        taken = {hash(_folded_key(names[int(order[place])], True)) for place in new}
    return found


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
