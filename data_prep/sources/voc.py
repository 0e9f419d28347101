"""Pascal VOC 2007 + 2012, with its boxes.

VOC counts pixels from 1 and includes the last one, so its xmin and ymin are lowered by 1 here, and nothing else. The
annotations are read with ElementTree of the standard library: they come from the user's own disk, and its parser
(expat 2.4.1 and newer) limits the size to which an entity may expand.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from data_prep.catalog import WHOLE_FILE, Catalog, Sample
from data_prep.catalog.names import format_examples
from data_prep.sources.boxes import encode_annotation, list_files, make_part, require_files
from hpcssl.errors import DataError

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
PARTS = {"train": (("VOC2007", "trainval"), ("VOC2012", "trainval")), "val": (("VOC2007", "test"),)}
LAYOUT = (
    "VOCdevkit as the archives unpack: VOC2007 (VOCtrainval and VOCtest) and VOC2012 (VOCtrainval), each with "
    "JPEGImages, Annotations and ImageSets/Main"
)


def read(src: Path) -> dict[str, Catalog]:
    """Read trainval of 2007 and 2012 (16,551 images) as train, and test of 2007 (4,952) as val.

    Args:
        src: VOCdevkit.

    Raises:
        DataError: Files are missing or cannot be read.
    """
    needed = sorted({f"{year}/ImageSets/Main/{split}.txt" for part in PARTS.values() for year, split in part})
    require_files(src, needed, LAYOUT)
    return {
        part: make_part(
            [sample for year, split in splits for sample in _read_split(src, year, split)], list(CLASSES), src, "voc"
        )
        for part, splits in PARTS.items()
    }


def _read_split(src: Path, year: str, split: str) -> list[Sample]:
    list_file = src / year / "ImageSets" / "Main" / f"{split}.txt"
    names = [line.split()[0] for line in list_file.read_text().splitlines() if line.strip()]
    images = list_files(src / year / "JPEGImages", LAYOUT)
    annotations = list_files(src / year / "Annotations", LAYOUT)
    missing = [f"{year}/JPEGImages/{name}.jpg" for name in names if f"{name}.jpg" not in images]
    missing += [f"{year}/Annotations/{name}.xml" for name in names if f"{name}.xml" not in annotations]
    if missing or not names:
        raise DataError(
            f"source {src}",
            got=f"{len(missing)} files fewer than {list_file} lists: {format_examples(missing)}"
            if names
            else f"an empty list {list_file}",
            expected=LAYOUT,
            fix="unpack the archives again; VOC2007 needs VOCtrainval and VOCtest in one folder",
        )
    return [
        Sample(
            f"{year}/JPEGImages/{name}.jpg",
            -1,
            os.fspath(src.absolute()),
            WHOLE_FILE,
            *images[f"{name}.jpg"],
            extra_json=_read_annotation(src / year / "Annotations" / f"{name}.xml"),
        )
        for name in names
    ]


def _read_annotation(path: Path) -> str:
    try:
        tree = ElementTree.parse(path).getroot()
        annotation: dict[str, list[Any]] = {
            "size": [int(_text(tree, "size/height")), int(_text(tree, "size/width"))],
            "boxes": [],
            "labels": [],
            "difficult": [],
        }
        for item in tree.findall("object"):
            x1, y1, x2, y2 = (float(_text(item, f"bndbox/{end}")) for end in ("xmin", "ymin", "xmax", "ymax"))
            annotation["boxes"].append([x1 - 1, y1 - 1, x2, y2])
            annotation["labels"].append(CLASSES.index(_text(item, "name").strip()))
            annotation["difficult"].append(int(item.findtext("difficult") or 0))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DataError(
            f"annotation {path}",
            got=f"a file that cannot be read as one of VOC ({error})",
            expected="for every object its name (one of the 20 of VOC), box and difficulty, and the size of the image",
            fix="unpack the archive again",
        ) from error
    return encode_annotation(annotation, path)


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"no {path}")
    return text
