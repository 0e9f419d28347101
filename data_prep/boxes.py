"""Pictures with boxes: Pascal VOC 2007 + 2012 and COCO 2017, as their archives unpack, into two catalogues.

Each sample's KEY.json holds, beside its source::

    "size":   [height, width]                  as the annotation has them
    "boxes":  [[x1, y1, x2, y2], …]            pixels, corners of the area: x2 - x1 is the width
    "labels": [class number, …]                from 0, in the order of the folder's classes
    "difficult": [0 | 1, …]                    VOC: objects that its protocol neither rewards nor punishes
    "iscrowd": [0 | 1, …], "area": […],        COCO: as its files have them
    "segmentation": [polygons | run lengths, …]

VOC counts pixels from 1 and includes the last one, so that its xmin and ymin are lowered by 1 here and nothing else.
The annotations are read with the standard library's ElementTree: they come from the user's own disk, and its parser
(expat 2.4.1 and newer) bounds what an entity may expand to. COCO's training annotations take some 3 GB of memory.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from xml.etree import ElementTree

from data_prep.catalogue import WHOLE, Catalogue, Sample, refuse_case, refuse_clashes, some
from hpcssl.errors import ConfigError, DataError, nearest

VOC_CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
               "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
VOC_PARTS = {"train": (("VOC2007", "trainval"), ("VOC2012", "trainval")), "val": (("VOC2007", "test"),)}
COCO_PARTS = {"train": "train2017", "val": "val2017"}


def read(name: str, src: Path) -> dict[str, Catalogue]:
    """The parts ``train`` and ``val`` of the data set ``name`` (voc, coco) below ``src``.

    Raises ``ConfigError`` for another name, ``DataError`` naming what the folder lacks or what cannot be read.
    """
    if name not in SETS:
        raise ConfigError("hpcssl-shard detection", got=repr(name), expected="voc or coco", mend=nearest(name, SETS))
    if not src.is_dir():
        raise DataError(f"source {src}", got="no such folder", expected=_LAYOUT[name], mend="check the path")
    return SETS[name](src)


def voc(src: Path) -> dict[str, Catalogue]:
    """trainval of 2007 and 2012 (16,551 pictures) and test of 2007 (4,952)."""
    needed = sorted({f"{year}/ImageSets/Main/{split}.txt" for part in VOC_PARTS.values() for year, split in part})
    _refuse_missing(src, needed, "voc")
    return {part: _catalogue([sample for year, split in pieces for sample in _voc_split(src, year, split)],
                             list(VOC_CLASSES), src, "voc") for part, pieces in VOC_PARTS.items()}


def _voc_split(src: Path, year: str, split: str) -> list[Sample]:
    listed = src / year / "ImageSets" / "Main" / f"{split}.txt"
    names = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
    pictures = _listing(src / year / "JPEGImages", "voc")
    notes = _listing(src / year / "Annotations", "voc")
    lost = [f"{year}/JPEGImages/{name}.jpg" for name in names if f"{name}.jpg" not in pictures]
    lost += [f"{year}/Annotations/{name}.xml" for name in names if f"{name}.xml" not in notes]
    if lost or not names:
        raise DataError(f"source {src}", got=f"{len(lost)} files fewer than {listed} lists: {some(lost)}" if names else
                        f"an empty list {listed}", expected=_LAYOUT["voc"],
                        mend="unpack the archives again; VOC2007 needs VOCtrainval and VOCtest in one folder")
    return [Sample(f"{year}/JPEGImages/{name}.jpg", -1, os.fspath(src.absolute()), WHOLE, *pictures[f"{name}.jpg"],
                   more=_voc_note(src / year / "Annotations" / f"{name}.xml")) for name in names]


def _voc_note(path: Path) -> str:
    try:
        tree = ElementTree.parse(path).getroot()
        note = {"size": [int(tree.findtext("size/height")), int(tree.findtext("size/width"))],
                "boxes": [], "labels": [], "difficult": []}
        for thing in tree.findall("object"):
            x1, y1, x2, y2 = (float(thing.findtext(f"bndbox/{end}")) for end in ("xmin", "ymin", "xmax", "ymax"))
            note["boxes"].append([x1 - 1, y1 - 1, x2, y2])
            note["labels"].append(VOC_CLASSES.index(thing.findtext("name").strip()))
            note["difficult"].append(int(thing.findtext("difficult") or 0))
    except (OSError, ElementTree.ParseError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"annotation {path}", got=f"a file that cannot be read as VOC's ({error})",
                        expected="an object's name (one of VOC's 20), box and difficulty, and the picture's size",
                        mend="unpack the archive again") from error
    return _packed(note, path)


def coco(src: Path) -> dict[str, Catalogue]:
    """train2017 (118,287 pictures, some without an object) and val2017 (5,000), with the masks as COCO has them."""
    needed = [place for name in COCO_PARTS.values() for place in (name, f"annotations/instances_{name}.json")]
    _refuse_missing(src, needed, "coco")
    parts = {part: _coco_split(src, name) for part, name in COCO_PARTS.items()}
    classes = parts["train"][0]
    if parts["val"][0] != classes:
        raise DataError(f"annotations of {src}", got="other categories for val2017 than for train2017",
                        expected="the same categories in both files", mend="take both files from one download")
    return {part: _catalogue(samples, classes, src, "coco") for part, (_, samples) in parts.items()}


def _coco_split(src: Path, name: str) -> tuple[list[str], list[Sample]]:
    path = src / "annotations" / f"instances_{name}.json"
    try:
        found = json.loads(path.read_bytes())
        kinds = sorted(found["categories"], key=lambda kind: kind["id"])
        number = {kind["id"]: i for i, kind in enumerate(kinds)}
        notes = {image["id"]: {"size": [image["height"], image["width"]], "boxes": [], "labels": [], "iscrowd": [],
                               "area": [], "segmentation": []} for image in found["images"]}
        for thing in found["annotations"]:
            note, (x, y, width, height) = notes[thing["image_id"]], thing["bbox"]
            for field, value in (("boxes", [x, y, x + width, y + height]), ("labels", number[thing["category_id"]]),
                                 ("iscrowd", thing["iscrowd"]), ("area", thing["area"]),
                                 ("segmentation", thing["segmentation"])):
                note[field].append(value)
        files = {image["id"]: image["file_name"] for image in found["images"]}
        classes = [kind["name"] for kind in kinds]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"annotation {path}", got=f"a file that cannot be read as COCO's "
                        f"({type(error).__name__}: {error})", expected="images, annotations and categories",
                        mend="unpack annotations_trainval2017.zip again") from error
    del found
    pictures = _listing(src / name, "coco")
    lost = sorted(f"{name}/{file}" for file in files.values() if file not in pictures)
    if lost or not files:
        raise DataError(f"source {src}", got=f"{len(lost)} pictures fewer than {path.name} lists: {some(lost)}"
                        if files else f"no picture in {path.name}", expected=_LAYOUT["coco"],
                        mend=f"unpack {name}.zip again")
    return classes, [Sample(f"{name}/{files[i]}", -1, os.fspath(src.absolute()), WHOLE, *pictures[files[i]],
                            more=_packed(notes.pop(i), path)) for i in sorted(files)]


def _packed(note: dict, where: Path) -> str:
    """The note as text, which takes a tenth of its objects' memory, once its boxes are numbers."""
    for box in note["boxes"]:
        if not all(math.isfinite(x) for x in box) or box[2] < box[0] or box[3] < box[1]:
            raise DataError(f"annotation {where}", got=f"the box {box}", expected="finite corners, the second beyond "
                            "the first", mend="unpack the archive again")
    return json.dumps(note, separators=(",", ":"))


