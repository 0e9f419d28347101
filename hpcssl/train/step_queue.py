"""The steps of a run in order, each with its report: at once, or after the next step was launched.

``verdict`` explains why the host reads late, and why the results are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hpcssl.data.batch import Batch
from hpcssl.train.train_state import TrainState
from hpcssl.train.verdict import LaunchedStep, StepFlags, StepReport

GetFlags = Callable[[], StepFlags]
Launch = Callable[[TrainState, Batch, GetFlags, LaunchedStep | None], LaunchedStep]


class StepQueue:
    """Launches steps and reads their verdicts.

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
