"""Object detection: Faster and Mask R-CNN fine-tuned from the encoder, by the protocols of ``detection/protocols.py``.

    voc_c4        Faster R-CNN C4 on VOC 07+12 trainval, test07: AP, AP50 and AP75 at 11 recalls, as Detectron2's VOC
                  evaluation of 2007 reports them
    coco_c4_2x    Mask R-CNN C4 on COCO 2017: AP of boxes and masks at 101 recalls
    coco_fpn_1x   Mask R-CNN FPN on COCO 2017: the same

The detector is built from torchvision's parts, so this differs from Detectron2's recipe:

- Box regression has a smooth L1 loss with beta 1/9; Detectron2 has L1.
- Anchors are rounded to whole pixels.
- The targets of masks are cut from bitmaps; in Detectron2, from polygons.
- Proposals thinner than 0.001 pixels are dropped.
- Batches are padded to the largest image of all ranks and to a multiple of 16 (C4) or 64 (FPN); in Detectron2, to the
  largest image of each GPU and to a multiple of 1 or 32, and images of similar shape are batched together.
- SyncBN weights ranks by their counts; Detectron2's naiveSyncBN weights them equally.

Regions (ROIAlignV2), numbers of proposals, samples, thresholds, initial values, the mask branch that shares the C4
head, and learning rates are Detectron2's.

A training that is killed continues from its last save; on a CPU its numbers are the same to the bit. Different numbers
of ranks take the same steps up to the rounding of sums, and a GPU sums the gradients of regions in no fixed order; this
training magnifies rounding, so that the scores of such runs differ about as much as those of two seeds. What one
trained detector scores is the same on any number of ranks.
"""

from __future__ import annotations

import importlib.util
import json
import logging

import numpy as np
import numpy.typing as npt
import torch
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from hpcssl.data.order import Order
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.world import World
from hpcssl.errors import EvalError
from hpcssl.evals.common.encoder import FrozenEncoder
from hpcssl.evals.context import EvalContext
from hpcssl.evals.detection.data import DetectionShards
from hpcssl.evals.detection.example_stream import ExampleStream, find_trainable_images
from hpcssl.evals.detection.model import assemble_detector
from hpcssl.evals.detection.norm import SyncNorm
from hpcssl.evals.detection.options import DetectOptions
from hpcssl.evals.detection.protocols import DetectionProtocol
from hpcssl.evals.detection.scoring import compute_average_precision, detect_objects
from hpcssl.evals.detection.training import DetectionSchedule, DetectionTrainer, train_detector
from hpcssl.nets import resnet

LOG = logging.getLogger("hpcssl")


def check_sets(train: ShardSet, val: ShardSet) -> None:
    """Raise ``EvalError`` unless both sets hold images, and of the same classes. Their boxes are checked later."""
    for data in (train, val):
        if len(data) == 0:
            raise EvalError(
                f"shard folder {data.root}",
                got="no images",
                expected="at least one",
                fix="name another folder, or write the shards again",
            )
    if train.classes != val.classes:
        raise EvalError(
            f"classes of {val.root}",
            got=f"{len(val.classes)} classes ({', '.join(val.classes[:3])} …)",
            expected=f"those of {train.root} ({', '.join(train.classes[:3])} …)",
            fix="name OUT/train and OUT/val of one `hpcssl-shard detection`",
        )


