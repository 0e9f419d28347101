"""Object detection: Faster and Mask R-CNN fine-tuned from the encoder, protocol by protocol (moco/detection).

    voc_c4        Faster R-CNN C4 on VOC 07+12 trainval, test07: 24,000 iterations, steps 18,000 and 22,000, warm-up
                  100, short side 480-800; AP, AP50, AP75 at 11 recalls as Detectron2's VOC evaluation of 2007 has them.
                  pascal_voc_R_50_C4_24k_moco.yaml; published values are means of five runs (``seed=0`` … ``4``)
    coco_c4_2x    Mask R-CNN C4 on COCO 2017: 180,000, steps 120,000 and 160,000, short side 640-800; boxes and masks
    coco_fpn_1x   Mask R-CNN FPN on COCO 2017: 90,000, steps 60,000 and 80,000, short side 640-800

All train every layer (FREEZE_AT 0), 16 pictures per iteration, lr 0.02, SyncBN in backbone, C4 head and FPN, RGB with
the encoder's own mean and std, and re-estimate the norms over 200 batches at the end (PRECISE_BN). Tested at 800.

Built from torchvision's parts, this differs from Detectron2's recipe in what follows: box regression is smooth L1 with
beta 1/9, there L1; anchors are rounded to whole pixels; the targets of masks are cut from bitmaps, there from
polygons; proposals thinner than 0.001 pixels are dropped; batches are padded to the largest picture of the world
(there of each GPU, which also gathers pictures of like shape) and to a multiple of 16 (C4) or 64 (FPN), there none or
32. Regions (ROIAlignV2), numbers of proposals, samples, thresholds, initial values, the mask branch that shares the C4
head, and rates are Detectron2's; SyncBN weighs ranks by their counts, there (naiveSyncBN) equally.

Killed and run again, the training goes on from its last save; the numbers are the same to the bit on a CPU. Any number
of ranks takes the same steps up to the rounding of sums, and a GPU sums the gradients of regions in no fixed order;
this training magnifies rounding, so that such runs differ in their scores much as two seeds do. What one trained
detector scores is the same on any number of ranks.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import dataclass, field, replace

import torch

from hpcssl.data.order import Order
from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError, EvalError, nearest
from hpcssl.evals import detect_model
from hpcssl.evals.detect_data import Pictures, Stream, usable
from hpcssl.evals.detect_norm import SyncNorm
from hpcssl.evals.detect_score import detect, precision
from hpcssl.evals.detect_train import Schedule, Training, train
from hpcssl.nets import resnet

log = logging.getLogger("hpcssl")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One published protocol as values. ``before``, ``after``: proposals kept before and after the suppression, in
    training and testing; ``regions``: those that train the head, per picture; ``points``: recalls of the average
    precision.
    """

    head: str = "c4"
    masks: bool = False
    iterations: int = 24_000
    milestones: list[int] = field(default_factory=lambda: [18_000, 22_000])
    warmup: int = 1000
    batch: int = 16
    lr: float = 0.02
    sizes: list[int] = field(default_factory=lambda: list(range(640, 801, 32)))
    test_size: int = 800
    max_size: int = 1333
    anchors: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    before: tuple[int, int] = (12_000, 6_000)
    after: tuple[int, int] = (2_000, 1_000)
    regions: int = 512
    precise_bn: int = 200
    points: int = 101


PROTOCOLS = {
    "voc_c4": Protocol(warmup=100, sizes=list(range(480, 801, 32)), points=11),
    "coco_c4_2x": Protocol(masks=True, iterations=180_000, milestones=[120_000, 160_000]),
    "coco_fpn_1x": Protocol(head="fpn", masks=True, iterations=90_000, milestones=[60_000, 80_000],
                            before=(2_000, 1_000), after=(1_000, 1_000)),
}


