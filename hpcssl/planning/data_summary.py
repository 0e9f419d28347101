"""What ``hpcssl init`` needs to know of a data set: number and size of the images, labels, a second modality."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcssl.data.decode import DamagedImageError, read_size
from hpcssl.data.reader import Reader
from hpcssl.data.shards import INDEX, ShardSet
from hpcssl.errors import DataError

PROBED_IMAGES = 64
"""Images whose size is read, at equal distances in the training set."""


@dataclass(frozen=True)
class DataSummary:
    """A training set and, if there is one, its validation set.

    Attributes:
        train: The training shards.
        val: The validation shards, or None.
        side: Median of the smaller side of the images that were probed, in pixels.
        probed: Number of images that were probed.
        labeled: Number of training images with a label.
    """

    train: ShardSet
    val: ShardSet | None
    side: int
    probed: int
    labeled: int

    @property
    def images(self) -> int:
        """Number of training images."""
        return len(self.train)

    @property
    def has_scores(self) -> bool:
        """Whether k-NN can score an encoder: every image of both sets has one label, of the same classes."""
        sets = [self.train, *([self.val] if self.val is not None else [])]
        return (
            len(sets) == 2
            and all(len(part) > 0 and part.targets is None and bool((part.labels >= 0).all()) for part in sets)
            and sets[0].classes == sets[1].classes
        )


def read_summary(root: Path) -> DataSummary:
    """Open a data set and read the sizes of some of its images.

    Args:
        root: A shard folder, or a folder with shards in ``train`` and, optionally, in ``val``.

    Raises:
        DataError: There are no such shards, they are damaged, or no image can be read.
    """
    if not root.is_dir():
        raise DataError(
            f"DATA {root}",
            got="no such folder" if not root.exists() else "a file",
            expected="a folder that hpcssl-shard wrote",
            fix="check the path, or write shards with `hpcssl-shard images SRC OUT`",
        )
    if (root / INDEX).exists():
        train, val = ShardSet.open(root), None
    elif (root / "train").is_dir():
        train = ShardSet.open(root / "train")
        val = ShardSet.open(root / "val") if (root / "val").is_dir() else None
    else:
        below = sorted(index.parent for at in ("*", "*/train") for index in root.glob(f"{at}/{INDEX}"))
        raise DataError(
            f"DATA {root}",
            got=f"neither {INDEX} nor a folder train",
            expected="a folder that hpcssl-shard wrote",
            fix=f"name {below[0].parent if below[0].name == 'train' else below[0]}"
            if below
            else f"write shards of these images first: `hpcssl-shard images {root} OUT`, then `hpcssl init OUT`",
        )
    sides = _probe_sides(train)
    if not sides:
        raise DataError(
            f"shard folder {train.root}",
            got="no image whose size can be read" if len(train) else "no images",
            expected="images",
            fix="`hpcssl-shard verify` names each damaged image",
        )
    labels = train.labels if train.targets is None else np.where(train.targets.any(1), 0, -1)
    return DataSummary(train, val, int(statistics.median(sides)), len(sides), int((labels >= 0).sum()))


def _probe_sides(shards: ShardSet) -> list[int]:
    """The smaller sides of some images, in pixels."""
    sides = []
    with Reader(shards) as reader:
        for index in np.unique(np.linspace(0, len(shards) - 1, PROBED_IMAGES).astype(int)) if len(shards) else ():
            try:
                sides.append(min(read_size(reader.read(int(index)))))
            except DamagedImageError:  # the training replaces it
                continue
    return sides
