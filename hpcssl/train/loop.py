"""The training loop: one batch and one step after the other, and between steps saves, evaluations and stops."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from hpcssl import config, files
from hpcssl.checkpoint.manager import CheckpointManager, CheckpointState
from hpcssl.data.batch import Batch
from hpcssl.errors import ResumeError
from hpcssl.journal import Journal
from hpcssl.nets import weights
from hpcssl.run_dir import RunDir
from hpcssl.signals import StopFlag
from hpcssl.train import replicas
from hpcssl.train.damage_log import DamageLog
from hpcssl.train.step import launch_step
from hpcssl.train.train_state import TrainState
from hpcssl.train.verdict import NonFiniteError, StepFlags, StepQueue, StepReport

LOG = logging.getLogger("hpcssl")


class OnlineEvaluation(Protocol):
    """An evaluation during training. The caller of ``main.train`` provides it, since training knows no evaluation.

    Attributes:
        every_epochs: Epochs between two evaluations; 0 for none.
    """

    every_epochs: int

    def __call__(self, path: Path, step: int) -> Mapping[str, float] | None:
        """Return scores of the exported weights at ``path`` by name, or None if a stop came first. A collective."""


@dataclass(frozen=True)
class LoopResult:
    """How the loop ended.

    Attributes:
        finished: Whether the run is finished. Otherwise a stop was requested, and the state is saved.
        unsaved: Why the state could not be saved at a stop; None if it is saved.
    """

    finished: bool
    unsaved: str | None = None


@dataclass
class Loop:
    """Everything that one attempt trains with.

    Attributes:
        training: The state that is trained, at the step from which the attempt goes on.
        batches: ``batches(first, last, give_up)`` yields this rank's batches of the steps ``first`` to ``last - 1``;
            an incomplete one where ``give_up()`` came true while the batch was late.
        checkpoints: Saves and restores the state.
        journal: Receives metrics.
        run_dir: The run folder.
        stop: Set from outside to stop the training.
        evaluation: The evaluation during training, or None.
        damage_log: Counts damaged samples, or None.
    """

    training: TrainState
    batches: Callable[[int, int, Callable[[], bool]], Iterable[Batch]]
    checkpoints: CheckpointManager
    journal: Journal
    run_dir: RunDir
    stop: StopFlag
    evaluation: OnlineEvaluation | None = None
    damage_log: DamageLog | None = None

    def run(self) -> LoopResult:
        """Train to the end, or to the step at which all ranks agree to stop; then the state is saved.

        Raises:
            NonFiniteError: Too many steps in a row were not finite, and no rollback is left.
            ResumeError: The last checkpoint could not be written.
            WorldError: The ranks hold different values of what they must hold alike.
        """
        t, machine = self.training, self.training.recipe.machine
        if t.step < t.last_step and t.world.any(self.stop.is_set()):
            return LoopResult(finished=False)
        if not self._export_and_evaluate():  # of step 0, or where the last attempt ended right after a checkpoint
            return LoopResult(finished=False)
        saved_at = time.monotonic()
        batches = iter(self.batches(t.step, t.last_step, self.stop.is_set))
        steps = StepQueue(t, launch_step, self._is_boundary)
        while t.step < t.last_step:
            t.world.set_phase("data", t.step + 1)
            batch = next(batches)
            t.world.set_phase("step")
            save_due = machine.checkpoint_minutes > 0 and time.monotonic() - saved_at > machine.checkpoint_minutes * 60
            stop = save = False
            for batch_of_step, report in steps.take(batch, partial(self._step_flags, batch, save_due)):
                if report.abandoned:
                    return self._save_and_stop()
                self._record_step(batch_of_step, report)
                stop, save = stop or report.flags.stop, save or report.flags.save_due
            if not steps.is_settled:
                continue
            if t.step == t.last_step:
                break
            if stop:
                return self._save_and_stop()
            by_steps = machine.checkpoint_steps > 0 and t.step % machine.checkpoint_steps == 0
            # No save after a step that was not taken: a run that diverges keeps the checkpoints from before.
            if report.taken and (save or by_steps):
                self._begin_save()
                saved_at = time.monotonic()
            elif machine.replica_check_steps > 0 and t.step % machine.replica_check_steps == 0:
                replicas.check(t, t.state())
            if not self._export_and_evaluate():
                return self._save_and_stop()
        return self._finish()

    def _is_boundary(self, step: int) -> bool:
        """Whether a save, a comparison, an export or an evaluation may follow after this number of steps."""
        t, machine = self.training, self.training.recipe.machine
        intervals = t.steps_per_epoch, machine.checkpoint_steps, machine.replica_check_steps
        return step == t.last_step or any(every > 0 and step % every == 0 for every in intervals)

    def _step_flags(self, batch: Batch, save_due: bool) -> StepFlags:
        """Return what this rank reports to all ranks with the step."""
        damaged = self.damage_log is not None and batch.complete and self.damage_log.has_new(batch)
        return StepFlags(
            stop=self.stop.is_set(),
            save_due=save_due and self.training.world.is_main,
            save_in_flight=self.checkpoints.busy,
            damaged=damaged,
        )

    def _record_step(self, batch: Batch, report: StepReport) -> None:
        """Do what follows each step: complete a save, write metrics, count damaged samples, handle bad steps."""
        t = self.training
        # A save that all ranks have written is completed before the next step counts: a kill then loses one step less.
        if self.checkpoints.saving and not report.flags.save_in_flight:
            self._complete_save()
        self.journal.write(report.step, epoch=(report.step - 1) / t.steps_per_epoch, **report.scalars)
        if t.recipe.machine.log_sample_ids:
            self.journal.write_sample_ids(report.step, torch.as_tensor(batch.index), t.layout)
        if report.flags.damaged and self.damage_log is not None:
            self.damage_log.record(report.step, batch)
        if not report.taken:
            LOG.warning("Step %d was skipped on all ranks: %s.", report.step, report.reason)
            self._handle_nonfinite(batch)

    def _handle_nonfinite(self, batch: Batch) -> None:
        """After too many bad steps in a row, return to the newest checkpoint and skip the batches since then.

        Raises:
            NonFiniteError: No rollback is left, or there is no checkpoint.
        """
        t, machine = self.training, self.training.recipe.machine
        if t.skipped_in_a_row < machine.max_nonfinite_steps:
            return
        self._complete_save()
        may_roll_back = len(t.rollbacks) < machine.max_rollbacks
        saved = self.checkpoints.latest() if may_roll_back else None
        if saved is not None:
            t.roll_back(saved)
            LOG.warning(
                "%d bad steps in a row. Rolled back to step %d; the batches up to step %d are skipped.",
                machine.max_nonfinite_steps,
                saved.step,
                t.step,
            )
            return
        index = t.world.all_gather_rows(torch.as_tensor(batch.index, device=t.world.device), t.layout).tolist()
        self.journal.flush()
        before = "no checkpoint to roll back to" if may_roll_back else f"{len(t.rollbacks)} earlier rollbacks"
        raise NonFiniteError(
            f"the loss at step {t.step}",
            got=f"{machine.max_nonfinite_steps} steps in a row that were not finite, with {before}; the last batch has "
            f"the samples {index}",
            expected="finite numbers",
            fix="check these samples; the same command tries again from the last checkpoint, "
            "machine.max_rollbacks=N allows more rollbacks, and a new run (another --run folder) may use a lower "
            "optim.lr or optim.precision=fp32",
        )

    # -- saving ---------------------------------------------------------------------------------------------

    def _save_and_stop(self) -> LoopResult:
        self.training.world.set_phase("save")
        return LoopResult(finished=False, unsaved=self.checkpoints.save(self._checked_state()))

    def _begin_save(self) -> None:
        self.training.world.set_phase("save")
        self._complete_save()
        self.checkpoints.begin(self._checked_state())

    def _complete_save(self) -> None:
        """Complete a save that was begun, if there is one, and log why it failed if it did. A collective."""
        problem = self.checkpoints.finish() if self.checkpoints.saving else None
        if problem:
            LOG.warning("The checkpoint was not saved, and the previous one remains: %s", problem)

    def _checked_state(self) -> CheckpointState:
        """Return the state to save, after the ranks were compared and the metrics so far are durable.

        A checkpoint takes each tensor from one rank, so a value that went wrong there would reach all ranks. A
        resumed journal goes on at the checkpoint's step, so no metrics before it may be missing.
        """
        state = self.training.state()
        replicas.check(self.training, state)
        self.journal.sync()
        return state

    def _finish(self) -> LoopResult:
        """Write the last checkpoint, the exported weights, and the mark that the run is done, in this order."""
        t = self.training
        t.world.set_phase("finish")
        problem = self.checkpoints.save(self._checked_state())
        if problem:
            raise ResumeError(
                "the last checkpoint",
                got=problem,
                expected="enough free space and permission to write it",
                fix="free disk space or correct the permissions, then run the same command; it resumes from the "
                "previous checkpoint",
            )
        path = self.export()
        if not self._export_and_evaluate():
            return LoopResult(finished=False)
        done = {"step": t.step, "weights": str(path.relative_to(self.run_dir.root))}
        t.world.run_on_main(lambda: files.write_record(self.run_dir.done, done))
        return LoopResult(finished=True)

    # -- weights --------------------------------------------------------------------------------------------

    def export(self) -> Path:
        """Write the online backbone's weights at this step. A collective.

        The backbone of a second modality goes into a folder ``second`` beside it.

        Returns:
            The path of the first backbone, on all ranks, once the files are there.
        """
        t = self.training
        path, views, second = self.run_dir.weights_at(t.step), t.recipe.views, t.pair.online.second
        meta = {
            "mean": views.mean,
            "std": views.std,
            "size": views.size,
            "step": t.step,
            "method": t.recipe.method.name,
            "fingerprint": config.fingerprint(t.science),
        }

        def write() -> None:
            if second is not None:
                second_path = path.parent / "second" / path.name
                weights.save(second_path, second.backbone, t.recipe.arch, **meta)
            weights.save(path, t.pair.online.backbone, t.recipe.arch, **meta)

        t.world.set_phase("export")
        t.world.run_on_main(write)
        return path

    def _export_and_evaluate(self) -> bool:
        """Export and evaluate the weights where the recipe asks for it at this step.

        Returns:
            False if a stop came during the evaluation; the next attempt then evaluates these weights.
        """
        t = self.training
        epoch, step_in_epoch = divmod(t.step, t.steps_per_epoch)

        def is_due(every_epochs: int) -> bool:
            # a length in fractional epochs may end between two epochs of whole batches
            is_end = t.recipe.schedule.fractional_epochs and t.step == t.last_step
            return every_epochs > 0 and (is_end or (step_in_epoch == 0 and epoch % every_epochs == 0))

        evaluation = self.evaluation
        if evaluation is not None and (not is_due(evaluation.every_epochs) or self.journal.has_scores(t.step)):
            evaluation = None
        if not (t.step == 0 or evaluation is not None or is_due(t.recipe.machine.export_epochs)):
            return True
        path = self.export()
        if evaluation is not None:
            self._complete_save()  # before the evaluation, which may be the last that this attempt lives to do
            self.journal.flush()
            t.world.set_phase("evaluate")
            scores = evaluation(path, t.step)
            if scores is None:
                return False
            self.journal.write_scores(t.step, **scores)
        return True
