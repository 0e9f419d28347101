"""The twelve data sets of the transfer protocol: their published layouts, checked, become train, val and test.

Classes, split sizes and what is held out for validation are those of BYOL's appendix D (table 10), which NNCLR
follows. Sizes are compared with them, so that a wrong or an incomplete folder is named before anything is written.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep import images, layouts
from data_prep.catalogue import WHOLE, Catalogue, Sample, refuse_clashes, some
from data_prep.layouts import Item, Layout, Source, find
from hpcssl.errors import ConfigError, DataError, nearest

log = logging.getLogger("hpcssl")
PARTS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Published:
    """What is known of a data set. ``val``: the images per class that are held out of train, ``"share"`` where their
    number in all is known (each class gives its share), ``"list"`` where a list of them is published."""

    classes: int
    sizes: tuple[int, int, int]  # train, val, test
    val: int | str
    page: str
    layouts: tuple[Layout, ...]
    splits: int = 1  # how many splits are published (or, of Caltech-101, drawn)
    trainval: bool = False  # train and val are also written as one, on which VOC07's SVMs learn

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The folders that are written, and the parts that each holds."""
        return {part: (part,) for part in PARTS} | ({"trainval": ("train", "val")} if self.trainval else {})


def _one(read, homes: Sequence[str], *markers: str) -> tuple[Layout]:
    return (Layout(read, tuple(homes), markers),)


_FOLDERS = Layout(layouts.class_folders, (), ("train/", "test/"))

SETS = {
    "food101": Published(
        classes=101, sizes=(68175, 7575, 25250), val=75, page="data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
        layouts=_one(layouts.food101, ["food-101"], "images/", "meta/train.json", "meta/test.json")),
    "cifar10": Published(
        classes=10, sizes=(45000, 5000, 10000), val=500, page="www.cs.toronto.edu/~kriz/cifar.html",
        layouts=(*_one(layouts.cifar10, ["cifar-10-batches-bin"], "batches.meta.txt", *layouts.CIFAR10_FILES),
                 _FOLDERS)),
    "cifar100": Published(  # 5,067 are no multiple of 100 classes
        classes=100, sizes=(44933, 5067, 10000), val="share", page="www.cs.toronto.edu/~kriz/cifar.html",
        layouts=(*_one(layouts.cifar100, ["cifar-100-binary"], "fine_label_names.txt", *layouts.CIFAR100_FILES),
                 _FOLDERS)),
    "birdsnap": Published(  # BYOL's text asks for as many val as test images per class, its table for twice as many
        classes=500, sizes=(42405, 4981, 2443), val="share", page="thomasberg.org",
        layouts=_one(layouts.birdsnap, ["birdsnap"], "species.txt", "images.txt", "test_images.txt",
                     "download/images/")),
    "sun397": Published(
        classes=397, sizes=(15880, 3970, 19850), val=10, splits=10, page="vision.princeton.edu/projects/2010/SUN",
        layouts=_one(layouts.sun397, [], layouts.SUN_IMAGES, *map(layouts.sun_list, (
            "ClassName.txt", "Training_{split:02d}.txt", "Testing_{split:02d}.txt")))),
    "cars": Published(
        classes=196, sizes=(6494, 1650, 8041), val="share", page="ai.stanford.edu/~jkrause/cars/car_dataset.html",
        layouts=(*_one(layouts.cars, ["stanford_cars"], "cars_train/", "cars_test/", "devkit/cars_meta.mat",
                       "devkit/cars_train_annos.mat", layouts.CARS_TEST),
                 *_one(layouts.cars_in_one, ["stanford_cars"], "car_ims/", "cars_annos.mat"))),
    "aircraft": Published(
        classes=100, sizes=(3334, 3333, 3333), val="list", page="www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        layouts=_one(layouts.aircraft, ["data", "fgvc-aircraft-2013b/data"], "images/", "variants.txt",
                     *(f"images_variant_{part}.txt" for part in PARTS))),
    "voc07": Published(
        classes=20, sizes=(2501, 2510, 4952), val="list", page="host.robots.ox.ac.uk/pascal/VOC/voc2007",
        layouts=_one(layouts.voc07, ["VOC2007", "VOCdevkit/VOC2007"], "JPEGImages/",
                     *(f"ImageSets/Main/{part}.txt" for part in PARTS)), trainval=True),
    "dtd": Published(
        classes=47, sizes=(1880, 1880, 1880), val="list", splits=10, page="www.robots.ox.ac.uk/~vgg/data/dtd",
        layouts=_one(layouts.dtd, ["dtd"], "images/", *(f"labels/{part}{{split}}.txt" for part in PARTS))),
    "pets": Published(
        classes=37, sizes=(2940, 740, 3669), val=20, page="www.robots.ox.ac.uk/~vgg/data/pets",
        layouts=_one(layouts.pets, ["oxford-iiit-pet"], "images/", "annotations/trainval.txt",
                     "annotations/test.txt")),
    "caltech101": Published(  # called 101, and counted with its background class everywhere: (25 + 5) x 102
        classes=102, sizes=(2550, 510, 6084), val=5, splits=5, page="data.caltech.edu/records/mzrjq-6wc02",
        layouts=_one(layouts.caltech101, ["101_ObjectCategories", "caltech101/101_ObjectCategories",
                                          "caltech-101/101_ObjectCategories"], "BACKGROUND_Google/", "Faces_easy/")),
    "flowers": Published(
        classes=102, sizes=(1020, 1020, 6149), val="list", page="www.robots.ox.ac.uk/~vgg/data/flowers/102",
        layouts=_one(layouts.flowers, ["flowers-102"], "jpg/", "imagelabels.mat", "setid.mat")),
}


