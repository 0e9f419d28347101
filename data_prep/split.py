"""Divide a catalog into train and val."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.catalog import Catalog, LeftOut, Sample, SampleTable
from data_prep.shards import near_duplicates
from data_prep.sources.transfer.hold_out import split_by_share
from hpcssl.errors import ConfigError, DataError, require_choice

GROUP_CHOICES = ("none", "folder")
DEFAULT_DISTANCE = 4
"""``--dedup-distance``: copies of another size, format or compression are closer, distinct photographs farther."""
MAX_DISTANCE = 8
"""Largest ``--dedup-distance``: beyond it, perceptual hashes of images that have nothing in common agree by
chance, and the search compares nearly all pairs."""


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How to divide a catalog.

    Attributes:
        val: Share of the images that goes to val, above 0 and below 1; None for no division.
        group_by: ``folder`` to keep the images of one folder together, or ``none``.
        dedup: Whether to leave images of train out that are near-duplicates of an image of val.
        dedup_distance: Largest number of different bits, of 64, in the perceptual hashes of near-duplicates; None for
            ``DEFAULT_DISTANCE``.
    """

    val: float | None = None
    group_by: str = "none"
    dedup: bool = False
    dedup_distance: int | None = None

    def __post_init__(self) -> None:
        require_choice("--group-by", self.group_by, GROUP_CHOICES)
        if self.val is not None and not 0 < self.val < 1:
            raise ConfigError(
                "--val", got=self.val, expected="a share above 0 and below 1", fix="write a share such as 0.1 for 10 %"
            )
        if not 0 <= self.distance <= MAX_DISTANCE:
            raise ConfigError(
                "--dedup-distance",
                got=self.distance,
                expected=f"0 to {MAX_DISTANCE} bits",
                fix="4 suits most sets",
            )
        for option, used in (("--group-by", self.group_by != "none"), ("--dedup", self.dedup)):
            if used and self.val is None:
                raise ConfigError(option, got="no --val", expected="a division into train and val", fix="add --val 0.1")

        if self.dedup_distance is not None and not self.dedup:
            raise ConfigError("--dedup-distance", got="no --dedup", expected="--dedup beside it", fix="add --dedup")

    @property
    def distance(self) -> int:
        """Largest number of different bits of near-duplicates."""
        return DEFAULT_DISTANCE if self.dedup_distance is None else self.dedup_distance

    @property
    def provenance(self) -> dict[str, object]:
        """What of it enters the index: whatever decides about the samples of a part."""
        group_by = {} if self.group_by == "none" else {"group_by": self.group_by}
        dedup = {"dedup": self.distance} if self.dedup else {}
        return {"val": self.val, **group_by, **dedup}


def split_catalog(catalog: Catalog, options: SplitOptions, seed: int) -> dict[str, Catalog]:
    """Draw the val part of a catalog.

    With single labels and without groups, every class gives its share, by the method of largest remainders; a class
    keeps at least one image in train.

    Args:
        catalog: All images.
        options: The share, and whether folders stay together.
        seed: Seed of the draw.

    Returns:
        The catalogs of ``train`` and ``val``, with the same classes.

    Raises:
        ConfigError: Folders are to stay together, and each is a class of its own.
        DataError: A part would be empty.
    """
    assert options.val is not None
    samples = catalog.samples
    total = max(round(options.val * len(samples)), 1)
    if options.group_by == "folder":
        chosen = _draw_folders(samples, total, seed)
        _check_folders(catalog, chosen)
    else:
        chosen = _draw_images(samples, total, seed)
    if not 0 < len(chosen) < len(samples):
        raise DataError(
            f"--val {options.val:g}",
            got=f"{len(chosen)} of {len(samples)} images for val",
            expected="images in both parts",
            fix="use more images"
            + (", or leave out --group-by, since a folder is never divided" if options.group_by == "folder" else ""),
        )
    parts = {
        "train": SampleTable(sample for n, sample in enumerate(samples) if n not in chosen),
        "val": SampleTable(sample for n, sample in enumerate(samples) if n in chosen),
    }
    return {
        part: Catalog(catalog.classes, members, {**catalog.provenance, **options.provenance, "part": part})
        for part, members in parts.items()
    }


def _draw_images(samples: Sequence[Sample], total: int, seed: int) -> set[int]:
    from hpcssl import rng  # imports torch, which the workers never need

    labels = (
        np.fromiter((sample.label for sample in samples), np.int64, len(samples)) + 1
    )  # 0 for images without a label
    counts = np.bincount(labels)
    quotas = split_by_share(counts, total)
    quotas = np.minimum(quotas, np.maximum(counts - 1, 0))
    chosen: set[int] = set()
    for label in np.flatnonzero(quotas):
        members = np.flatnonzero(labels == label)
        order = rng.permutation(rng.key(seed, "split", "val", int(label) - 1), len(members))
        chosen.update(members[order[: quotas[label]]].tolist())
    return chosen


def _draw_folders(samples: Sequence[Sample], total: int, seed: int) -> set[int]:
    """Draw whole folders in random order, each if it brings the number of images closer to ``total``."""
    from hpcssl import rng

    folders: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        folders.setdefault(posixpath.dirname(sample.source), []).append(number)
    members = [folders[name] for name in sorted(folders)]
    chosen: set[int] = set()
    for n in rng.permutation(rng.key(seed, "split", "val", "folders"), len(members)):
        missing = total - len(chosen)
        if abs(missing - len(members[n])) < missing:
            chosen.update(members[n])
    return chosen


def _check_folders(catalog: Catalog, chosen: set[int]) -> None:
    """Refuse a division that takes whole classes away from train."""
    labels = np.array([sample.label for sample in catalog.samples], int)
    in_val = np.zeros(len(labels), bool)
    in_val[sorted(chosen)] = True
    lost = sorted(set(labels[in_val].tolist()) - set(labels[~in_val].tolist()) - {-1})
    if lost:
        raise ConfigError(
            "--group-by folder",
            got=f"every image of class {catalog.classes[lost[0]]} in val",
            expected="classes that are spread over several folders",
            fix="leave --group-by out, or give --classes-from none",
        )


def remove_near_duplicates(parts: dict[str, Catalog], options: SplitOptions, workers: int | None) -> list[LeftOut]:
    """Take the images of train that are near-duplicates of an image of val out of train.

    Train gives them up, so that val stays a random sample.

    Args:
        parts: The catalogs of ``train`` and ``val``; that of train is changed.
        options: The largest distance.
        workers: Number of processes; None for one per usable core.

    Returns:
        The images that were taken out.

    Raises:
        ConfigError: imagehash is missing.
    """
    train, val = parts["train"].samples, parts["val"].samples
    hashes = near_duplicates.hash_samples([*train, *val], workers)
    nearest = near_duplicates.find_nearest(hashes[: len(train)], hashes[len(train) :], options.distance)
    parts["train"].samples = SampleTable(sample for sample, n in zip(train, nearest, strict=True) if n < 0)
    return [
        LeftOut(sample.source, f"near-duplicate of {val[n].source}, which is in val")
        for sample, n in zip(train, nearest, strict=True)
        if n >= 0
    ]
