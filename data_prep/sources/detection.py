"""Images with boxes: Pascal VOC 2007 + 2012 and COCO 2017, as their archives unpack.

KEY.json of each sample holds, beside its source::

    "size":   [height, width]                  as the annotation has them
    "boxes":  [[x1, y1, x2, y2], …]            pixels, corners of the area: x2 - x1 is the width
    "labels": [class number, …]                from 0, in the order of the classes of the folder
    "difficult": [0 | 1, …]                    VOC: objects that its protocol ignores
    "iscrowd": [0 | 1, …], "area": […],        COCO: as its files have them
    "segmentation": [polygons | run lengths, …]
"""

from __future__ import annotations

from pathlib import Path

from data_prep.catalog import Catalog
from data_prep.sources import coco, voc
from hpcssl.errors import ConfigError, DataError, suggest

DATA_SETS = {"voc": (voc.read, voc.LAYOUT), "coco": (coco.read, coco.LAYOUT)}


def read(name: str, src: Path) -> dict[str, Catalog]:
    """Read the annotations of a data set.

    Args:
        name: voc or coco.
        src: Its folder.

    Returns:
        The catalogs of the parts ``train`` and ``val``.

    Raises:
        ConfigError: There is no data set of this name.
        DataError: Files are missing or cannot be read.
    """
    if name not in DATA_SETS:
        raise ConfigError(
            "hpcssl-shard detection", got=repr(name), expected="voc or coco", fix=suggest(name, DATA_SETS)
        )
    reader, layout = DATA_SETS[name]
    if not src.is_dir():
        raise DataError(f"source {src}", got="no such folder", expected=layout, fix="check the path")
    return reader(src)