def run(context: EvalContext[DetectOptions]) -> dict[str, float]:
    """Object detection: average precision in percent on the validation set. A collective.

    Returns:
        ``AP``, ``AP50`` and ``AP75`` of boxes; for protocols with masks also ``AP_mask``, ``AP50_mask``,
        ``AP75_mask``.
    """
    _check_packages()
    world, protocol = context.world, context.options.resolve()
    train_shards, val_shards = DetectionShards(context.train), DetectionShards(context.val)
    context.exit_stack.callback(train_shards.close)
    context.exit_stack.callback(val_shards.close)
    trainable = find_trainable_images(train_shards, world, masks=protocol.masks)
    find_trainable_images(val_shards, world, masks=protocol.masks)
    if protocol.batch > len(trainable) or protocol.batch % world.size:
        raise EvalError(
            "detection",
            got=f"train_batch={protocol.batch} on {world.size} ranks with {len(trainable)} training images with boxes",
            expected="at least one whole batch, and a batch that the number of ranks divides",
            fix="set train_batch, the images of one iteration over all ranks",
        )
    trainer = _train(context, protocol, train_shards, trainable)
    detections = detect_objects(
        trainer.model,
        val_shards,
        world,
        side=protocol.test_size,
        max_side=protocol.max_size,
        stop=context.stop,
    )
    scores: dict[str, float] = {}
    world.run_on_main(
        lambda: scores.update(
            compute_average_precision(detections, val_shards, points=protocol.points, masks=protocol.masks)
        )
    )
    shared: dict[str, float] = json.loads(world.broadcast_text(json.dumps(scores)))
    return shared


def _train(
    context: EvalContext[DetectOptions],
    protocol: DetectionProtocol,
    shards: DetectionShards,
    trainable: npt.NDArray[np.int64],
) -> DetectionTrainer:
    """Train the detector on the images ``trainable``, or continue from the state file. A collective."""
    world, seed = context.world, context.options.seed
    trainer = DetectionTrainer(build_detector(context.encoder, protocol, context.train, world, seed), world)
    if context.state_file is None:
        LOG.warning("detect: without a run folder this training is not saved, and a kill loses it")
    elif trainer.load(context.state_file, context.identity):
        LOG.info("detect: continuing at iteration %d of %d", trainer.step, protocol.iterations)
    if len(set(world.all_gather_text(str(trainer.step)))) > 1:
        raise EvalError(
            f"state {context.state_file}",
            got="a file that only some ranks see",
            expected="one file system for all ranks",
            fix="put the run folder where every node sees it",
        )
    order = Order([len(trainable)], seed=seed, global_batch=protocol.batch, window="all")
    schedule = DetectionSchedule(
        iterations=protocol.iterations,
        lr=protocol.lr,
        warmup=protocol.warmup,
        milestones=protocol.milestones,
        precise_bn=protocol.precise_bn,
    )
    steps = range(trainer.step, schedule.iterations + schedule.precise_bn)
    stream = ExampleStream(
        shards,
        ((step, trainable[order.local_batch(step, world.rank, world.size)]) for step in steps),
        sides=protocol.train_sizes,
        max_side=protocol.max_size,
        masks=protocol.masks,
        seed=seed,
        threads=context.threads,
    )
    context.exit_stack.callback(stream.close)
    train_detector(
        trainer,
        iter(stream),
        schedule,
        stop=context.stop,
        state_file=context.state_file,
        identity=context.identity,
    )
    return trainer


def build_detector(
    encoder: FrozenEncoder, protocol: DetectionProtocol, data: ShardSet, world: World, seed: int
) -> GeneralizedRCNN:
    """Build the detector of a protocol with the weights of an encoder, on the device of ``world``.

    Args:
        encoder: The encoder; it is not changed.
        protocol: The protocol.
        data: The training set, for its classes.
        world: The processes that train together.
        seed: Seed of the new layers, and of the sampling of anchors and regions.
    """

    def norm(channels: int) -> SyncNorm:
        return SyncNorm(channels, world=world)

    arch, state = encoder.meta["arch"], encoder.backbone.state_dict()
    backbone = resnet.build(arch, norm=norm)
    backbone.load_state_dict({name: value for name, value in state.items() if not name.endswith("num_batches_tracked")})
    model = assemble_detector(
        backbone,
        arch,
        protocol,
        classes=len(data.classes),
        norm=norm,
        mean=encoder.meta["mean"],
        std=encoder.meta["std"],
        seed=seed,
    )
    return model.to(world.device, memory_format=torch.channels_last)


def _check_packages() -> None:
    missing = [name for name in ("torchmetrics", "pycocotools") if importlib.util.find_spec(name) is None]
    if missing:
        raise EvalError(
            "detection",
            got=f"no {' and no '.join(missing)}",
            expected="the packages of the extra `detect`",
            fix="run `pip install -e '.[detect]'` in the clone",
        )
