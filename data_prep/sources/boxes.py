"""Shared by the data sets with boxes: checks of folders and boxes, and the catalog of a part."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from data_prep.catalog import Catalog, Sample
from data_prep.catalog.names import check_distinct_classes, check_distinct_keys, format_examples
from hpcssl.errors import DataError


def encode_annotation(annotation: dict[str, Any], path: Path) -> str:
    """Encode an annotation as JSON text, which takes a tenth of the memory of its objects.

    Args:
        annotation: Fields of KEY.json.
        path: Its file, for the message.

    Raises:
        DataError: A box has no finite corners, or its second corner lies before the first.
    """
    for box in annotation["boxes"]:
        if not all(math.isfinite(x) for x in box) or box[2] < box[0] or box[3] < box[1]:
            raise DataError(
                f"annotation {path}",
                got=f"the box {box}",
                expected="finite corners, the second beyond the first",
                fix="unpack the archive again",
            )
    return json.dumps(annotation, separators=(",", ":"))


def make_part(samples: list[Sample], classes: list[str], src: Path, dataset: str) -> Catalog:
    """Sort the samples of a part by name. Raises DataError for names that clash."""
    check_distinct_classes(classes, f"classes of {src}")
    samples.sort()
    check_distinct_keys([sample.source for sample in samples], src)
    return Catalog(classes, samples, {"verb": "detection", "dataset": dataset})


def list_files(folder: Path, layout: str) -> dict[str, tuple[int, int]]:
    """Return the size in bytes and the modification time in ns of every file, by name. Raises DataError."""
    try:
        return {entry.name: (entry.stat().st_size, entry.stat().st_mtime_ns) for entry in os.scandir(folder)}
    except OSError as error:
        raise DataError(
            f"folder {folder}", got=error.strerror, expected=layout, fix="unpack the archives again"
        ) from error


def require_files(src: Path, needed: list[str], layout: str) -> None:
    """Check that a folder holds files or folders.

    Args:
        src: The folder.
        needed: Paths in it.
        layout: What the folder should hold, for the message.

    Raises:
        DataError: Some are missing.
    """
    missing = [name for name in needed if not (src / name).exists()]
    if not missing:
        return
    entries = sorted(os.listdir(src))
    inner = next((name for name in entries if (src / name / needed[0]).exists()), None)
    raise DataError(
        f"source {src}",
        got=f"no {format_examples(missing)} (it holds {format_examples(entries) or 'nothing'})",
        expected=layout,
        fix=f"name {src / inner}" if inner else "check the path, or unpack what is missing there",
    )
