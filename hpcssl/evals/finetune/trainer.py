"""A whole network under fine-tuning: backbone and linear head, their optimizers, one step, and scores.

Shapes: B batch of all ranks, b this rank's part of it, S pixels, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl.data.batch import Batch
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.devices import copy_images, to_device
from hpcssl.distributed.world import World
from hpcssl.errors import HpcsslError
from hpcssl.evals.common.encoder import FrozenEncoder
from hpcssl.evals.common.images import ImageStream, IndexBatches, Indices
from hpcssl.evals.common.sync import StopCheck, as_eval_error, raise_on_any_rank
from hpcssl.evals.finetune.protocols import FinetuneProtocol
from hpcssl.evals.linear.heads import count_correct, draw_initial_weights
from hpcssl.nets import norm
from hpcssl.nets.kernels import selection
from hpcssl.nets.norm import BatchNorm
from hpcssl.optim import build
from hpcssl.optim.schedule import learning_rate
from hpcssl.views import augment
from hpcssl.views.augment import ViewSpec

PRECISIONS: dict[str, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": None,
}
"""Precision of the training -> autocast dtype, None for no autocast."""


class BackboneWithHead(nn.Module):
    """A backbone and a linear layer on its features.

    Args:
        backbone: [b, 3, S, S] -> [b, D].
        head: [b, D] -> [b, C].
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b, C]."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


def build_network(
    encoder: FrozenEncoder, classes: int, protocol: FinetuneProtocol, seed: int, world: World, dtype: torch.dtype
) -> BackboneWithHead:
    """Copy the encoder's backbone, give it one batch norm group over the whole batch, and add a new head.

    Args:
        encoder: The encoder; it is not changed.
        classes: Number of classes, C.
        protocol: Batch size and initial values of the head.
        seed: Seed of the initial values.
        world: The processes that train together.
        dtype: Precision of the parameters.
    """
    backbone = copy.deepcopy(encoder.backbone).requires_grad_()
    fast = selection.use_fast_kernels("auto", world)
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                synced = BatchNorm(child.num_features, group=protocol.batch, world=world, eps=child.eps, fast=fast)
                synced.load_state_dict({k: v for k, v in child.state_dict().items() if k in synced.state_dict()})
                setattr(module, name, synced)
    head = nn.Linear(encoder.width, classes)
    weight, bias = draw_initial_weights(protocol.init, classes, encoder.width, seed, "finetune")
    head.load_state_dict({"weight": weight, "bias": bias})
    network = BackboneWithHead(backbone, head)
    return network.to(world.device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]  # torch


class StepResult(NamedTuple):
    """What all ranks know after one step.

    Attributes:
        nonfinite: Whether the loss of some rank was not finite; the step then changed nothing.
        stop: Whether some rank was asked to stop.
        failed: Whether some rank had an error.
    """

    nonfinite: bool
    stop: bool
    failed: bool


