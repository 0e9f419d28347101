"""Training of linear heads on frozen features, with resume.

The backbone is frozen, so the features of a step do not depend on earlier steps: all ranks encode, and rank 0 alone
trains the heads, in order. The numbers are therefore the same on any number of ranks.

Shapes: B batch, D features.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcssl.data.order import Order
from hpcssl.data.shards import ShardSet
from hpcssl.errors import HpcsslError
from hpcssl.evals.common import state
from hpcssl.evals.common.features import Features, LabeledImages
from hpcssl.evals.common.images import Indices
from hpcssl.evals.common.sync import as_eval_error, raise_on_any_rank
from hpcssl.evals.context import EvalContext
from hpcssl.evals.linear.batches import BatchSource, FeatureBatch, encoded_batches, stored_batches
from hpcssl.evals.linear.heads import LinearHeads
from hpcssl.evals.linear.options import LinearOptions
from hpcssl.evals.linear.protocols import LinearProtocol
from hpcssl.terminal.progress import ProgressLog

LOG = logging.getLogger("hpcssl")

EpochScores = list[dict[str, float]]
"""Scores in percent of each head after one epoch."""


@dataclass
class HeadTask:
    """One training of heads.

    Attributes:
        name: Name in the state file and in messages.
        rates: Peak learning rate of each head.
        index: Indices of the training images, int64 [n].
        test: Returns the inputs [N, D] and labels [N] that the heads are scored on. Called on rank 0.
        note: Plain values that the state file keeps beside the position.
    """

    name: str
    rates: Sequence[float]
    index: Indices
    test: Callable[[], FeatureBatch]
    note: dict[str, Any] = field(default_factory=dict)


class HeadTrainer:
    """Trains heads on one training set.

    Args:
        context: Encoder, options and processes.
        protocol: The protocol.
        train: Labels of the training images, and the images where crops are encoded again.
        features: Features of their center crops, for a protocol that standardizes, trains on them or has a sweep.
    """

    def __init__(
        self,
        context: EvalContext[LinearOptions],
        protocol: LinearProtocol,
        train: LabeledImages,
        features: Features | None,
    ) -> None:
        self.context, self.world, self.protocol = context, context.world, protocol
        self.train_set, self.features = train, features
        self.labels = torch.as_tensor(train.labels)
        self.scale: Callable[[Tensor], Tensor] = _identity
        if protocol.standardize:
            assert features is not None, "a standardizing protocol needs the features of the training set"
            self.scale = build_standardizer(features, self.world.device)

    def inputs(self, features: Features, index: Tensor) -> FeatureBatch:
        """The inputs of the heads for rows of a feature set, and their labels, on the device."""
        x = self.scale(features.rows(index).to(self.world.device))
        return x, features.labels[index].to(self.world.device)

    def train(self, task: HeadTask) -> list[EpochScores]:
        """Train the heads of a task, or continue from the state file. A collective.

        Returns:
            Scores of each epoch and head, on every rank.

        Raises:
            EvalError: All heads have diverged, or what one rank raised.
            Stopped: After a request to stop; the heads are saved.
        """
        world, context, protocol = self.world, self.context, self.protocol
        order = Order([len(task.index)], seed=context.options.seed, global_batch=protocol.batch, window="all")
        run = _HeadRun(self, task, order) if world.is_main else None
        first = int(world.broadcast_text(str(run.heads.step) if run else None))
        total = protocol.epochs * order.steps_per_epoch
        source = self._batch_source(task, order, first, total)
        for start in range(first, total, source.steps_per_call):
            batches = source.read(range(start, min(start + source.steps_per_call, total)))
            problem = run.train_steps(batches) if run else None
            stop = context.stop()
            if stop and run and problem is None:
                problem = run.try_save()
            raise_on_any_rank(world, "linear evaluation", stop=stop, error=problem)
        scores: list[EpochScores] = json.loads(world.broadcast_text(json.dumps(run.scores if run else [])))
        return scores

    def _batch_source(self, task: HeadTask, order: Order, first: int, total: int) -> BatchSource:
        if self.protocol.augment == "center":
            assert self.features is not None, "training on center crops needs their features"
            return stored_batches(self.features, self.labels, task.index, order, self.world.device)
        assert isinstance(self.train_set, ShardSet), "random crops are encoded from one shard set"
        return encoded_batches(self.context, self.train_set, self.labels, task.index, order, first, total)


class _HeadRun:
    """The heads of one task on rank 0, with their scores so far."""

    def __init__(self, trainer: HeadTrainer, task: HeadTask, order: Order) -> None:
        self.context, self.protocol, self.scale = trainer.context, trainer.protocol, trainer.scale
        self.task, self.steps_per_epoch = task, order.steps_per_epoch
        self.scores: list[EpochScores] = []
        self.heads = LinearHeads(
            len(trainer.train_set.classes),
            self.context.encoder.width,
            self.protocol,
            task.rates,
            self.context.options.seed,
            self.context.world.device,
            order.steps_per_epoch,
        )
        saved = state.read(self.context.state_file, self.context.identity)
        if saved is not None and saved[1]["task"] == task.name:
            self.heads.restore(saved[0], saved[1]["step"])
            self.scores = saved[1]["scores"]
            LOG.info("linear, %s: continuing at step %d", task.name, self.heads.step)
        self.test = task.test()
        total = self.protocol.epochs * order.steps_per_epoch
        self.progress = ProgressLog(f"linear, {task.name}", total, "steps", first=self.heads.step)

    def train_steps(self, batches: Iterator[FeatureBatch]) -> HpcsslError | None:
        """Train on batches, score after each epoch; return the error, if any."""
        try:
            for x, y in batches:
                self.heads.train_step(self.scale(x), y)
                if self.heads.step % self.steps_per_epoch == 0:
                    self._score()
                top1 = " ".join(f"{score['top1']:.2f}" for score in self.scores[-1]) if self.scores else ""
                self.progress.update(self.heads.step, top1 and f"top-1 {top1}")
        except (HpcsslError, OSError) as caught:
            return as_eval_error(caught)
        return None

    def _score(self) -> None:
        self.scores.append(self.heads.score(*self.test))
        self._save()

    def try_save(self) -> HpcsslError | None:
        """Write the state file; return the error, if any."""
        try:
            self._save()
        except OSError as caught:
            return as_eval_error(caught)
        return None

    def _save(self) -> None:
        if self.context.state_file is not None:
            state.write(
                self.context.state_file,
                self.context.identity,
                self.heads.tensors(),
                {"task": self.task.name, "step": self.heads.step, "scores": self.scores, **self.task.note},
            )


def build_standardizer(features: Features, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a function that scales raw features to unit length and then to the statistics of a training set.

        x = (f / |f| - mean) / sqrt(var + 1e-5)

    Mean and variance (unbiased) are those of the unit-length training features (MSF, eval_linear.py:200-215).

    Args:
        features: The training features.
        device: Device of the inputs.
    """
    mean_D, var_D = (value.to(device) for value in features.moments)
    inverse_D = (var_D + 1e-5).rsqrt()
    return lambda raw: (F.normalize(raw, dim=1) - mean_D) * inverse_D


def _identity(raw: Tensor) -> Tensor:
    return raw
