"""What a user should know or do about a job, by SLURM's reason for its state.

The names of the reasons are those of SLURM 22.05 and newer (``job_state_reason_string``). Reasons that pass by
themselves and that every user of a cluster knows, such as Priority and Resources, have no hint.
"""

from __future__ import annotations

_SUBMIT_SMALLER = "it never starts: `scancel {job}`, then submit with"

HINTS = {
    "launch failed requeued held": "a node could not start the step: check the node, then run `scontrol release {job}`",
    "job requeued in held state": "read the logs, then run `scontrol release {job}`",
    "jobholdmaxrequeue": "SLURM could not start it several times: read the logs, then run `scontrol release {job}`",
    "dependencyneversatisfied": "the job that it depends on did not succeed: fix that and submit again, after "
    "`scancel {job}` if it is still in the queue",
    "jobhelduser": "run `scontrol release {job}`",
    "jobheldadmin": "ask the administrators why they hold it",
    "nodedown": "it lost a node: submit again with the same command to continue",
    "begintime": "it was requeued and starts by itself, after about two minutes",
    "preempted": "its partition cancels the jobs that it preempts: submit again with the same command to continue",
    "partitionnodelimit": "it requests more nodes than its partition allows, or fewer than it requires, and "
    + _SUBMIT_SMALLER
    + " other --nodes or another --partition",
    "partitiontimelimit": f"its time limit is above that of its partition, and {_SUBMIT_SMALLER} a shorter --time or "
    "another --partition",
    "partitionconfig": "no node of its partition has as many CPUs, GPUs or as much memory as it requests per node, and "
    + _SUBMIT_SMALLER
    + " fewer tasks per node or another --partition",
    "badconstraints": "no node has what it requests (--constraint, --gres, sizes per node), and "
    + _SUBMIT_SMALLER
    + " options that `sinfo -o '%P %f %G %c %m'` shows",
    "partitiondown": "its partition starts no jobs at the moment: wait, or move it with "
    "`scontrol update jobid={job} partition=NAME`",
    "partitioninactive": "its partition starts no jobs at the moment: wait, or move it with "
    "`scontrol update jobid={job} partition=NAME`",
    "reqnodenotavail": "nodes that it needs are down, or reserved during its time limit: wait (`sinfo -R`, "
    "`scontrol show reservation`), or submit again without --nodelist or with a shorter --time",
    "nodes required for job are down": "nodes that it needs are down, drained or reserved: it starts when they are "
    "back; `sinfo -R` says why",
    "maxwalldurationperjoblimit": f"its time limit is above that of its QOS or account, and {_SUBMIT_SMALLER} a "
    "shorter --time",
    "perjoblimit": f"it requests more than its QOS or account allows for one job, and {_SUBMIT_SMALLER} fewer nodes or "
    "another --qos",
    "invalidaccount": "its account is not valid: run `scontrol update jobid={job} account=NAME`",
    "invalidqos": "its QOS is not valid: run `scontrol update jobid={job} qos=NAME`",
    "accountnotallowed": "its account may not use this partition: run `scontrol update jobid={job} account=NAME`",
    "qosnotallowed": "its QOS may not be used in this partition: run `scontrol update jobid={job} qos=NAME`",
}
"""The hints; the first that matches counts."""


def find_hint(reason: str, job: str, state: str = "") -> str:
    """Return what a user should know or do; empty if nothing.

    Args:
        reason: SLURM's reason, as ``scontrol`` or ``squeue`` writes it.
        job: The job id, for the commands.
        state: The name of the job's state.
    """
    words = reason.replace("_", " ").lower() + " preempted" * (state == "PREEMPTED")
    return next((hint.format(job=job) for key, hint in HINTS.items() if key in words), "")
