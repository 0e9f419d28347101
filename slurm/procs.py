"""Processes by session, from /proc: what a local job consists of, however it was started.

A supervisor leads a session of its own, so every process of its job carries the supervisor's id as session id, and
no list of pids can go stale. A pid with its start time is unique; the pid alone is not.
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
    pid: int
    parent: int
    session: int
    state: str
    started: int
    """Clock ticks after boot."""

    @property
    def alive(self) -> bool:
        return self.state not in "ZX"


def look(pid: int) -> Process | None:
    """The process with this id, or None."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    words = text.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return Process(pid, int(words[1]), int(words[3]), words[0], int(words[19]))


def same(pid: int, started: int) -> bool:
    """Whether the process that had this id and this start is still alive."""
    found = look(pid)
    return found is not None and found.started == started and found.alive


def session(leader: int) -> list[Process]:
    """Living processes of a session, without its leader."""
    found = (look(int(p.name)) for p in Path("/proc").iterdir() if p.name.isdigit())
    return [p for p in found if p is not None and p.session == leader and p.pid != leader and p.alive]


def environment(pid: int) -> dict[str, str]:
    """The variables that a process was started with; empty where they cannot be read."""
    try:
        body = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in body.split("\0") if "=" in item)


def tasks(leader: int) -> list[Process]:
    """The task processes of a local job: those that submitit's controller started, not their own children."""
    members = session(leader)
    ours = {p.pid for p in members if "SUBMITIT_LOCAL_GLOBALID" in environment(p.pid)}
    return [p for p in members if p.pid in ours and p.parent not in ours]


def send(processes: list[Process], *signals: signal.Signals) -> int:
    """Send signals in order; the number of processes that were there to take them."""
    taken = 0
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            for number in signals:
                os.kill(process.pid, number)
            taken += 1
    return taken


def clear(leader: int, patience_s: float = 0.0) -> None:
    """End what is left of a session: wait, then KILL."""
    limit = time.monotonic() + patience_s
    while session(leader) and time.monotonic() < limit:
        time.sleep(0.1)
    while left := session(leader):
        send(left, signal.SIGKILL)
        time.sleep(0.05)
