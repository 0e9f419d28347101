"""Images with boxes from shards: their records, and resized and mirrored examples.

Boxes are [x1, y1, x2, y2] in pixels, the corners of the area.

Shapes: n objects, h and w height and width in pixels.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels

from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.errors import EvalError
from hpcssl.evals.detection.masks import draw_mask

_TAR_BLOCK = 512  # bytes


@dataclass
class DetectionExample:
    """One image as the network gets it.

    Attributes:
        index: Index of the image in its shard set.
        image: uint8 [3, h, w], resized.
        size: Height and width of the stored image.
        target: ``boxes`` fp32 [n, 4], ``labels`` int64 [n] from 1 (0 is the background), and with masks ``masks`` uint8
            [n, h, w]; empty for a test image.
    """

    index: int
    image: Tensor
    size: tuple[int, int]
    target: dict[str, Tensor]


class DetectionShards:
    """Records and images of a shard set that ``hpcssl-shard detection`` wrote. Any number of threads may read.

    Args:
        data: The shard set.
    """

    def __init__(self, data: ShardSet) -> None:
        self.data = data
        rows = data.rows.copy()
        ends = np.append(rows["header"][1:], 0)
        last = np.append(rows["shard"][1:] != rows["shard"][:-1], True)
        ends[last] = [data.shards[i].bytes for i in rows["shard"][last]]
        # the tar members after the image are read as the reader reads a second modality: one pread of known bytes
        rows["offset_b"] = rows["offset"] + -(-rows["size"].astype(np.uint64) // _TAR_BLOCK) * _TAR_BLOCK
        rows["size_b"] = ends - rows["offset_b"]
        self.reader = Reader(ShardSet(data.root, data.meta, rows, table=data.table), limit=0)

    def record(self, index: int) -> dict[str, Any]:
        """Read the annotations of an image (``KEY.json``).

        Returns:
            ``boxes`` float64 [n, 4], ``labels`` int64 [n], ``ignored`` bool [n] (difficult or a crowd), ``crowd`` bool
            [n], ``size`` (height, width, or None); with masks ``segmentation`` and ``area`` as they are stored.

        Raises:
            EvalError: The shards hold no boxes for the image, or inconsistent ones.
        """
        try:
            with tarfile.open(fileobj=io.BytesIO(self.reader.read_second(index)), mode="r:") as tar:
                member = next(member for member in tar if member.name.endswith(".json"))
                content = tar.extractfile(member)
                if content is None:
                    raise KeyError(member.name)
                stored = json.loads(content.read())
            boxes = np.asarray(stored["boxes"], np.float64).reshape(-1, 4)
            labels = np.asarray(stored["labels"], np.int64)
            crowd = np.asarray(stored.get("iscrowd", [0] * len(labels)), bool)
            ignored = crowd | np.asarray(stored.get("difficult", [0] * len(labels)), bool)
            if not len(boxes) == len(labels) == len(ignored) or (labels >= len(self.data.classes)).any():
                raise ValueError("boxes, labels and classes are inconsistent")
        except (KeyError, ValueError, TypeError, StopIteration, tarfile.TarError) as error:
            reason = f" ({error})" if isinstance(error, ValueError) else ""
            raise EvalError(
                f"shard folder {self.data.root}",
                got=f"no boxes for {self.data.key(index)}{reason}",
                expected="images with boxes, as `hpcssl-shard detection` writes them",
                fix="name OUT/train and OUT/val of `hpcssl-shard detection voc|coco SRC OUT`",
            ) from error
        return {
            "boxes": boxes,
            "labels": labels,
            "crowd": crowd,
            "ignored": ignored,
            "size": stored.get("size"),
            **{name: stored[name] for name in ("segmentation", "area") if name in stored},
        }

    def example(
        self,
        index: int,
        side: int,
        max_side: int,
        *,
        flip: bool = False,
        masks: bool = False,
        with_target: bool = True,
    ) -> DetectionExample:
        """Read an image and resize it.

        Crowds and boxes without an area are not targets. VOC's difficult objects are targets, as in Detectron2.

        Args:
            index: Index of the image.
            side: Its short side in pixels.
            max_side: Its largest long side in pixels.
            flip: Whether it is mirrored.
            masks: Whether the target has masks.
            with_target: Whether the target is read; else it is empty.
        """
        _, stored, _ = self.reader.read_images(index, 0)
        assert stored is not None, "a reader without tolerance for damaged images raises at one"
        size = (stored.shape[0], stored.shape[1])
        new_size = resize_shape(size, side, max_side)
        image = pixels.resize(torch.from_numpy(stored.copy()).permute(2, 0, 1), list(new_size), antialias=True)
        if flip:
            image = image.flip(2)
        target = self._target(index, size, new_size, flip, masks) if with_target else {}
        return DetectionExample(index, image.contiguous(), size, target)

    def _target(
        self, index: int, size: tuple[int, int], new_size: tuple[int, int], flip: bool, masks: bool
    ) -> dict[str, Tensor]:
        record = self.record(index)
        if record["size"] is not None and tuple(record["size"]) != size:
            raise EvalError(
                f"shard folder {self.data.root}, {self.data.key(index)}",
                got=f"an image of {size} pixels (height, width)",
                expected=f"{record['size']}, the size that its boxes refer to",
                fix="write the shards again from images and annotations of the same download",
            )
        (new_height, new_width), (height, width) = new_size, size
        boxes: npt.NDArray[np.float64] = record["boxes"] * ([new_width / width, new_height / height] * 2)
        boxes = boxes.clip(0, [new_width, new_height] * 2)
        if flip:
            boxes = np.stack((new_width - boxes[:, 2], boxes[:, 1], new_width - boxes[:, 0], boxes[:, 3]), 1)
        keep = ~record["crowd"] & (boxes[:, 2:] - boxes[:, :2] > 1e-3).all(1)
        target = {
            "boxes": torch.tensor(boxes[keep], dtype=torch.float32),
            "labels": torch.tensor(record["labels"][keep] + 1),
        }
        if masks:
            drawn = [draw_mask(record["segmentation"][i], size, new_size, flip) for i in np.flatnonzero(keep)]
            empty = torch.zeros(0, *new_size, dtype=torch.uint8)
            target["masks"] = torch.from_numpy(np.stack(drawn)) if drawn else empty
        return target

    def close(self) -> None:
        """Close the shards."""
        self.reader.close()


def resize_shape(size: tuple[int, int], side: int, max_side: int) -> tuple[int, int]:
    """Return height and width with a short side of ``side`` pixels, or less where the long one would be too long.

    Args:
        size: Height and width before.
        side: Short side.
        max_side: Largest long side.
    """
    scale = side / min(size)
    if max(size) * scale > max_side:
        scale = max_side / max(size)
    height, width = (max(1, int(edge * scale + 0.5)) for edge in size)
    return height, width
