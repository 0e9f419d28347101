"""Fine-tuning of the whole network on the labelled images, by the protocols of ``tunings.py``.

    logits = W f(x) + b        loss = cross-entropy        trained: W, b and every weight of f

on random resized crops (area 0.08-1) with flips, one batch norm over the whole batch, the backbone's rates apart from
the head's. ``--train`` names the labelled shards, such as 1 % or 10 % that `hpcssl-shard subset --list` wrote; the
centre crops of ``--val`` give the score.

A protocol is one *trial* or a grid of them, run one after another. ``judge=val`` (OpenSelfSup, BSIM) reports the trial
that is best on the validation set, as the original does; ``judge=held_out`` (BYOL) compares them on labelled images
held out of the training, and trains once more on all of them with the best values.

Every rank trains on its part of each batch. On one rank, and on a CPU on any number of them, a run that is killed and
started again ends with the same bits. Ranks change the order of sums: in float64 1, 2 and 4 of them agree to 1e-8, in
float32 they cannot (each step rounds, and training amplifies it), so that a score may then differ in its last digits.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace

import numpy as np
import torch

from hpcssl.data.order import Order
from hpcssl.errors import ConfigError, EvalError, HpcsslError
from hpcssl.evals import choice, state, tunings
from hpcssl.evals.features import ViewOptions, one_of
from hpcssl.evals.images import Among, Images
from hpcssl.evals.together import Stopped, agree, as_error
from hpcssl.evals.tuner import PRECISIONS, Tuner
from hpcssl.evals.tunings import TUNINGS, Tuning
from hpcssl.views.augment import Augment, ViewSpec

log = logging.getLogger("hpcssl")


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(ViewOptions):
    """``protocol`` names a row of ``TUNINGS``; other fields, where they are set, replace its values.

    ``percent``: 1 or 10, of the labels; None takes what the shards' record says. ``lr`` and ``head_lr``, in the
    protocol's own unit, make its grid one trial. ``held_out``: images that the trials are judged on
    (``choice.held_out``). ``precision``: fp32, bf16, fp16 (autocast), or fp64, which is for proofs. ``batch``: images
    that are scored at once; ``train_batch``: images per step over all ranks.
    """

    protocol: str = "bsim"
    percent: int | None = None
    lr: float | None = None
    head_lr: float | None = None
    epochs: int | None = None
    train_batch: int | None = None
    weight_decay: float | None = None
    held_out: int | None = None
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        one_of("protocol", self.protocol, TUNINGS)
        one_of("precision", self.precision, PRECISIONS)
        one_grid = (self.lr is None) == (self.head_lr is None)
        judged = TUNINGS[self.protocol][1].judge == "held_out" and self.lr is None
        for name, holds, expected in (
                ("percent", self.percent in (None, 1, 10), "1 or 10"),
                ("lr", self.lr is None or self.lr > 0, "above 0"),
                ("head_lr", self.head_lr is None or self.head_lr > 0, "above 0"),
                ("head_lr", one_grid, "lr and head_lr, both or neither"),
                ("epochs", self.epochs is None or self.epochs >= 1, "1 or more"),
                ("train_batch", self.train_batch is None or self.train_batch >= 2, "2 or more"),
                ("weight_decay", self.weight_decay is None or self.weight_decay >= 0, "0 or more"),
                ("held_out", self.held_out is None or self.held_out >= 1, "1 or more"),
                ("held_out", self.held_out is None or judged, "a protocol that holds images out")):
            if not holds:
                raise ConfigError(f"evals.finetune.{name}", got=getattr(self, name), expected=expected,
                                  mend=f"leave {name} out to take the protocol's value")

    def resolve(self, data) -> Tuning:
        given = {"rates": None if self.lr is None else ((self.lr, self.head_lr),),
                 "epochs": None if self.epochs is None else (self.epochs,), "batch": self.train_batch,
                 "weight_decay": self.weight_decay}
        return replace(tunings.find(self.protocol, self.percent, data),
                       **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Trial:
    """One training: its rates and length, the samples it learns from, and what it is scored on."""

    name: str
    lr: float
    head_lr: float
    epochs: int
    learns: np.ndarray
    judge: tuple  # (shard set, indices)


def run(context) -> dict[str, float]:
    """Scores in percent: ``top1`` and ``top5`` of the epoch that the protocol reports; where it scores every epoch,
    ``…_best`` and ``…_last`` too. The row's details say the values that were chosen and what each trial scored.
    """
    tuning = context.options.resolve(context.train)
    return _Work(context, tuning).run()


def _diverged(where: str) -> EvalError:
    return EvalError("fine-tuning", got=f"a loss that is not finite {where}", expected="finite numbers",
                     mend="lower evals.finetune.lr and head_lr; if that does not help, the weights' own training has "
                          "diverged: evaluate an earlier step's")


class _Work:
    """The trials of one evaluation and what is finished of them."""

    def __init__(self, context, tuning: Tuning):
        self.context, self.world, self.options, self.tuning = context, context.world, context.options, tuning
        kind = tuning.interpolation if self.options.interpolation == "auto" else self.options.interpolation
        self.view = context.encoder.view(replace(self.options, interpolation=kind))
        self.crops = ViewSpec(name="rrc_flip", size=self.view.size, augment=Augment(
            scale=(0.08, 1.0), flip=0.5, interpolation=kind))
        self.note: dict = {"done": {}}  # of each finished trial its scores by epoch; [] where it diverged
        self.found = None  # on rank 0: the tensors of an unfinished trial

    def run(self) -> dict[str, float]:
        context, tuning = self.context, self.tuning
        everything, held = np.arange(len(context.train)), np.empty(0, np.int64)
        grid = [(lr, head, epochs) for epochs in tuning.epochs for lr, head in tuning.rates]
        if tuning.judge == "held_out" and len(grid) > 1:
            held = choice.held_out(len(everything), len(context.train.classes), self.options.seed,
                                   self.options.held_out)
        self._check(len(everything) - len(held))
        self._resume()
        val = (context.val, np.arange(len(context.val)))
        learns, judge = (np.setdiff1d(everything, held), (context.train, held)) if len(held) else (everything, val)
        trials = [Trial(f"lr{lr:g}_head{head:g}_ep{epochs}", lr, head, epochs, learns, judge)
                  for lr, head, epochs in grid]
        scores = {trial.name: self._finished(trial) for trial in trials}
        told = {name: choice.reported(s, tuning.report)["top1"] for name, s in scores.items() if s}
        if not told:
            raise _diverged("in every trial")
        best = next(trial for trial in trials if trial.name == max(told, key=told.get))
        context.details |= {"lr": best.lr, "head_lr": best.head_lr, "epochs": best.epochs,
                            "weight_decay": tuning.weight_decay}
        if len(trials) > 1:  # a trial without a score has diverged
            context.details["trials"] = {name: told.get(name) for name in scores}
        final = scores[best.name]
        if len(held):
            context.details["held_out"] = len(held)
            final = self._finished(replace(best, name="final", learns=everything, judge=val))
            if not final:
                raise _diverged("with the chosen rates")
        return dict(final[-1]) if tuning.report == "last" else choice.summary(final, tuning.report)

    def _check(self, samples: int) -> None:
        batch, size = self.tuning.batch, self.world.size
        if samples < batch:
            raise EvalError("fine-tuning", got=f"{samples} labelled images, batch {batch}",
                            expected="at least one whole batch", mend=f"train_batch={samples - samples % size} or less")
        if batch % size:
            raise EvalError("fine-tuning", got=f"a batch of {batch} on {size} ranks", expected="equal parts",
                            mend=f"train_batch={max(1, batch // size) * size}, or another number of ranks")

    def _resume(self) -> None:
        found = state.read(self.context.state, self.context.identity) if self.world.main else None
        note = json.loads(self.world.tell(json.dumps(found[1] if found else None)))
        if note is not None:
            self.note, self.found = note, found and found[0]

    def _finished(self, trial: Trial) -> list[dict[str, float]]:
        """Scores by epoch of a trial, which is trained unless it was before; none where it diverges. A collective."""
        if trial.name in self.note["done"]:
            return self.note["done"][trial.name]
        order = Order([len(trial.learns)], seed=self.options.seed, global_batch=self.tuning.batch, window="all")
        tuner = Tuner(self.context.encoder, len(self.context.train.classes), self.tuning, lr=trial.lr,
                      head_lr=trial.head_lr, epochs=trial.epochs, steps_per_epoch=order.steps_per_epoch,
                      precision=self.options.precision, seed=self.options.seed, world=self.world)
        scores: list[dict[str, float]] = []
        if self.note.get("trial") == trial.name:
            tuner.restore(self.found, self.note["step"], self.note["scaler"])
            scores = self.note["scores"]
            log.info("fine-tuning %s: goes on at step %d", trial.name, tuner.step)
        self.found = None
        steps = range(tuner.step, trial.epochs * order.steps_per_epoch)
        with Images(self.context.train, self.crops, Among(order, trial.learns), steps, seed=self.options.seed,
                    rank=self.world.rank, size=self.world.size, threads=self.context.threads,
                    pin=self.world.device.type == "cuda") as images:
            scores = self._train(trial, tuner, order, images, scores)
        self.note = {"done": self.note["done"] | {trial.name: scores}}
        self._save({}, self.note)
        return scores

    def _train(self, trial: Trial, tuner: Tuner, order: Order, images: Images,
               scores: list[dict[str, float]]) -> list[dict[str, float]]:
        total, each = trial.epochs * order.steps_per_epoch, self.tuning.report == "best"
        while True:
            epoch, inside = divmod(tuner.step, order.steps_per_epoch)
            if not inside and epoch and len(scores) < (epoch if each else epoch == trial.epochs):
                score = self._score(trial, tuner, scores)
                if score is None:
                    return []
                scores.append(score)
                log.info("fine-tuning %s: epoch %d of %d, top-1 %.2f", trial.name, epoch, trial.epochs, score["top1"])
            if tuner.step == total:
                return scores
            if not inside and tuner.step > images.first:
                self._keep(trial, tuner, scores)
            poor, stop, failed, error = self._step(tuner, images)
            if failed:
                agree(self.world, "fine-tuning", error=error)
            if poor:
                log.warning("fine-tuning %s: the loss of step %d is not finite", trial.name, tuner.step + 1)
                return []
            if stop:
                self._keep(trial, tuner, scores)
                agree(self.world, "fine-tuning", stop=True)

    def _step(self, tuner: Tuner, images: Images) -> tuple[bool, bool, bool, HpcsslError | None]:
        """A rank that cannot read its images goes through the step with others, or those would wait for it."""
        error, rows, size = None, self.tuning.batch // self.world.size, self.view.size
        try:
            x, y = tuner.look(next(images), self.crops)
        except (HpcsslError, OSError) as caught:
            error = as_error(caught)
            x = torch.zeros(rows, 3, size, size, dtype=tuner.dtype, device=self.world.device)
            y = torch.zeros(rows, dtype=torch.int64, device=self.world.device)
        return *tuner.learn(x, y, (self.context.stop(), error is not None)), error

    def _score(self, trial: Trial, tuner: Tuner, scores: list) -> dict[str, float] | None:
        data, index = trial.judge
        try:
            return tuner.score(data, index, self.view, at_once=self.options.batch, threads=self.context.threads,
                               stop=self.context.stop)
        except Stopped:
            self._keep(trial, tuner, scores)
            raise

    def _keep(self, trial: Trial, tuner: Tuner, scores: list) -> None:
        self._save(tuner.tensors(), self.note | {"trial": trial.name, "step": tuner.step, "scores": scores,
                                                 "scaler": tuner.scaler.state_dict()})

    def _save(self, tensors: dict, note: dict) -> None:
        """A collective: no rank goes on where the file could not be written."""
        problem = None
        if self.world.main and self.context.state is not None:
            try:
                state.write(self.context.state, self.context.identity, tensors, note)
            except OSError as caught:
                problem = as_error(caught)
        agree(self.world, "fine-tuning", error=problem)