def _catalogue(samples: list[Sample], classes: list[str], src: Path, name: str) -> Catalogue:
    refuse_case(classes, f"classes of {src}")
    samples.sort()
    refuse_clashes([sample.source for sample in samples], src)
    return Catalogue(classes, samples, {"verb": "detection", "dataset": name})


def _listing(folder: Path, name: str) -> dict[str, tuple[int, int]]:
    """Size in bytes and modification time in ns of every file, by name."""
    try:
        return {entry.name: (entry.stat().st_size, entry.stat().st_mtime_ns) for entry in os.scandir(folder)}
    except OSError as error:
        raise DataError(f"folder {folder}", got=error.strerror, expected=_LAYOUT[name],
                        mend="unpack the archives again") from error


def _refuse_missing(src: Path, needed: list[str], name: str) -> None:
    lost = [place for place in needed if not (src / place).exists()]
    if lost:
        inside = sorted(os.listdir(src))
        deeper = next((p for p in inside if (src / p / needed[0]).exists()), None)
        raise DataError(f"source {src}", got=f"no {some(lost)} (it holds {some(inside) or 'nothing'})",
                        expected=_LAYOUT[name], mend=f"name {src / deeper}" if deeper else
                        "check the path, or unpack what is missing there")


SETS = {"voc": voc, "coco": coco}
_LAYOUT = {"voc": "VOCdevkit as the archives unpack: VOC2007 (VOCtrainval and VOCtest) and VOC2012 (VOCtrainval), each "
                  "with JPEGImages, Annotations and ImageSets/Main",
           "coco": "a folder with train2017, val2017 and annotations/instances_{train,val}2017.json"}
