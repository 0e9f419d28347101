"""Small pictures of coloured rectangles, written as detection shards by the writer that users run."""

import io
import json

import numpy as np
from PIL import Image

from data_prep import build
from data_prep.catalogue import Catalogue, Sample
from hpcssl.data.shards import ShardSet

CLASSES = ["red", "green"]
COLOURS = np.array([(230, 40, 40), (40, 230, 40)])
SIDE = 32


def picture(draw, boxes, labels, width=SIDE):
    image = draw.integers(90, 120, (SIDE, width, 3))
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        image[y1:y2, x1:x2] = COLOURS[label]
    return image.astype(np.uint8)


def write(root, notes, images):
    """Notes are KEY.json's fields beside the source."""
    bodies, samples, at = [], [], 0
    for i, (note, image) in enumerate(zip(notes, images, strict=True)):
        body = io.BytesIO()
        Image.fromarray(image).save(body, "PNG")
        bodies.append(body.getvalue())
        samples.append(Sample(f"{i:03d}.png", -1, str(root) + ".bin", at, len(bodies[-1]), 0,
                              more=json.dumps({"size": image.shape[:2], **note})))
        at += len(bodies[-1])
    root.parent.mkdir(parents=True, exist_ok=True)
    root.with_name(root.name + ".bin").write_bytes(b"".join(bodies))
    with build.claim(root) as work:
        build.write(work, Catalogue(CLASSES, samples), build.Options(workers=1, samples_per_shard=3))
    return ShardSet.open(root)


def squares(root, count, seed):
    """One rectangle in each picture, every second picture wider, with its mask as COCO's polygons."""
    draw = np.random.default_rng(seed)
    notes, images = [], []
    for i in range(count):
        width = SIDE + 8 * (i % 2)
        w, h = draw.integers(10, 16, 2)
        x, y = int(draw.integers(0, width - w)), int(draw.integers(0, SIDE - h))
        box, label = [x, y, int(x + w), int(y + h)], i % 2
        images.append(picture(draw, [box], [label], width))
        x1, y1, x2, y2 = box
        notes.append({"boxes": [box], "labels": [label], "iscrowd": [0], "area": [int(w * h)],
                      "segmentation": [[[x1, y1, x2, y1, x2, y2, x1, y2]]]})
    return write(root, notes, images)
