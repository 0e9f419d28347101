"""Detections of a trained detector on a shard set, and their average precision by torchmetrics.

Images are distributed over the ranks one by one and detected alone, so the scores are the same on any number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from hpcssl.distributed.world import World
from hpcssl.errors import HpcsslError
from hpcssl.evals.common.sync import StopCheck, as_eval_error, raise_on_any_rank
from hpcssl.evals.detection.data import DetectionShards
from hpcssl.evals.detection.masks import decode_masks, encode_mask, paste_mask
from hpcssl.terminal.progress import ProgressLog

_IMAGES_PER_ROUND = 16  # per rank, between two exchanges
_OUTSIDE_AREA = 1e11  # beyond all of COCO's area ranges: such an object counts neither as found nor as missed

Detections = dict[str, Any]
"""Of one image: ``boxes`` in its stored pixels, ``scores``, ``labels`` from 0, and perhaps ``masks`` (run lengths)."""


@torch.no_grad()
def detect_objects(
    model: GeneralizedRCNN, shards: DetectionShards, world: World, *, side: int, max_side: int, stop: StopCheck
) -> list[Detections]:
    """Run a detector on every image. A collective.

    Args:
        model: The detector. It is left in eval mode.
        shards: The images.
        world: The processes that share the work.
        side: Short side of the images in pixels.
        max_side: Their largest long side in pixels.
        stop: Whether this process was asked to stop.

    Returns:
        The detections of each image in index order on rank 0, an empty list on other ranks.

    Raises:
        EvalError: What one rank raised.
        Stopped: After a request to stop.
    """
    model.eval()
    model.transform.side = None
    count, detections = len(shards.data), dict[int, Detections]()
    round_size = _IMAGES_PER_ROUND * world.size
    progress = ProgressLog("detect, scores", count, "images")
    for first in range(0, count, round_size):
        mine: dict[int, Detections] = {}
        error = None
        try:
            for index in range(first + world.rank, min(first + round_size, count), world.size):
                mine[index] = _detect_image(model, shards, index, world, side, max_side)
        except (HpcsslError, OSError) as caught:
            error = as_eval_error(caught)
        raise_on_any_rank(world, "detection", stop=stop(), error=error)
        for text in world.all_gather_text(json.dumps(mine)):
            if world.is_main:
                detections |= {int(index): value for index, value in json.loads(text).items()}
        progress.add(round_size)
    return [detections[index] for index in sorted(detections)]


def _detect_image(
    model: GeneralizedRCNN, shards: DetectionShards, index: int, world: World, side: int, max_side: int
) -> Detections:
    example = shards.example(index, side, max_side, with_target=False)
    (out,) = model([example.image.to(world.device)])
    (height, width), resized = example.size, example.image.shape[1:]
    boxes = out["boxes"] * out["boxes"].new_tensor([width / resized[1], height / resized[0]] * 2)
    detections = {"boxes": boxes.tolist(), "scores": out["scores"].tolist(), "labels": (out["labels"] - 1).tolist()}
    if "masks" in out:
        detections["masks"] = [
            paste_mask(out["masks"][i : i + 1], boxes[i : i + 1], example.size) for i in range(len(boxes))
        ]
    return detections


def compute_average_precision(
    detections: Sequence[Detections], shards: DetectionShards, *, points: int, masks: bool
) -> dict[str, float]:
    """Compute average precision as COCO does, at the recalls of COCO or of VOC 2007.

    Crowds are COCO's. VOC's difficult objects are not crowds: a crowd excuses whatever lies inside it, VOC only what
    overlaps it as much as a match must. Each difficult object is therefore passed as often as there are detections,
    with an area outside every range, so that a detection of it counts neither for nor against. One difference from
    VOC's rule remains: there a detection belongs to the object that it overlaps most, here to the one that it overlaps
    most among those that are still unmatched.

    Args:
        detections: Detections of each image in index order.
        shards: The images with their true boxes.
        points: Recalls at which precision is read: 101 as COCO does, 11 as VOC 2007 does.
        masks: Whether masks are scored too.

    Returns:
        In percent: ``AP`` (mean over IoU 0.5, 0.55, …, 0.95), ``AP50`` and ``AP75`` of boxes; with masks also
        ``AP_mask``, ``AP50_mask`` and ``AP75_mask``.
    """
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(
        iou_type=("bbox", "segm") if masks else ("bbox",),
        rec_thresholds=[i / (points - 1) for i in range(points)],
        backend="pycocotools",
        sync_on_compute=False,  # rank 0 has all detections
    )
    for index, detected in enumerate(detections):
        record = shards.record(index)
        difficult = record["ignored"] & ~record["crowd"]
        rows = np.repeat(np.arange(len(difficult)), np.where(difficult, max(1, len(detected["boxes"])), 1))
        truth = _truth(record, difficult, rows)
        predicted = {
            "boxes": torch.tensor(detected["boxes"], dtype=torch.float64).reshape(-1, 4),
            "scores": torch.tensor(detected["scores"], dtype=torch.float64),
            "labels": torch.tensor(detected["labels"], dtype=torch.int64),
        }
        if masks:
            size = (record["size"][0], record["size"][1])
            truth["masks"] = decode_masks([encode_mask(record["segmentation"][i], size) for i in rows], size)
            predicted["masks"] = decode_masks(
                [{"counts": text.encode(), "size": size} for text in detected["masks"]], size
            )
        metric.update([predicted], [truth])
    scores = {name: float(value) for name, value in metric.compute().items() if value.ndim == 0}
    prefixes = {"": "bbox_", "_mask": "segm_"} if masks else {"": ""}
    return {
        f"{short}{suffix}": 100 * max(0.0, scores[prefix + long])
        for suffix, prefix in prefixes.items()
        for short, long in (("AP", "map"), ("AP50", "map_50"), ("AP75", "map_75"))
    }


def _truth(record: dict[str, Any], difficult: npt.NDArray[np.bool_], rows: npt.NDArray[np.int64]) -> dict[str, Tensor]:
    area = np.where(difficult, _OUTSIDE_AREA, record.get("area", 0))[rows]
    return {
        "boxes": torch.tensor(record["boxes"][rows]),
        "labels": torch.tensor(record["labels"][rows]),
        "iscrowd": torch.tensor(record["crowd"][rows].astype(np.int64)),
        "area": torch.tensor(area),
    }
