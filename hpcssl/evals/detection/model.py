"""Faster and Mask R-CNN around a backbone of this package, out of torchvision's parts: the C4 head and the FPN.

``c4`` (He et al. 2017, appendix A; moco/detection/train_net.py, ``Res5ROIHeadsExtraNorm``): regions are cropped from
the last stage but one, and the last stage with one norm after it is the head of boxes and masks. ``fpn`` (Lin et al.
2017): all stages, five levels, two linear layers for the boxes and four convolutions for the masks.

torchvision guesses the scales of the feature maps from the sizes of the images, which padding to the largest image of
all ranks would mislead; here they are given. See ``regions.py`` for the other differences.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from hpcssl import rng
from hpcssl.errors import ConfigError
from hpcssl.evals.detection.protocols import DetectionProtocol
from hpcssl.evals.detection.regions import BalancedSampler, RegionPool, Res5Head, Res5MaskFeatures
from hpcssl.nets import resnet
from hpcssl.nets.resnet import Arch

_FPN_WIDTH, _BOX_WIDTH, _MASK_WIDTH = 256, 1024, 256


class ImageBatcher(nn.Module):
    """Normalizes and pads images into one batch: uint8 [3, h, w] each to [n, 3, H, W].

    Args:
        mean: Mean of each color channel in [0, 1].
        std: Standard deviation of each color channel.
        stride: H and W are rounded up to a multiple of it.

    Attributes:
        side: Height and width to pad to, the same on every rank, so that norms see the same batch on any number of
            ranks. None for the largest of the images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], stride: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.stride = stride
        self.side: tuple[int, int] | None = None

    def forward(self, images: list[Tensor], targets: list[Any] | None) -> tuple[ImageList, list[Any] | None]:
        """Batch the images; the targets are returned unchanged."""
        sizes = [tuple(image.shape[1:]) for image in images]
        side = self.side or tuple(max(edge) for edge in zip(*sizes, strict=True))
        height, width = (-(-edge // self.stride) * self.stride for edge in side)
        batch = self.mean.new_zeros(len(images), 3, height, width)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = (image.to(row) / 255 - self.mean) / self.std
        return ImageList(batch.contiguous(memory_format=torch.channels_last), sizes), targets

    def postprocess(self, detections: list[Any], *_: object) -> list[Any]:
        """Return the detections in the pixels of the resized images; ``scoring.py`` scales them back."""
        return detections


@dataclass
class _Parts:
    """What the C4 and the FPN detector differ in.

    Attributes:
        body: The backbone up to the feature maps.
        stride: Multiple that padded images are rounded to.
        anchors: Sizes of anchors in pixels, per feature map.
        box_pool: Features of regions, for the boxes.
        box_head: Their vectors.
        box_width: Length of a vector.
        mask: Features of regions, head and width of the mask branch; None without masks.
    """

    body: nn.Module
    stride: int
    anchors: tuple[tuple[int, ...], ...]
    box_pool: nn.Module
    box_head: nn.Module
    box_width: int
    mask: tuple[nn.Module, nn.Module, int] | None


def assemble_detector(
    backbone: nn.Module,
    arch: Arch,
    protocol: DetectionProtocol,
    *,
    classes: int,
    norm: Callable[[int], nn.Module],
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
) -> GeneralizedRCNN:
    """Build the detector of a protocol around a backbone. The initial values of new layers are drawn by their names.

    Args:
        backbone: A network of ``arch`` whose norms are of ``norm``. Its layers become parts of the detector.
        arch: Architecture of the backbone.
        protocol: The protocol.
        classes: Number of classes without the background.
        norm: Channels -> norm layer.
        mean: Mean of each color channel in [0, 1].
        std: Standard deviation of each color channel.
        seed: Seed of the initial values, and of the sampling of anchors and regions.

    Raises:
        ConfigError: The number of anchor sizes is not that of the FPN's levels.
    """
    stages = [name for name, _ in backbone.named_children() if name.startswith("layer")]
    first = 1 if arch.stem == "small" or arch.arch == "resnet_tiny" else 4
    strides = {name: first * 2**i for i, name in enumerate(stages)}
    if protocol.head == "c4":
        parts = _c4_parts(backbone, strides, protocol, norm)
    else:
        parts = _fpn_parts(backbone, arch, strides, protocol, norm)
    rpn = _proposal_network(parts, protocol, seed)
    heads = _region_heads(parts, protocol, classes, seed)
    model = GeneralizedRCNN(parts.body, rpn, heads, ImageBatcher(mean, std, parts.stride))
    _initialize(model, seed)
    return model


def _c4_parts(
    backbone: nn.Module, strides: dict[str, int], protocol: DetectionProtocol, norm: Callable[[int], nn.Module]
) -> _Parts:
    layers = dict(backbone.named_children())
    *lower, last = strides
    kept = [name for name in layers if name in lower or not name.startswith(("layer", "avgpool", "fc"))]
    body = nn.Sequential(OrderedDict((name, layers[name]) for name in kept))
    body.out_channels = resnet.feature_width(layers[lower[-1]])  # type: ignore[assignment]  # torchvision reads it
    width, stride = resnet.feature_width(layers[last]), strides[lower[-1]]
    box_pool = Res5Head(stride, layers[last], norm(width))
    box_head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    mask = (Res5MaskFeatures(box_pool), nn.Identity(), width) if protocol.masks else None
    return _Parts(body, stride, (tuple(protocol.anchor_sizes),), box_pool, box_head, width, mask)


def _fpn_parts(
    backbone: nn.Module,
    arch: Arch,
    strides: dict[str, int],
    protocol: DetectionProtocol,
    norm: Callable[[int], nn.Module],
) -> _Parts:
    layers, stages, sizes = dict(backbone.named_children()), list(strides), protocol.anchor_sizes
    widths = [resnet.feature_width(layers[name]) for name in stages]
    names = {name: str(i) for i, name in enumerate(stages)}
    body = BackboneWithFPN(backbone, names, widths, _FPN_WIDTH, norm_layer=norm)
    maps = {str(i): strides[name] for i, name in enumerate(stages)}
    box_pool, box_head = RegionPool(7, maps), TwoMLPHead(_FPN_WIDTH * 7**2, _BOX_WIDTH)
    mask = (RegionPool(14, maps), MaskRCNNHeads(_FPN_WIDTH, (_MASK_WIDTH,) * 4, 1), _MASK_WIDTH)
    if len(sizes) != len(stages) + 1:
        raise ConfigError(
            "evals.detect.anchor_sizes",
            got=f"{len(sizes)} sizes",
            expected=f"{len(stages) + 1} sizes, one for each level of the FPN on {arch.arch}",
            fix="remove anchor_sizes" if len(stages) == 4 else "name one size per level",
        )
    return _Parts(
        body,
        2 * max(strides.values()),
        tuple((size,) for size in sizes),
        box_pool,
        box_head,
        _BOX_WIDTH,
        mask if protocol.masks else None,
    )


def _proposal_network(parts: _Parts, protocol: DetectionProtocol, seed: int) -> RegionProposalNetwork:
    """Detectron2's region proposal network: 256 anchors per image, IoU 0.7 and 0.3, suppression at 0.7."""
    anchors = AnchorGenerator(parts.anchors, ((0.5, 1.0, 2.0),) * len(parts.anchors))
    phases = ("training", "testing")
    rpn = RegionProposalNetwork(
        anchors,
        RPNHead(parts.body.out_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n=dict(zip(phases, protocol.before, strict=True)),
        post_nms_top_n=dict(zip(phases, protocol.after, strict=True)),
        nms_thresh=0.7,
    )
    rpn.fg_bg_sampler = BalancedSampler("anchors", 256, 0.5, seed)
    return rpn


def _region_heads(parts: _Parts, protocol: DetectionProtocol, classes: int, seed: int) -> RoIHeads:
    """Detectron2's heads: IoU 0.5, a quarter of positives, suppression at 0.5, 100 detections from a score of 0.05."""
    mask_branch: dict[str, nn.Module] = {}
    if parts.mask is not None:
        pool, head, width = parts.mask
        predictor = MaskRCNNPredictor(width, _MASK_WIDTH, classes + 1)
        mask_branch = {"mask_roi_pool": pool, "mask_head": head, "mask_predictor": predictor}
    heads = RoIHeads(
        parts.box_pool,
        parts.box_head,
        FastRCNNPredictor(parts.box_width, classes + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=protocol.regions,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
        **mask_branch,
    )
    heads.fg_bg_sampler = BalancedSampler("regions", protocol.regions, 0.25, seed)
    return heads


@torch.no_grad()
def _initialize(model: GeneralizedRCNN, seed: int) -> None:
    """Draw Detectron2's initial values of the new layers, each keyed by its name. The backbone's values stay."""
    for name, module in model.named_modules():
        if name.startswith(("backbone.body.", "roi_heads.box_roi_pool.")):
            continue
        if name.startswith("backbone.") and not name.startswith("backbone.fpn."):
            continue
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            continue
        generator = rng.generator(rng.key(seed, "detect", "init", name))
        if name.startswith("rpn.") or name.endswith("cls_score"):
            nn.init.normal_(module.weight, std=0.01, generator=generator)
        elif name.endswith(("bbox_pred", "mask_fcn_logits")):
            nn.init.normal_(module.weight, std=0.001, generator=generator)
        elif "mask" in name:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        else:  # the FPN and the box head's two layers
            nn.init.kaiming_uniform_(module.weight, a=1, generator=generator)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