def check(name: str, split: int) -> Published:
    """The facts of a data set. Raises ConfigError for a name or a split that it does not have."""
    if name not in SETS:
        raise ConfigError("transfer", got=name, expected=f"one of {', '.join(SETS)}", mend=nearest(name, SETS))
    facts = SETS[name]
    if not 1 <= split <= facts.splits:
        raise ConfigError("--split", got=split, expected=f"1 to {facts.splits}" if facts.splits > 1 else
                          f"1: {name} has one split", mend="leave --split out for the one that the papers use")
    return facts


def read(name: str, src: Path, scratch: Path, *, seed: int = 0, split: int = 1,
         partial: bool = False) -> dict[str, Catalogue]:
    """train, val and test (of voc07 also trainval) of the data set ``name`` in the folder ``src``, of the same classes.

    ``scratch``: a file for images that must be encoded first. ``partial``: images may be missing, as for a trial.
    Raises DataError naming what is missing or does not fit.
    """
    facts = check(name, split)
    layout, home = _home(name, facts, src, split)
    with open(scratch, "wb") as file:
        source = Source(home, split, layouts.Scratch(file))
        try:
            listing = layout.read(source)
            _refuse_unsound(listing)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError, csv.Error) as error:
            raise DataError(f"lists of {name} in {home}",
                            got=f"something that cannot be understood ({type(error).__name__}: {error})",
                            expected="the lists as published", mend=f"download them again from {facts.page}") from error
        samples, missing = _locate(listing.items, source)
    if missing and not partial:
        raise DataError(f"{name} in {home}", got=f"{len(missing)} of {len(listing.items)} listed images missing "
                        f"({some(missing)})", expected="every image",
                        mend=f"unpack or download it again ({facts.page}), or give --partial for a trial with what "
                             "is there")
    kept = [item for item in listing.items if item.source in samples]
    complete = not missing and len(kept) == sum(facts.sizes)
    if facts.val != "list":
        kept = _hold_out(kept, facts, name, seed, complete)
    _compare(name, home, facts, listing.classes, kept, partial)
    refuse_clashes([item.source for item in kept], home)
    made = {"verb": "transfer", "dataset": name}
    made |= {"split": split} if facts.splits > 1 else {}
    made |= {} if complete else {"partial": True}
    return {name: Catalogue(listing.classes, sorted(samples[i.source] for i in kept if i.part in members),
                            {**made, "part": name}) for name, members in facts.parts.items()}


def _home(name: str, facts: Published, src: Path, split: int) -> tuple[Layout, Path]:
    """The layout that lies in ``src`` and the folder of it."""
    what, mend = f"{name} in {src}", f"unpack what {facts.page} offers, and give the folder that holds all of it"
    if not src.is_dir():
        raise DataError(what, got="a file" if src.exists() else "no such folder", expected="the unpacked archive",
                        mend=mend if src.exists() else "check the path")
    closest: tuple[Path, list[str]] | None = None
    for layout in facts.layouts:
        layout = replace(layout, markers=tuple(marker.format(split=split) for marker in layout.markers))
        for home in (src, *(src / home for home in layout.homes)):
            lacking = [marker for marker in layout.markers if find(home, marker) is None]
            if not lacking:
                return layout, home.absolute()
            if closest is None or len(lacking) < len(closest[1]):
                closest = home, lacking
    _refuse_pickles(what, src)
    home, lacking = closest
    inside = sorted(os.listdir(home if home.is_dir() else src))
    raise DataError(what, got=f"no {some([marker.partition('|')[0] for marker in lacking])} (it holds "
                    f"{some(inside) or 'nothing'})", expected="the folder as published", mend=mend)


def _refuse_pickles(what: str, src: Path) -> None:
    """CIFAR's Python version is a set of pickles, and reading a pickle may run any program that is in it."""
    for home in (src, src / "cifar-10-batches-py", src / "cifar-100-python"):
        if (home / "data_batch_1").is_file() or ((home / "meta").is_file() and (home / "train").is_file()):
            raise DataError(what, got="the Python version, pickled: reading a pickle can run any program",
                            expected="the binary version, or folders train/CLASS and test/CLASS of images",
                            mend="download the file named `…-binary.tar.gz` from the same page and unpack it")


