"""Linear classification on a frozen backbone, protocol by protocol.

``msf`` (MSF and CMSF, eval_linear.py:30-63, 200-215), with f the avgpool feature:

    x = (f / |f| - mean) / sqrt(var + 1e-5)          logits = x W^T + b          loss = cross-entropy

mean and var (unbiased) are those of the unit-length *training* features of the centre crop, fixed, not learned.
SGD, lr 0.01, momentum 0.9, weight decay 1e-4 on W and b, batch 256, 40 epochs, lr x 0.1 after 15 and 30; trained on
random resized crops (area 0.08-1) with flips, scored on centre crops after every epoch; the best epoch is the score.
``msf_center``: the same on the cached centre-crop features, as MSF trains its transfer sets.
One deviation: an epoch's last, incomplete batch is dropped.

The backbone is frozen, so the features of a step do not depend on the steps before it: rank r encodes the whole
batches of steps r, r + W, …, and rank 0 alone trains the head on them in order. The numbers are therefore the same
on any number of ranks. Letters in shapes: B batch, D features, C classes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpcssl import files, rng
from hpcssl.data.order import Order
from hpcssl.errors import ConfigError, EvalError, HpcsslError, nearest
from hpcssl.evals.features import FeatureOptions, Features, Stream
from hpcssl.evals.images import Batches
from hpcssl.evals.together import agree, as_error
from hpcssl.nets import weights
from hpcssl.views.augment import Augment, ViewSpec

log = logging.getLogger("hpcssl")

AUGMENTS = ("rrc_flip", "center")
_ROUND = 64  # steps between two looks at the stop flag where features come from the cache


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One published protocol as values. ``milestones``: epochs after which lr is multiplied by 0.1."""

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch: int = 256
    epochs: int = 40
    milestones: list[int] = field(default_factory=lambda: [15, 30, 40])
    augment: str = "rrc_flip"


PROTOCOLS = {"msf": Protocol(), "msf_center": Protocol(augment="center")}


@dataclass(frozen=True, kw_only=True)
class LinearOptions(FeatureOptions):
    """``protocol`` names a row of ``PROTOCOLS``; the other fields, where they are set, replace its values.

    ``augment``: ``rrc_flip`` encodes new crops in every epoch, ``center`` trains on the cached features.
    ``train_batch``: images per step of the head.
    """

    protocol: str = "msf"
    lr: float | None = None
    weight_decay: float | None = None
    train_batch: int | None = None
    epochs: int | None = None
    milestones: list[int] | None = None
    augment: str | None = None
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name, value, known in (("protocol", self.protocol, PROTOCOLS), ("augment", self.augment, AUGMENTS)):
            if value is not None and value not in known:
                raise ConfigError(f"evals.linear.{name}", got=repr(value), expected="a known name",
                                  mend=nearest(value, known))
        for name, low in (("lr", 0.0), ("weight_decay", 0.0), ("train_batch", 1), ("epochs", 1)):
            if getattr(self, name) is not None and not getattr(self, name) >= low:
                raise ConfigError(f"evals.linear.{name}", got=getattr(self, name), expected=f"at least {low}",
                                  mend=f"leave {name} out to take the protocol's value")

    def resolve(self) -> Protocol:
        given = {"lr": self.lr, "weight_decay": self.weight_decay, "batch": self.train_batch,
                 "epochs": self.epochs, "milestones": self.milestones, "augment": self.augment}
        return replace(PROTOCOLS[self.protocol], **{k: v for k, v in given.items() if v is not None})


