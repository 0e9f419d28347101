"""The encoders of a method: the online encoder, which is trained, and the target encoder, which it is trained toward.

Letters in shapes: b rows of this rank, W ranks, D width of the projection, C prototypes, S pixels per side.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl.distributed.batch_layout import BatchLayout
from hpcssl.distributed.world import World
from hpcssl.nets import norm
from hpcssl.nets.heads import Prototypes
from hpcssl.optim import masked

Embedded = tuple[Tensor, Tensor | None]
"""Projection z and prediction u of a view: [b, D] each, of unit length. With prototypes, u holds the scores [b, C].
u is None without a predictor."""


class Encoder(nn.Module):
    """Backbone, projector and an optional predictor.

    Args:
        backbone: Maps images [b, 3, S, S] to features [b, F].
        projector: Maps features to projections [b, D].
        predictor: Maps projections to predictions [b, D], or ``Prototypes``, which maps them to scores [b, C]. None for
            a target encoder, and for methods without one.
        second: The encoder of the second modality, where the view plan has views of one.
        joint: Whether views share the statistics of their batch normalization, as in SwAV's code (resnet50.py,
            forward): consecutive views of one size pass the backbone together, and all views the projector. Otherwise
            each view is a pass of its own.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        predictor: nn.Module | None,
        second: Encoder | None = None,
        joint: bool = False,
    ):
        super().__init__()
        self.backbone, self.projector, self.predictor, self.second = backbone, projector, predictor, second
        self.joint = joint

    def forward(self, views: list[Tensor], second: Sequence[bool] = ()) -> list[Embedded]:
        """Embed several views.

        Args:
            views: Images of each view, [b, 3, S, S].
            second: Per view, whether it shows the second modality; empty for none.

        Returns:
            Projection and prediction of each view.
        """
        if self.joint:
            return self._embed_jointly(views)
        is_second = second or [False] * len(views)
        return [self._of_modality(other).embed(view) for view, other in zip(views, is_second, strict=True)]

    def embed(self, view: Tensor) -> Embedded:
        """Embed one view [b, 3, S, S] of this encoder's own modality."""
        z = self.projector(self.backbone(view))
        return l2_normalize(z), self.predict(z)

    def predict(self, z: Tensor) -> Tensor | None:
        """Compute predictions from projections [b, D] of any length. None without a predictor."""
        if self.predictor is None:
            return None
        if isinstance(self.predictor, Prototypes):
            scores: Tensor = self.predictor(l2_normalize(z))
            return scores
        return l2_normalize(self.predictor(z))

    def without_predictor(self) -> Encoder:
        """An encoder of the same networks, not copied, without predictors. A moving average has none."""
        second = None if self.second is None else self.second.without_predictor()
        return Encoder(self.backbone, self.projector, None, second, self.joint)

    def _of_modality(self, second: bool) -> Encoder:
        if not second:
            return self
        assert self.second is not None  # the encoder is built from the plan that these views come from
        return self.second

    def _embed_jointly(self, views: list[Tensor]) -> list[Embedded]:
        features: list[Tensor] = []
        for _, same_size in itertools.groupby(views, key=lambda view: view.shape):
            features += _pass_together(self.backbone, list(same_size))
        projections = _pass_together(self.projector, features)
        return [(l2_normalize(z), self.predict(z)) for z in projections]


def _pass_together(network: nn.Module, views: list[Tensor]) -> list[Tensor]:
    """Run a network once on views [b, …] of one shape.

    The rows of a sample stand next to each other, so that a group of the norms holds whole samples on any number of
    ranks.
    """
    layers = norm.find_norms([network])
    rows = torch.stack(views, 1).flatten(0, 1)
    if rows.dim() == 4 and views[0].is_contiguous(memory_format=torch.channels_last):
        rows = rows.contiguous(memory_format=torch.channels_last)
    for layer in layers:
        layer.rows_per_sample = len(views)
    try:
        return list(network(rows).unflatten(0, (-1, len(views))).unbind(1))
    finally:
        for layer in layers:
            layer.rows_per_sample = 1


def l2_normalize(x: Tensor) -> Tensor:
    """Scale rows [b, D] to unit length, in float32 or float64: lengths and cosines need more than half precision."""
    return F.normalize(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, dim=1)


