"""How many processes a submission asks for, and for how long, read from sbatch's options."""

from __future__ import annotations

import re

from hpcssl.errors import ConfigError
from slurm import options

ELSEWHERE = ("ntasks", "ntasks-per-gpu", "ntasks-per-socket", "ntasks-per-core", "gpus-per-task")
"""Options by which a user leaves the number of tasks to SLURM."""

LOCAL = ("nodes", "ntasks", "ntasks-per-node", "gpus", "gpus-per-node", "time", "signal", "job-name", "chdir", "gres")
"""sbatch's options that mean something without SLURM."""

SIGNAL_S = 300
"""Seconds before the time limit at which a run is told to save, where a fifth of the limit is not less."""


NICE = "10000"
"""How far behind the training's priority the evaluations beside it stand."""


def gpus_per_node(sbatch: dict) -> int:
    """GPUs asked for on each node, from --gpus-per-node, --gres, or --gpus over --nodes; 0 where none is."""
    if "gpus-per-node" in sbatch:
        return _count(sbatch["gpus-per-node"])
    for item in str(sbatch.get("gres", "")).split(","):
        if _is_gpu(item):
            return _count(item)
    if "gpus" in sbatch:
        return max(1, _count(sbatch["gpus"]) // nodes(sbatch))
    return 0


def nodes(sbatch: dict) -> int:
    """The least number of nodes asked for."""
    text = str(sbatch.get("nodes", "1"))
    found = re.match(r"\d+", text)
    if not found or int(found[0]) == 0:
        raise ConfigError("option --nodes", got=repr(text), expected="a number of nodes", mend="write --nodes=2")
    return int(found[0])


def tasks_per_node(sbatch: dict) -> int | None:
    """Processes per node: --ntasks-per-node, else the GPUs per node, else 1; None where SLURM is to decide."""
    if "ntasks-per-node" in sbatch:
        return _count(sbatch["ntasks-per-node"], "ntasks-per-node")
    if any(name in sbatch for name in ELSEWHERE):
        return None
    return max(1, gpus_per_node(sbatch))


def processes(sbatch: dict) -> int | None:
    """Processes of the whole job; None where SLURM is to decide."""
    tasks = tasks_per_node(sbatch)
    return None if tasks is None or not str(sbatch.get("nodes", "1")).isdigit() else nodes(sbatch) * tasks


def local_tasks(sbatch: dict) -> int:
    """Processes on this machine. Raises ``ConfigError`` for more than one node."""
    if nodes(sbatch) > 1:
        raise ConfigError("option --nodes", got=sbatch["nodes"], expected="1 with --local", mend="leave out --local, "
                          "or ask for that many processes with --ntasks-per-node")
    if "ntasks" in sbatch and "ntasks-per-node" not in sbatch:
        return _count(sbatch["ntasks"], "ntasks")
    return tasks_per_node(sbatch) or max(1, gpus_per_node(sbatch))


def limit(sbatch: dict) -> int | None:
    """The time limit in seconds; None where the partition's own holds, or none."""
    return options.seconds(str(sbatch["time"])) if "time" in sbatch else None


def signal(sbatch: dict) -> tuple[str, int]:
    """The signal before the limit and its lead in seconds: 300, or a fifth of the limit where that is less."""
    name, lead = options.signal_of(str(sbatch["signal"])) if "signal" in sbatch else ("USR2", None)
    if lead is None:
        known = limit(sbatch)
        lead = SIGNAL_S if known is None else min(SIGNAL_S, max(1, known // 5))
    return name, lead


def evaluation(train: dict, given: dict) -> dict:
    """sbatch's options for an evaluation: the training's, for one task on one node, then what was given.

    Of the GPUs it keeps one of their type, and of other generic resources all; the training's dependency is met by
    then, its begin time is past, and a person who held it has let it go.
    """
    several = {"nodes", "ntasks", "ntasks-per-node", "gpus", "gpus-per-node", "gres", "gpus-per-socket",
               "gpus-per-task", "dependency", "begin", "deadline", "nodelist", "nodefile", "time-min", "switches",
               "hold", *ELSEWHERE}
    kept = {name: value for name, value in train.items() if name not in several}
    generic = str(train.get("gres", "")).split(",")
    if others := [item for item in generic if item and not _is_gpu(item)]:
        kept["gres"] = ",".join(others)
    asked = [train[k] for k in ("gpus-per-node", "gpus", "gpus-per-task", "gpus-per-socket") if k in train]
    asked += [item for item in generic if _is_gpu(item)]
    if asked and not any(name.startswith("gpus") or name == "gres" for name in given):
        kind = re.match(r"(?:(?:gres/)?gpu[:/])?([A-Za-z][\w.-]*)(?=:\d|$)", str(asked[0]))
        kept["gpus-per-node"] = f"{kind[1]}:1" if kind and kind[1] != "gpu" else "1"
    return kept | {"nodes": "1"} | given


def after(parent: str, sbatch: dict) -> dict:
    """The options with ``afterok:PARENT`` beside what a user wants to wait for. Raises ``ConfigError``."""
    theirs = str(sbatch.get("dependency", ""))
    if "?" in theirs:
        raise ConfigError("option --eval-sbatch --dependency", got=repr(theirs), expected="conditions that must all "
                          "hold, since the end of the training is one of them", mend="write commas instead of ?")
    return sbatch | {"dependency": ",".join([f"afterok:{parent}", *([theirs] if theirs else [])])}


def beside(sbatch: dict) -> dict:
    """The options of an evaluation beside the training, which the training's next attempt may overtake."""
    return {"nice": NICE} | sbatch


def _is_gpu(generic: str) -> bool:
    return re.split(r"[:/]", generic.removeprefix("gres/"))[0] == "gpu"


def _count(value: object, name: str = "gpus-per-node") -> int:
    found = re.search(r"(?:^|[:=])(\d+)(?:\(.*\))?$", str(value))
    if not found:
        if name == "gpus-per-node" and re.fullmatch(r"[A-Za-z][\w:/]*", str(value)):
            return 1  # a type alone asks for one
        raise ConfigError(f"option --{name}", got=repr(value), expected="a number", mend=f"write --{name}=4")
    return int(found[1])
