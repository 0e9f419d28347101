"""Linear classification on a frozen backbone, by the protocols of ``protocols.py``.

    logits = x W^T + b        loss = cross-entropy        x = f, the avgpool feature of a new crop

and with ``standardise`` (MSF and CMSF, eval_linear.py:200-215)

    x = (f / |f| - mean) / sqrt(var + 1e-5)

where mean and var (unbiased) are those of the unit-length *training* features of the centre crop, fixed, not learned.
The head is scored on centre crops after every epoch; the score is the best epoch's or the last one's, as the
protocol reports it, and both are told.

A protocol with a *sweep* (BYOL) holds out a part of the training set, trains one head per rate on the rest, all on
the same pass, takes the rate whose score on the held-out part is best, and trains that one on everything. The
validation set chooses no rate.

The backbone is frozen, so the features of a step do not depend on the steps before it: rank r encodes the whole
batches of steps r, r + W, …, and rank 0 alone trains the heads on them in order. The numbers are therefore the same
on any number of ranks. Letters in shapes: B batch, D features.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hpcssl.data.order import Order
from hpcssl.errors import ConfigError, EvalError, HpcsslError
from hpcssl.evals import choice, state
from hpcssl.evals.features import FeatureOptions, Features, Stream, one_of
from hpcssl.evals.heads import Heads
from hpcssl.evals.images import Batches
from hpcssl.evals.protocols import AUGMENTS, PROTOCOLS, Protocol
from hpcssl.evals.together import agree, as_error
from hpcssl.views.augment import Augment, ViewSpec

log = logging.getLogger("hpcssl")

_ROUND = 64  # steps between two looks at the stop flag where features come from the cache


@dataclass(frozen=True, kw_only=True)
class LinearOptions(FeatureOptions):
    """``protocol`` names a row of ``PROTOCOLS``; other fields, where they are set, replace its values.

    ``lr`` (one rate: no sweep) and ``sweep`` are in the protocol's own unit. ``train_batch``: images per step of the
    head. ``milestones``: epochs after which the rate falls to a tenth, instead of the protocol's schedule.
    ``held_out``: images that the sweep is judged on (``choice.held_out``). ``batch``: images that pass the network at
    once, in training too.
    """

    protocol: str = "msf"
    lr: float | None = None
    sweep: list[float] | None = None
    weight_decay: float | None = None
    train_batch: int | None = None
    epochs: int | None = None
    milestones: list[int] | None = None
    augment: str | None = None
    held_out: int | None = None
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        one_of("protocol", self.protocol, PROTOCOLS)
        if self.augment is not None:
            one_of("augment", self.augment, AUGMENTS)
        for name, value, holds, expected in (
                ("lr", self.lr, self.lr is None or self.lr > 0, "above 0"),
                ("sweep", self.sweep, all(rate > 0 for rate in self.sweep or ()), "rates above 0"),
                ("sweep", self.sweep, self.sweep is None or self.lr is None, "lr or sweep, not both"),
                ("weight_decay", self.weight_decay, self.weight_decay is None or self.weight_decay >= 0, "0 or more"),
                ("train_batch", self.train_batch, self.train_batch is None or self.train_batch >= 1, "1 or more"),
                ("epochs", self.epochs, self.epochs is None or self.epochs >= 1, "1 or more"),
                ("held_out", self.held_out, self.held_out is None or self.held_out >= 1, "1 or more"),
                ("held_out", self.held_out, self.held_out is None or bool(self.resolve().sweep),
                 "a protocol that chooses among rates")):
            if not holds:
                raise ConfigError(f"evals.linear.{name}", got=value, expected=expected,
                                  mend=f"leave {name} out to take the protocol's value")

    def resolve(self) -> Protocol:
        given = {"lr": self.lr, "sweep": () if self.lr is not None else self.sweep, "weight_decay": self.weight_decay,
                 "batch": self.train_batch, "epochs": self.epochs, "milestones": self.milestones,
                 "augment": self.augment}
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
        return replace(PROTOCOLS[self.protocol], **given)


@dataclass
class _Task:
    """One training of heads: on the training samples ``index``, scored on the rows ``test``.

    ``note``: what its saved state says besides where it stands.
    """

    name: str
    rates: Sequence[float]
    index: np.ndarray
    test: Callable[[], tuple[Tensor, Tensor]]
    note: dict = field(default_factory=dict)


def run(context) -> dict[str, float]:
    """Scores in percent: ``top1`` and ``top5`` of the epoch that the protocol reports, ``…_best`` of the best one (by
    top-1, the earliest), ``…_last`` of the last. The row's details say the rate, and what a sweep found.
    """
    options, world = context.options, context.world
    protocol = options.resolve()
    if options.interpolation == "auto":
        options = replace(options, interpolation=protocol.interpolation)
        context = replace(context, options=options)
    samples = len(context.train)
    held = np.empty(0, np.int64)
    if protocol.sweep:
        held = choice.held_out(samples, len(context.train.classes), options.seed, options.held_out)
    if samples - len(held) < protocol.batch:
        raise EvalError("linear evaluation",
                        got=f"{samples - len(held)} training images, batch {protocol.batch}",
                        expected="at least one whole batch", mend=f"train_batch={samples - len(held)} or less")
    needed = protocol.standardise or protocol.augment == "center" or len(held)
    train = context.features(context.train) if needed else None
    val = context.features(context.val)
    found = state.read(context.state, context.identity) if world.main else None
    note = json.loads(world.tell(json.dumps(found[1] if found else {})))
    work = _Work(context, protocol, train)
    swept = note.get("swept")
    if len(held) and swept is None:
        kept = np.setdiff1d(np.arange(samples), held)
        scores = work.train(_Task("sweep", protocol.sweep, kept, lambda: work.rows(train, torch.from_numpy(held))))
        swept = [choice.reported(one, protocol.report)["top1"] for one in zip(*scores, strict=True)]
    lr = protocol.lr if swept is None else protocol.sweep[int(np.argmax(swept))]
    everything = torch.arange(len(val))
    scores = work.train(_Task("final", (lr,), np.arange(samples), lambda: work.rows(val, everything),
                              {"swept": swept}))
    context.details["lr"] = lr
    if swept is not None:
        context.details["held_out"] = {"images": len(held), "top1": dict(zip(map(str, protocol.sweep), swept,
                                                                             strict=True))}
    return choice.summary([score for score, in scores], protocol.report)


class _Work:
    """What the trainings of one evaluation share."""

    def __init__(self, context, protocol: Protocol, train: Features | None):
        self.context, self.world, self.protocol, self.features = context, context.world, protocol, train
        self.labels = torch.as_tensor(context.train.labels)
        self.scale = _standard(train, self.world.device) if protocol.standardise else lambda raw: raw

    def rows(self, features: Features, index: Tensor) -> tuple[Tensor, Tensor]:
        """What the heads see of these rows, and the labels, on the device."""
        x = self.scale(features.rows(index).to(self.world.device))
        return x, features.labels[index].to(self.world.device)

    def train(self, task: _Task) -> list[list[dict[str, float]]]:
        """Scores by epoch and head. A collective."""
        world, context, protocol = self.world, self.context, self.protocol
        order = Order([len(task.index)], seed=context.options.seed, global_batch=protocol.batch, window="all")
        heads, scores, test, problem = None, [], None, None
        if world.main:
            heads = Heads(len(context.train.classes), context.encoder.width, protocol, task.rates,
                          context.options.seed, world.device, order.steps_per_epoch)
            found = state.read(context.state, context.identity)
            if found is not None and found[1]["task"] == task.name:
                heads.restore(found[0], found[1]["step"])
                scores = found[1]["scores"]
                log.info("linear, %s: goes on at step %d", task.name, heads.step)
            test = task.test()
        first = int(world.tell(str(heads.step) if world.main else None))
        total = protocol.epochs * order.steps_per_epoch
        source, width = self._source(task, order, first, total)
        for start in range(first, total, width):
            batches = source(range(start, min(start + width, total)))  # a collective where ranks encode for all
            if world.main:
                try:
                    self._learn(heads, batches, test, scores, order, task)
                except (HpcsslError, OSError) as caught:
                    problem = as_error(caught)
            stop = context.stop()
            if stop and world.main and problem is None:
                try:
                    self._save(heads, scores, task)
                except OSError as caught:
                    problem = as_error(caught)
            agree(world, "linear evaluation", stop=stop, error=problem)
        return json.loads(world.tell(json.dumps(scores)))

    def _learn(self, heads: Heads, batches: Iterator[tuple[Tensor, Tensor]], test: tuple[Tensor, Tensor],
               scores: list, order: Order, task: _Task) -> None:
        for x, y in batches:
            heads.learn(self.scale(x), y)
            if heads.step % order.steps_per_epoch == 0:
                scores.append(heads.score(*test))
                log.info("linear, %s: epoch %d of %d, top-1 %s", task.name, len(scores), self.protocol.epochs,
                         " ".join(f"{score['top1']:.2f}" for score in scores[-1]))
                self._save(heads, scores, task)

    def _save(self, heads: Heads, scores: list, task: _Task) -> None:
        if self.context.state is not None:
            state.write(self.context.state, self.context.identity, heads.tensors(),
                        {"task": task.name, "step": heads.step, "scores": scores, **task.note})

    def _source(self, task: _Task, order: Order, first: int, total: int):
        """A function (range of steps) -> iterator of (raw features [B, D], labels [B]), and the steps per call."""
        world, context, features = self.world, self.context, self.features
        if self.protocol.augment == "center":
            def cached(steps: range) -> Iterator[tuple[Tensor, Tensor]]:
                for step in steps:
                    index = torch.from_numpy(task.index[order.batch(step)])
                    yield features.rows(index).to(world.device), self.labels[index].to(world.device)
            return cached, _ROUND

        batch, at_once = self.protocol.batch, context.options.batch
        mine, chunks = range(first + world.rank, total, world.size), -(-batch // at_once)
        view = ViewSpec(name="rrc_flip", size=context.encoder.meta["size"], augment=Augment(
            scale=(0.08, 1.0), flip=0.5, interpolation=context.options.interpolation))
        # a step's batch passes the network in chunks, which are the same on any number of ranks
        passes = Batches(range(len(mine) * chunks),
                         lambda i: task.index[order.batch(mine[i // chunks])[i % chunks * at_once:][:at_once]],
                         lambda i: order.epoch_of(mine[i // chunks]), min(batch, at_once))
        stream = Stream(context.encoder, context.train, view, passes, context.options.precision,
                        seed=context.options.seed, threads=context.threads)
        context.closing.enter_context(stream)

        def encoded(steps: range) -> Iterator[tuple[Tensor, Tensor]]:
            x, error = torch.zeros(batch, context.encoder.width, device=world.device), None
            if world.rank < len(steps):
                try:
                    x = torch.cat([next(stream)[0] for _ in range(chunks)])
                except (HpcsslError, OSError) as caught:
                    error = as_error(caught)
            agree(world, "linear evaluation", error=error)
            every = world.gather(x).split(batch)
            return ((every[i], self.labels[torch.from_numpy(task.index[order.batch(step)])].to(world.device))
                    for i, step in enumerate(steps))
        return encoded, world.size


def _standard(train: Features, device: torch.device) -> Callable[[Tensor], Tensor]:
    mean_D, var_D = (value.to(device) for value in train.moments)
    inverse_D = (var_D + 1e-5).rsqrt()
    return lambda raw: (F.normalize(raw, dim=1) - mean_D) * inverse_D
