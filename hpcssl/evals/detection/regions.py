"""Parts of a detector that deal with regions: their sampling, pooling, and the C4 head.

torchvision's own parts are not used as they are for two reasons: its samplers draw from the global generator, and its
regions are aligned half a pixel off. Here each draw is a function of its key, and regions are aligned as in Detectron2
(ROIAlignV2: aligned, adaptive number of samples).

Shapes: R regions, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from hpcssl import rng

_CANONICAL_SIDE = 224  # a region of this side belongs to the level of stride 16 (Lin et al. 2017, eq. 1)


class BalancedSampler:
    """Sampling of positive and negative anchors or proposals, a drop-in for torchvision's sampler.

    Args:
        address: Name that separates the draws of different samplers.
        per_image: Samples per image.
        fraction: Largest share of positives.
        seed: Seed of the draws.

    Attributes:
        positives: Number of positives in the last call.
        total: Number of samples in the last call. The losses' means were taken over these.
    """

    def __init__(self, address: str, per_image: int, fraction: float, seed: int) -> None:
        self.address, self.per_image, self.seed = address, per_image, seed
        self.max_positives = int(per_image * fraction)
        self.step, self.positives, self.total = 0, 0, 0
        self.index: list[int] = []

    def set_images(self, step: int, index: Sequence[int]) -> None:
        """Set what the next draws are keyed by: the step, and the global indices of the images."""
        self.step, self.index = step, [int(i) for i in index]

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Draw samples.

        Args:
            labels: Labels of each image's candidates: above 0 positive, 0 negative, below 0 neither.

        Returns:
            Masks of the positives and of the negatives of each image, uint8.
        """
        positive, negative = [], []
        for index, label in zip(self.index, labels, strict=True):
            generator = rng.generator(rng.key(self.seed, "detect", self.address, self.step, index))
            positive.append(self._draw(label >= 1, self.max_positives, generator))
            negative.append(self._draw(label == 0, self.per_image - int(positive[-1].sum()), generator))
        self.positives = sum(int(mask.sum()) for mask in positive)
        self.total = self.positives + sum(int(mask.sum()) for mask in negative)
        return positive, negative

    @staticmethod
    def _draw(mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
        candidates = mask.nonzero()[:, 0]
        chosen = torch.randperm(len(candidates), generator=generator)[:count].to(candidates.device)
        return torch.zeros_like(mask, dtype=torch.uint8).index_fill_(0, candidates[chosen], 1)


class RegionPool(nn.Module):
    """Crops regions [R, C, size, size] out of feature maps, as Detectron2's ROIPooler with ROIAlignV2.

    Args:
        size: Side of a cropped region in cells.
        strides: Pixels per cell of each map, by its name.
    """

    def __init__(self, size: int, strides: dict[str, int]) -> None:
        super().__init__()
        self.size, self.strides = size, strides

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], _shapes: object = None) -> Tensor:
        """Crop the boxes of each image from the map of their size.

        Args:
            features: Maps by name, each [n, C, h, w].
            boxes: Boxes of each image in pixels, [r, 4].
        """
        rois = torch.cat([torch.cat((box.new_full((len(box), 1), i), box), 1) for i, box in enumerate(boxes)])
        levels = [math.log2(stride) for stride in self.strides.values()]
        side = (rois[:, 3:] - rois[:, 1:3]).clamp(min=0).prod(1).sqrt()
        level = torch.floor(4 + torch.log2(side / _CANONICAL_SIDE + 1e-8)).clamp(min(levels), max(levels))
        crops: list[Tensor] = [
            roi_align(features[name], rois[level == near], self.size, 1 / stride, sampling_ratio=0, aligned=True)
            for near, (name, stride) in zip(levels, self.strides.items(), strict=True)
        ]
        if len(crops) == 1:
            return crops[0]
        order = torch.cat([(level == near).nonzero()[:, 0] for near in levels])
        return torch.cat(crops)[torch.argsort(order)]


class Res5Head(nn.Module):
    """The C4 head: regions of 14 x 14 cells, the backbone's last stage and an extra norm, to [R, C, 7, 7].

    Args:
        stride: Pixels per cell of the feature map.
        stage: The last stage of the backbone.
        norm: The norm after it (MoCo, ``Res5ROIHeadsExtraNorm``).
    """

    def __init__(self, stride: int, stage: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.pool, self.stage, self.norm = RegionPool(14, {"0": stride}), stage, norm
        self.shared = False  # whether a mask branch reuses the features of the boxes
        self.last: tuple[list[Tensor], Tensor] | None = None

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], _shapes: object = None) -> Tensor:
        """Features [R, C, 7, 7] of the boxes of all images."""
        x: Tensor = self.norm(self.stage(self.pool(features, boxes)))
        if self.training and self.shared:
            self.last = boxes, x
        return x


class Res5MaskFeatures(nn.Module):
    """The features of the C4 mask branch.

    In training it takes the rows that the box branch computed for the same boxes, as Detectron2 does, so that the
    norms of the head see each region once. In testing it computes the features of the detected boxes.

    Args:
        res5: The head of the box branch.
    """

    def __init__(self, res5: Res5Head) -> None:
        super().__init__()
        self._res5 = (res5,)  # in a tuple, so that its parameters are registered in the box branch only
        res5.shared = True

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], _shapes: object = None) -> Tensor:
        """Features [R, C, 7, 7] of the boxes of all images."""
        (res5,) = self._res5
        if not self.training or res5.last is None:
            computed: Tensor = res5(features, boxes)
            return computed
        (all_boxes, x), res5.last = res5.last, None
        rows, first = [], 0
        for positives, sampled in zip(boxes, all_boxes, strict=True):
            rows.append(first + (positives[:, None] == sampled).all(2).int().argmax(1))
            first += len(sampled)
        return x[torch.cat(rows)]
