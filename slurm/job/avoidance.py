"""The next attempt avoids nodes that earlier ones blame (``slurm.log.avoided_nodes``).

SLURM changes the excluded nodes of pending jobs only. Right after a granted requeue, while the job's processes still
end, it accepts the change (measured, SLURM 22.05: the job then ran on another node).
"""

from __future__ import annotations

import contextlib
import math
import os
import re

from hpcssl.cli_runner import print_message
from hpcssl.errors import HpcsslError
from hpcssl.run_dir import RunDir
from hpcssl.signals import hold_signals
from slurm.backend import batch_script, resources, scheduler
from slurm.log import avoided_nodes, job_log
from slurm.log.job_log import SbatchOptions

FIXED_NODES = ("nodelist", "nodefile", "reservation", "clusters")
"""Options with which it is unknown whether another node could take the place of a blamed one."""
UNUSABLE = r"(?i)down|drain|drng|fail|maint|resv|reserved|unk|boot|power|\*"


def choose_nodes(run: RunDir, what: str, options: SbatchOptions, lost: list[str] | None = None) -> dict[str, str]:
    """Return the blamed nodes that the next attempt should avoid, with the reasons.

    Only as many are avoided as others of the same kind (CPUs, memory, GPUs, features) can replace; nothing is avoided
    if that is not known.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
        options: The job's options of sbatch.
        lost: Nodes that were lost just now, which no record names yet.
    """
    blamed = dict.fromkeys(lost or [], "node_fail") | avoided_nodes.list_blamed_nodes(run, what)
    if not blamed or any(name in options for name in FIXED_NODES):
        return {}
    kinds, usable = _list_kinds(str(options.get("partition") or os.environ.get("SLURM_JOB_PARTITION", "")))
    excluded = set(_list_excluded(options))
    needed = resources.count_nodes(options) + resources.count_spare_nodes(options)
    chosen: dict[str, str] = {}
    for kind in dict.fromkeys(kinds[node] for node in blamed if node in kinds):
        alike = {node for node in kinds if kinds[node] == kind and node not in excluded}
        left = len(alike & usable)
        most = avoided_nodes.max_avoided(len(alike))
        for node in [node for node in blamed if node in alike][:most]:
            if node in usable and left <= needed:
                continue
            left -= node in usable
            chosen[node] = blamed[node]
    return dict(list(chosen.items())[: avoided_nodes.MAX_NODES])


def requeue_and_exclude(run: RunDir, what: str, job: str, lost: str = "") -> str | None:
    """Ask SLURM to requeue the job, and let the next attempt avoid the nodes that earlier ones blame.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
        job: Id of the job that this process belongs to.
        lost: The nodes of the attempt, as SLURM writes them, if it ended by the loss of a node; else empty.

    Returns:
        None if SLURM requeues the job, else its reason.
    """
    nodes = find_nodes(run, what, lost)
    if not nodes:
        return scheduler.request_requeue(job)
    with hold_signals():  # the requeue brings TERM to this process
        refusal = scheduler.request_requeue(job)
        if refusal is None:
            exclude(run, what, job, nodes)
    return refusal


def find_nodes(run: RunDir, what: str, lost: str = "", options: SbatchOptions | None = None) -> dict[str, str]:
    """Return what ``choose_nodes`` does; empty after an error, which must not cost an attempt.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
        lost: See ``requeue_and_exclude``.
        options: The job's options of sbatch; by default those of the newest job.
    """
    with contextlib.suppress(HpcsslError, OSError):
        if options is None:
            recorded = job_log.latest_jobs(run).get(what)
            options = recorded.options if recorded is not None else {}
        return choose_nodes(run, what, options, scheduler.find_lost_nodes(lost, math.inf) if lost else [])
    return {}


def exclude(run: RunDir, what: str, job: str, nodes: dict[str, str]) -> None:
    """Make a job that was just requeued avoid nodes, and record it. Where SLURM refuses, a message says so.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
        job: The job id. The job is pending, or its processes still end.
        nodes: The nodes, with the reasons; nothing happens without any.
    """
    if not nodes:
        return
    recorded = job_log.latest_jobs(run).get(what)
    text = str(batch_script.add_excluded(recorded.options if recorded is not None else {}, nodes)["exclude"])
    answer = scheduler.run_command("scontrol", "update", f"jobid={job}", f"ExcNodeList={text}")
    if answer.returncode:
        print_message(f"the next attempt may run on {', '.join(nodes)} again: {' '.join(answer.stderr.split())[:200]}")
        return
    with contextlib.suppress(OSError):
        avoided_nodes.record(run, what, job, nodes)


def _list_excluded(options: SbatchOptions) -> list[str]:
    return scheduler.expand_nodes(str(options["exclude"])) if "exclude" in options else []


def _list_kinds(partition: str) -> tuple[dict[str, tuple[str, ...]], set[str]]:
    """What each node of a partition, or of the default one, has; and which nodes are usable."""
    where = ["-p", partition] if partition else []
    text = scheduler.run_command("sinfo", "-h", "-N", *where, "-o", "%N|%T|%P|%c|%m|%G|%f").stdout
    rows = [line.strip().split("|") for line in text.splitlines()]
    rows = [row for row in rows if len(row) == 7 and (partition or row[2].endswith("*"))]
    usable = {row[0] for row in rows if not re.search(UNUSABLE, row[1])}
    return {row[0]: tuple(row[3:]) for row in rows}, usable
