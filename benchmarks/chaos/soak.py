"""The soak test: trainings one after the other on one cluster, faults, and the comparison with what is expected."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from pathlib import Path

from benchmarks import loopback
from benchmarks.chaos.commands import PERIOD, StuckError, TrainingCommands
from benchmarks.chaos.kinds import KINDS
from benchmarks.chaos.plan import Fault
from benchmarks.chaos.report import Injection, SoakReport, build_row, print_line
from benchmarks.chaos.session import MAX_RESUBMISSIONS, Progress, Recovery, TargetMissing, TrainingSession
from hpcssl.run_dir import RunDir
from hpcssl.timing.uptime import measure_uptime
from slurm.log import attempts

STEPS_DURING_SAVE = 5
"""Steps that are made while a save is written, until it has its manifest."""
SEVERITY = ("none", "signal", "kill", "damage", "disk")
"""``FaultKind.loss``, in the order of what may be lost."""


class Soak:
    """Trainings one after the other on one cluster, and the faults that are injected into them.

    Args:
        cluster: The cluster.
        folder: Where the run folders are created.
        commands: How to submit a training.
        report: The report.

    Attributes:
        session: The current training; None between two trainings.
        floor: The next group of faults waits for a later step than this: two crashes at the same step end a run.
        disk_full_step: The step at which the disk was full. Until the training has saved again, what a kill costs is
            counted as the cost of the full disk.
    """

    def __init__(self, cluster: loopback.LoopbackCluster, folder: Path, commands: TrainingCommands, report: SoakReport):
        self.cluster, self.folder, self.commands, self.report = cluster, folder, commands, report
        self.session: TrainingSession | None = None
        self.floor = 0
        self.disk_full_step = -1
        self._later_causes: set[str] = set()  # of faults that may end an attempt, and have not yet
        self._runs = self._stuck_groups = 0

    def run_undisturbed(self) -> None:
        """Run one training without faults. Its digest is what all others must have."""
        start = time.monotonic()
        session = self._start_training()
        self.report.expected = session.finish()
        if causes := [attempt.cause for attempt in attempts.read_attempts(session.run)[:-1]]:
            self.report.add_violation(f"the undisturbed training was disturbed: {', '.join(map(str, causes))}")
        self.report.undisturbed_s = round(time.monotonic() - start, 1)
        self._clean_up(session)
        print_line(
            f"undisturbed: {self.commands.steps} steps in {self.report.undisturbed_s:g} s, "
            f"digest {self.report.expected[:12]}"
        )

    def inject(self, group: list[Fault]) -> None:
        """Inject one group of faults, and wait for the recovery.

        If the training ends before the first fault, the next training gets it.

        Raises:
            StuckError: Several trainings in a row did not recover.
        """
        injected: list[Injection] = []
        try:
            while not injected:
                session = self._running_session()
                with contextlib.suppress(TargetMissing):
                    self._approach(session, group[0])
                    before = session.progress()
                    for fault in group:
                        at = time.monotonic() - self.report.start
                        injected.append((fault, at, KINDS[fault.kind].inject(session, fault)))
                time.sleep(0 if injected else 1)
            restarts = any(KINDS[fault.kind].restarts is not False for fault, _, _ in injected)
            recovery = session.wait_for_recovery(before, restarts)
        except (StuckError, AssertionError, OSError, subprocess.SubprocessError) as error:
            self._give_up(group, injected, error)
        else:
            self._stuck_groups = 0
            self._record(injected, before, recovery)

    def finish(self) -> None:
        """Finish the current training, if there is one."""
        if self.session is not None:
            self._finish_training(self.session)

    # -- trainings -----------------------------------------------------------------------------------------------

    def _start_training(self) -> TrainingSession:
        self._runs += 1
        run = RunDir(self.folder / f"run-{self._runs}")
        self.session, self.floor = TrainingSession(self.cluster, run, self.commands, print_line), 0
        self.disk_full_step = -1
        self._later_causes = set()
        return self.session

    def _running_session(self) -> TrainingSession:
        if self.session is not None and self.session.is_finished:
            self._finish_training(self.session)
        return self.session or self._start_training()

    def _approach(self, session: TrainingSession, first: Fault) -> None:
        """Wait until the training has made as many steps as the first fault says."""
        goal = self.floor + first.steps
        session.wait_until(lambda: session.last_step() >= goal and len(session.task_pids()) == 4, f"step {goal}", 240)
        time.sleep(first.delay_s)
        if session.is_finished:
            raise TargetMissing
        session.initial_tasks = set(session.task_pids().values())

    def _finish_training(self, session: TrainingSession) -> None:
        digest = session.finish()
        self.report.digests.append(digest)
        if (uptime := measure_uptime(session.run, time.time())) is not None:
            self.report.uptimes.append(uptime)
        is_equal = digest == self.report.expected
        if not is_equal:
            self.report.add_violation(
                f"{session.run.root.name} ended with digest {digest[:12]} instead of {self.report.expected[:12]}"
            )
        print_line(
            f"training {len(self.report.digests)} finished: digest {digest[:12]}, "
            f"{'equal' if is_equal else 'DIFFERENT'}"
        )
        self._clean_up(session)
        self.report.write()

    def _clean_up(self, session: TrainingSession) -> None:
        """End what is left of a training, so that the next one gets an idle cluster."""
        self.session = None
        for process in session.stale_ranks:
            process.kill()  # it has had its time: ranks wait for one another for 5 s
            if "let in" in process.communicate()[1]:
                self.report.add_violation("a rank of another attempt was let in at the rendezvous")
        for held in session.held_ports:
            held.close()
        self.cluster("scancel", session.job)
        with contextlib.suppress(AssertionError):
            self.cluster.wait_until(lambda: not session.find_processes("slurm"), "end of the job's processes", 30)
        session.send_signal(*session.find_processes("slurm"))
        shutil.rmtree(session.run.root, ignore_errors=True)

    def _give_up(self, group: list[Fault], injected: list[Injection], error: Exception) -> None:
        """Record that a training is stuck, and remove it. The next group starts another one."""
        self.report.add_violation(f"{', '.join(f'fault {f.number} ({f.kind})' for f in group)}: {error}")
        self._stuck_groups += 1
        self.report.log += [build_row(injection, self.floor, None) for injection in injected]
        if self.session is not None:
            print_line(self.session.describe())
            self._clean_up(self.session)
        self.report.write()
        if self._stuck_groups >= MAX_RESUBMISSIONS:
            raise StuckError(f"{MAX_RESUBMISSIONS} groups of faults in a row") from error

    # -- records -------------------------------------------------------------------------------------------------

    def _record(self, injected: list[Injection], before: Progress, recovery: Recovery) -> None:
        """Add the rows of a group of faults to the report, and check what happened."""
        lost = max(0, recovery.peak - recovery.first)  # an attempt that ends slowly makes more steps
        worst = max((KINDS[fault.kind].loss for fault, _, _ in injected), key=SEVERITY.index)
        if worst == "disk":
            self.disk_full_step = recovery.peak
        elif recovery.first <= self.disk_full_step and worst != "none":
            worst = "disk"
        measure = _select_measure(worst, recovery)
        restarting = [fault for fault, _, _ in injected if KINDS[fault.kind].restarts is not False]
        responsible = restarting or [injected[-1][0]]
        causes = list(recovery.causes)
        for injection in injected:
            fault, is_last = injection[0], injection[0] is responsible[-1]
            count = 0 if fault not in responsible else len(causes) if is_last else min(1, len(causes))
            own, causes = causes[:count], causes[count:]
            row = build_row(
                injection,
                recovery.peak,
                recovery.first,
                lost if is_last else 0,
                measure if is_last and own else None,
                own,
            )
            if is_last and recovery.resubmissions:
                row["resubmissions"] = recovery.resubmissions
            self.report.log.append(row)
            print_line(
                f"{row['fault']:4d} {row['time']:7.1f} s  {row['kind']}: {row['target']}; step {row['step_before']}, "
                f"then {row['step_after']}" + (f" ({', '.join(own)})" if own else "")
            )
        count = len(self.report.violations)
        self._check(injected, recovery, lost, worst)
        if len(self.report.violations) > count and self.session is not None:
            print_line(self.session.describe())
        self.floor = max(recovery.peak, recovery.first)
        self.report.write()

    def _check(self, injected: list[Injection], recovery: Recovery, lost: int, worst: str) -> None:
        """Compare what happened with what the kinds allow."""
        kinds = [KINDS[fault.kind] for fault, _, _ in injected]
        name = ", ".join(f"fault {fault.number} ({fault.kind})" for fault, _, _ in injected)
        allowed = {
            "none": 0,
            "signal": 0,
            "kill": PERIOD + STEPS_DURING_SAVE * recovery.saving,
            "damage": 2 * PERIOD + STEPS_DURING_SAVE,
            "disk": None,
        }[worst]
        if allowed is not None and lost > allowed:
            self.report.add_violation(f"{name}: {lost} steps lost, {allowed} allowed")
        possible = {"done"}.union(self._later_causes, *(kind.causes for kind in kinds))
        # SLURM counts a node whose slurmstepd was killed as lost when the job ends for another reason, maybe much later
        late = () if recovery.causes else (kind.causes for kind in kinds if kind.restarts is None)
        self._later_causes = set().union(() if recovery.causes else self._later_causes, *late)
        if unexpected := [cause for cause in recovery.causes if cause not in possible]:
            self.report.add_violation(f"{name}: ended as {', '.join(unexpected)}")
        if not recovery.causes and any(kind.restarts for kind in kinds):
            self.report.add_violation(f"{name}: no attempt ended")
        if recovery.resubmissions and not any(kind.may_end_job for kind in kinds):
            reasons = "; ".join(recovery.resubmissions)
            self.report.add_violation(f"{name}: the job had to be submitted again: {reasons}")


def _select_measure(loss: str, recovery: Recovery) -> str:
    """Under which of ``report.MEASURES`` lost steps are counted."""
    return {
        "none": "after_signal",
        "signal": "after_signal",
        "damage": "after_damage",
        "disk": "after_full_disk",
        "kill": "after_kill_in_a_save" if recovery.saving else "after_kill",
    }[loss]
