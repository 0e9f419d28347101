"""Boxes and masks of a trained detector on a shard folder, and their average precision by torchmetrics.

Pictures are dealt out one by one and detected alone, so that the scores are the same on any number of ranks.
"""

from __future__ import annotations

import json
import logging

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image

from hpcssl.errors import HpcsslError
from hpcssl.evals.detect_data import Pictures, encoded
from hpcssl.evals.together import Stop, agree, as_error
from hpcssl.world import World

log = logging.getLogger("hpcssl")
_ROUND = 16  # pictures per rank between two exchanges
_BEYOND = 1e11  # an area outside of all of COCO's ranges: such an object is neither found nor missed


@torch.no_grad()
def detect(model: GeneralizedRCNN, pictures: Pictures, world: World, *, side: int, longest: int,
           stop: Stop) -> list[dict]:
    """What the model finds in every picture, in index order, on rank 0 (elsewhere an empty list). A collective.

    Per picture ``boxes`` in the pixels of the stored picture, ``scores``, ``labels`` from 0, and for Mask R-CNN
    ``masks`` as compressed run lengths. Raises ``Stopped``, and what a rank met as ``EvalError``.
    """
    model.eval()
    model.transform.side = None
    count, found = len(pictures.data), {}
    for first in range(0, count, _ROUND * world.size):
        here = range(first + world.rank, min(first + _ROUND * world.size, count), world.size)
        mine, error = {}, None
        try:
            mine = {index: _one(model, pictures, index, world, side, longest) for index in here}
        except (HpcsslError, OSError) as caught:
            error = as_error(caught)
        agree(world, "detection", stop=stop(), error=error)
        for text in world.gather_text(json.dumps(mine)):
            if world.main:
                found |= {int(index): value for index, value in json.loads(text).items()}
        log.info("detect: %d of %d pictures", min(first + _ROUND * world.size, count), count)
    return [found[index] for index in sorted(found)]


def _one(model: GeneralizedRCNN, pictures: Pictures, index: int, world: World, side: int, longest: int) -> dict:
    example = pictures.example(index, side, longest, asked=False)
    out, = model([example.image.to(world.device)])
    (height, width), now = example.size, example.image.shape[1:]
    boxes = out["boxes"] * out["boxes"].new_tensor([width / now[1], height / now[0]] * 2)
    answer = {"boxes": boxes.tolist(), "scores": out["scores"].tolist(), "labels": (out["labels"] - 1).tolist()}
    if "masks" in out:
        answer["masks"] = [_run_lengths(mask, box, example.size)
                           for mask, box in zip(out["masks"].split(1), boxes.split(1), strict=True)]
    return answer


def _run_lengths(mask: Tensor, box: Tensor, size: tuple[int, int]) -> str:
    """A mask of 28 x 28 probabilities [1, 1, …], pasted into the picture and cut at one half."""
    from pycocotools import mask as rle

    drawn = (paste_masks_in_image(mask, box, size)[0, 0] > 0.5).to(torch.uint8).cpu().numpy()
    return rle.encode(np.asfortranarray(drawn))["counts"].decode()


def precision(found: list[dict], pictures: Pictures, *, points: int, masks: bool) -> dict[str, float]:
    """``AP`` (mean over IoU 0.5, 0.55, …, 0.95), ``AP50`` and ``AP75`` in percent, and of masks ``AP_mask`` and so on.

    ``points``: recalls at which precision is read: 101 as COCO does, 11 as VOC 2007 does. Crowds are COCO's. VOC's
    difficult objects are not: a crowd forgives whatever lies inside of it, VOC only what overlaps as a match would.
    Each is therefore given as often as there are detections, with an area that no range holds, so that a detection of
    it counts neither for nor against. What is left of VOC's own rule: there a detection belongs to the object that it
    overlaps most, here to the one it overlaps most among those still free.
    """
    from torchmetrics.detection import MeanAveragePrecision

    kinds = ("bbox", "segm") if masks else ("bbox",)
    metric = MeanAveragePrecision(iou_type=kinds, rec_thresholds=[i / (points - 1) for i in range(points)],
                                  backend="pycocotools", sync_on_compute=False)  # rank 0 has everything, and is alone
    for index, here in enumerate(found):
        record = pictures.record(index)
        difficult = record["ignored"] & ~record["crowd"]
        rows = np.repeat(np.arange(len(difficult)), np.where(difficult, max(1, len(here["boxes"])), 1))
        area = np.where(difficult, _BEYOND, record.get("area", 0))[rows]
        truth = {"boxes": torch.tensor(record["boxes"][rows]), "labels": torch.tensor(record["labels"][rows]),
                 "iscrowd": torch.tensor(record["crowd"][rows].astype(np.int64)), "area": torch.tensor(area)}
        said = {"boxes": torch.tensor(here["boxes"], dtype=torch.float64).reshape(-1, 4),
                "scores": torch.tensor(here["scores"], dtype=torch.float64),
                "labels": torch.tensor(here["labels"], dtype=torch.int64)}
        if masks:
            size = tuple(record["size"])
            truth["masks"] = _bits([encoded(record["segmentation"][i], size) for i in rows], size)
            said["masks"] = _bits([{"counts": text.encode(), "size": size} for text in here["masks"]], size)
        metric.update([said], [truth])
    scores = {name: float(value) for name, value in metric.compute().items() if value.ndim == 0}
    names = {"": "", "_mask": "segm_"} if masks else {"": ""}
    box = "bbox_" if masks else ""
    return {f"{short}{end}": 100 * max(0.0, scores[(prefix or box) + long]) for end, prefix in names.items()
            for short, long in (("AP", "map"), ("AP50", "map_50"), ("AP75", "map_75"))}


def _bits(shapes: list[dict], size: tuple[int, int]) -> Tensor:
    from pycocotools import mask as rle

    if not shapes:
        return torch.zeros(0, *size, dtype=torch.bool)
    return torch.from_numpy(np.stack([rle.decode(shape) for shape in shapes])).bool()