class FinetuneTrainer:
    """One training: the network, its two optimizers, and the number of steps they have taken.

    Args:
        encoder: The encoder to start from.
        classes: Number of classes.
        protocol: The protocol.
        lr: Peak learning rate of the backbone, in the protocol's unit.
        head_lr: Peak learning rate of the head, in the protocol's unit.
        epochs: Length of the schedule.
        steps_per_epoch: Steps per epoch.
        precision: A key of ``PRECISIONS``.
        seed: Seed of the head's initial values.
        world: The processes that train together.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        classes: int,
        protocol: FinetuneProtocol,
        *,
        lr: float,
        head_lr: float,
        epochs: int,
        steps_per_epoch: int,
        precision: str,
        seed: int,
        world: World,
    ) -> None:
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        self.network = build_network(encoder, classes, protocol, seed, world, self.dtype).train()
        self.world, self.meta, self.autocast_dtype = world, encoder.meta, PRECISIONS[precision]
        self.batch, self.steps_per_epoch = protocol.batch, steps_per_epoch
        self.schedule = protocol.schedule(epochs)
        self.ddp_network = world.wrap_in_ddp(self.network)
        self.norms = norm.find_norms([self.network])
        self.optims = {"backbone": protocol.optim("backbone", lr), "head": protocol.optim("head", head_lr)}
        parts = {"backbone": self.network.backbone, "head": self.network.head}
        self.optimizers = {
            name: build.build_optimizer(options, parts[name].named_parameters(), global_batch=protocol.batch)
            for name, options in self.optims.items()
        }
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        self.step = 0

    def prepare(self, batch: Batch, view: ViewSpec) -> tuple[Tensor, Tensor]:
        """Augment a batch of the loader on the device.

        Returns:
            Images [b, 3, S, S] and labels, int64 [b].
        """
        device = self.world.device
        x = augment.augment_batch(
            copy_images(batch.images[:1], device)[0],
            batch.params[0],
            view.augment,
            mean=self.meta["mean"],
            std=self.meta["std"],
            dtype=self.dtype,
        )
        return x, to_device(batch.label, device)

    def logits(self, network: nn.Module, x: Tensor) -> Tensor:
        """Logits [b, C] of images, fp32 (fp64 for that precision)."""
        dtype = self.autocast_dtype
        with torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype is not None):
            logits: Tensor = network(x)
        return logits if self.dtype == torch.float64 else logits.float()

    def train_step(self, x: Tensor, y: Tensor, *, stop: bool, failed: bool) -> StepResult:
        """Take one step on this rank's part of the batch. A collective.

        Args:
            x: Images [b, 3, S, S].
            y: Labels, int64 [b].
            stop: Whether this rank was asked to stop.
            failed: Whether this rank could not read its images.
        """
        loss = F.cross_entropy(self.logits(self.ddp_network, x), y)
        flags = to_device(np.array([False, stop, failed], np.float32), loss.device)
        flags[0] = ~loss.detach().isfinite()
        reduction = self.world.all_reduce_max(flags)  # in progress during the backward pass
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch
        result = StepResult(*reduction.result().bool().tolist())
        for name, optimizer in self.optimizers.items():
            options = self.optims[name]
            lr = learning_rate(self.schedule, self.step, peak=options.lr, steps_per_epoch=self.steps_per_epoch)
            build.set_lr(optimizer, options, lr, global_batch=self.batch)
            if not result.nonfinite:
                self.scaler.step(optimizer)
            optimizer.zero_grad()
        if result.nonfinite:
            norm.discard_pending(self.norms)
        else:
            self.scaler.update()
            norm.commit_pending(self.norms, self.world)
            self.step += 1
        return result

    @torch.no_grad()
    def score(
        self, data: ShardSet, index: Indices, view: ViewSpec, *, batch: int, threads: int, stop: StopCheck
    ) -> dict[str, float] | None:
        """Score the network on images, which pass in blocks that do not depend on the number of ranks. A collective.

        Args:
            data: The images.
            index: Indices of those that are scored.
            view: How they are cropped.
            batch: Images per forward pass.
            threads: Loader threads of this process.
            stop: Whether this process was asked to stop.

        Returns:
            ``top1`` and ``top5`` in percent; None if logits are not finite.

        Raises:
            EvalError: What one rank raised.
            Stopped: After a request to stop.
        """
        blocks = [index[i : i + batch] for i in range(0, len(index), batch)][self.world.rank :: self.world.size]
        counts, error = torch.zeros(3, dtype=torch.int64, device=self.world.device), None
        self.network.eval()
        try:
            for x, y in self._score_batches(data, blocks, view, batch, threads):
                if stop():
                    break
                logits = self.logits(self.network, x)
                counts += torch.stack((*count_correct(logits, y), (~logits.isfinite()).sum()))
        except (HpcsslError, OSError) as caught:
            error = as_eval_error(caught)
        self.network.train()
        raise_on_any_rank(self.world, "fine-tuning", stop=stop(), error=error)
        top1, top5, nonfinite = self.world.all_reduce_sum(counts).tolist()
        return None if nonfinite else {"top1": 100.0 * top1 / len(index), "top5": 100.0 * top5 / len(index)}

    def _score_batches(
        self, data: ShardSet, blocks: Sequence[Indices], view: ViewSpec, batch: int, threads: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if not blocks:
            return
        steps = range(len(blocks))
        order = IndexBatches(steps, blocks.__getitem__, lambda step: 0, batch)
        pin = self.world.device.type == "cuda"
        with ImageStream(data, view, order, steps, threads=threads, pin=pin) as images:
            for block in images:
                yield self.prepare(block, view)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a resume needs, by name, besides ``step`` and the state of the scaler. Not copies."""
        named = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        for part, optimizer in self.optimizers.items():
            named |= {f"momentum.{part}.{name}": moment for name, moment in build.momentum_tensors(optimizer).items()}
        return named

    def restore(self, tensors: Mapping[str, Tensor] | None, step: int, scaler: dict[str, Any]) -> None:
        """Restore the state of rank 0 on every rank. A collective.

        Args:
            tensors: What ``tensors`` returned; None on ranks other than 0.
            step: Steps taken.
            scaler: State of the gradient scaler; empty for none.
        """
        live = self.tensors()
        if not self.world.is_main or tensors is None:
            tensors = {name: torch.zeros_like(value) for name, value in live.items()}
        for name, value in live.items():
            value.copy_(self.world.all_reduce_sum(tensors[name].to(value.device)))
        self.step = step
        if scaler:
            self.scaler.load_state_dict(scaler)
