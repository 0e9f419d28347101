"""The kinds of faults that the soak knows, what may be lost by each, and in which company they come."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import chaos_faults as faults
from benchmarks.chaos_plan import Fault
from benchmarks.chaos_scene import Scene


@dataclass(frozen=True)
class Kind:
    """``lost``: whose measure the steps lost fall under: ``signal`` none may be lost, ``kill`` those since the last
    checkpoint, ``damage`` those since the one before. ``restarts``: another attempt must follow; None: it may.
    ``causes``: how the attempt may end in the record. ``ends``: SLURM may drop the job, so that somebody has to submit
    again."""

    strike: Callable[[Scene, Fault], str]
    lost: str
    restarts: bool | None = True
    causes: tuple[str, ...] = ()
    ends: bool = False


STOPS = ("stopped", "preempted", "timeout")
CRASHES = ("error", "killed", "lost", "node_fail", "hang")
TERM, USR1, USR2 = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2

KINDS: dict[str, Kind] = {
    "TERM to one rank": Kind(faults.to_one(TERM), "signal", causes=STOPS),
    "USR1 to one rank": Kind(faults.to_one(USR1), "signal", causes=STOPS),
    "USR2 to one rank": Kind(faults.to_one(USR2), "signal", causes=STOPS),
    "TERM to all ranks": Kind(faults.to_all(TERM), "signal", causes=STOPS),
    "USR1 to all ranks": Kind(faults.to_all(USR1), "signal", causes=STOPS),
    "USR2 to all ranks": Kind(faults.to_all(USR2), "signal", causes=STOPS),
    "TERM to one rank, twice": Kind(faults.to_one(TERM, 2), "signal", causes=STOPS),
    "USR2 to all ranks, twice": Kind(faults.to_all(USR2, 2), "signal", causes=STOPS),
    "TERM during a save": Kind(faults.in_a_save(faults.to_one(TERM)), "signal", causes=STOPS),
    "preemption": Kind(faults.preemption, "signal", causes=STOPS),
    "requeue": Kind(faults.requeue, "signal", causes=STOPS),
    "walltime": Kind(faults.walltime, "signal", causes=STOPS),
    "node down": Kind(faults.node_down, "kill", causes=STOPS + CRASHES),
    "KILL of one rank": Kind(faults.to_one(signal.SIGKILL), "kill", causes=CRASHES),
    "KILL of rank 0": Kind(faults.to_rank_zero, "kill", causes=CRASHES),
    "KILL of all ranks": Kind(faults.to_all(signal.SIGKILL), "kill", causes=CRASHES),
    "STOP of one rank": Kind(faults.to_one(signal.SIGSTOP), "kill", causes=("hang",)),
    "KILL during a save": Kind(faults.in_a_save(faults.to_one(signal.SIGKILL)), "kill", causes=CRASHES),
    "USR2 to srun": Kind(faults.to_process("srun", USR2), "signal", causes=STOPS),
    # srun kills its step at once when it gets TERM, which no preemption sends it
    "TERM to srun": Kind(faults.to_process("srun", TERM), "kill", causes=STOPS + CRASHES),
    "TERM to the batch script": Kind(faults.to_process("slurm_script", TERM), "signal", restarts=False, causes=STOPS),
    "KILL of srun": Kind(faults.to_process("srun"), "kill", causes=STOPS + CRASHES),
    # a batch script whose slurmstepd was killed before dies unseen
    "KILL of the batch script": Kind(faults.to_process("slurm_script"), "kill", None, STOPS + CRASHES),
    "KILL of slurmstepd": Kind(faults.to_process("slurmstepd:"), "kill", None, STOPS + CRASHES, ends=True),
    # a rank that has not yet come to hold signals back dies of the TERM that follows, whose code hides the other's
    "KILL of one rank in the start": Kind(faults.in_the_start(faults.to_one(signal.SIGKILL)), "signal",
                                          causes=STOPS + CRASHES),
    "TERM to all ranks in the start": Kind(faults.in_the_start(faults.to_all(TERM)), "signal", causes=STOPS),
    "a rank left over in the start": Kind(faults.in_the_start(faults.stranger), "none", restarts=False),
    "flipped bit": Kind(faults.flip, "damage", restarts=False),
    "truncated part": Kind(faults.truncate, "damage", restarts=False),
    "no manifest": Kind(faults.no_manifest, "damage", restarts=False),
    "half-written save": Kind(faults.half_written, "none", restarts=False),
    "full disk": Kind(faults.full_disk, "disk", restarts=False, causes=CRASHES, ends=True),
    "STOP and CONT of all ranks": Kind(faults.stop_and_continue, "none", restarts=False),
    "KILL of slurmd": Kind(faults.slurmd, "none", restarts=False),
    "KILL of slurmctld": Kind(faults.slurmctld, "none", restarts=False),
    "a second job": Kind(faults.second_job, "none", restarts=False),
}

ALONE = [(kind,) for kind, about in KINDS.items() if about.lost != "damage" and "in the start" not in kind]
TOGETHER = [
    ("flipped bit", "KILL of all ranks"),
    ("truncated part", "KILL of one rank"),
    ("no manifest", "KILL of one rank"),
    ("half-written save", "KILL of rank 0"),
    ("TERM to one rank", "KILL of one rank in the start"),
    ("requeue", "TERM to all ranks in the start"),
    ("USR1 to all ranks", "a rank left over in the start"),
]
OFTEN = [(kind,) for kind in ("STOP and CONT of all ranks", "KILL of slurmd", "KILL of slurmctld", "half-written save",
                              "STOP and CONT of all ranks", "KILL of slurmd")]
"""What needs no restart comes more than once per cycle."""
BOUTS: list[tuple[str, ...]] = ALONE + TOGETHER + OFTEN
