"""The published layouts of the transfer data sets: where each names its images, its classes and its split.

One small reader per layout, for the folder that its archive unpacks to. A reader opens lists, never images (CIFAR's
binary batches, which are both, excepted), and refuses nothing: ``transfer.py`` knows what should have been there.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_prep.images import png
from hpcssl.data.shards import IMAGE_SUFFIXES

log = logging.getLogger("hpcssl")


class Item(NamedTuple):
    """An image of a data set: a file at ``source`` below the folder, unless ``place`` says where its bytes lie."""

    source: str
    part: str  # train, val, test; where no val is published, train still holds what will be held out
    label: int  # class number, -1 with targets
    targets: tuple[int, ...] | None = None  # as ``ShardSet.targets``
    place: tuple[str, int, int, int] | None = None  # path, offset, size, and modification time in ns of its source


class Listing(NamedTuple):
    classes: list[str]
    items: list[Item]


class Scratch:
    """Images that no file of the source holds, laid end to end in one file, which is read after it was closed."""

    def __init__(self, file):
        self._file, self._at = file, 0

    def add(self, body: bytes, stamp: int) -> tuple[str, int, int, int]:
        """Keep ``body``; returns an ``Item.place``."""
        place = self._file.name, self._at, len(body), stamp
        self._at += self._file.write(body)
        return place


@dataclass(frozen=True)
class Source:
    """A folder that holds what ``Layout.markers`` asks for, and which of the published splits is wanted."""

    home: Path
    split: int
    scratch: Scratch

    def lines(self, name: str) -> list[str]:
        """The non-empty lines of a list; ``name`` may give alternatives."""
        text = (self.home / find(self.home, name)).read_text("utf-8", "surrogateescape")
        return [line.strip() for line in text.splitlines() if line.strip()]


def find(home: Path, marker: str) -> str | None:
    """The first of the alternatives (``a.txt|lists/a.txt``; folders end with /) that ``home`` holds."""
    for name in marker.split("|"):
        if (home / name).is_dir() if name.endswith("/") else (home / name).is_file():
            return name
    return None


@dataclass(frozen=True)
class Layout:
    """How a data set lies on the disk: ``markers`` below SRC itself or below one of the folders ``homes`` in it."""

    read: Callable[[Source], Listing]
    homes: tuple[str, ...]
    markers: tuple[str, ...]  # {split} stands for the number of the split


def _numbers(names) -> dict:
    return {name: number for number, name in enumerate(names)}


def food101(at: Source) -> Listing:
    lists = {part: json.loads((at.home / "meta" / f"{part}.json").read_text()) for part in ("train", "test")}
    classes = sorted(lists["train"])
    number = _numbers(classes)
    return Listing(classes, [Item(f"images/{name}.jpg", part, number[kind]) for part, kinds in lists.items()
                             for kind, names in kinds.items() for name in names])


CIFAR10_FILES = {**{f"data_batch_{n}.bin": "train" for n in range(1, 6)}, "test_batch.bin": "test"}
CIFAR100_FILES = {"train.bin": "train", "test.bin": "test"}


def cifar10(at: Source) -> Listing:
    return _cifar(at, at.lines("batches.meta.txt"), CIFAR10_FILES, 1)


def cifar100(at: Source) -> Listing:
    """Its records hold the coarse label and then the fine one, which is the class."""
    return _cifar(at, at.lines("fine_label_names.txt"), CIFAR100_FILES, 2)


def _cifar(at: Source, classes: list[str], files: dict[str, str], labels: int) -> Listing:
    """Records of ``labels`` bytes and 32x32 pixels, plane by plane; the pixels are kept as PNG."""
    items = []
    for file, part in files.items():
        path = at.home / file
        bytes_ = np.fromfile(path, np.uint8)
        if bytes_.size % (labels + 3072):
            raise ValueError(f"{file} has {bytes_.size} bytes, no whole number of records of {labels + 3072}")
        stamp = path.stat().st_mtime_ns
        for n, record in enumerate(bytes_.reshape(-1, labels + 3072)):
            label = int(record[labels - 1])
            pixels = record[labels:].reshape(3, 32, 32).transpose(1, 2, 0)
            source = f"{part}/{classes[label]}/{path.stem}-{n:05d}.png"
            items.append(Item(source, part, label, place=at.scratch.add(png(Image.fromarray(pixels)), stamp)))
    return Listing(classes, items)


def class_folders(at: Source) -> Listing:
    """train/CLASS/*.png and test/CLASS/*.png (or .jpg): CIFAR as many tools unpack it."""
    classes = _folders(at.home / "train")
    number = _numbers(classes)
    items = [Item(f"{part}/{kind}/{name}", part, number[kind]) for part in ("train", "test")
             for kind in _folders(at.home / part) for name in _images(at.home / part / kind)]
    if any(item.source.lower().endswith((".jpg", ".jpeg")) for item in items):
        log.warning("%s holds JPEGs: somebody encoded CIFAR's pixels again, so results may differ a little from "
                    "published ones", at.home)
    return Listing(classes, items)


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _images(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != ".")


def birdsnap(at: Source) -> Listing:
    """Tables with a head line; get_birdsnap.py, which comes with them, fetches the photographs one by one."""
    species, photographs = (list(csv.DictReader(at.lines(name), delimiter="\t", quoting=csv.QUOTE_NONE))
                            for name in ("species.txt", "images.txt"))
    number = _numbers(row["id"] for row in species)
    test = set(at.lines("test_images.txt"))
    return Listing([row["common"] for row in species],
                   [Item(f"download/images/{row['path']}", "test" if row["path"] in test else "train",
                         number[row["species_id"]]) for row in photographs])


SUN_IMAGES = "a/|SUN397/a/"


def sun_list(name: str) -> str:
    """The places where people unpack Partitions.zip."""
    return "|".join(folder + name for folder in ("", "Partitions/", "SUN397/", "SUN397/Partitions/"))


def sun397(at: Source) -> Listing:
    """Lines such as ``/a/apartment_building/outdoor/sun_….jpg``; the first letter is only a drawer."""
    root = find(at.home, SUN_IMAGES).removesuffix("a/")
    folders = at.lines(sun_list("ClassName.txt"))
    number = _numbers(folders)
    lists = {part: at.lines(sun_list(f"{name}_{at.split:02d}.txt"))
             for part, name in (("train", "Training"), ("test", "Testing"))}
    return Listing([folder.strip("/").partition("/")[2] for folder in folders],
                   [Item(root + line.strip("/"), part, number[line.rpartition("/")[0]])
                    for part, lines in lists.items() for line in lines])


CARS_TEST = "cars_test_annos_withlabels.mat|devkit/cars_test_annos_withlabels.mat"


def cars(at: Source) -> Listing:
    classes = [str(name) for name in _mat(at, "devkit/cars_meta.mat", "class_names")]
    lists = {"train": "devkit/cars_train_annos.mat", "test": CARS_TEST}
    return Listing(classes, [Item(f"cars_{part}/{row['fname']}", part, int(row["class"]) - 1)
                             for part, name in lists.items() for row in _mat(at, name, "annotations")])


def cars_in_one(at: Source) -> Listing:
    """The later release: all photographs in one folder, and one table that says which are for the test."""
    table = "cars_annos.mat"
    return Listing([str(name) for name in _mat(at, table, "class_names")],
                   [Item(str(row["relative_im_path"]), "test" if row["test"] else "train", int(row["class"]) - 1)
                    for row in _mat(at, table, "annotations")])


def _mat(at: Source, name: str, variable: str) -> np.ndarray:
    """One array of a MATLAB file, flat."""
    from scipy.io import loadmat, matlab  # scikit-learn brings it, and only two of the sets need it

    try:
        return np.atleast_1d(loadmat(at.home / find(at.home, name), squeeze_me=True)[variable]).ravel()
    except (matlab.MatReadError, zlib.error) as error:
        raise ValueError(f"{name}: {error}") from error


def aircraft(at: Source) -> Listing:
    """Lines ``1025794 707-320``: the variant may hold blanks."""
    classes = at.lines("variants.txt")
    number = _numbers(classes)
    rows = ((part, *line.split(None, 1)) for part in ("train", "val", "test")
            for line in at.lines(f"images_variant_{part}.txt"))
    return Listing(classes, [Item(f"images/{image}.jpg", part, number[variant]) for part, image, variant in rows])


def voc07(at: Source) -> Listing:
    """One list per class and part, of every image with 1, -1, or 0 where all such objects are marked difficult."""
    main = "ImageSets/Main"
    classes = sorted(name.removesuffix("_train.txt") for name in os.listdir(at.home / main)
                     if name.endswith("_train.txt"))
    items = []
    for part in ("train", "val", "test"):
        columns = [{name: int(value) for name, value in map(str.split, at.lines(f"{main}/{kind}_{part}.txt"))}
                   for kind in classes]
        items += [Item(f"JPEGImages/{image}.jpg", part, -1, tuple(column[image] for column in columns))
                  for image in at.lines(f"{main}/{part}.txt")]
    return Listing(classes, items)


def dtd(at: Source) -> Listing:
    rows = [(part, line) for part in ("train", "val", "test") for line in at.lines(f"labels/{part}{at.split}.txt")]
    classes = sorted({line.partition("/")[0] for _, line in rows})
    number = _numbers(classes)
    return Listing(classes, [Item(f"images/{line}", part, number[line.partition("/")[0]]) for part, line in rows])


def pets(at: Source) -> Listing:
    """Lines ``Abyssinian_100 1 1 1``: image, class from 1, species, breed."""
    rows = [(part, *line.split()[:2]) for part, name in (("train", "trainval"), ("test", "test"))
            for line in at.lines(f"annotations/{name}.txt") if not line.startswith("#")]
    names = {int(kind): image.rpartition("_")[0] for _, image, kind in rows}
    number = _numbers(sorted(names))
    return Listing([names[kind] for kind in sorted(names)],
                   [Item(f"images/{image}.jpg", part, number[int(kind)]) for part, image, kind in rows])


CALTECH_TRAIN = 30


def caltech101(at: Source) -> Listing:
    """No split is published: 30 images of every class are drawn, in five ways, and all others are the test."""
    from hpcssl import rng

    classes, items = _folders(at.home), []
    for number, kind in enumerate(classes):
        names = _images(at.home / kind)
        chosen = CALTECH_TRAIN if len(names) > CALTECH_TRAIN else len(names) // 2  # the half: only of a partial set
        order = rng.permutation(rng.key(0, "transfer", "caltech101", at.split, kind), len(names))
        items += [Item(f"{kind}/{names[i]}", "train" if n < chosen else "test", number) for n, i in enumerate(order)]
    return Listing(classes, items)


def flowers(at: Source) -> Listing:
    """Classes have numbers and no names."""
    label = _mat(at, "imagelabels.mat", "labels").astype(int)
    return Listing([str(n + 1) for n in range(label.max())],
                   [Item(f"jpg/image_{i:05d}.jpg", part, int(label[i - 1]) - 1)
                    for part, name in (("train", "trnid"), ("val", "valid"), ("test", "tstid"))
                    for i in _mat(at, "setid.mat", name).astype(int)])
