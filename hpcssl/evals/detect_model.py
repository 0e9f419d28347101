"""Faster and Mask R-CNN around our backbones, out of torchvision's parts: the C4 head and the FPN.

``c4`` (He et al. 2017, App. A; moco/detection/train_net.py, Res5ROIHeadsExtraNorm): regions are cut from the last
stage but one, and the last stage with one norm after it is the head of boxes and masks. ``fpn`` (Lin et al. 2017):
all stages, five levels, two linear layers for the boxes and four convolutions for the masks.

torchvision's two classes of the same names are not used as they are for three reasons: their samplers draw from the
global generator, their regions are aligned half a pixel off, and their scales are guessed from the size of the
images, which padding to the largest image of the whole world would mislead. Here a draw is addressed, and regions
are aligned as Detectron2 aligns them (ROIAlignV2: aligned, adaptive number of samples).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

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
from torchvision.ops import roi_align

from hpcssl import rng
from hpcssl.errors import ConfigError
from hpcssl.nets import resnet
from hpcssl.nets.resnet import Arch

_FPN_WIDTH, _BOX_WIDTH, _MASK_WIDTH = 256, 1024, 256
_CANONICAL = 224  # a region of this side belongs to the level of stride 16 (Lin et al. 2017, eq. 1)


class Batcher(nn.Module):
    """Pixels to one padded batch: uint8 [3, H, W] each -> normalised [n, 3, *side].

    ``side``: the padded height and width, the same on every rank, so that norms see the same batch in every world;
    None takes the largest of these images. Both are rounded up to a multiple of ``stride``.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], stride: int):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.stride = stride
        self.side: tuple[int, int] | None = None

    def forward(self, images: list[Tensor], targets: list[dict] | None) -> tuple[ImageList, list[dict] | None]:
        sizes = [tuple(image.shape[1:]) for image in images]
        side = self.side or tuple(max(edge) for edge in zip(*sizes, strict=True))
        height, width = (-(-edge // self.stride) * self.stride for edge in side)
        batch = self.mean.new_zeros(len(images), 3, height, width)
        for row, image in zip(batch, images, strict=True):
            row[:, :image.shape[1], :image.shape[2]] = (image.to(row) / 255 - self.mean) / self.std
        return ImageList(batch.contiguous(memory_format=torch.channels_last), sizes), targets

    def postprocess(self, found: list[dict], *_) -> list[dict]:
        """Detections stay in the pixels of the resized image: who resized it knows the way back."""
        return found


class Sampler:
    """torchvision's balanced choice of anchors or proposals, each image's draw at an address of its own.

    ``at`` names the step and the images (global indices); ``positives`` and ``total`` are then what was chosen for
    them, which the losses' means were taken over.
    """

    def __init__(self, place: str, per_image: int, fraction: float, seed: int):
        self.place, self.per_image, self.most, self.seed = place, per_image, int(per_image * fraction), seed
        self.step, self.index, self.positives, self.total = 0, [], 0, 0

    def at(self, step: int, index: Sequence[int]) -> None:
        self.step, self.index = step, [int(i) for i in index]

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Labels (above 0 positive, 0 negative, below 0 neither) of each image -> its two masks, uint8."""
        masks = []
        for index, label in zip(self.index, labels, strict=True):
            draw = rng.generator(rng.key(self.seed, "detect", self.place, self.step, index))
            positive, room = self._some(label >= 1, self.most, draw), self.per_image
            masks.append((positive, self._some(label == 0, room - int(positive.sum()), draw)))
        positive, negative = zip(*masks, strict=True)
        self.positives = sum(int(mask.sum()) for mask in positive)
        self.total = self.positives + sum(int(mask.sum()) for mask in negative)
        return list(positive), list(negative)

    @staticmethod
    def _some(mask: Tensor, most: int, draw: torch.Generator) -> Tensor:
        where = mask.nonzero()[:, 0]
        chosen = torch.randperm(len(where), generator=draw)[:most].to(where.device)
        return torch.zeros_like(mask, dtype=torch.uint8).index_fill_(0, where[chosen], 1)


class Pool(nn.Module):
    """Regions [R, C, size, size] of feature maps, as Detectron2's ROIPooler with ROIAlignV2 cuts them.

    ``strides``: pixels per cell of each map, by its name.
    """

    def __init__(self, size: int, strides: dict[str, int]):
        super().__init__()
        self.size, self.strides = size, strides

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], _shapes=None) -> Tensor:
        rois = torch.cat([torch.cat((box.new_full((len(box), 1), i), box), 1) for i, box in enumerate(boxes)])
        levels = [math.log2(stride) for stride in self.strides.values()]
        side = (rois[:, 3:] - rois[:, 1:3]).clamp(min=0).prod(1).sqrt()
        level = torch.floor(4 + torch.log2(side / _CANONICAL + 1e-8)).clamp(min(levels), max(levels))
        cut = [roi_align(features[name], rois[level == near], self.size, 1 / stride, sampling_ratio=0, aligned=True)
               for near, (name, stride) in zip(levels, self.strides.items(), strict=True)]
        if len(cut) == 1:
            return cut[0]
        order = torch.cat([(level == near).nonzero()[:, 0] for near in levels])
        return torch.cat(cut)[torch.argsort(order)]


class Res5(nn.Module):
    """The C4 head: regions of 14 x 14, the backbone's last stage, and the extra norm. [R, C, 7, 7]."""

    def __init__(self, stride: int, stage: nn.Module, norm: nn.Module):
        super().__init__()
        self.pool, self.stage, self.norm = Pool(14, {"0": stride}), stage, norm
        self.shared = False  # whether a mask branch takes what was made for the boxes
        self.kept: tuple[list[Tensor], Tensor] | None = None

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], _shapes=None) -> Tensor:
        x = self.norm(self.stage(self.pool(features, boxes)))
        if self.training and self.shared:
            self.kept = boxes, x
        return x


