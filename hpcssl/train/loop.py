"""The loop: one batch, one step, and between two steps everything that all ranks must agree on."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from hpcssl import config, files
from hpcssl.data.loader import Batch
from hpcssl.errors import HpcsslError, ResumeError
from hpcssl.files import RunDir
from hpcssl.journal import Journal
from hpcssl.nets import weights
from hpcssl.signals import StopFlag
from hpcssl.train import replicas
from hpcssl.train.checkpoint import State, Store
from hpcssl.train.data import Damage
from hpcssl.train.state import Training
from hpcssl.train.step import train_step

LOG = logging.getLogger("hpcssl")


class Watch(Protocol):
    """An evaluation during training, handed down by the door: what is on this floor knows no evaluation."""

    every_epochs: int

    def __call__(self, path: Path, step: int) -> dict[str, float] | None:
        """Scores of the weights at ``path``; None if a stop came first. All ranks call it."""


class NonFinite(HpcsslError):
    """Too many losses in a row were not finite."""


@dataclass
class Loop:
    """What one attempt trains with. ``batches(first, last, give_up)`` gives this rank's batches of these steps, and one
    that is not whole where ``give_up()`` came true while it was late."""

    training: Training
    batches: Callable[[int, int, Callable[[], bool]], Iterable[Batch]]
    store: Store
    journal: Journal
    run: RunDir
    stop: StopFlag
    watch: Watch | None = None
    damage: Damage | None = None
    unsaved: str | None = None

    def go(self) -> bool:
        """Train to the end (True), or to the step at which a stop was agreed; then the state is saved (False), or
        ``unsaved`` says why not."""
        t, machine = self.training, self.training.recipe.machine
        if t.step < t.last_step and t.world.any(self.stop.is_set()):
            return False
        if not self._after_epoch():  # of step 0; and a kill may have come between a checkpoint and what follows it
            return False
        saved_at = time.monotonic()
        batches = iter(self.batches(t.step, t.last_step, self.stop.is_set))
        while t.step < t.last_step:
            t.world.mark("data", t.step + 1)
            batch = next(batches)
            t.world.mark("step")
            late = machine.checkpoint_minutes > 0 and time.monotonic() - saved_at > machine.checkpoint_minutes * 60
            report = train_step(t, batch, partial(self._flags, batch, late))
            stop, due, busy, damaged = report.flags
            if report.void:
                return self._stop()
            self._record(batch, report.scalars)
            if damaged:
                self.damage.note(t.step, batch)
            if not report.taken:
                LOG.warning("step %d: %s; no rank took the step", t.step, report.why)
                self._bear(batch)
            if self.store.saving and not busy:
                self._warn(self.store.finish())
            if t.step == t.last_step:
                break
            if stop:
                return self._stop()
            due = due or (machine.checkpoint_steps > 0 and t.step % machine.checkpoint_steps == 0)
            if due and report.taken:  # a run that diverges keeps the checkpoints from before
                self._begin_save()
                saved_at = time.monotonic()
            elif machine.check_replicas_steps > 0 and t.step % machine.check_replicas_steps == 0:
                replicas.check(t)
            if not self._after_epoch():
                return self._stop()
        return self._finish()

    def _flags(self, batch: Batch, late: bool) -> tuple[bool, ...]:
        """What this rank tells all: a stop, a save that is due, one that is under way, samples newly found damaged."""
        damaged = self.damage is not None and batch.whole and self.damage.news(batch)
        return self.stop.is_set(), late and self.training.world.main, self.store.busy, damaged

    def _stop(self) -> bool:
        self.training.world.mark("save")
        self.unsaved = self.store.save(self._state())
        return False

    def _record(self, batch: Batch, scalars: dict) -> None:
        t = self.training
        self.journal.write(t.step, epoch=(t.step - 1) / t.steps_per_epoch, **scalars)
        if t.recipe.machine.log_samples:
            self.journal.sample_ids(t.step, torch.as_tensor(batch.index))

    def _bear(self, batch: Batch) -> None:
        """After too many bad steps in a row: go on from the last good checkpoint with the batches that come, once or as
        often as the recipe allows. Raises ``NonFinite`` after that."""
        t, machine = self.training, self.training.recipe.machine
        if t.skipped_in_a_row < machine.nonfinite_limit:
            return
        if self.store.saving:
            self._warn(self.store.finish())
        may = len(t.rolled_back) < machine.rollbacks
        saved = self.store.newest() if may else None
        if saved is not None:
            t.roll_back(saved)
            LOG.warning("%d bad steps in a row: the state of step %d is taken up again, and the run goes on past their "
                        "batches, at step %d", machine.nonfinite_limit, saved.step, t.step)
            return
        index = t.world.whole_batch(torch.as_tensor(batch.index, device=t.world.device)).tolist()
        self.journal.flush()
        before = "no checkpoint to go back to" if may else f"{len(t.rolled_back)} rollbacks before"
        raise NonFinite(f"the loss at step {t.step}", got=f"{machine.nonfinite_limit} steps in a row that were not "
                        f"finite, and {before}; the last batch held the samples {index}", expected="finite numbers",
                        mend="look at these samples; the same command tries again from the last checkpoint, "
                             "machine.rollbacks=N lets it go back more often, and a new run (another --run folder) may "
                             "take a lower optim.lr or optim.precision=fp32")

    # -- saving ---------------------------------------------------------------------------------------------

    def _begin_save(self) -> None:
        self.training.world.mark("save")
        if self.store.saving:
            self._warn(self.store.finish())
        self.store.begin(self._state())

    def _state(self) -> State:
        """What a save takes: a state that went wrong on one rank would spread to all through it, and a resumed journal
        starts at the checkpoint, so that nothing before it may be missing."""
        replicas.check(self.training)
        self.journal.sync()
        return self.training.state()

    def _warn(self, sentence: str | None) -> None:
        if sentence:
            LOG.warning("checkpoint not saved, the one before it stays: %s", sentence)

    def _finish(self) -> bool:
        """The last checkpoint, the exported weights, and the mark that the run is done, in this order."""
        t = self.training
        t.world.mark("finish")
        failed = self.store.save(self._state())
        if failed:
            raise ResumeError("the last checkpoint", got=failed, expected="room and the right to write it",
                              mend="free room, or mend what this names; the same command then goes on from the "
                                   "checkpoint before")
        path = self.export()
        if not self._after_epoch():
            return False
        done = {"step": t.step, "weights": str(path.relative_to(self.run.root))}
        t.world.on_main(lambda: files.atomic_write(self.run.done, json.dumps(done)))
        return True

    # -- weights --------------------------------------------------------------------------------------------

    def export(self) -> Path:
        """Write the online backbone at this step, and that of the second modality into a folder ``second`` beside it.
        All ranks return the path when it is there."""
        t = self.training
        path, views = self.run.weights_at(t.step), t.recipe.views
        about = {"mean": views.mean, "std": views.std, "size": views.size, "step": t.step,
                 "method": t.recipe.method.name, "fingerprint": config.fingerprint(t.science)}

        def write() -> None:
            if t.pair.online.second is not None:
                beside = path.parent / "second" / path.name
                beside.parent.mkdir(parents=True, exist_ok=True)
                weights.save(beside, t.pair.online.second.backbone, t.recipe.arch, **about)
            weights.save(path, t.pair.online.backbone, t.recipe.arch, **about)

        t.world.mark("export")
        t.world.on_main(write)
        return path

    def _after_epoch(self) -> bool:
        """Export the weights of step 0 and of the epochs that are asked for, and evaluate those to be watched.

        False if a stop came during the evaluation, which is then made up for by the next attempt.
        """
        t = self.training
        epoch, inside = divmod(t.step, t.steps_per_epoch)

        def due(every: int) -> bool:
            return every > 0 and inside == 0 and epoch % every == 0

        watched = self.watch is not None and due(self.watch.every_epochs) and not self.journal.scored(t.step)
        if not (t.step == 0 or watched or due(t.recipe.machine.export_epochs)):
            return True
        path = self.export()
        if watched:
            if self.store.saving:  # sealed now: the evaluation may be the last that this attempt lives to do
                self._warn(self.store.finish())
            self.journal.flush()
            t.world.mark("evaluate")
            scores = self.watch(path, t.step)
            if scores is None:
                return False
            self.journal.score(t.step, **scores)
        return True
