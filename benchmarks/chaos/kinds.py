"""The kinds of faults, what may be lost by each, and which of them are injected together."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.chaos import disk_faults, environment_faults, faults
from benchmarks.chaos.plan import Fault
from benchmarks.chaos.session import TrainingSession


@dataclass(frozen=True)
class FaultKind:
    """What a kind of fault does, and what may follow from it.

    Attributes:
        inject: Injects a fault into a training; returns what was hit. Raises ``session.TargetMissing`` if the target
            does not exist at the moment.
        loss: Which steps may be lost: ``none`` and ``signal``: no step. ``kill``: those since the last checkpoint.
            ``damage``: those since the checkpoint before it. ``disk``: any number.
        restarts: Whether another attempt must follow; None if it may.
        causes: Causes that the attempt may have in the record.
        may_end_job: Whether SLURM may end the job for good, so that somebody has to submit it again.
    """

    inject: Callable[[TrainingSession, Fault], str]
    loss: str
    restarts: bool | None = True
    causes: tuple[str, ...] = ()
    may_end_job: bool = False


STOPS = ("stopped", "preempted", "timeout")
CRASHES = ("error", "killed", "lost", "hang")
LOSSES = (*CRASHES, "node_fail")
"""Causes after faults that SLURM may take for the loss of a node."""
TERM, USR1, USR2, KILL = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGKILL

KINDS: dict[str, FaultKind] = {
    "TERM to one rank": FaultKind(faults.signal_one_rank(TERM), "signal", causes=STOPS),
    "USR1 to one rank": FaultKind(faults.signal_one_rank(USR1), "signal", causes=STOPS),
    "USR2 to one rank": FaultKind(faults.signal_one_rank(USR2), "signal", causes=STOPS),
    "TERM to all ranks": FaultKind(faults.signal_all_ranks(TERM), "signal", causes=STOPS),
    "USR1 to all ranks": FaultKind(faults.signal_all_ranks(USR1), "signal", causes=STOPS),
    "USR2 to all ranks": FaultKind(faults.signal_all_ranks(USR2), "signal", causes=STOPS),
    "TERM to one rank, twice": FaultKind(faults.signal_one_rank(TERM, 2), "signal", causes=STOPS),
    "USR2 to all ranks, twice": FaultKind(faults.signal_all_ranks(USR2, 2), "signal", causes=STOPS),
    "TERM during a save": FaultKind(faults.during_save(faults.signal_one_rank(TERM)), "signal", causes=STOPS),
    "preemption": FaultKind(faults.preempt_job, "signal", causes=STOPS),
    "requeue": FaultKind(faults.requeue_job, "signal", causes=STOPS),
    "walltime": FaultKind(faults.reach_time_limit, "signal", causes=STOPS),
    "node down": FaultKind(faults.set_node_state("down"), "kill", causes=STOPS + LOSSES),
    "KILL of one rank": FaultKind(faults.signal_one_rank(KILL), "kill", causes=CRASHES),
    "KILL of rank 0": FaultKind(faults.kill_rank_zero, "kill", causes=CRASHES),
    "KILL of all ranks": FaultKind(faults.signal_all_ranks(KILL), "kill", causes=CRASHES),
    "STOP of one rank": FaultKind(faults.signal_one_rank(signal.SIGSTOP), "kill", causes=("hang",)),
    "KILL during a save": FaultKind(faults.during_save(faults.signal_one_rank(KILL)), "kill", causes=CRASHES),
    "USR2 to srun": FaultKind(faults.signal_process("srun", USR2), "signal", causes=STOPS),
    # srun kills its step at once when it gets TERM, which no preemption sends it
    "TERM to srun": FaultKind(faults.signal_process("srun", TERM), "kill", causes=STOPS + CRASHES),
    "TERM to the batch script": FaultKind(
        faults.signal_process("slurm_script", TERM), "signal", restarts=False, causes=STOPS
    ),
    "KILL of srun": FaultKind(faults.signal_process("srun"), "kill", causes=STOPS + CRASHES),
    # SLURM does not notice the death of a batch script whose slurmstepd was killed before
    "KILL of the batch script": FaultKind(faults.signal_process("slurm_script"), "kill", None, STOPS + LOSSES),
    "KILL of slurmstepd": FaultKind(
        faults.signal_process("slurmstepd:"), "kill", None, STOPS + LOSSES, may_end_job=True
    ),
    # a rank that has not blocked the signals yet dies of the TERM that follows; its exit code hides the other one's
    "KILL of one rank in the start": FaultKind(
        faults.during_start(faults.signal_one_rank(KILL)), "signal", causes=STOPS + CRASHES
    ),
    "TERM to all ranks in the start": FaultKind(
        faults.during_start(faults.signal_all_ranks(TERM)), "signal", causes=STOPS
    ),
    "a rank left over in the start": FaultKind(faults.during_start(faults.start_stale_rank), "none", restarts=False),
    "port in use in the start": FaultKind(faults.hold_port, "none", restarts=False),
    # nothing may be written at the old path: neither the end of the attempt nor the request for another one
    "run folder moved": FaultKind(faults.move_run_folder, "kill", causes=CRASHES, may_end_job=True),
    "flipped bit": FaultKind(disk_faults.flip_bit, "damage", restarts=False),
    "truncated part": FaultKind(disk_faults.truncate_part, "damage", restarts=False),
    "no manifest": FaultKind(disk_faults.remove_manifest, "damage", restarts=False),
    "half-written save": FaultKind(disk_faults.leave_half_save, "none", restarts=False),
    "damaged weights": FaultKind(disk_faults.damage_export, "none", restarts=False),
    "shards copied again": FaultKind(disk_faults.copy_shards, "none", restarts=False),
    "full disk": FaultKind(disk_faults.fill_disk, "disk", restarts=False, causes=CRASHES, may_end_job=True),
    "STOP and CONT of all ranks": FaultKind(faults.pause_all_ranks, "none", restarts=False),
    "KILL of slurmd": FaultKind(faults.restart_slurmd, "none", restarts=False),
    "KILL of slurmctld": FaultKind(faults.restart_slurmctld, "none", restarts=False),
    "loss of SLURM's state": FaultKind(faults.give_number_away, "kill", causes=STOPS + LOSSES, may_end_job=True),
    "interrupted submission": FaultKind(faults.interrupt_submission, "signal", causes=("cancelled",)),
    "a second job": FaultKind(faults.start_second_writer, "none", restarts=False),
    "several submissions": FaultKind(environment_faults.submit_many_times, "none", restarts=False),
    "drained node": FaultKind(faults.set_node_state("drain"), "none", restarts=False),
    "changed time limit": FaultKind(environment_faults.change_time_limit, "none", restarts=False),
    "requeue and hold": FaultKind(environment_faults.hold_requeued_job, "signal", causes=STOPS),
    "KILL of slurmctld in a requeue": FaultKind(
        environment_faults.restart_controller_during_requeue, "signal", causes=STOPS
    ),
    "a late rank": FaultKind(environment_faults.delay_one_rank, "none", restarts=False),
    "a late rank in the start": FaultKind(
        faults.during_start(environment_faults.delay_one_rank), "none", restarts=False
    ),
    "a traced rank": FaultKind(environment_faults.trace_one_rank, "none", restarts=False),
    "suspended job": FaultKind(environment_faults.suspend_job, "none", restarts=False),
    "cancelled step": FaultKind(environment_faults.cancel_step, "kill", causes=CRASHES),
    "copied run folder": FaultKind(environment_faults.use_copied_folder, "none", restarts=False),
    "no memory": FaultKind(environment_faults.limit_memory, "kill", None, CRASHES),
}

SINGLE: list[tuple[str, ...]] = [
    (kind,) for kind, about in KINDS.items() if about.loss != "damage" and "in the start" not in kind
]
COMBINED: list[tuple[str, ...]] = [
    ("flipped bit", "KILL of all ranks"),
    ("truncated part", "KILL of one rank"),
    ("no manifest", "KILL of one rank"),
    ("half-written save", "KILL of rank 0"),
    ("shards copied again", "KILL of one rank"),
    ("TERM to one rank", "KILL of one rank in the start"),
    ("requeue", "TERM to all ranks in the start"),
    ("USR1 to all ranks", "a rank left over in the start"),
    ("USR2 to one rank", "a late rank in the start"),
    ("requeue", "port in use in the start"),
]
REPEATED: list[tuple[str, ...]] = [
    (kind,)
    for kind in (
        "STOP and CONT of all ranks",
        "KILL of slurmd",
        "KILL of slurmctld",
        "half-written save",
        "STOP and CONT of all ranks",
        "KILL of slurmd",
    )
]
"""Faults without a restart, which take little time, are injected more than once per cycle."""
FAULT_GROUPS = SINGLE + COMBINED + REPEATED
"""The groups of one cycle: kinds that are injected one after the other."""
