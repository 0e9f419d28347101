"""How many processes a job has, and for how long, according to its options of sbatch."""

from __future__ import annotations

import re

from hpcssl.errors import ConfigError
from slurm.backend import sbatch_options
from slurm.log.job_log import SbatchOptions

TASK_COUNT_OPTIONS = ("ntasks", "ntasks-per-gpu", "ntasks-per-socket", "ntasks-per-core", "gpus-per-task")
"""Options with which a user lets SLURM compute the number of tasks per node."""

LOCAL_OPTIONS = (
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "gpus",
    "gpus-per-node",
    "time",
    "signal",
    "job-name",
    "chdir",
    "gres",
)
"""Options of sbatch that ``--local`` does not report as ignored."""

SPARE_NODES = "spare-nodes"
"""``--spare-nodes`` of hpcssl-submit. It is kept among the options of sbatch, so that a successor has it as well."""

SIGNAL_LEAD_S = 300
"""Seconds before the time limit at which a job is signaled to save. For a short limit it is a fifth of the limit."""

CONCURRENT_NICE = "10000"
"""By how much the priority of evaluations during the training is below that of the training."""

NOT_INHERITED = {
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "gpus",
    "gpus-per-node",
    "gres",
    "gpus-per-socket",
    "gpus-per-task",
    "dependency",
    "begin",
    "deadline",
    "nodelist",
    "nodefile",
    "time-min",
    "switches",
    "hold",
    SPARE_NODES,
    *TASK_COUNT_OPTIONS,
}
"""Options of the training that its evaluations do not inherit: sizes, places, and conditions that are met by then."""


