"""The trials of a fine-tuning evaluation: each one training, saved so that a kill repeats at most an epoch."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpcssl.data.order import Order
from hpcssl.data.shards import ShardSet
from hpcssl.errors import HpcsslError, Stopped
from hpcssl.evals.common import state
from hpcssl.evals.common.images import ImageStream, Indices, SubsetOrder
from hpcssl.evals.common.sync import as_eval_error, raise_on_any_rank
from hpcssl.evals.context import EvalContext
from hpcssl.evals.finetune.options import FinetuneOptions
from hpcssl.evals.finetune.protocols import FinetuneProtocol
from hpcssl.evals.finetune.trainer import FinetuneTrainer, StepResult
from hpcssl.terminal.progress import ProgressLog
from hpcssl.views.augment import Augmentation, ViewSpec

LOG = logging.getLogger("hpcssl")

Scores = list[dict[str, float]]
"""Scores in percent of the epochs of a trial; empty if it diverged."""


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        name: Name in the state file and in the result row.
        lr: Peak learning rate of the backbone, in the protocol's unit.
        head_lr: Peak learning rate of the head, in the protocol's unit.
        epochs: Passes over the training images.
        train_index: Indices of the training images, int64 [n].
        judge: The images that it is scored on: their set, and their indices.
    """

    name: str
    lr: float
    head_lr: float
    epochs: int
    train_index: Indices
    judge: tuple[ShardSet, Indices]


