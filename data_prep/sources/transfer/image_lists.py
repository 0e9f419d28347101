"""Transfer data sets whose images, classes and splits are given by lists or tables."""

from __future__ import annotations

import csv
import json
import os

from data_prep.sources.transfer.layout import Item, Listing, Source, list_folders, list_images, number_classes

SUN_IMAGES = "a/|SUN397/a/"
CARS_TEST = "cars_test_annos_withlabels.mat|devkit/cars_test_annos_withlabels.mat"
CALTECH_TRAIN = 30
"""Images per class of Caltech-101 that are drawn for training and validation."""


def read_food101(source: Source) -> Listing:
    """Read the JSON lists of Food-101."""
    lists = {part: json.loads((source.home / "meta" / f"{part}.json").read_text()) for part in ("train", "test")}
    classes = sorted(lists["train"])
    number = number_classes(classes)
    return Listing(
        classes,
        [
            Item(f"images/{image}.jpg", part, number[name])
            for part, images in lists.items()
            for name, names in images.items()
            for image in names
        ],
    )


def read_birdsnap(source: Source) -> Listing:
    """Read the tables of Birdsnap; its get_birdsnap.py downloads the images one by one."""
    species, images = (
        list(csv.DictReader(source.read_lines(name), delimiter="\t", quoting=csv.QUOTE_NONE))
        for name in ("species.txt", "images.txt")
    )
    number = number_classes(row["id"] for row in species)
    test = set(source.read_lines("test_images.txt"))
    return Listing(
        [row["common"] for row in species],
        [
            Item(
                f"download/images/{row['path']}", "test" if row["path"] in test else "train", number[row["species_id"]]
            )
            for row in images
        ],
    )


def sun_list(name: str) -> str:
    """Return the alternatives for a file of Partitions.zip of SUN397, which users unpack in several places."""
    return "|".join(folder + name for folder in ("", "Partitions/", "SUN397/", "SUN397/Partitions/"))


def read_sun397(source: Source) -> Listing:
    """Read lines such as ``/a/apartment_building/outdoor/sun_….jpg``; the first letter is not part of the class."""
    root = source.find_name(SUN_IMAGES).removesuffix("a/")
    folders = source.read_lines(sun_list("ClassName.txt"))
    number = number_classes(folders)
    lists = {
        part: source.read_lines(sun_list(f"{name}_{source.split:02d}.txt"))
        for part, name in (("train", "Training"), ("test", "Testing"))
    }
    return Listing(
        [folder.strip("/").partition("/")[2] for folder in folders],
        [
            Item(root + line.strip("/"), part, number[line.rpartition("/")[0]])
            for part, lines in lists.items()
            for line in lines
        ],
    )


def read_cars(source: Source) -> Listing:
    """Read the first release of Stanford Cars: a folder and a table per part."""
    classes = [str(name) for name in source.read_matlab("devkit/cars_meta.mat", "class_names")]
    tables = {"train": "devkit/cars_train_annos.mat", "test": CARS_TEST}
    return Listing(
        classes,
        [
            Item(f"cars_{part}/{row['fname']}", part, int(row["class"]) - 1)
            for part, name in tables.items()
            for row in source.read_matlab(name, "annotations")
        ],
    )


def read_cars_single_folder(source: Source) -> Listing:
    """Read the later release of Stanford Cars: all images in one folder, and one table that names the test images."""
    table = "cars_annos.mat"
    return Listing(
        [str(name) for name in source.read_matlab(table, "class_names")],
        [
            Item(str(row["relative_im_path"]), "test" if row["test"] else "train", int(row["class"]) - 1)
            for row in source.read_matlab(table, "annotations")
        ],
    )


def read_aircraft(source: Source) -> Listing:
    """Read lines ``1025794 707-320`` of FGVC Aircraft: image and variant, which may contain blanks."""
    classes = source.read_lines("variants.txt")
    number = number_classes(classes)
    rows = (
        (part, *line.split(None, 1))
        for part in ("train", "val", "test")
        for line in source.read_lines(f"images_variant_{part}.txt")
    )
    return Listing(classes, [Item(f"images/{image}.jpg", part, number[variant]) for part, image, variant in rows])


def read_voc07(source: Source) -> Listing:
    """Read the lists of VOC 2007, one per class and part, of every image with a target.

    The target is 1, -1, or 0 where all objects of the class are marked difficult.
    """
    main = "ImageSets/Main"
    classes = sorted(
        name.removesuffix("_train.txt") for name in os.listdir(source.home / main) if name.endswith("_train.txt")
    )
    items = []
    for part in ("train", "val", "test"):
        columns = []
        for name in classes:
            pairs = (line.split() for line in source.read_lines(f"{main}/{name}_{part}.txt"))
            columns.append({image: int(target) for image, target in pairs})
        items += [
            Item(f"JPEGImages/{image}.jpg", part, -1, tuple(column[image] for column in columns))
            for image in source.read_lines(f"{main}/{part}.txt")
        ]
    return Listing(classes, items)


def read_dtd(source: Source) -> Listing:
    """Read the lists of one split of the Describable Textures Dataset."""
    parts = ("train", "val", "test")
    rows = [(part, line) for part in parts for line in source.read_lines(f"labels/{part}{source.split}.txt")]
    classes = sorted({line.partition("/")[0] for _, line in rows})
    number = number_classes(classes)
    return Listing(classes, [Item(f"images/{line}", part, number[line.partition("/")[0]]) for part, line in rows])


def read_pets(source: Source) -> Listing:
    """Read lines ``Abyssinian_100 1 1 1`` of Oxford-IIIT Pet: image, class from 1, species, breed."""
    rows = [
        (part, *line.split()[:2])
        for part, name in (("train", "trainval"), ("test", "test"))
        for line in source.read_lines(f"annotations/{name}.txt")
        if not line.startswith("#")
    ]
    names = {int(class_id): image.rpartition("_")[0] for _, image, class_id in rows}
    number = number_classes(sorted(names))
    return Listing(
        [names[class_id] for class_id in sorted(names)],
        [Item(f"images/{image}.jpg", part, number[int(class_id)]) for part, image, class_id in rows],
    )


def read_caltech101(source: Source) -> Listing:
    """Draw the parts of Caltech-101: no split is published, so 30 images of every class are drawn, in five ways."""
    from hpcssl import rng

    classes, items = list_folders(source.home), []
    for number, name in enumerate(classes):
        images = list_images(source.home / name)
        # half of a class that is smaller, which occurs only in a partial set
        count = CALTECH_TRAIN if len(images) > CALTECH_TRAIN else len(images) // 2
        order = rng.permutation(rng.key(0, "transfer", "caltech101", source.split, name), len(images))
        items += [Item(f"{name}/{images[i]}", "train" if n < count else "test", number) for n, i in enumerate(order)]
    return Listing(classes, items)


def read_flowers(source: Source) -> Listing:
    """Read the tables of Oxford Flowers 102, whose classes have numbers and no names."""
    label = source.read_matlab("imagelabels.mat", "labels").astype(int)
    return Listing(
        [str(n + 1) for n in range(label.max())],
        [
            Item(f"jpg/image_{i:05d}.jpg", part, int(label[i - 1]) - 1)
            for part, name in (("train", "trnid"), ("val", "valid"), ("test", "tstid"))
            for i in source.read_matlab("setid.mat", name).astype(int)
        ],
    )