class Positives(nn.Module):
    """The mask branch of C4. In training it takes the rows that the box branch made for the same boxes, as
    Detectron2 does, so that the head's norms see each region once; boxes that were found are cut anew.
    """

    def __init__(self, res5: Res5):
        super().__init__()
        self._res5 = (res5,)  # no submodule: its parameters belong to the box branch
        res5.shared = True

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], _shapes=None) -> Tensor:
        res5, = self._res5
        if not self.training:
            return res5(features, boxes)
        (every, x), res5.kept = res5.kept, None
        rows, first = [], 0
        for some, whole in zip(boxes, every, strict=True):
            rows.append(first + (some[:, None] == whole).all(2).int().argmax(1))
            first += len(whole)
        return x[torch.cat(rows)]


def build(backbone: nn.Module, arch: Arch, *, head: str, masks: bool, classes: int, norm: Callable[[int], nn.Module],
          anchors: Sequence[int], proposals: dict[str, dict[str, int]], regions: int,
          mean: Sequence[float], std: Sequence[float], seed: int) -> GeneralizedRCNN:
    """The detector, its new layers drawn by address. ``backbone``: of ``arch``, trained whole, its norms ``norm``'s.

    ``anchors``: their sizes in pixels, one per level for ``fpn``. ``proposals``: ``before`` and ``after`` the
    suppression, each in ``training`` and ``testing``; ``regions``: those that train the head, per picture.
    """
    stages = [name for name, _ in backbone.named_children() if name.startswith("layer")]
    first = 1 if arch.stem == "small" or arch.arch == "resnet_tiny" else 4
    strides = {name: first * 2**i for i, name in enumerate(stages)}
    parts = dict(backbone.named_children())
    if head == "c4":
        *below, last = stages
        body = nn.Sequential(OrderedDict((name, part) for name, part in parts.items()
                                         if name in below or not name.startswith(("layer", "avgpool", "fc"))))
        body.out_channels = resnet.width_of(parts[below[-1]])
        width = resnet.width_of(parts[last])
        box_pool = Res5(strides[below[-1]], parts[last], norm(width))
        box_head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        mask = (Positives(box_pool), nn.Identity(), width) if masks else ()
        sizes, box_width, stride = (tuple(anchors),), width, strides[below[-1]]
    else:
        names = {name: str(i) for i, name in enumerate(stages)}
        body = BackboneWithFPN(backbone, names, [resnet.width_of(parts[name]) for name in stages], _FPN_WIDTH,
                               norm_layer=norm)
        maps = {str(i): strides[name] for i, name in enumerate(stages)}
        box_pool, box_head = Pool(7, maps), TwoMLPHead(_FPN_WIDTH * 7**2, _BOX_WIDTH)
        mask = (Pool(14, maps), MaskRCNNHeads(_FPN_WIDTH, (_MASK_WIDTH,) * 4, 1), _MASK_WIDTH)
        sizes, box_width, stride = tuple((size,) for size in anchors), _BOX_WIDTH, 2 * max(strides.values())
        if len(sizes) != len(stages) + 1:
            raise ConfigError("evals.detect.anchors", got=f"{len(sizes)} sizes", mend="leave anchors out" if
                              len(stages) == 4 else "name one size per level", expected=f"{len(stages) + 1}, one for "
                              f"each level of the FPN on {arch.arch}")
    maker = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    rpn = RegionProposalNetwork(maker, RPNHead(body.out_channels, maker.num_anchors_per_location()[0]), 0.7, 0.3, 256,
                                0.5, proposals["before"], proposals["after"], 0.7)
    rpn.fg_bg_sampler = Sampler("anchors", 256, 0.5, seed)
    more = {}
    if masks:
        mask_pool, mask_head, mask_width = mask
        more = {"mask_roi_pool": mask_pool, "mask_head": mask_head,
                "mask_predictor": MaskRCNNPredictor(mask_width, _MASK_WIDTH, classes + 1)}
    heads = RoIHeads(box_pool, box_head, FastRCNNPredictor(box_width, classes + 1), 0.5, 0.5, regions, 0.25,
                     (10.0, 10.0, 5.0, 5.0), 0.05, 0.5, 100, **more)
    heads.fg_bg_sampler = Sampler("regions", regions, 0.25, seed)
    model = GeneralizedRCNN(body, rpn, heads, Batcher(mean, std, stride))
    _initialise(model, seed)
    return model


@torch.no_grad()
def _initialise(model: GeneralizedRCNN, seed: int) -> None:
    """Detectron2's initial values of the new layers, each drawn at its name. The backbone's stay."""
    for name, part in model.named_modules():
        if name.startswith(("backbone.body.", "roi_heads.box_roi_pool.")) or not hasattr(part, "weight") or (
                not isinstance(part, nn.Conv2d | nn.Linear | nn.ConvTranspose2d)):
            continue
        if name.startswith("backbone.") and not name.startswith("backbone.fpn."):
            continue
        draw = rng.generator(rng.key(seed, "detect", "init", name))
        if name.startswith("rpn.") or name.endswith("cls_score"):
            nn.init.normal_(part.weight, std=0.01, generator=draw)
        elif name.endswith(("bbox_pred", "mask_fcn_logits")):
            nn.init.normal_(part.weight, std=0.001, generator=draw)
        elif "mask" in name:
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu", generator=draw)
        else:  # the FPN and the box head's two layers
            nn.init.kaiming_uniform_(part.weight, a=1, generator=draw)
        if part.bias is not None:
            nn.init.zeros_(part.bias)
