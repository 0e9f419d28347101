"""The facts of the twelve transfer data sets: classes, sizes, layouts and where to download them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_prep.sources.transfer import cifar, image_lists
from data_prep.sources.transfer.layout import Layout, Listing, Source
from hpcssl.errors import ConfigError, suggest

PARTS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class DataSetFacts:
    """What is known of a data set.

    Attributes:
        classes: Number of classes.
        sizes: Images of train, val and test.
        val: Images per class that are held out of train; ``"share"`` where only their total is known and each class
            gives its share; ``"list"`` where a list of them is published.
        page: Where to download it, without ``https://``.
        layouts: Layouts in which it is published.
        splits: Number of splits that are published (or, for Caltech-101, drawn).
        trainval: Whether train and val are also written as one folder, on which the SVMs of VOC07 learn.
    """

    classes: int
    sizes: tuple[int, int, int]
    val: int | str
    page: str
    layouts: tuple[Layout, ...]
    splits: int = 1
    trainval: bool = False

    @property
    def folders(self) -> dict[str, tuple[str, ...]]:
        """The folders that are written, and the parts that each holds."""
        return {part: (part,) for part in PARTS} | ({"trainval": ("train", "val")} if self.trainval else {})


def _one(read: Callable[[Source], Listing], homes: Sequence[str], *markers: str) -> tuple[Layout]:
    return (Layout(read, tuple(homes), markers),)


_FOLDERS = Layout(cifar.read_class_folders, (), ("train/", "test/"))

DATA_SETS = {
    "food101": DataSetFacts(
        classes=101,
        sizes=(68175, 7575, 25250),
        val=75,
        page="data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
        layouts=_one(image_lists.read_food101, ["food-101"], "images/", "meta/train.json", "meta/test.json"),
    ),
    "cifar10": DataSetFacts(
        classes=10,
        sizes=(45000, 5000, 10000),
        val=500,
        page="www.cs.toronto.edu/~kriz/cifar.html",
        layouts=(
            *_one(cifar.read_cifar10, ["cifar-10-batches-bin"], "batches.meta.txt", *cifar.CIFAR10_FILES),
            _FOLDERS,
        ),
    ),
    "cifar100": DataSetFacts(  # 5,067 is not a multiple of 100 classes
        classes=100,
        sizes=(44933, 5067, 10000),
        val="share",
        page="www.cs.toronto.edu/~kriz/cifar.html",
        layouts=(
            *_one(
                cifar.read_cifar100,
                ["cifar-100-binary"],
                "fine_label_names.txt",
                *cifar.CIFAR100_FILES,
            ),
            _FOLDERS,
        ),
    ),
    "birdsnap": DataSetFacts(  # BYOL: as many val as test images per class in the text, twice as many in the table
        classes=500,
        sizes=(42405, 4981, 2443),
        val="share",
        page="thomasberg.org",
        layouts=_one(
            image_lists.read_birdsnap, ["birdsnap"], "species.txt", "images.txt", "test_images.txt", "download/images/"
        ),
    ),
    "sun397": DataSetFacts(
        classes=397,
        sizes=(15880, 3970, 19850),
        val=10,
        splits=10,
        page="vision.princeton.edu/projects/2010/SUN",
        layouts=_one(
            image_lists.read_sun397,
            [],
            image_lists.SUN_IMAGES,
            *map(image_lists.sun_list, ("ClassName.txt", "Training_{split:02d}.txt", "Testing_{split:02d}.txt")),
        ),
    ),
    "cars": DataSetFacts(
        classes=196,
        sizes=(6494, 1650, 8041),
        val="share",
        page="ai.stanford.edu/~jkrause/cars/car_dataset.html",
        layouts=(
            *_one(
                image_lists.read_cars,
                ["stanford_cars"],
                "cars_train/",
                "cars_test/",
                "devkit/cars_meta.mat",
                "devkit/cars_train_annos.mat",
                image_lists.CARS_TEST,
            ),
            *_one(image_lists.read_cars_single_folder, ["stanford_cars"], "car_ims/", "cars_annos.mat"),
        ),
    ),
    "aircraft": DataSetFacts(
        classes=100,
        sizes=(3334, 3333, 3333),
        val="list",
        page="www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        layouts=_one(
            image_lists.read_aircraft,
            ["data", "fgvc-aircraft-2013b/data"],
            "images/",
            "variants.txt",
            *(f"images_variant_{part}.txt" for part in PARTS),
        ),
    ),
    "voc07": DataSetFacts(
        classes=20,
        sizes=(2501, 2510, 4952),
        val="list",
        page="host.robots.ox.ac.uk/pascal/VOC/voc2007",
        layouts=_one(
            image_lists.read_voc07,
            ["VOC2007", "VOCdevkit/VOC2007"],
            "JPEGImages/",
            *(f"ImageSets/Main/{part}.txt" for part in PARTS),
        ),
        trainval=True,
    ),
    "dtd": DataSetFacts(
        classes=47,
        sizes=(1880, 1880, 1880),
        val="list",
        splits=10,
        page="www.robots.ox.ac.uk/~vgg/data/dtd",
        layouts=_one(image_lists.read_dtd, ["dtd"], "images/", *(f"labels/{part}{{split}}.txt" for part in PARTS)),
    ),
    "pets": DataSetFacts(
        classes=37,
        sizes=(2940, 740, 3669),
        val=20,
        page="www.robots.ox.ac.uk/~vgg/data/pets",
        layouts=_one(
            image_lists.read_pets, ["oxford-iiit-pet"], "images/", "annotations/trainval.txt", "annotations/test.txt"
        ),
    ),
    "caltech101": DataSetFacts(  # named 101, but all papers count its background class: (25 + 5) x 102
        classes=102,
        sizes=(2550, 510, 6084),
        val=5,
        splits=5,
        page="data.caltech.edu/records/mzrjq-6wc02",
        layouts=_one(
            image_lists.read_caltech101,
            ["101_ObjectCategories", "caltech101/101_ObjectCategories", "caltech-101/101_ObjectCategories"],
            "BACKGROUND_Google/",
            "Faces_easy/",
        ),
    ),
    "flowers": DataSetFacts(
        classes=102,
        sizes=(1020, 1020, 6149),
        val="list",
        page="www.robots.ox.ac.uk/~vgg/data/flowers/102",
        layouts=_one(image_lists.read_flowers, ["flowers-102"], "jpg/", "imagelabels.mat", "setid.mat"),
    ),
}


def find_facts(name: str, split: int) -> DataSetFacts:
    """Return the facts of a data set.

    Args:
        name: Its name.
        split: The split to read, from 1.

    Raises:
        ConfigError: There is no data set of this name, or no such split of it.
    """
    if name not in DATA_SETS:
        raise ConfigError("transfer", got=name, expected=f"one of {', '.join(DATA_SETS)}", fix=suggest(name, DATA_SETS))
    facts = DATA_SETS[name]
    if not 1 <= split <= facts.splits:
        raise ConfigError(
            "--split",
            got=split,
            expected=f"1 to {facts.splits}" if facts.splits > 1 else f"1: {name} has one split",
            fix="leave --split out for the one that the papers use",
        )
    return facts
