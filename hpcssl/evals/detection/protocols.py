"""Published protocols of object detection (MoCo, ``detection/configs``), as values.

All train every layer (FREEZE_AT 0) on 16 images per iteration at a learning rate of 0.02, with SyncBN in backbone, C4
head and FPN, on RGB images normalized as the weights file says, and re-estimate the norms over 200 batches at the end
(PRECISE_BN). All are tested with a short side of 800 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class DetectionProtocol:
    """One published protocol.

    Attributes:
        head: ``c4`` or ``fpn``.
        masks: Whether masks are learned and scored (Mask R-CNN).
        iterations: Optimizer steps.
        milestones: Iterations after which the learning rate falls to a tenth.
        warmup: Iterations of the linear warm-up.
        batch: Images per iteration, over all ranks.
        lr: Peak learning rate.
        train_sizes: Short sides of training images in pixels, of which one is drawn per image.
        test_size: Short side of test images in pixels.
        max_size: Largest long side in pixels.
        anchor_sizes: Sizes of anchors in pixels; for ``fpn`` one per level.
        before: Proposals per image (FPN: and level) kept before non-maximum suppression, in training and testing.
        after: Proposals per image kept after it, in training and testing.
        regions: Regions per image that train the head.
        precise_bn: Batches over which the statistics of the norms are re-estimated at the end.
        points: Recalls at which precision is read: 11 (VOC 2007) or 101 (COCO).
    """

    head: str = "c4"
    masks: bool = False
    iterations: int = 24_000
    milestones: list[int] = field(default_factory=lambda: [18_000, 22_000])
    warmup: int = 1000
    batch: int = 16
    lr: float = 0.02
    train_sizes: list[int] = field(default_factory=lambda: list(range(640, 801, 32)))
    test_size: int = 800
    max_size: int = 1333
    anchor_sizes: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    before: tuple[int, int] = (12_000, 6_000)
    after: tuple[int, int] = (2_000, 1_000)
    regions: int = 512
    precise_bn: int = 200
    points: int = 101


PROTOCOLS = {
    # Faster R-CNN C4 on VOC 07+12, pascal_voc_R_50_C4_24k_moco.yaml; published values are means of five runs (seeds)
    "voc_c4": DetectionProtocol(warmup=100, train_sizes=list(range(480, 801, 32)), points=11),
    # Mask R-CNN C4 on COCO 2017, schedule 2x
    "coco_c4_2x": DetectionProtocol(masks=True, iterations=180_000, milestones=[120_000, 160_000]),
    # Mask R-CNN FPN on COCO 2017, schedule 1x
    "coco_fpn_1x": DetectionProtocol(
        head="fpn",
        masks=True,
        iterations=90_000,
        milestones=[60_000, 80_000],
        before=(2_000, 1_000),
        after=(1_000, 1_000),
    ),
}
