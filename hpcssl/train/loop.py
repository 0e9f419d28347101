"""The loop: one batch, one step, and between two steps everything that all ranks must agree on."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from hpcssl import files
from hpcssl.data.loader import Batch
from hpcssl.errors import HpcsslError, ResumeError
from hpcssl.files import RunDir
from hpcssl.journal import Journal
from hpcssl.nets import weights
from hpcssl.signals import StopFlag
from hpcssl.train.checkpoint import Store
from hpcssl.train.state import Training
from hpcssl.train.step import train_step

LOG = logging.getLogger("hpcssl")


class Watch(Protocol):
    """An evaluation during training, handed down by the door: what is on this floor knows no evaluation."""

    every_epochs: int

    def __call__(self, path: Path, step: int) -> dict[str, float]:
        """Scores of the weights at ``path``. All ranks call it."""


class NonFinite(HpcsslError):
    """Too many losses in a row were not finite."""


@dataclass
class Loop:
    """What one attempt trains with. ``batches`` gives this rank's batches from a step on."""

    training: Training
    batches: Callable[[int, int], Iterable[Batch]]
    store: Store
    journal: Journal
    run: RunDir
    stop: StopFlag
    watch: Watch | None = None

    def go(self) -> bool:
        """Train to the end (True), or to the step at which a stop was agreed; then the state is durable (False)."""
        t, machine = self.training, self.training.recipe.machine
        if t.step == 0 or (t.step < t.last_step and not self._exported()):
            self._after_epoch()  # a kill may have come between the checkpoint and what follows an epoch
        if t.step < t.last_step and t.world.any(self.stop.is_set()):
            return False
        saved_at = time.monotonic()
        batches = iter(self.batches(t.step, t.last_step))
        while t.step < t.last_step:
            batch = next(batches)
            due = machine.checkpoint_minutes > 0 and time.monotonic() - saved_at > machine.checkpoint_minutes * 60
            report = train_step(t, batch, (self.stop.is_set(), due and t.world.main, self.store.busy))
            stop, due, busy = report.flags
            self._record(batch, report.scalars)
            if not report.taken:
                self._refuse_more(batch)
            if self.store.saving and not busy:
                self._warn(self.store.finish())
            if t.step == t.last_step:
                break
            if stop:
                self.journal.flush()
                self._warn(self.store.save(t.state()))
                return False
            if due or (machine.checkpoint_steps and t.step % machine.checkpoint_steps == 0):
                self._begin_save()
                saved_at = time.monotonic()
            self._after_epoch()
        self._finish()
        return True

    def _record(self, batch: Batch, scalars: dict) -> None:
        t = self.training
        self.journal.write(t.step, epoch=(t.step - 1) / t.steps_per_epoch, **scalars)
        if t.recipe.machine.log_samples:
            self.journal.sample_ids(t.step, torch.as_tensor(batch.index))

    def _refuse_more(self, batch: Batch) -> None:
        t = self.training
        limit = t.recipe.machine.nonfinite_limit
        LOG.warning("step %d: the loss was not finite on some rank; no rank took the step (%d in a row)",
                    t.step, t.skipped_in_a_row)
        if t.skipped_in_a_row < limit:
            return
        index = t.world.gather(torch.as_tensor(batch.index, device=t.world.device)).tolist()
        self.journal.flush()
        raise NonFinite(f"the loss at step {t.step}", got=f"no finite value in {limit} steps in a row; the last batch "
                        f"held the samples {index}", expected="a finite loss",
                        mend="look at these samples, lower optim.lr, or use optim.precision=fp32; the last checkpoint "
                             "is kept, and the same command goes on from it")

    # -- saving ---------------------------------------------------------------------------------------------

    def _begin_save(self) -> None:
        if self.store.saving:
            self._warn(self.store.finish())
        self.journal.flush()  # a resumed journal starts at the checkpoint: nothing before it may be missing
        self.store.begin(self.training.state())

    def _warn(self, sentence: str | None) -> None:
        if sentence:
            LOG.warning("checkpoint not saved, the one before it stays: %s", sentence)

    def _finish(self) -> None:
        """The last checkpoint, the exported weights, and the mark that the run is done, in this order."""
        t = self.training
        self.journal.flush()
        failed = self.store.save(t.state())
        if failed:
            raise ResumeError("the last checkpoint", got=failed, expected="room to write it",
                              mend="free room, then run the same command again: it goes on from the checkpoint before")
        path = self.export()
        if t.world.main:
            done = {"step": t.step, "weights": str(path.relative_to(self.run.root))}
            files.atomic_write(self.run.done, json.dumps(done))
        t.world.barrier()

    # -- weights --------------------------------------------------------------------------------------------

    def export(self) -> Path:
        """Write the online backbone at this step. All ranks return the path when it is there."""
        t = self.training
        path = self.run.weights_at(t.step)
        if t.world.main:
            views = t.recipe.views
            weights.save(path, t.pair.online.backbone, t.recipe.arch, mean=views.mean, std=views.std, size=views.size,
                         step=t.step, method=t.recipe.method.name, fingerprint=self.fingerprint)
        t.world.barrier()
        return path

    @property
    def fingerprint(self) -> str:
        from hpcssl.config import fingerprint

        return fingerprint(self.training.science)

    def _exported(self) -> bool:
        """Whether this step's weights are there, by rank 0's word."""
        return not self.training.world.any(self.training.world.main
                                           and not self.run.weights_at(self.training.step).exists())

    def _after_epoch(self) -> None:
        """Export the weights of step 0 and of the epochs that are asked for, and evaluate those to be watched."""
        t = self.training
        epoch, inside = divmod(t.step, t.steps_per_epoch)

        def due(every: int) -> bool:
            return every > 0 and inside == 0 and epoch % every == 0

        watched = self.watch is not None and due(self.watch.every_epochs)
        if t.step == 0 or watched or due(t.recipe.machine.export_epochs):
            path = self.export()
        if watched:
            self.journal.flush()
            self.journal.score(t.step, **self.watch(path, t.step))
