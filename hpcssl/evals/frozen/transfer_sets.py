"""The data sets of the transfer evaluation: their metrics, and their shard folders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError, DataError

METRICS = {
    "food101": "top1",
    "cifar10": "top1",
    "cifar100": "top1",
    "birdsnap": "top1",
    "sun397": "top1",
    "cars": "top1",
    "aircraft": "per_class",
    "voc07": "voc11",
    "dtd": "top1",
    "pets": "per_class",
    "caltech101": "per_class",
    "flowers": "per_class",
}
"""Data set -> ``top1`` accuracy, mean accuracy ``per_class``, or ``voc11`` for mean average precision at eleven points
(Kornblith et al. 2019; NNCLR Table 3)."""
MSF_SETS = tuple(name for name in METRICS if name not in ("birdsnap", "voc07"))
"""The ten sets of MSF and CMSF."""
PARTS = ("train", "val", "test")


def open_data_sets(folder: str, names: Sequence[str], known: Iterable[str]) -> dict[str, dict[str, ShardSet]]:
    """Open the parts of data sets.

    Args:
        folder: The folder that holds NAME/train, NAME/val and NAME/test; the option ``root``.
        names: Data sets to open; empty for all ``known`` ones in the folder.
        known: Data sets of the protocol.

    Returns:
        Data set -> part -> shard set.

    Raises:
        ConfigError: No folder named.
        DataError: A folder that does not exist, holds another data set, or cannot be opened.
    """
    root, known = Path(folder), tuple(known)
    if not folder:
        raise ConfigError(
            "evals.transfer.root",
            got="no folder",
            expected="the folder that holds the shards of the data sets",
            fix="set root=FOLDER, with FOLDER/NAME as `hpcssl-shard transfer NAME SRC FOLDER/NAME` wrote it",
        )
    if not root.is_dir():
        raise DataError(
            f"folder {root}",
            got="no such folder",
            expected="a folder of data sets",
            fix="set root= to the folder that holds the data sets",
        )
    names = names or [name for name in known if (root / name).is_dir()]
    if not names:
        raise DataError(
            f"folder {root}",
            got=", ".join(sorted(p.name for p in root.iterdir())[:3]) or "an empty folder",
            expected="one of the folders " + ", ".join(known),
            fix=f"write one with `hpcssl-shard transfer NAME SRC {root}/NAME`",
        )
    present = [name for name in METRICS if (root / name).is_dir()]
    absent = [name for name in names if name not in present]
    if absent:
        raise DataError(
            f"folder {root}",
            got=f"no {', '.join(absent)} (it holds {', '.join(present) or 'no data set'})",
            expected="a folder for each data set of the option sets",
            fix=f"write it with `hpcssl-shard transfer {absent[0]} SRC {root}/{absent[0]}`",
        )
    opened = {name: {part: ShardSet.open(root / name / part) for part in PARTS} for name in names}
    for name, parts in opened.items():
        for data in parts.values():
            _check_part(name, data)
    return opened


def _check_part(name: str, data: ShardSet) -> None:
    if data.meta.get("dataset", name) != name:
        raise DataError(
            f"shard folder {data.root}",
            got=f"the data set {data.meta['dataset']}",
            expected=name,
            fix="rename the folder to its data set, or write the right data set there",
        )
    if (METRICS[name] == "voc11") != (data.targets is not None):
        raise DataError(
            f"shard folder {data.root}",
            got=f"{'one class' if data.targets is None else 'several classes'} per image",
            expected=f"the images and targets of {name}",
            fix=f"write it with `hpcssl-shard transfer {name}`",
        )