@dataclass
class Head:
    """The linear layer, its SGD, and where its training stands. Everything that a resume needs, and no more."""

    weight_CD: Tensor
    bias_C: Tensor
    optimiser: torch.optim.SGD
    step: int = 0
    scores: list[dict[str, float]] = field(default_factory=list)  # one entry per finished epoch

    @classmethod
    def start(cls, classes: int, width: int, protocol: Protocol, seed: int, device: torch.device) -> Head:
        """PyTorch's own initial values of a linear layer: uniform in ±1/sqrt(D), drawn by address."""
        def drawn(name: str, *shape: int) -> Tensor:
            made = torch.rand(*shape, generator=rng.generator(rng.key(seed, "linear", name)))
            return ((2 * made - 1) * width**-0.5).to(device).requires_grad_()

        weight, bias = drawn("weight", classes, width), drawn("bias", classes)
        return cls(weight, bias, torch.optim.SGD([weight, bias], lr=protocol.lr, momentum=protocol.momentum,
                                                 weight_decay=protocol.weight_decay))

    def learn(self, x_BD: Tensor, y_B: Tensor, lr: float) -> None:
        self.optimiser.param_groups[0]["lr"] = lr
        loss = F.cross_entropy(F.linear(x_BD, self.weight_CD, self.bias_C), y_B)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.step += 1

    @torch.no_grad()
    def score(self, x_ND: Tensor, y_N: Tensor) -> dict[str, float]:
        """Top-1 and top-5 in percent; among equal logits the lower class stands first."""
        right = torch.zeros(2, dtype=torch.int64)
        for x, y in zip(x_ND.split(4096), y_N.split(4096), strict=True):
            logits = F.linear(x, self.weight_CD, self.bias_C)
            if not torch.isfinite(logits).all():
                raise EvalError("linear evaluation", got=f"NaN or infinite logits after step {self.step}",
                                expected="finite numbers", mend="lower evals.linear.lr")
            true = logits.gather(1, y[:, None])
            lower = torch.arange(logits.shape[1], device=y.device) < y[:, None]
            place = ((logits > true) | ((logits == true) & lower)).sum(1)
            right += torch.stack(((place < 1).sum(), (place < 5).sum())).cpu()
        top1, top5 = (100.0 * right.double() / len(x_ND)).tolist()
        return {"top1": top1, "top5": top5}

    def save(self, path: Path, identity: str) -> None:
        moments = {name: self.optimiser.state[p]["momentum_buffer"] for name, p in self._named() if self.step}
        tensors = dict(self._named()) | {f"momentum.{name}": value for name, value in moments.items()}
        files.atomic_write(path, weights.pack(tensors, {
            "identity": identity, "step": str(self.step), "scores": json.dumps(self.scores)}))

    def load(self, path: Path, identity: str) -> bool:
        """Take up the state of an earlier attempt at the same evaluation; False where there is none."""
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError):
            return False
        if meta.get("identity") != identity:
            return False
        self.step, self.scores = int(meta["step"]), json.loads(meta["scores"])
        with torch.no_grad():
            for name, parameter in self._named():
                parameter.copy_(tensors[name])
                if self.step:
                    momentum = tensors[f"momentum.{name}"].to(parameter.device)
                    self.optimiser.state[parameter]["momentum_buffer"] = momentum
        return True

    def _named(self) -> list[tuple[str, Tensor]]:
        return [("weight", self.weight_CD), ("bias", self.bias_C)]


