"""Which nodes of an allocation with spare ones run the tasks.

``python -m slurm.job.step_nodes RUN WHAT NODES TASKS`` prints the arguments of srun. SLURM takes a lost node out of an
allocation that was made with ``--no-kill``; a node that no longer answers is still in it for a while.
"""

from __future__ import annotations

import math
import sys

from hpcssl.run_dir import RunDir
from slurm.backend import scheduler
from slurm.backend.owner import current_token
from slurm.log import attempts, avoided_nodes


def find_usable_nodes(job: str) -> list[str]:
    """Return the nodes that a running job has now, without those that are down or do not answer."""
    nodes = scheduler.list_nodes(job)
    down = scheduler.find_lost_nodes(",".join(nodes), math.inf)
    return [node for node in nodes if node not in down]


def find_blamed_nodes(run: RunDir, what: str) -> list[str]:
    """Return the nodes that are named as the cause of a crash in the current job.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
    """
    from hpcssl.distributed.liveness import hang_report

    job, restart = scheduler.current_job()
    allocation = (job, current_token(), restart)
    own = [a for a in attempts.read_attempts(run, what) if (*a.job_key, a.restart) == allocation]
    crashes = [attempt for attempt in own if attempt.is_crash]
    named = [node for attempt in crashes for node in hang_report.named_nodes(attempt.error)]
    return named + [node for attempt in crashes for node in avoided_nodes.find_blamed_nodes(attempt)]


def format_arguments(run: RunDir, what: str, count: int, tasks: int) -> str:
    """Return the arguments of srun: the first usable nodes, and those last that were blamed for a crash.

    Without enough usable nodes the choice is left to SLURM, which reports the error.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
        count: How many nodes run tasks.
        tasks: The number of tasks.
    """
    blamed = find_blamed_nodes(run, what)
    usable = sorted(find_usable_nodes(scheduler.current_job()[0]), key=lambda node: node in blamed)
    chosen = usable[:count]
    words = [f"--nodes={count}", f"--ntasks={tasks}"]
    return " ".join(words + ([f"--nodelist={','.join(chosen)}"] if len(chosen) == count else []))


if __name__ == "__main__":
    sys.stdout.write(format_arguments(RunDir(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