class TrialRunner:
    """Runs the trials of one evaluation, and keeps the scores of finished ones in the state file.

    Args:
        context: Encoder, data, options and processes.
        protocol: The protocol.
    """

    def __init__(self, context: EvalContext[FinetuneOptions], protocol: FinetuneProtocol) -> None:
        self.context, self.world, self.options = context, context.world, context.options
        self.protocol = protocol
        auto = self.options.interpolation == "auto"
        interpolation = protocol.interpolation if auto else self.options.interpolation
        self.view = context.encoder.view(replace(self.options, interpolation=interpolation))
        self.crops = ViewSpec(
            name="rrc_flip",
            size=self.view.size,
            augment=Augmentation(scale=(0.08, 1.0), flip=0.5, interpolation=interpolation),
        )
        self._note: dict[str, Any] = {"done": {}}  # scores by epoch of each finished trial
        self._tensors: dict[str, Tensor] | None = None  # of an unfinished trial, on rank 0

    def resume(self) -> None:
        """Read what an earlier attempt at this evaluation finished. A collective."""
        saved = state.read(self.context.state_file, self.context.identity) if self.world.is_main else None
        note = json.loads(self.world.broadcast_text(json.dumps(saved[1] if saved else None)))
        if note is not None:
            self._note, self._tensors = note, saved and saved[0]

    def run_trial(self, trial: Trial) -> Scores:
        """Return the scores of a trial by epoch, training it unless an earlier attempt did. A collective.

        Returns:
            The scores of each scored epoch; empty if the trial diverged.

        Raises:
            EvalError: What one rank raised.
            Stopped: After a request to stop; the trial is saved.
        """
        if trial.name in self._note["done"]:
            finished: Scores = self._note["done"][trial.name]
            return finished
        order = Order([len(trial.train_index)], seed=self.options.seed, global_batch=self.protocol.batch, window="all")
        trainer = self._build_trainer(trial, order.steps_per_epoch)
        scores: Scores = []
        if self._note.get("trial") == trial.name:
            trainer.restore(self._tensors, self._note["step"], self._note["scaler"])
            scores = self._note["scores"]
            LOG.info("fine-tuning %s: continuing at step %d", trial.name, trainer.step)
        self._tensors = None
        steps = range(trainer.step, trial.epochs * order.steps_per_epoch)
        with ImageStream(
            self.context.train,
            self.crops,
            SubsetOrder(order, trial.train_index),
            steps,
            seed=self.options.seed,
            rank=self.world.rank,
            size=self.world.size,
            threads=self.context.threads,
            pin=self.world.device.type == "cuda",
        ) as images:
            scores = self._train(trial, trainer, images, scores)
        self._note = {"done": self._note["done"] | {trial.name: scores}}
        self._save({}, self._note)
        return scores

    def _build_trainer(self, trial: Trial, steps_per_epoch: int) -> FinetuneTrainer:
        return FinetuneTrainer(
            self.context.encoder,
            len(self.context.train.classes),
            self.protocol,
            lr=trial.lr,
            head_lr=trial.head_lr,
            epochs=trial.epochs,
            steps_per_epoch=steps_per_epoch,
            precision=self.options.precision,
            seed=self.options.seed,
            world=self.world,
        )

    def _train(self, trial: Trial, trainer: FinetuneTrainer, images: ImageStream, scores: Scores) -> Scores:
        """Train to the end, scoring and saving at the ends of epochs. Returns no scores if the loss diverges."""
        per_epoch, every_epoch = trainer.steps_per_epoch, self.protocol.report == "best"
        progress = ProgressLog(f"fine-tuning {trial.name}", trial.epochs * per_epoch, "steps", first=trainer.step)
        while True:
            epoch, step_of_epoch = divmod(trainer.step, per_epoch)
            due = epoch if every_epoch else int(epoch == trial.epochs)
            if not step_of_epoch and epoch and len(scores) < due:
                score = self._score(trial, trainer, scores)
                if score is None:
                    return []
                scores.append(score)
            if trainer.step == trial.epochs * per_epoch:
                LOG.info("fine-tuning %s: top-1 %.2f", trial.name, scores[-1]["top1"])
                return scores
            if not step_of_epoch and trainer.step > images.first:
                self._save_trial(trial, trainer, scores)
            result, error = self._step(trainer, images)
            if result.failed:
                raise_on_any_rank(self.world, "fine-tuning", error=error)
            if result.nonfinite:
                LOG.warning("fine-tuning %s: the loss of step %d is not finite", trial.name, trainer.step + 1)
                return []
            if result.stop:
                self._save_trial(trial, trainer, scores)
                raise_on_any_rank(self.world, "fine-tuning", stop=True)
            progress.update(trainer.step, f"top-1 {scores[-1]['top1']:.2f}" if scores else "")

    def _step(self, trainer: FinetuneTrainer, images: ImageStream) -> tuple[StepResult, HpcsslError | None]:
        """Take one step. A rank that cannot read its images takes it with zeros: the others would wait for it."""
        error, rows, size = None, self.protocol.batch // self.world.size, self.view.size
        try:
            x, y = trainer.prepare(next(images), self.crops)
        except (HpcsslError, OSError) as caught:
            error = as_eval_error(caught)
            x = torch.zeros(rows, 3, size, size, dtype=trainer.dtype, device=self.world.device)
            y = torch.zeros(rows, dtype=torch.int64, device=self.world.device)
        return trainer.train_step(x, y, stop=self.context.stop(), failed=error is not None), error

    def _score(self, trial: Trial, trainer: FinetuneTrainer, scores: Scores) -> dict[str, float] | None:
        data, index = trial.judge
        try:
            return trainer.score(
                data,
                index,
                self.view,
                batch=self.options.forward_batch,
                threads=self.context.threads,
                stop=self.context.stop,
            )
        except Stopped:
            self._save_trial(trial, trainer, scores)
            raise

    def _save_trial(self, trial: Trial, trainer: FinetuneTrainer, scores: Scores) -> None:
        position = {
            "trial": trial.name,
            "step": trainer.step,
            "scores": scores,
            "scaler": trainer.scaler.state_dict(),
        }
        self._save(trainer.tensors(), self._note | position)

    def _save(self, tensors: Mapping[str, Tensor], note: dict[str, Any]) -> None:
        """Write the state file. A collective: no rank continues if the file could not be written."""
        problem = None
        if self.world.is_main and self.context.state_file is not None:
            try:
                state.write(self.context.state_file, self.context.identity, tensors, note)
            except OSError as caught:
                problem = as_eval_error(caught)
        raise_on_any_rank(self.world, "fine-tuning", error=problem)
