"""COCO 2017, with its boxes and masks. Its training annotations take some 3 GB of memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from data_prep.catalog import WHOLE_FILE, Catalog, Sample
from data_prep.catalog.names import format_examples
from data_prep.sources.boxes import encode_annotation, list_files, make_part, require_files
from hpcssl.errors import DataError

PARTS = {"train": "train2017", "val": "val2017"}
LAYOUT = "a folder with train2017, val2017 and annotations/instances_{train,val}2017.json"


def read(src: Path) -> dict[str, Catalog]:
    """Read train2017 (118,287 images, some without an object) and val2017 (5,000), with the masks as COCO has them.

    Args:
        src: The folder of train2017, val2017 and annotations.

    Raises:
        DataError: Files are missing or cannot be read.
    """
    needed = [path for name in PARTS.values() for path in (name, f"annotations/instances_{name}.json")]
    require_files(src, needed, LAYOUT)
    parts = {part: _read_split(src, name) for part, name in PARTS.items()}
    classes = parts["train"][0]
    if parts["val"][0] != classes:
        raise DataError(
            f"annotations of {src}",
            got="other categories for val2017 than for train2017",
            expected="the same categories in both files",
            fix="take both files from one download",
        )
    return {part: make_part(samples, classes, src, "coco") for part, (_, samples) in parts.items()}


def _read_split(src: Path, name: str) -> tuple[list[str], list[Sample]]:
    """Return the class names and the samples of one split."""
    path = src / "annotations" / f"instances_{name}.json"
    classes, files, annotations = _read_annotations(path)
    images = list_files(src / name, LAYOUT)
    missing = sorted(f"{name}/{file}" for file in files.values() if file not in images)
    if missing or not files:
        raise DataError(
            f"source {src}",
            got=f"{len(missing)} images fewer than {path.name} lists: {format_examples(missing)}"
            if files
            else f"no image in {path.name}",
            expected=LAYOUT,
            fix=f"unpack {name}.zip again",
        )
    return classes, [
        Sample(
            f"{name}/{files[i]}",
            -1,
            os.fspath(src.absolute()),
            WHOLE_FILE,
            *images[files[i]],
            extra_json=encode_annotation(annotations.pop(i), path),
        )
        for i in sorted(files)
    ]


def _read_annotations(path: Path) -> tuple[list[str], dict[int, str], dict[int, dict[str, Any]]]:
    """Return the class names, and the file name and the fields of KEY.json of every image id."""
    try:
        content = json.loads(path.read_bytes())
        categories = sorted(content["categories"], key=lambda category: category["id"])
        number = {category["id"]: i for i, category in enumerate(categories)}
        annotations: dict[int, dict[str, Any]] = {
            image["id"]: {
                "size": [image["height"], image["width"]],
                "boxes": [],
                "labels": [],
                "iscrowd": [],
                "area": [],
                "segmentation": [],
            }
            for image in content["images"]
        }
        for item in content["annotations"]:
            annotation, (x, y, width, height) = annotations[item["image_id"]], item["bbox"]
            annotation["boxes"].append([x, y, x + width, y + height])
            annotation["labels"].append(number[item["category_id"]])
            for field in ("iscrowd", "area", "segmentation"):
                annotation[field].append(item[field])
        files = {image["id"]: image["file_name"] for image in content["images"]}
        return [category["name"] for category in categories], files, annotations
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"annotation {path}",
            got=f"a file that cannot be read as one of COCO ({type(error).__name__}: {error})",
            expected="images, annotations and categories",
            fix="unpack annotations_trainval2017.zip again",
        ) from error
