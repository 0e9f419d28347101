"""Which nodes the attempts of a run blame, and which of them its next attempt avoids.

A node is blamed if the watchdog names it for a hang, if SLURM lost it, or if its replica of the model differs from that
of most others, as after a wrong all-reduce. A rank that was only killed blames no node: its memory limit, for example,
would be the same elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from hpcssl.run_dir import RunDir
from slurm.log import job_log
from slurm.log.attempts import Attempt, read_attempts

MAX_NODES = 8
MAX_SHARE = 0.1
"""At most this many nodes, and this share of the nodes of their kind, are avoided; but one in any case."""


def find_blamed_nodes(attempt: Attempt) -> list[str]:
    """Return the nodes that are to blame for the end of an attempt, each once."""
    from hpcssl.distributed.liveness import hang_report

    if attempt.cause == "node_fail":
        match = re.fullmatch(r"lost (.+)", attempt.error)
        return match[1].split(" and ") if match else []
    differing, separator, _ = attempt.error.partition(" with other bits than the rest")
    if separator:  # of hpcssl.train.replicas; "with different bits" names all nodes
        return list(dict.fromkeys(re.findall(r"\brank \d+ on ([^\s,]+)", differing)))
    return hang_report.named_nodes(attempt.error) if attempt.cause == "hang" else []


def list_blamed_nodes(run: RunDir, what: str) -> dict[str, str]:
    """Return the nodes that attempts of a run have blamed, the latest first, with the reason.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
    """
    blamed: dict[str, str] = {}
    for attempt in reversed(read_attempts(run, what)):
        for node in find_blamed_nodes(attempt):
            blamed.setdefault(node, f"{attempt.cause} in attempt {attempt.number}")
    return blamed


def max_avoided(alike: int) -> int:
    """Return how many nodes are avoided at most, of so many nodes of their kind."""
    return min(MAX_NODES, max(1, int(alike * MAX_SHARE)))


def record(run: RunDir, what: str, job: str, nodes: Mapping[str, str]) -> None:
    """Record the nodes that a job avoids from now on, with the reasons."""
    why = "; ".join(f"{node}: {reason}" for node, reason in nodes.items())
    job_log.record_event(run, "avoid", job, what=what, nodes=list(nodes), why=why)


def describe(run: RunDir, what: str = job_log.TRAIN) -> str:
    """Return which nodes the newest job avoids, as a hint for ``status``; empty if none."""
    job = job_log.latest_jobs(run).get(what)
    events = [line for line in job_log.read_events(run, "avoid", job.id) if line["what"] == what] if job else []
    if job is None or not events:
        return ""
    return (
        f"job {job.id} avoids {events[-1]['why']}; `scontrol update jobid={job.id} ExcNodeList=` allows them again "
        "while it is pending"
    )
