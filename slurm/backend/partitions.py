"""Limits of partitions, checked before a submission: SLURM queues a job that is beyond them, and never starts it.

``sbatch --test-only`` does not serve: it accepts a time limit beyond that of the partition, and refuses a job whose
nodes are drained at the moment but will come back (measured, SLURM 22.05).
"""

from __future__ import annotations

import os
import re

from hpcssl.errors import ConfigError, suggest
from slurm.backend import resources, sbatch_options, scheduler
from slurm.log.job_log import SbatchOptions


def check_limits(sbatch: SbatchOptions, prefix: str = "") -> None:
    """Check that a job with these options can start some day, in one of the partitions that it names.

    What depends on the moment, such as nodes that are down, is not checked. Nothing is checked if SLURM does not
    answer, or the job may run on more than one cluster.

    Args:
        sbatch: Options of sbatch.
        prefix: What stands before an option on the command line, such as ``--eval-sbatch ``, for the message.

    Raises:
        ConfigError: There is no such partition, or the job requests more nodes or time than it allows.
    """
    cluster = str(sbatch.get("clusters", ""))
    answer = scheduler.run_command("scontrol", "-a", "show", "partition", "-o", cluster=cluster or None)
    partitions = [dict(re.findall(r"([A-Z]\w*)=(\S*)", line)) for line in answer.stdout.splitlines()]
    if answer.returncode or "," in cluster or not partitions:
        return
    names = os.environ.get("SBATCH_PARTITION") or sbatch.get("partition")
    requested = (
        str(names).split(",") if names else [p["PartitionName"] for p in partitions if p.get("Default") == "YES"]
    )
    known = {partition["PartitionName"]: partition for partition in partitions}
    if unknown := [name for name in requested if name not in known]:
        raise ConfigError(
            f"option {prefix}--partition",
            got=repr(unknown[0]),
            expected="a partition of this cluster",
            fix=suggest(unknown[0], known),
        )
    problems = [_find_problem(known[name], sbatch, prefix) for name in requested]
    if problems and all(problems):  # the job runs in whichever of its partitions can start it
        raise next(problem for problem in problems if problem)


def _find_problem(partition: dict[str, str], sbatch: SbatchOptions, prefix: str) -> ConfigError | None:
    name, nodes = partition["PartitionName"], resources.count_nodes(sbatch) + resources.count_spare_nodes(sbatch)
    limits = [partition.get("TotalNodes", "")]
    has_qos = "qos" in sbatch or partition.get("QoS", "N/A") != "N/A"  # it may allow more than the partition
    if not has_qos:
        limits.append(partition.get("MaxNodes", ""))
    most = min((int(limit) for limit in limits if limit.isdigit()), default=nodes)
    if nodes > most:
        return ConfigError(
            f"option {prefix}--nodes",
            got=f"{nodes} with the spare ones" if resources.SPARE_NODES in sbatch else nodes,
            expected=f"at most {most}, the limit of partition {name}",
            fix="request fewer nodes, or name another --partition",
        )
    text = str(sbatch.get("time-min") or sbatch.get("time") or "")
    seconds, longest = (sbatch_options.parse_time(t) if t else None for t in (text, partition.get("MaxTime", "")))
    if text and longest is not None and not has_qos and (seconds is None or seconds > longest):
        return ConfigError(
            f"option {prefix}--time",
            got=text,
            expected=f"at most {partition['MaxTime']}, the limit of partition {name}",
            fix="request less time (the run continues in the next attempt), or name another --partition",
        )
    return None