def run(context) -> dict[str, float]:
    """Scores in percent: ``top1`` and ``top5`` of the best epoch (by top-1, the earliest), ``…_last`` of the last."""
    world, options = context.world, context.options
    protocol = options.resolve()
    if len(context.train) < protocol.batch:
        raise EvalError("linear evaluation", got=f"{len(context.train)} training images, batch {protocol.batch}",
                        expected="at least one whole batch", mend=f"train_batch={len(context.train)} or less")
    train, val = context.features(context.train), context.features(context.val)
    head, problem = None, None
    if world.main:
        head = Head.start(len(context.train.classes), train.width, protocol, options.seed, world.device)
        if context.state is not None and head.load(context.state, context.identity):
            log.info("linear: goes on at step %d", head.step)
    first = int(world.tell(str(head.step) if world.main else None))
    order = Order([len(context.train)], seed=options.seed, global_batch=protocol.batch, window="all")
    total = protocol.epochs * order.steps_per_epoch
    source, width = _source(context, protocol, order, train, first, total)
    scale = _standard(train, world.device)
    val_x = scale(val.rows(torch.arange(len(val))).to(world.device)) if world.main else None
    for start in range(first, total, width):
        steps = range(start, min(start + width, total))
        batches = source(steps)  # a collective where ranks encode for one another
        if world.main:
            try:
                _learn(head, batches, scale, val_x, val.labels.to(world.device), protocol, order, context)
            except (HpcsslError, OSError) as caught:
                problem = as_error(caught)
        stop = context.stop()
        if stop and world.main and context.state is not None:
            head.save(context.state, context.identity)
        agree(world, "linear evaluation", stop=stop, error=problem)
    return json.loads(world.tell(json.dumps(_summary(head.scores)) if world.main else None))


def _learn(head: Head, batches: Iterator[tuple[Tensor, Tensor]], scale: Callable[[Tensor], Tensor],
           val_x: Tensor, val_y: Tensor, protocol: Protocol, order: Order, context) -> None:
    for x, y in batches:
        epoch = order.epoch_of(head.step)
        head.learn(scale(x), y, protocol.lr * 0.1 ** sum(epoch >= m for m in protocol.milestones))
        if head.step % order.steps_per_epoch == 0:
            head.scores.append(head.score(val_x, val_y))
            log.info("linear: epoch %d of %d, top-1 %.2f", epoch + 1, protocol.epochs, head.scores[-1]["top1"])
            if context.state is not None:
                head.save(context.state, context.identity)


def _summary(scores: list[dict[str, float]]) -> dict[str, float]:
    best = max(scores, key=lambda score: score["top1"])  # the first of equals, as in the original
    return {"top1": best["top1"], "top5": best["top5"],
            "top1_last": scores[-1]["top1"], "top5_last": scores[-1]["top5"]}


def _standard(train: Features, device: torch.device) -> Callable[[Tensor], Tensor]:
    mean_D, var_D = (value.to(device) for value in train.moments)
    inverse_D = (var_D + 1e-5).rsqrt()
    return lambda raw: (F.normalize(raw, dim=1) - mean_D) * inverse_D


def _source(context, protocol: Protocol, order: Order, train: Features, first: int, total: int):
    """A function (range of steps) -> iterator of (raw features [B, D], labels [B]), and the steps per call."""
    world = context.world
    labels = torch.as_tensor(context.train.labels)
    if protocol.augment == "center":
        def cached(steps: range) -> Iterator[tuple[Tensor, Tensor]]:
            for step in steps:
                index = torch.tensor(order.batch(step))
                yield train.rows(index).to(world.device), labels[index].to(world.device)
        return cached, _ROUND

    mine = range(first + world.rank, total, world.size)
    view = ViewSpec(name="rrc_flip", size=context.encoder.meta["size"],
                    augment=Augment(scale=(0.08, 1.0), flip=0.5))
    stream = Stream(context.encoder, context.train, view,
                    Batches(mine, order.batch, order.epoch_of, protocol.batch),
                    context.options.precision, seed=context.options.seed, threads=context.threads)
    context.closing.enter_context(stream)

    def encoded(steps: range) -> Iterator[tuple[Tensor, Tensor]]:
        x, error = torch.zeros(protocol.batch, train.width, device=world.device), None
        if world.rank < len(steps):
            try:
                x = next(stream)[0]
            except (HpcsslError, OSError) as caught:
                error = as_error(caught)
        agree(world, "linear evaluation", error=error)
        every = world.gather(x).split(protocol.batch)
        return ((every[i], labels[torch.tensor(order.batch(step))].to(world.device))
                for i, step in enumerate(steps))
    return encoded, world.size