def _refuse_unsound(listing: layouts.Listing) -> None:
    """Raise ValueError for a label or a name that no list of the data set can hold."""
    for item in listing.items:
        if item.targets is None and not 0 <= item.label < len(listing.classes):
            raise ValueError(f"{item.source} is of class {item.label} of {len(listing.classes)}, from 0")
        if item.targets is not None and not {-1, 0, 1}.issuperset(item.targets):
            raise ValueError(f"{item.source} is marked {item.targets}")
        if item.source.startswith("/") or ".." in item.source.split("/"):
            raise ValueError(f"{item.source} leads out of the folder")


def _locate(items: list[Item], source: Source) -> tuple[dict[str, Sample], list[str]]:
    """A sample for every item whose bytes are there, and the names of the others.

    Some sets name GIFs and BMPs ``.jpg`` (Oxford's pets have eight): these are kept as PNG, pixel by pixel.
    """
    samples, missing, encoded = {}, [], []
    folder = os.fspath(source.home)
    for item in items:
        more = None if item.targets is None else json.dumps({"targets": item.targets}, separators=(",", ":"))
        place = item.place
        if place is None:
            try:
                with open(source.home / item.source, "rb") as file:
                    status, start = os.fstat(file.fileno()), file.read(8)
                place = folder, WHOLE, status.st_size, status.st_mtime_ns
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                missing.append(item.source)
                continue
            except OSError:  # the writer will name it with its reason, as any file that it cannot read
                place, start = (folder, WHOLE, 0, 0), images.PNG
            if images.suffix(start) is None and (body := _as_png(source.home / item.source)):
                place = source.scratch.add(body, place[-1])
                encoded.append(item.source)
        path, offset, size, stamp = place
        samples[item.source] = Sample(item.source, item.label, path, offset, size, stamp, more=more)
    if encoded:
        log.warning("%d images are neither JPEG nor PNG inside, and are kept as PNG: %s", len(encoded), some(encoded))
    return samples, missing


def _as_png(path: Path) -> bytes | None:
    """A GIF, BMP, TIFF or WebP file as PNG; None for what is none of these, which the writer will name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=("GIF", "BMP", "TIFF", "WEBP")) as image:
                return images.png(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError):
        return None


def _hold_out(items: list[Item], facts: Published, name: str, seed: int, complete: bool) -> list[Item]:
    """Move the val images out of train, drawn per class. Of an incomplete set the same share, never a whole class."""
    from hpcssl import rng

    train = sorted((n for n, item in enumerate(items) if item.part == "train"), key=lambda n: items[n].source)
    labels = np.array([items[n].label for n in train], int)
    counts = np.bincount(labels, minlength=1)
    if complete and facts.val != "share":
        quotas = np.full_like(counts, facts.val)
    else:
        total = round(len(train) * facts.sizes[1] / (facts.sizes[0] + facts.sizes[1]))
        quotas = np.minimum(_shares(counts, max(total, 1)), np.maximum(counts - 1, 0))
    out = list(items)
    for label in np.flatnonzero(quotas):
        members = np.flatnonzero(labels == label)
        order = rng.permutation(rng.key(seed, "transfer", name, "val", int(label)), len(members))
        for n in members[order[: quotas[label]]]:
            out[train[n]] = items[train[n]]._replace(part="val")
    return out


def _shares(counts: np.ndarray, total: int) -> np.ndarray:
    """``total`` spread over the classes in proportion to ``counts``: whole numbers by the largest remainders."""
    exact = counts * (total / max(counts.sum(), 1))
    quotas = np.floor(exact).astype(int)
    quotas[np.argsort(quotas - exact, kind="stable")[: total - quotas.sum()]] += 1
    return quotas


def _compare(name: str, home: Path, facts: Published, classes: list[str], items: list[Item], partial: bool) -> None:
    """Refuse what is not of the published size: fewer only with ``partial``, more and an empty part never."""
    found = np.array([sum(item.part == part for item in items) for part in PARTS])
    fewer = partial and len(classes) <= facts.classes and (found <= facts.sizes).all()
    if (tuple(found) == facts.sizes and len(classes) == facts.classes) or (fewer and found.all()):
        return
    numbers = [", ".join(f"{part} {n}" for part, n in zip(PARTS, sizes, strict=True)) for sizes in (found, facts.sizes)]
    expected = f"{facts.classes} classes, {numbers[1]}"
    raise DataError(f"{name} in {home}", got=f"{len(classes)} classes, {numbers[0]}",
                    expected=f"at most {expected}, and no part empty" if partial else expected,
                    mend="check that it is this data set" + ("" if partial else ", whole; --partial allows less"))
