"""Detection shards of small images with colored rectangles, written by the code behind ``hpcssl-shard``."""

import io
import json

import numpy as np
from PIL import Image

from data_prep import build
from data_prep.catalog import Catalog, Sample
from hpcssl.data.shards import ShardSet

CLASSES = ["red", "green"]
COLORS = np.array([(230, 40, 40), (40, 230, 40)])
SIDE = 32


def draw_image(draw, boxes, labels, width=SIDE):
    """Noise with a filled rectangle per box, in the color of its label: uint8 [SIDE, width, 3]."""
    image = draw.integers(90, 120, (SIDE, width, 3))
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        image[y1:y2, x1:x2] = COLORS[label]
    return image.astype(np.uint8)


def write(root, annotations, images):
    """Write a shard set. Each annotation holds further fields of its image's KEY.json, such as boxes and labels."""
    bodies, samples, offset = [], [], 0
    for i, (annotation, image) in enumerate(zip(annotations, images, strict=True)):
        body = io.BytesIO()
        Image.fromarray(image).save(body, "PNG")
        bodies.append(body.getvalue())
        samples.append(
            Sample(
                source=f"{i:03d}.png",
                label=-1,
                path=str(root) + ".bin",
                offset=offset,
                size=len(bodies[-1]),
                mtime_ns=0,
                extra_json=json.dumps({"size": image.shape[:2], **annotation}),
            )
        )
        offset += len(bodies[-1])
    root.parent.mkdir(parents=True, exist_ok=True)
    root.with_name(root.name + ".bin").write_bytes(b"".join(bodies))
    with build.claim_folder(root) as work:
        build.write_folder(work, Catalog(CLASSES, samples), build.WriteOptions(workers=1, samples_per_shard=3))
    return ShardSet.open(root)


def squares(root, count, seed):
    """Write images with one rectangle each and its mask as a COCO polygon. Every second image is wider."""
    draw = np.random.default_rng(seed)
    annotations, images = [], []
    for i in range(count):
        width = SIDE + 8 * (i % 2)
        w, h = draw.integers(10, 16, 2)
        x, y = int(draw.integers(0, width - w)), int(draw.integers(0, SIDE - h))
        box, label = [x, y, int(x + w), int(y + h)], i % 2
        images.append(draw_image(draw, [box], [label], width))
        x1, y1, x2, y2 = box
        annotations.append(
            {
                "boxes": [box],
                "labels": [label],
                "iscrowd": [0],
                "area": [int(w * h)],
                "segmentation": [[[x1, y1, x2, y1, x2, y2, x1, y2]]],
            }
        )
    return write(root, annotations, images)
