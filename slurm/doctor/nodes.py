"""What the results of the job's nodes mean: folder, clocks, network, and what is checked between them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hpcssl.errors import format_bytes
from slurm.doctor.findings import BROKEN, NOTE, OK, SKIPPED, WARNING, Finding
from slurm.doctor.job import JobResult

MAX_SKEW_S = 5.0
"""Largest difference between two clocks. The times of nodes are compared with those that SLURM reports."""
MIN_LOCAL_BYTES = 1e9

Record = dict[str, Any]


def judge_start(result: JobResult, nodes: int, wait_minutes: float) -> list[Finding]:
    """Judge whether the job has started on all nodes.

    Args:
        result: What the job has reported.
        nodes: The number of nodes that were requested.
        wait_minutes: How long its start was waited for.
    """
    started, state = {record["node"] for record in result.find("start")}, result.state
    if not result.started:
        fix = state.hint or "wait longer with --wait-minutes, or request another partition, fewer --nodes or less time"
        got = f"job {result.job} did not start within {wait_minutes:g} minutes: {state.name} ({state.reason or '-'})"
        return [Finding("job", BROKEN, f"{got}; it was cancelled", "a job that starts", fix)]
    if not started:
        got = f"job {result.job} ended as {state.name} with exit code {state.exit_code}, and no node has reported"
        log = f"; its output ends with: {result.log}" if result.log else ", and there is no output"
        fix = (
            "read the output; use an interpreter that the nodes have (python: in the cluster profile)"
            if result.log
            else "put --folder on a file system that all nodes mount and can write"
        )
        return [Finding("job", BROKEN, got + log, "a report of every node", fix)]
    if len(started) < nodes:
        got = f"{len(started)} of {nodes} nodes have reported ({', '.join(sorted(started))}); {result.log}"
        return [Finding("job", BROKEN, got, "a report of every node", "look at the other nodes with `sinfo -R`")]
    return [Finding("job", OK, f"it ran on {', '.join(sorted(started))}")]


def judge_folder(result: JobResult) -> list[Finding]:
    """Judge the folder: every node sees the login node's file and the files of the others; locks and renames work."""
    failed = {r["node"]: r.get("failure", "other content") for r in result.find("folder") if not r.get("same")}
    if failed:
        got = "; ".join(f"{node}: {failure}" for node, failure in sorted(failed.items()))
        fix = "use a folder that these nodes mount and can write (--folder), or have the mount repaired there"
        return [Finding("folder on nodes", BROKEN, got, "every node reads and writes it", fix)]
    unseen = [f"{r['node']} sees no file of task {r['missing']}" for r in result.find("shared") if r["missing"]]
    if unseen:
        fix = "use a shared file system, and mount it with a cache of attributes of a few seconds at most (acdirmax)"
        return [Finding("folder on nodes", BROKEN, "; ".join(unseen), "files of other nodes within 20 s", fix)]
    return [Finding("folder on nodes", OK, "every node sees the files of the others"), *_judge_between_nodes(result)]


def _judge_between_nodes(result: JobResult) -> list[Finding]:
    findings = []
    locks = [r for r in result.find("lock") if (r["while_held"], r["after"]) != ("held", "free")]
    if locks:
        got = "; ".join(f"{r['node']}: while another node held the lock it was {r['while_held']}" for r in locks)
        fix = "mount the file system with locks between nodes (Lustre: -o flock; NFS: without nolock and local_lock)"
        findings.append(Finding("locks between nodes", BROKEN, got, "held, then free", fix))
    elif result.find("lock"):
        findings.append(Finding("locks between nodes", OK, "a lock of one node holds on the others"))
    renames = [r for r in result.find("rename") if r["torn"] or not r["newest"]]
    if renames:
        got = "; ".join(f"{r['node']}: {r['torn'] or 'an old version after 20 s'}" for r in renames)
        fix = "use a file system with atomic renames for runs, not an object store that is mounted as a folder"
        findings.append(Finding("renames between nodes", BROKEN, got, "the old file or the new one, whole", fix))
    elif result.find("rename"):
        findings.append(Finding("renames between nodes", OK, "a file that is replaced was always read whole"))
    return findings


def judge_clocks(result: JobResult) -> list[Finding]:
    """Judge the clocks of the nodes against that of the login node, and against each other.

    The login node wrote a tick before a node read it, and read a result after the node had written it: the difference
    of the clocks lies between the two.
    """
    wrong = {}
    for node in sorted({r["node"] for r in result.find("clock")}):
        own = [r for r in result.records if r["node"] == node and r["check"] not in ("restarted", "unreadable")]
        least = max((r["ahead_s"] for r in own if r.get("ahead_s") is not None), default=float("-inf"))
        most = min(r["seen"] - r["time"] for r in own)
        if least > MAX_SKEW_S or most < -MAX_SKEW_S:
            wrong[node] = f"{node} is {least:.0f} s behind" if least > MAX_SKEW_S else f"{node} is {-most:.0f} s ahead"
    for r in result.find("network"):
        if "offset" in r and abs(r["offset"]) - r["error"] > MAX_SKEW_S and not {r["node"], r["peer"]} & set(wrong):
            wrong[r["node"]] = f"the clocks of {r['node']} and {r['peer']} differ by {abs(r['offset']):.1f} s"
    if wrong:
        fix = "synchronize the clocks of these nodes (chronyd or ntpd); munge refuses messages at 300 s"
        return [Finding("clock", BROKEN, "; ".join(wrong.values()), f"at most {MAX_SKEW_S:g} s", fix)]
    if not result.find("clock"):
        return [Finding("clock", SKIPPED, "the nodes do not see the folder")]
    pairs = [abs(r["offset"]) + r["error"] for r in result.find("network") if "offset" in r]
    between = f"; between nodes at most {max(pairs):.3f} s" if pairs else ""
    return [Finding("clock", OK, f"less than {MAX_SKEW_S:g} s apart from this node{between}")]