def count_gpus_per_node(sbatch: SbatchOptions) -> int:
    """Return the GPUs per node that ``--gpus-per-node``, ``--gres``, or ``--gpus`` over ``--nodes`` request; else 0.

    Raises:
        ConfigError: The value is not a number of GPUs.
    """
    if "gpus-per-node" in sbatch:
        return _parse_count(sbatch["gpus-per-node"])
    for item in str(sbatch.get("gres", "")).split(","):
        if _is_gpu(item):
            return _parse_count(item)
    if "gpus" in sbatch:
        return max(1, _parse_count(sbatch["gpus"]) // count_nodes(sbatch))
    return 0


def count_nodes(sbatch: SbatchOptions) -> int:
    """Return the smallest number of nodes that ``--nodes`` allows.

    Raises:
        ConfigError: The value is not a number of nodes.
    """
    text = str(sbatch.get("nodes", "1"))
    match = re.match(r"\d+", text)
    if not match or int(match[0]) == 0:
        raise ConfigError("option --nodes", got=repr(text), expected="a number of nodes", fix="write --nodes=2")
    return int(match[0])


def count_tasks_per_node(sbatch: SbatchOptions) -> int | None:
    """Return the processes per node: ``--ntasks-per-node``, else the GPUs per node, else 1.

    Returns:
        The number; None if SLURM computes it from other options.

    Raises:
        ConfigError: A value is not a number.
    """
    if "ntasks-per-node" in sbatch:
        return _parse_count(sbatch["ntasks-per-node"], "ntasks-per-node")
    if any(name in sbatch for name in TASK_COUNT_OPTIONS):
        return None
    return max(1, count_gpus_per_node(sbatch))


def count_spare_nodes(sbatch: SbatchOptions) -> int:
    """Return the nodes that ``--spare-nodes`` allocates besides those that run tasks.

    Raises:
        ConfigError: It is not a number; or the number of nodes, tasks or GPUs per node is left to SLURM, so that it is
            unknown which nodes are spare.
    """
    text = str(sbatch.get(SPARE_NODES, 0))
    if not text.isdigit():
        raise ConfigError(
            f"option --{SPARE_NODES}", got=repr(text), expected="a number of nodes", fix=f"write --{SPARE_NODES}=1"
        )
    spare = int(text)
    if spare and "gpus" in sbatch:
        raise ConfigError(
            f"option --{SPARE_NODES}",
            got=f"{spare}, with --gpus={sbatch['gpus']}, which counts the GPUs of all nodes",
            expected="a number of GPUs per node",
            fix="replace --gpus by --gpus-per-node",
        )
    if spare and count_processes(sbatch) is None:
        raise ConfigError(
            f"option --{SPARE_NODES}",
            got=f"{spare}, with a number of nodes or tasks that SLURM chooses",
            expected="fixed numbers of nodes and of tasks per node",
            fix="add --nodes=2 --ntasks-per-node=8, with your numbers, or leave out --spare-nodes",
        )
    return spare


def count_processes(sbatch: SbatchOptions) -> int | None:
    """Return the processes of the whole job; None if SLURM computes it, or may choose the number of nodes."""
    tasks = count_tasks_per_node(sbatch)
    return None if tasks is None or not str(sbatch.get("nodes", "1")).isdigit() else count_nodes(sbatch) * tasks


def count_local_tasks(sbatch: SbatchOptions) -> int:
    """Return the processes of a local job.

    Raises:
        ConfigError: More than one node is requested.
    """
    if count_nodes(sbatch) > 1:
        raise ConfigError(
            "option --nodes",
            got=sbatch["nodes"],
            expected="1 with --local",
            fix="leave out --local, or request that many processes with --ntasks-per-node",
        )
    if "ntasks" in sbatch and "ntasks-per-node" not in sbatch:
        return _parse_count(sbatch["ntasks"], "ntasks")
    return count_tasks_per_node(sbatch) or max(1, count_gpus_per_node(sbatch))


def get_time_limit(sbatch: SbatchOptions) -> int | None:
    """Return the time limit in seconds; None for the default of the partition, or for no limit."""
    return sbatch_options.parse_time(str(sbatch["time"])) if "time" in sbatch else None


def get_warning_signal(sbatch: SbatchOptions) -> tuple[str, int]:
    """Return the signal that announces the time limit, and how many seconds before the limit it is sent.

    By default that is USR2, 300 seconds before the limit, or a fifth of the limit if that is less.
    """
    name, lead = sbatch_options.parse_signal(str(sbatch["signal"])) if "signal" in sbatch else ("USR2", None)
    if lead is None:
        limit = get_time_limit(sbatch)
        lead = SIGNAL_LEAD_S if limit is None else min(SIGNAL_LEAD_S, max(1, limit // 5))
    return name, lead


def derive_evaluation_options(train: SbatchOptions, overrides: SbatchOptions) -> SbatchOptions:
    """Return the options of an evaluation's job: the training's, reduced to one task on one node, then ``overrides``.

    Of the training's GPUs the evaluation keeps one of the same type; it keeps all other generic resources.

    Args:
        train: The options of the training.
        overrides: The options of ``--eval-sbatch``.
    """
    options = {name: value for name, value in train.items() if name not in NOT_INHERITED}
    generic = str(train.get("gres", "")).split(",")
    if others := [item for item in generic if item and not _is_gpu(item)]:
        options["gres"] = ",".join(others)
    gpu_names = ("gpus-per-node", "gpus", "gpus-per-task", "gpus-per-socket")
    requests = [str(train[name]) for name in gpu_names if name in train]
    requests += [item for item in generic if _is_gpu(item)]
    if requests and not any(name.startswith("gpus") or name == "gres" for name in overrides):
        gpu_type = re.match(r"(?:(?:gres/)?gpu[:/])?([A-Za-z][\w.-]*)(?=:\d|$)", requests[0])
        options["gpus-per-node"] = f"{gpu_type[1]}:1" if gpu_type and gpu_type[1] != "gpu" else "1"
    return options | {"nodes": "1"} | overrides


def add_dependency(parent: str, sbatch: SbatchOptions) -> SbatchOptions:
    """Return the options with the dependency ``afterok:PARENT``, besides the user's own dependencies.

    Raises:
        ConfigError: The user's own are alternatives (``?``), which cannot be combined with a condition that must hold.
    """
    own = str(sbatch.get("dependency", ""))
    if "?" in own:
        raise ConfigError(
            "option --eval-sbatch --dependency",
            got=repr(own),
            expected="conditions that must all hold, since the end of the training is one of them",
            fix="write commas instead of ?",
        )
    return sbatch | {"dependency": ",".join([f"afterok:{parent}", *([own] if own else [])])}


def lower_priority(sbatch: SbatchOptions) -> SbatchOptions:
    """Return the options of an evaluation during the training: the training's next attempt is scheduled before it."""
    return {"nice": CONCURRENT_NICE, **sbatch}


def _is_gpu(generic: str) -> bool:
    return re.split(r"[:/]", generic.removeprefix("gres/"))[0] == "gpu"


def _parse_count(value: object, name: str = "gpus-per-node") -> int:
    match = re.search(r"(?:^|[:=])(\d+)(?:\(.*\))?$", str(value))
    if not match:
        if name == "gpus-per-node" and re.fullmatch(r"[A-Za-z][\w:/]*", str(value)):
            return 1  # a type without a number requests one
        raise ConfigError(
            f"option --{name}", got=repr(value), expected="a number", fix=f"write a number, such as --{name}=4"
        )
    return int(match[1])
