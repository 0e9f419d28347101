"""Pictures with boxes out of shards: the record of each, its resized and flipped training example, and what is asked.

What a training example looks like is a function of (seed, step, image) alone: the short side is one of the
protocol's sizes, half of the pictures are mirrored. Boxes are [x1, y1, x2, y2] in pixels, corners of the area.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels

from hpcssl import rng
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.errors import EvalError
from hpcssl.world import World

_BLOCK = 512  # of a tar
_AHEAD = 3  # steps whose pictures are read before they are asked for


@dataclass
class Example:
    """One picture as the network gets it. ``size``: height and width before it was resized."""

    index: int
    image: Tensor  # uint8 [3, h, w]
    size: tuple[int, int]
    target: dict[str, Tensor]  # boxes [n, 4], labels [n] from 1 (0 is the background), masks uint8 [n, h, w]


class Pictures:
    """Records and pictures of a shard folder that ``hpcssl-shard detection`` wrote, for any number of threads."""

    def __init__(self, data: ShardSet):
        self.data = data
        rows = data.rows.copy()
        ends = np.append(rows["header"][1:], 0)
        last = np.append(rows["shard"][1:] != rows["shard"][:-1], True)
        ends[last] = [data.shards[i].bytes for i in rows["shard"][last]]
        # the members after the image are read as the reader reads a second modality: one pread of known bytes
        rows["offset_b"] = rows["offset"] + -(-rows["size"].astype(np.uint64) // _BLOCK) * _BLOCK
        rows["size_b"] = ends - rows["offset_b"]
        self.reader = Reader(ShardSet(data.root, data.meta, rows), limit=0)

    def record(self, index: int) -> dict:
        """KEY.json of a sample: ``boxes`` float64 [n, 4], ``labels`` int64 [n], ``ignored`` bool [n] (difficult or a
        crowd), ``crowd`` bool [n]; with masks ``segmentation`` and ``area`` as they are stored. Raises ``EvalError``.
        """
        try:
            with tarfile.open(fileobj=io.BytesIO(self.reader.read_second(index)), mode="r:") as tar:
                note = next(member for member in tar if member.name.endswith(".json"))
                found = json.loads(tar.extractfile(note).read())
            boxes = np.asarray(found["boxes"], np.float64).reshape(-1, 4)
            labels = np.asarray(found["labels"], np.int64)
            crowd = np.asarray(found.get("iscrowd", [0] * len(labels)), bool)
            ignored = crowd | np.asarray(found.get("difficult", [0] * len(labels)), bool)
            if not len(boxes) == len(labels) == len(ignored) or (labels >= len(self.data.classes)).any():
                raise ValueError("boxes, labels and classes that do not fit each other")
        except (KeyError, ValueError, TypeError, StopIteration, tarfile.TarError) as error:
            why = f" ({error})" if isinstance(error, ValueError) else ""
            raise EvalError(f"shard folder {self.data.root}", got=f"no boxes for {self.data.key(index)}{why}",
                            expected="pictures with boxes, as `hpcssl-shard detection` writes them",
                            mend="name OUT/train and OUT/val of `hpcssl-shard detection voc|coco SRC OUT`") from error
        return {"boxes": boxes, "labels": labels, "crowd": crowd, "ignored": ignored, "size": found.get("size"),
                **{name: found[name] for name in ("segmentation", "area") if name in found}}

    def example(self, index: int, side: int, longest: int, *, flip: bool = False, masks: bool = False,
                asked: bool = True) -> Example:
        """The picture with its short side at ``side``, its long side at most ``longest``, perhaps mirrored.

        ``asked`` False leaves the target empty. Crowds and boxes without an area are no targets; VOC's difficult
        objects are, as in Detectron2.
        """
        _, found, _ = self.reader.images(index, 0)
        size = found.shape[:2]
        height, width = resized(size, side, longest)
        image = pixels.resize(torch.from_numpy(found.copy()).permute(2, 0, 1), [height, width], antialias=True)
        if flip:
            image = image.flip(2)
        return Example(index, image.contiguous(), size, self._target(index, size, (height, width), flip, masks)
                       if asked else {})

    def _target(self, index: int, size: tuple[int, int], now: tuple[int, int], flip: bool, masks: bool) -> dict:
        record = self.record(index)
        if record["size"] is not None and tuple(record["size"]) != tuple(size):
            raise EvalError(f"shard folder {self.data.root}, {self.data.key(index)}", got=f"a picture of {size}",
                            expected=f"{record['size']} (height, width), as its boxes have it",
                            mend="write the shards again from pictures and annotations of one download")
        (height, width), (tall, wide) = now, size
        boxes = record["boxes"] * ([width / wide, height / tall] * 2)
        boxes = boxes.clip(0, [width, height] * 2)
        if flip:
            boxes = np.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), 1)
        keep = ~record["crowd"] & (boxes[:, 2:] - boxes[:, :2] > 1e-3).all(1)
        target = {"boxes": torch.tensor(boxes[keep], dtype=torch.float32),
                  "labels": torch.tensor(record["labels"][keep] + 1)}
        if masks:
            drawn = [_mask(record["segmentation"][i], size, now, flip) for i in np.flatnonzero(keep)]
            target["masks"] = torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, *now, dtype=torch.uint8)
        return target

    def close(self) -> None:
        self.reader.close()


def resized(size: tuple[int, int], side: int, longest: int) -> tuple[int, int]:
    """Height and width with the short side at ``side``, or less where the long one would pass ``longest``."""
    scale = side / min(size)
    if max(size) * scale > longest:
        scale = longest / max(size)
    height, width = (max(1, int(edge * scale + 0.5)) for edge in size)
    return height, width


def _mask(shape: list | dict, size: tuple[int, int], now: tuple[int, int], flip: bool) -> np.ndarray:
    """Polygons scaled and then filled, run lengths filled and then scaled: uint8 [*now]."""
    from pycocotools import mask as rle

    if isinstance(shape, dict):
        whole = torch.from_numpy(rle.decode(encoded(shape, size)))[None]
        drawn = pixels.resize(whole, list(now), interpolation=pixels.InterpolationMode.NEAREST_EXACT)[0].numpy()
    else:
        scale = np.array([now[1] / size[1], now[0] / size[0]])
        scaled = [(np.reshape(ring, (-1, 2)) * scale).reshape(-1).tolist() for ring in shape]
        drawn = rle.decode(rle.merge(rle.frPyObjects(scaled, *now)))
    return np.ascontiguousarray(drawn[:, ::-1] if flip else drawn)


def encoded(shape: list | dict, size: tuple[int, int]) -> dict:
    """Polygons or run lengths of a picture of ``size`` as pycocotools' compressed run lengths."""
    from pycocotools import mask as rle

    if isinstance(shape, dict):
        return rle.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape
    return rle.merge(rle.frPyObjects(shape, *size))


