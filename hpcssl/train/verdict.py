"""Whether a step is taken: decided on the device, agreed by all ranks, and read by the host at once or one step late.

A step is *taken* if all losses, targets and gradients of all ranks are finite and every rank has a whole batch. On a
CPU the host reads this *verdict* before it makes the update. On a GPU it would stand idle until the backward pass has
ended, and then the GPU until the host has queued the next kernels. So there the host reads it late
(``TrainState.late_verdicts``):

    value                             written                           read by the host
    verdict and flags of step k       one maximum over ranks, after     after step k + 1 was queued; at once before a
                                      the backward pass of step k       save, a comparison of replicas, an export, an
                                                                        evaluation, and at the end of an epoch or run
    which ranks were not finite       with the verdict                  with the verdict, only of a bad step
    metrics of step k                 in step k                         when the journal is flushed, after the verdict
    position of the bank, step,       by the host alone                 -
    bad steps in a row

The result has the same bits as if every verdict was read at once:

* Step k is taken on the device if its values are good *and* step k - 1 was taken, where that was not read yet. Every
  change that outlives the step depends on this one number: the update and the momentum, the moving average, the
  running statistics, the bank, and what the method keeps (``StepContext.taken``). Each selects old or new bits and
  computes none. So after a step that is not taken, the device holds the state before it, and the step behind it, which
  has been queued already, changes nothing either.
* What the host keeps (number of the step, position of the bank) is advanced as if each step was taken, and set back
  when the verdict says otherwise: first for the step behind it, which then has never been, and then for the step
  itself. After that the host does what it would have done at once: it counts the bad step, or rolls back to a
  checkpoint, or ends the run. Then it takes the step behind it again, with the same batch.
* All randomness is a function of the step, so the second time is like a first time.
* Verdicts are equal on all ranks and read between the same steps, so that all ranks do the same.

No finished step is lost after a signal: the flag travels with the next verdict, and the verdicts of all queued steps
are read before the state is saved. The state is saved up to one step later than it would be otherwise.

Three kinds of runs read at once on a GPU, too: with a loss scale (``optim.precision=fp16``), which the host lowers;
with a bank that is refilled at every step; and with a method whose ``after_step`` does not heed ``StepContext.taken``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpcssl.data.batch import Batch
from hpcssl.distributed.collectives import PendingReduction
from hpcssl.distributed.devices import to_device
from hpcssl.errors import HpcsslError
from hpcssl.train.train_state import TrainState


class NonFiniteError(HpcsslError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class StepFlags(NamedTuple):
    """What ranks exchange with a step. A flag that one rank raises holds on all of them.

    Attributes:
        stop: A stop was requested.
        save_due: The time for a checkpoint has come.
        save_in_flight: A checkpoint is still being written.
        damaged: The batch has a damaged sample that is not in the log yet.
    """

    stop: bool = False
    save_due: bool = False
    save_in_flight: bool = False
    damaged: bool = False


@dataclass(frozen=True)
class StepReport:
    """The result of a step, equal on all ranks except for ``scalars``.

    Attributes:
        step: Number of finished steps, this one included.
        taken: Whether the update was made.
        flags: The flags that some rank raised.
        scalars: This rank's metrics by name.
        reason: Why the step was not taken; empty if it was.
        abandoned: Whether some rank gave up waiting for its batch. The step then does not count at all.
    """

    step: int
    taken: bool
    flags: StepFlags
    scalars: dict[str, Tensor | float] = field(default_factory=dict)
    reason: str = ""
    abandoned: bool = False


class Values(NamedTuple):
    """What the verdict of a step says, as the host reads it.

    Attributes:
        bad_value: The loss or a target of some rank is not finite.
        bad_gradient: A gradient is not finite.
        incomplete: Some rank gave up waiting for its batch.
        flags: The flags that some rank raised.
    """

    bad_value: bool
    bad_gradient: bool
    incomplete: bool
    flags: StepFlags

    @property
    def taken(self) -> bool:
        """Whether the step is taken."""
        return not (self.bad_value or self.bad_gradient or self.incomplete)


class StepVerdict:
    """The verdict of one step, which all ranks have reduced to the same values.

    Args:
        reduction: The maximum over ranks of what ``pack`` returned.
    """

    def __init__(self, reduction: PendingReduction):
        self._reduction = reduction
        self._values: Values | None = None

    def taken(self, before: Tensor | None) -> Tensor:
        """Whether the step is taken, bool [] on the device, without waiting for it.

        Args:
            before: The same of the step before, if the host has not read that one's verdict yet.
        """
        good = (self._reduction.on_device()[:3] == 0).all()
        return good if before is None else good & before

    def read(self) -> Values:
        """Wait for the verdict on the host, and return it."""
        if self._values is None:
            value, gradient, incomplete, *raised = self._reduction.result().bool().tolist()
            self._values = Values(value, gradient, incomplete, StepFlags(*raised))
        return self._values


def pack(bad_value: Tensor, bad_gradient: Tensor, incomplete: bool, flags: Sequence[bool]) -> Tensor:
    """Pack this rank's part of a verdict as float32 [3 + flags], with one transfer of what the host knows.

    Args:
        bad_value: bool [], whether the loss or a target is not finite.
        bad_gradient: bool [], whether a gradient is not finite.
        incomplete: Whether the batch is incomplete.
        flags: This rank's ``StepFlags``.
    """
    device = torch.stack([bad_value, bad_gradient]).float()
    return torch.cat([device, to_device(np.array([incomplete, *flags], np.float32), device.device)])


class HostState(NamedTuple):
    """What a step advances on the host before its verdict is read.

    Attributes:
        step: Number of finished steps.
        pointer: The slot of the bank that is written next; 0 without a bank.
        filled: Number of filled slots of the bank.
    """

    step: int
    pointer: int
    filled: int

    @classmethod
    def of(cls, t: TrainState) -> HostState:
        """Return what ``t`` holds."""
        return cls(t.step, 0, 0) if t.bank is None else cls(t.step, t.bank.pointer, t.bank.filled)

    def restore(self, t: TrainState) -> None:
        """Set ``t`` back to these values."""
        t.step = self.step
        if t.bank is not None:
            t.bank.pointer, t.bank.filled = self.pointer, self.filled


@dataclass
class LaunchedStep:
    """A step that was queued on the device.

    Attributes:
        t: The state that is trained.
        start: The host's part of it before the step.
        verdict: The verdict of the step.
        finite: Whether this rank's loss and targets are finite, bool [].
        taken: Whether the step is taken, bool [] on the device; None once the host has read the verdict.
        scalars: This rank's metrics by name.
        reason: Why the step was not taken, if that is known already.
    """

    t: TrainState
    start: HostState
    verdict: StepVerdict
    finite: Tensor
    taken: Tensor | None = None
    scalars: dict[str, Tensor | float] = field(default_factory=dict)
    reason: str = ""

    def retract(self) -> None:
        """Forget this step, which the device does not take because the one before is not taken."""
        self.start.restore(self.t)

    def conclude(self) -> StepReport:
        """Read the verdict, and bring the host's part of the state up to it. A collective.

        The steps behind this one must have been retracted if it is not taken.
        """
        values, t, number = self.verdict.read(), self.t, self.start.step + 1
        was_late, self.taken = self.taken is not None, None
        if values.taken:
            t.skipped_in_a_row = 0
            return StepReport(number, True, values.flags, self.scalars)
        if was_late:
            self.start.restore(t)
        t.step = self.start.step
        if values.incomplete:
            reason = "some rank gave up waiting for its images"
            return StepReport(number - 1, False, values.flags, reason=reason, abandoned=True)
        t.step = number
        reason = self.reason or count_bad_step(t, values, self.finite)
        return StepReport(number, False, values.flags, self.scalars, reason)


def count_bad_step(t: TrainState, values: Values, finite: Tensor) -> str:
    """Count a step with a value that is not finite, and return in words where it was. A collective.

    Args:
        t: The state that is trained.
        values: The verdict.
        finite: Whether this rank's loss and targets are finite, bool [].
    """
    t.skipped_in_a_row += 1
    if not values.bad_value:
        return "a gradient was not finite, with a finite loss"
    ranks = t.world.all_gather((~finite)[None]).nonzero()[:, 0].tolist()
    return f"the loss or a target was not finite on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


GetFlags = Callable[[], StepFlags]
Launch = Callable[[TrainState, Batch, GetFlags, LaunchedStep | None], LaunchedStep]


class StepQueue:
    """The steps of a run in order, each with its report: at once, or after the next step was launched.

    Args:
        t: The state that is trained.
        launch: ``step.launch_step``.
        is_boundary: Whether something may happen after this number of finished steps that needs the state of exactly
            this step. Its verdict is then read at once.
    """

    def __init__(self, t: TrainState, launch: Launch, is_boundary: Callable[[int], bool]):
        self.t, self._launch, self._is_boundary = t, launch, is_boundary
        self._unread: tuple[Batch, LaunchedStep] | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the verdicts of all launched steps have been read."""
        return self._unread is None

    def take(self, batch: Batch, flags: GetFlags) -> Iterator[tuple[Batch, StepReport]]:
        """Launch the next step, and report the steps whose verdicts are read now. A collective.

        After the report of a stop, or of a checkpoint that is due, all launched steps are reported.

        Args:
            batch: The batch of the next step.
            flags: Returns this rank's flags for it.

        Yields:
            Batch and report of each step, in order: none, one or two. An abandoned step is the last. While the caller
            handles the report of a step that was not taken, ``t`` is at this step; whatever it changes holds for the
            next one.
        """
        before, launched = self._unread, self._launch(self.t, batch, flags, self._unread[1] if self._unread else None)
        self._unread = batch, launched
        read_now = not self.t.late_verdicts or self._is_boundary(self.t.step)
        if before is not None:
            if not before[1].verdict.read().taken:
                launched.retract()
            report = before[1].conclude()
            yield before[0], report
            if report.abandoned:
                self._unread = None
                return
            read_now = read_now or report.flags.stop or report.flags.save_due
            if not report.taken:  # the device has refused the step behind it as well
                launched = self._launch(self.t, batch, flags, None)
                self._unread = batch, launched
        if read_now:
            self._unread = None
            yield batch, launched.conclude()
