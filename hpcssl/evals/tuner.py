"""A whole network under fine-tuning: backbone and linear head, their optimisers, one step, and scores.

Letters in shapes: B batch of the world, b this rank's part of it, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl.data.loader import Batch
from hpcssl.errors import HpcsslError
from hpcssl.evals.features import Encoder
from hpcssl.evals.heads import hits, initial
from hpcssl.evals.images import Batches, Images
from hpcssl.evals.together import Stop, agree, as_error
from hpcssl.evals.tunings import Tuning
from hpcssl.nets import norm
from hpcssl.nets.norm import BatchNorm
from hpcssl.optim import build
from hpcssl.optim.schedule import learning_rate
from hpcssl.views import augment
from hpcssl.views.augment import ViewSpec
from hpcssl.world import World

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": None}


class Classifier(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Linear):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b, C]."""
        return self.head(self.backbone(images))


def classifier(encoder: Encoder, classes: int, tuning: Tuning, seed: int, world: World,
               dtype: torch.dtype) -> Classifier:
    """The encoder's backbone, copied, with one norm group over the whole batch, and a new head."""
    backbone = copy.deepcopy(encoder.backbone).requires_grad_()
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                ours = BatchNorm(child.num_features, group=tuning.batch, world=world, eps=child.eps)
                ours.load_state_dict({k: v for k, v in child.state_dict().items() if k in ours.state_dict()})
                setattr(module, name, ours)
    head = nn.Linear(encoder.width, classes)
    weight, bias = initial(tuning.init, classes, encoder.width, seed, "finetune")
    head.load_state_dict({"weight": weight, "bias": bias})
    return Classifier(backbone, head).to(world.device, dtype, memory_format=torch.channels_last)


class Tuner:
    """One training: the network, its two optimisers, and how many steps they have taken.

    ``lr``, ``head_lr``: peak rates in the protocol's unit. ``precision``: a key of ``PRECISIONS``.
    """

    def __init__(self, encoder: Encoder, classes: int, tuning: Tuning, *, lr: float, head_lr: float, epochs: int,
                 steps_per_epoch: int, precision: str, seed: int, world: World):
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        self.network = classifier(encoder, classes, tuning, seed, world, self.dtype).train()
        self.world, self.meta, self.low = world, encoder.meta, PRECISIONS[precision]
        self.batch, self.steps_per_epoch, self.schedule = tuning.batch, steps_per_epoch, tuning.schedule(epochs)
        self.parallel = world.parallel(self.network)
        self.norms = norm.norms_of([self.network])
        self.optims = {"trunk": tuning.optim("trunk", lr), "head": tuning.optim("head", head_lr)}
        parts = {"trunk": self.network.backbone, "head": self.network.head}
        self.optimizers = {name: build.build(options, parts[name].named_parameters(), global_batch=tuning.batch)
                           for name, options in self.optims.items()}
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        self.step = 0

    def look(self, batch: Batch, view: ViewSpec) -> tuple[Tensor, Tensor]:
        """Images [b, 3, S, S] and labels [b] on the device."""
        device = self.world.device
        x = augment.apply(batch.images[0].to(device, non_blocking=True), batch.params[0], view.augment,
                          mean=self.meta["mean"], std=self.meta["std"], dtype=self.dtype)
        return x, torch.from_numpy(batch.label).to(device, non_blocking=True)

    def logits(self, network: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(self.world.device.type, dtype=self.low, enabled=self.low is not None):
            found = network(x)
        return found if self.dtype == torch.float64 else found.float()

    def learn(self, x: Tensor, y: Tensor, flags: tuple[bool, ...]) -> tuple[bool, ...]:
        """One step of the world on this rank's part. Returns whether a loss is not finite on some rank, in which case
        nothing has changed, and which of the ``flags`` some rank has raised. A collective.
        """
        loss = F.cross_entropy(self.logits(self.parallel, x), y)
        raised = torch.tensor([False, *flags], dtype=torch.float32).to(loss.device)
        raised[0] = ~loss.detach().isfinite()
        verdict = self.world.maximum(raised)  # on its way during the backward pass
        self.scaler.scale(loss).backward()
        poor, *raised = verdict.result().bool().tolist()
        for name, optimizer in self.optimizers.items():
            options = self.optims[name]
            lr = learning_rate(self.schedule, self.step, peak=options.lr, steps_per_epoch=self.steps_per_epoch)
            build.set_lr(optimizer, options, lr, global_batch=self.batch)
            if not poor:
                self.scaler.step(optimizer)
            optimizer.zero_grad()
        if poor:
            norm.discard(self.norms)
        else:
            self.scaler.update()
            norm.commit(self.norms, self.world)
            self.step += 1
        return poor, *raised

    @torch.no_grad()
    def score(self, data, index: np.ndarray, view: ViewSpec, *, at_once: int, threads: int,
              stop: Stop) -> dict[str, float] | None:
        """Top-1 and top-5 in percent on the images ``index``; None where logits are not finite. A collective.

        The images pass in blocks that do not depend on the number of ranks. Raises ``EvalError``, ``Stopped``.
        """
        blocks = [index[i:i + at_once] for i in range(0, len(index), at_once)][self.world.rank::self.world.size]
        counted, error = torch.zeros(3, dtype=torch.int64, device=self.world.device), None
        self.network.eval()
        try:
            for x, y in self._blocks(data, blocks, view, at_once, threads):
                if stop():
                    break
                logits = self.logits(self.network, x)
                counted += torch.stack((*hits(logits, y), (~logits.isfinite()).sum()))
        except (HpcsslError, OSError) as caught:
            error = as_error(caught)
        self.network.train()
        agree(self.world, "fine-tuning", stop=stop(), error=error)
        first, five, poor = self.world.sum(counted).tolist()
        return None if poor else {"top1": 100.0 * first / len(index), "top5": 100.0 * five / len(index)}

    def _blocks(self, data, blocks: list[np.ndarray], view: ViewSpec, at_once: int,
                threads: int) -> Iterator[tuple[Tensor, Tensor]]:
        if not blocks:
            return
        steps = range(len(blocks))
        with Images(data, view, Batches(steps, blocks.__getitem__, lambda step: 0, at_once), steps, threads=threads,
                    pin=self.world.device.type == "cuda") as images:
            for batch in images:
                yield self.look(batch, view)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resume needs, living, besides ``step`` and the scaler's state."""
        named = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        for part, optimizer in self.optimizers.items():
            named |= {f"momentum.{part}.{name}": moment for name, moment in build.tensors(optimizer).items()}
        return named

    def restore(self, tensors: Mapping[str, Tensor] | None, step: int, scaler: dict) -> None:
        """Take over ``tensors`` of rank 0, which alone gives them. A collective."""
        living = self.tensors()
        given = tensors if self.world.main else {name: torch.zeros_like(value) for name, value in living.items()}
        for name, value in living.items():
            value.copy_(self.world.sum(given[name].to(value.device)))
        self.step = step
        if scaler:
            self.scaler.load_state_dict(scaler)