def judge_network(result: JobResult) -> list[Finding]:
    """Judge whether the nodes reach each other by the addresses that SLURM knows, and at which interface."""
    if failed := result.find("scontrol"):
        got = "; ".join(f"{r['node']}: {r['failure']}" for r in failed)
        fix = "make scontrol, slurm.conf and the munge socket available on the nodes, also inside a container"
        return [Finding("scontrol on nodes", BROKEN, got, "an answer of SLURM", fix)]
    links = result.find("network")
    closed = [f"{r['node']} to {r['peer']} ({r['address']}): {r['failure']}" for r in links if "failure" in r]
    closed += [f"{r['node']} to {r['peer']}, fixed port: {r['rendezvous']}" for r in links if r.get("rendezvous")]
    if closed:
        fix = (
            "open TCP ports 10000-29999 and those of sysctl net.ipv4.ip_local_port_range between the "
            "nodes, or name another network with interface: in the cluster profile"
        )
        return [Finding("ports between nodes", BROKEN, "; ".join(closed[:4]), "TCP connections", fix)]
    if not links:
        text = "only one node" if len({r["node"] for r in result.find("start")}) == 1 else "no node saw the others"
        return [Finding("ports between nodes", SKIPPED, text)]
    names = sorted({name for r in links for name in r["interface"]})
    other = sorted({name for r in links for name in r["also"]} - set(names))
    extra = f"; also reachable by {', '.join(other)}" if other else ""
    return [Finding("ports between nodes", OK, f"open, over {', '.join(names) or 'an unknown interface'}{extra}")]


def judge_signals(result: JobResult) -> list[Finding]:
    """Judge whether signals to a step, and the warning of the time limit, reach the tasks."""
    records = result.find("signals")
    if not records:
        return [Finding("signals", SKIPPED, "the job did not get that far")]
    findings = []
    refused = next((r["refused"] for r in records if r["refused"]), "")
    missing = [r["node"] for r in records if "SIGUSR1" not in r["after"]]
    if missing:
        got = f"SIGUSR1 to the step did not reach {', '.join(missing)}" + (f": {refused}" if refused else "")
        fix = "make scancel work on the nodes, and start the tasks without a wrapper that keeps signals from them"
        findings.append(Finding("signals", BROKEN, got, "`scancel --signal` reaches every task", fix))
    else:
        findings.append(Finding("signals", OK, "`scancel --signal` reaches every task"))
    missing = [r["node"] for r in records if "SIGUSR2" not in r["after"]]
    if missing:
        got = f"the warning of --signal did not reach {', '.join(missing)} within 75 s"
        fix = "ask whether a submit plugin removes --signal; else give the run a --time that it does not reach"
        findings.append(Finding("warning signal", BROKEN, got, "SIGUSR2 before the time limit", fix))
    else:
        latest = max(r["after"]["SIGUSR2"] for r in records)
        findings.append(Finding("warning signal", OK, f"--signal reached every task, {latest:.0f} s after the start"))
    return findings


def judge_requeue(result: JobResult) -> list[Finding]:
    """Judge whether a job can requeue itself, and starts again."""
    answers = result.find("requeue")
    if not answers:
        return [Finding("requeue", SKIPPED, "the job did not get that far")]
    if refused := answers[0]["refused"]:
        fix = (
            "ask for JobRequeue=1, or why a submit plugin removes --requeue. Until then another job continues each "
            "run, and waits in the queue again"
        )
        return [Finding("requeue", WARNING, f"SLURM refused: {refused}", "a requeue from inside the job", fix)]
    if result.requeue_s is None:
        got = f"granted, but no new start within 60 s: {result.state.name} ({result.state.reason or '-'})"
        return [Finding("requeue", NOTE, got + ". SLURM holds requeued jobs back for two minutes")]
    return [Finding("requeue", OK, f"the job requeued itself, and started again {result.requeue_s:.0f} s later")]


def judge_disks(result: JobResult) -> list[Finding]:
    """Judge the space that belongs to each node alone: the temporary folder and shared memory."""
    problems, spaces = [], []
    for r in result.find("disk"):
        for folder, space in r["spaces"].items():
            if not isinstance(space, (int, float)):
                problems.append(f"{r['node']}: {folder}: {space}")
            elif space < MIN_LOCAL_BYTES:
                problems.append(f"{r['node']}: {folder}: {format_bytes(space)} free")
            else:
                spaces.append((folder, space))
    if problems:
        fix = "set TMPDIR to a disk of the node (setup: in the profile), and ask for more /dev/shm (--mem counts it)"
        return [Finding("disk of nodes", WARNING, "; ".join(problems), "1 GB free", fix)]
    least = {folder: min(s for f, s in spaces if f == folder) for folder, _ in spaces}
    text = ", ".join(f"{folder} {format_bytes(space)} free" for folder, space in sorted(least.items()))
    return [Finding("disk of nodes", OK, text)] if text else [Finding("disk of nodes", SKIPPED, "no node has reported")]


def find_interface(result: JobResult) -> str | None:
    """Return a faster interface that all nodes reach each other at, where they use another one; None if there is none.

    Names that begin with ``ib`` or ``hs`` are InfiniBand and Slingshot.
    """
    links = result.find("network")
    if not links or any("failure" in r for r in links):
        return None
    common: Iterable[str] = set.intersection(*(set(r["also"]) for r in links))
    fast = sorted(name for name in common if re.match(r"(ib|hsn)\d", name))
    used = {name for r in links for name in r["interface"]}
    return fast[0] if fast and not used & set(fast) else None