@dataclass(frozen=True, kw_only=True)
class DetectOptions:
    """``protocol`` names a row of ``PROTOCOLS``; the other fields, where they are set, replace its values.

    ``iterations`` alone moves the milestones in proportion. ``train_batch``: pictures per iteration in the whole
    world. ``sizes``: short sides in pixels that training chooses among; ``test_size`` the one of testing; ``max_size``
    of the long side. ``anchors``: sizes in pixels, one per level for the FPN. ``proposals``: kept after the
    suppression, in training and testing; ``regions``: those of them that train the head. ``precise_bn``: batches of
    it, 0 for none.
    """

    protocol: str = "voc_c4"
    iterations: int | None = None
    milestones: list[int] | None = None
    warmup: int | None = None
    train_batch: int | None = None
    lr: float | None = None
    sizes: list[int] | None = None
    test_size: int | None = None
    max_size: int | None = None
    anchors: list[int] | None = None
    proposals: int | None = None
    regions: int | None = None
    precise_bn: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.protocol not in PROTOCOLS:
            raise ConfigError("evals.detect.protocol", got=repr(self.protocol), expected="a known protocol",
                              mend=nearest(self.protocol, PROTOCOLS))
        for name, low in (("iterations", 1), ("warmup", 0), ("train_batch", 1), ("lr", 0.0), ("test_size", 1),
                          ("max_size", 1), ("precise_bn", 0), ("milestones", 1), ("sizes", 1), ("anchors", 1),
                          ("proposals", 1), ("regions", 1)):
            value = getattr(self, name)
            if value is None or (name == "milestones" and not value):
                continue
            if value == [] or not all(v >= low for v in (value if isinstance(value, list) else [value])):
                raise ConfigError(f"evals.detect.{name}", got=value, expected=f"{low} or more",
                                  mend=f"leave {name} out to take the protocol's value")

    def resolve(self) -> Protocol:
        known = PROTOCOLS[self.protocol]
        given = {"iterations": self.iterations, "milestones": self.milestones, "warmup": self.warmup,
                 "batch": self.train_batch, "lr": self.lr, "sizes": self.sizes, "test_size": self.test_size,
                 "max_size": self.max_size, "anchors": self.anchors, "precise_bn": self.precise_bn,
                 "regions": self.regions,
                 "after": None if self.proposals is None else (self.proposals, self.proposals)}
        if self.iterations is not None and self.milestones is None:
            given["milestones"] = [m * self.iterations // known.iterations for m in known.milestones]
        return replace(known, **{name: value for name, value in given.items() if value is not None})


def check(training: ShardSet, val: ShardSet) -> None:
    """Raise ``EvalError`` unless both sets hold pictures and know the same classes; their records are read later."""
    for data in (training, val):
        if len(data) == 0:
            raise EvalError(f"shard folder {data.root}", got="no pictures", expected="at least one",
                            mend="name another folder, or write the shards again")
    if training.classes != val.classes:
        raise EvalError(f"classes of {val.root}", got=f"{len(val.classes)} classes ({', '.join(val.classes[:3])} …)",
                        expected=f"those of {training.root} ({', '.join(training.classes[:3])} …)",
                        mend="name OUT/train and OUT/val of one `hpcssl-shard detection`")


def run(context) -> dict[str, float]:
    """``AP``, ``AP50`` and ``AP75`` of boxes in percent, and with masks ``AP_mask``, ``AP50_mask``, ``AP75_mask``."""
    world, protocol, seed = context.world, context.options.resolve(), context.options.seed
    _refuse_without_metrics()
    pictures = {"train": Pictures(context.train), "val": Pictures(context.val)}
    for each in pictures.values():
        context.closing.callback(each.close)
    known = usable(pictures["train"], world, masks=protocol.masks)
    usable(pictures["val"], world, masks=protocol.masks)
    if protocol.batch > len(known) or protocol.batch % world.size:
        raise EvalError("detection", got=f"train_batch={protocol.batch} on {world.size} ranks, {len(known)} training "
                        "pictures with boxes", expected="at least one whole batch, and equal parts of it",
                        mend="set train_batch, the pictures of one iteration over all ranks")
    t = Training(network(context.encoder, protocol, context.train, world, seed), world)
    if context.state is None:
        log.warning("detect: no run folder keeps this training: a kill loses it")
    elif t.load(context.state, context.identity):
        log.info("detect: goes on at iteration %d of %d", t.step, protocol.iterations)
    if len(set(world.gather_text(str(t.step)))) > 1:
        raise EvalError(f"state {context.state}", got="ranks that do not all see it", expected="one file system",
                        mend="put the run folder where every node sees it")
    order = Order([len(known)], seed=seed, global_batch=protocol.batch, window="all")
    schedule = Schedule(iterations=protocol.iterations, lr=protocol.lr, warmup=protocol.warmup,
                        milestones=protocol.milestones, precise=protocol.precise_bn)
    steps = range(t.step, schedule.iterations + schedule.precise)
    stream = Stream(pictures["train"], ((step, known[order.part(step, world.rank, world.size)]) for step in steps),
                    sides=protocol.sizes, longest=protocol.max_size, masks=protocol.masks, seed=seed,
                    threads=context.threads)
    context.closing.callback(stream.close)
    train(t, iter(stream), schedule, stop=context.stop, state=context.state, identity=context.identity)
    found = detect(t.model, pictures["val"], world, side=protocol.test_size, longest=protocol.max_size,
                   stop=context.stop)
    scores: dict[str, float] = {}
    world.on_main(lambda: scores.update(precision(found, pictures["val"], points=protocol.points,
                                                  masks=protocol.masks)))
    return json.loads(world.tell(json.dumps(scores)))


def network(encoder, protocol: Protocol, data: ShardSet, world, seed: int):
    """The detector of a protocol with the encoder's weights, on the world's device."""
    def norm(channels: int) -> SyncNorm:
        return SyncNorm(channels, world=world)

    arch = encoder.meta["arch"]
    backbone = resnet.build(arch, norm=norm)
    backbone.load_state_dict({name: value for name, value in encoder.backbone.state_dict().items()
                              if not name.endswith("num_batches_tracked")})
    proposals = {when: dict(zip(("training", "testing"), getattr(protocol, when), strict=True))
                 for when in ("before", "after")}
    model = detect_model.build(backbone, arch, head=protocol.head, masks=protocol.masks, classes=len(data.classes),
                               norm=norm, anchors=protocol.anchors, proposals=proposals, regions=protocol.regions,
                               mean=encoder.meta["mean"], std=encoder.meta["std"], seed=seed)
    return model.to(world.device, memory_format=torch.channels_last)


def _refuse_without_metrics() -> None:
    lost = [name for name in ("torchmetrics", "pycocotools") if importlib.util.find_spec(name) is None]
    if lost:
        raise EvalError("detection", got=f"no {' and no '.join(lost)}", expected="the packages of the extra detect",
                        mend="pip install 'hpcssl[detect]'")