def usable(pictures: Pictures, world: World, *, masks: bool) -> np.ndarray:
    """Indices of the pictures with something to learn from: a box with an area that is no crowd. A collective.

    Rank 0 reads every record, so that shards without boxes, or without masks where they are asked for, are refused
    before the first step.
    """
    said: list[str] = []

    def look() -> None:
        for index in range(len(pictures.data)):
            record = pictures.record(index)
            if masks and len(record.get("segmentation", ())) != len(record["boxes"]):
                raise EvalError(f"shard folder {pictures.data.root}", got="boxes without masks",
                                expected="masks, which this protocol learns",
                                mend="protocol=voc_c4, or shards of `hpcssl-shard detection coco SRC OUT`")
            area = (record["boxes"][:, 2:] - record["boxes"][:, :2]).prod(1)
            said.append(str(int((~record["crowd"] & (area > 0)).any())))

    world.on_main(look)
    return np.flatnonzero(np.frombuffer(world.tell("".join(said)).encode(), np.uint8) == ord("1"))


class Stream:
    """This rank's training examples, one step after another: lists of ``Example``, read ahead by threads."""

    def __init__(self, pictures: Pictures, steps: Iterable[tuple[int, Sequence[int]]], *, sides: Sequence[int],
                 longest: int, masks: bool, seed: int, threads: int):
        self.pictures, self.steps = pictures, iter(steps)
        self.sides, self.longest, self.masks, self.seed = sides, longest, masks, seed
        self.pool = ThreadPoolExecutor(threads, "pictures")
        self.waiting: deque[list[Future]] = deque()

    def __iter__(self) -> Iterator[list[Example]]:
        for step, index in self.steps:
            self.waiting.append([self.pool.submit(self._one, step, int(i)) for i in index])
            if len(self.waiting) > _AHEAD:
                yield [future.result() for future in self.waiting.popleft()]
        while self.waiting:
            yield [future.result() for future in self.waiting.popleft()]

    def _one(self, step: int, index: int) -> Example:
        side, flip = rng.uniform(rng.key(self.seed, "detect", "view", step, index), 2)
        return self.pictures.example(index, self.sides[int(side * len(self.sides))], self.longest, flip=flip < 0.5,
                                     masks=self.masks)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
