"""What one rank reports about itself about once a second."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class HeartbeatRecord:
    """State of one rank, as its heartbeat publishes it.

    Attributes:
        rank: Index of the process.
        host: Name of its node.
        pid: Process id.
        phase: What the main thread does: ``data``, ``step``, ``backward``, ``save``, ...
        step: The step that is being taken, from 1; None before the first.
        idle: Seconds since the main thread last reported a phase, progress or a collective.
        count: Number of collectives called so far.
        last: The last collective in words.
        inside: Whether the main thread waits in that collective.
        stack: The main thread's innermost calls, innermost first.
        others: Stacks of other threads that the main thread may wait for.
        number: Number of this record; it grows by one with each.
    """

    rank: int
    host: str
    pid: int
    phase: str = "start"
    step: int | None = None
    idle: float = 0.0
    count: int = 0
    last: str = "no collective"
    inside: bool = False
    stack: str = ""
    others: str = ""
    number: int = 0

    @property
    def position(self) -> str:
        """Step and phase in words; the step is the one that is being taken."""
        return ("" if self.step is None else f"step {self.step}, ") + f"phase {self.phase}"

    @property
    def name(self) -> str:
        """Rank and node in words."""
        return f"rank {self.rank} on {self.host}"


def key(rank: int) -> str:
    """Key of a rank's record in the shared store. The first record is written during the rendezvous."""
    return f"rank/{rank}"


def node_name() -> str:
    """This node's name as the cluster knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def first_record(rank: int) -> str:
    """The first record of a rank, as JSON, from before its heartbeat runs."""
    return json.dumps(asdict(HeartbeatRecord(rank=rank, host=node_name(), pid=os.getpid())))
