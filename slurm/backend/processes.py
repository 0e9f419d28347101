"""The processes of a local job, read from /proc.

A supervisor leads a session of its own. Every process of its jobs has the supervisor's pid as session id, so they are
found without a list of pids, which could go stale. A pid is reused after a while; a pid with its start time is not.

psutil is not used: it has no session ids, and its start times are seconds since 1970, computed from the boot time,
which moves when the clock is adjusted. Another process compares them with what ``jobs.jsonl`` recorded hours before,
so they must be the kernel's own ticks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One process.

    Attributes:
        pid: Process id.
        parent: Process id of its parent.
        session: Process id of its session's leader.
        state: The kernel's letter, such as ``R`` (running) or ``Z`` (zombie).
        start_ticks: When it was started, in clock ticks after boot.
    """

    pid: int
    parent: int
    session: int
    state: str
    start_ticks: int

    @property
    def is_alive(self) -> bool:
        """Whether it still runs: a zombie has ended, and waits for its parent to notice."""
        return self.state not in "ZX"


def read_process(pid: int) -> Process | None:
    """Return the process with this id, or None."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it, in parentheses, may contain anything
    return Process(pid, int(fields[1]), int(fields[3]), fields[0], int(fields[19]))


def is_running(pid: int, start_ticks: int) -> bool:
    """Return whether the process with this id and this start time still runs."""
    process = read_process(pid)
    return process is not None and process.start_ticks == start_ticks and process.is_alive


def find_session_members(leader: int) -> list[Process]:
    """Return the running processes of a session, without its leader."""
    processes = (read_process(int(folder.name)) for folder in Path("/proc").iterdir() if folder.name.isdigit())
    return [p for p in processes if p is not None and p.session == leader and p.pid != leader and p.is_alive]


def read_environment(pid: int) -> dict[str, str]:
    """Return the environment variables that a process was started with; empty if they cannot be read."""
    try:
        body = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    items = (item.partition("=") for item in body.split("\0") if "=" in item)
    return {name: value for name, _, value in items}


def find_tasks(leader: int) -> list[Process]:
    """Return the running tasks of a local job: what submitit's controller started, without the tasks' own children.

    Args:
        leader: Process id of the job's supervisor.
    """
    members = find_session_members(leader)
    with_rank = {p.pid for p in members if "SUBMITIT_LOCAL_GLOBALID" in read_environment(p.pid)}
    return [p for p in members if p.pid in with_rank and p.parent not in with_rank]


def send_signals(processes: list[Process], *signals: signal.Signals) -> int:
    """Send signals in order to each process. Return the number of processes that still existed."""
    count = 0
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            for number in signals:
                os.kill(process.pid, number)
            count += 1
    return count


def kill_session(leader: int, patience_s: float = 0.0) -> None:
    """Wait for the members of a session to end, then kill those that are left.

    Args:
        leader: Process id of the session's leader, which is not killed.
        patience_s: Seconds to wait.
    """
    deadline = time.monotonic() + patience_s
    while find_session_members(leader) and time.monotonic() < deadline:
        time.sleep(0.1)
    while members := find_session_members(leader):
        send_signals(members, signal.SIGKILL)
        time.sleep(0.05)
