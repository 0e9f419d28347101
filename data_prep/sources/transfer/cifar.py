"""CIFAR-10 and CIFAR-100: the binary version, and folders of images as many tools unpack them."""

from __future__ import annotations

import logging

import numpy as np
from PIL import Image

from data_prep.shards.images import encode_png
from data_prep.sources.transfer.layout import Item, Listing, Source, list_folders, list_images, number_classes

LOG = logging.getLogger("hpcssl")

CIFAR10_FILES = {**{f"data_batch_{n}.bin": "train" for n in range(1, 6)}, "test_batch.bin": "test"}
CIFAR100_FILES = {"train.bin": "train", "test.bin": "test"}
_PIXEL_BYTES = 3 * 32 * 32


def read_cifar10(source: Source) -> Listing:
    """Read the binary version of CIFAR-10."""
    return _read_binary(source, source.read_lines("batches.meta.txt"), CIFAR10_FILES, 1)


def read_cifar100(source: Source) -> Listing:
    """Read the binary version of CIFAR-100. Its records hold the coarse label and then the fine one, the class."""
    return _read_binary(source, source.read_lines("fine_label_names.txt"), CIFAR100_FILES, 2)


def _read_binary(source: Source, classes: list[str], files: dict[str, str], label_bytes: int) -> Listing:
    """Read records of label bytes and 32x32 pixels, plane by plane, and encode the pixels as PNG."""
    items = []
    record_bytes = label_bytes + _PIXEL_BYTES
    for file, part in files.items():
        path = source.home / file
        content = np.fromfile(path, np.uint8)
        if content.size % record_bytes:
            raise ValueError(f"{file} has {content.size} bytes, no whole number of records of {record_bytes}")
        mtime_ns = path.stat().st_mtime_ns
        for n, record in enumerate(content.reshape(-1, record_bytes)):
            label = int(record[label_bytes - 1])
            pixels = record[label_bytes:].reshape(3, 32, 32).transpose(1, 2, 0)
            name = f"{part}/{classes[label]}/{path.stem}-{n:05d}.png"
            location = source.encoded.add(encode_png(Image.fromarray(pixels)), mtime_ns)
            items.append(Item(name, part, label, location=location))
    return Listing(classes, items)


def read_class_folders(source: Source) -> Listing:
    """Read train/CLASS/*.png and test/CLASS/*.png (or .jpg)."""
    classes = list_folders(source.home / "train")
    number = number_classes(classes)
    items = [
        Item(f"{part}/{name}/{image}", part, number[name])
        for part in ("train", "test")
        for name in list_folders(source.home / part)
        for image in list_images(source.home / part / name)
    ]
    if any(item.source.lower().endswith((".jpg", ".jpeg")) for item in items):
        LOG.warning(
            "%s holds JPEGs: the pixels of CIFAR were encoded again with loss, so results may differ a little from "
            "published ones.",
            source.home,
        )
    return Listing(classes, items)