class EncoderPair(nn.Module):
    """The online encoder and the target encoder.

    Only the online encoder has gradients. It is wrapped for data-parallel training, and must be called once per
    backward pass, with the list of all its views.

    Args:
        online: The encoder to train.
        target_encoder: ``ema`` for an exponential moving average of the online encoder, which starts as a copy. With
            ``stop_gradient`` and ``shared``, the online encoder embeds the target views as well.
        world: The processes that train together.
        layout: How the global batch is split over micro-batches and ranks.
        precision: Type that forward passes are cast to (autocast); None for no cast.

    Attributes:
        online: The online encoder.
        target: The moving average, or None.
    """

    target: Encoder | None

    def __init__(
        self,
        online: Encoder,
        target_encoder: Literal["ema", "stop_gradient", "shared"],
        world: World,
        layout: BatchLayout,
        precision: torch.dtype | None = None,
    ):
        super().__init__()
        self.online, self.target_encoder, self.world = online, target_encoder, world
        self.layout, self.precision = layout, precision
        self.target = None
        if target_encoder == "ema":
            self.target = copy.deepcopy(online.without_predictor()).requires_grad_(False)
        self._parallel = [world.wrap_in_ddp(online)]  # in a list: not a second copy of the parameters in state_dict
        self.normalize_prototypes()

    def embed(self, views: list[Tensor], second: Sequence[bool] = ()) -> list[Embedded]:
        """Embed views with the online encoder, with gradient. Arguments and result are those of ``Encoder.forward``."""
        with self._autocast():
            embedded: list[Embedded] = self._parallel[0](views, second)
        return embedded

    @torch.no_grad()
    def embed_without_grad(self, view: Tensor) -> Tensor:
        """Compute projections [b, D] of a view with the encoder that embeds targets, without gradient."""
        network = self.online if self.target is None else self.target
        with self._autocast():
            return torch.cat([network.embed(rows)[0] for rows in view.chunk(self.layout.micro_batches)])

    @torch.no_grad()
    def predict(self, z: Tensor) -> Tensor:
        """Apply the online predictor to projections [n, D], without gradient.

        Raises:
            ValueError: If the online encoder has no predictor.
        """
        prediction = self.online.predict(z)
        if prediction is None:
            raise ValueError("the online encoder has no predictor")
        return prediction

    @torch.no_grad()
    def embed_target(
        self, views: list[Tensor], orders: list[Tensor] | None = None, second: Sequence[bool] = ()
    ) -> list[Tensor]:
        """Compute projections with the moving average, without gradient. It uses batch statistics of its own.

        The rows pass in micro-batches like those of the online encoder, because groups of the norms lie within a
        micro-batch.

        Args:
            views: Images of each view, [b, 3, S, S].
            orders: Per view, a permutation of the global batch, int64 [W·b]. The images are permuted over ranks before
                the pass and back afterwards (shuffle-BN, He et al. 2020). None for no shuffle.
            second: Per view, whether it shows the second modality; empty for none.

        Returns:
            Projections of each view, [b, D], of unit length.

        Raises:
            ValueError: If there is no moving average.
        """
        target = self.target
        if target is None:
            raise ValueError("there is no moving average of the online encoder")
        world, layout = self.world, self.layout
        if orders is not None:
            views = [world.shuffle(view, order, layout) for view, order in zip(views, orders, strict=True)]
        micro_batches = zip(*(view.chunk(layout.micro_batches) for view in views), strict=True)
        with self._autocast():
            projections = [[z for z, _ in target(list(rows), second)] for rows in micro_batches]
        z_per_view = [torch.cat(parts) for parts in zip(*projections, strict=True)]
        if orders is not None:
            z_per_view = [world.unshuffle(z, order, layout) for z, order in zip(z_per_view, orders, strict=True)]
        return z_per_view

    @torch.no_grad()
    def update_ema(self, momentum: float, taken: Tensor | None = None) -> None:
        """Move the target encoder toward the online one; nothing without a moving average.

        target ← momentum · target + (1 − momentum) · online, for parameters only. Statistics of the norms are the
        target encoder's own.

        Args:
            momentum: From 0 to 1.
            taken: bool [] on the device; where it is false, nothing is changed. None means True.
        """
        if self.target is None:
            return
        target: list[Tensor] = list(self.target.parameters())
        online: list[Tensor] = [p for name, p in self.online.named_parameters() if "predictor" not in name.split(".")]
        with masked.unchanged_unless(taken, target):
            torch._foreach_lerp_(target, online, 1 - momentum)

    def normalize_prototypes(self, taken: Tensor | None = None) -> None:
        """Scale prototypes, where the predictor is made of them, to unit length. To be called after every update.

        Args:
            taken: bool [] on the device; where it is false, nothing is changed. None means True.
        """
        if isinstance(self.online.predictor, Prototypes):
            with masked.unchanged_unless(taken, list(self.online.predictor.parameters())):
                self.online.predictor.normalize_prototypes()

    def no_sync(self) -> AbstractContextManager[None]:
        """Keep gradients of this backward pass on their rank; for all micro-batches but the last."""
        network = self._parallel[0]
        if isinstance(network, nn.parallel.DistributedDataParallel):
            return network.no_sync()
        return contextlib.nullcontext()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, dtype=self.precision, enabled=self.precision is not None)
