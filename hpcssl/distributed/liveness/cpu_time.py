"""How much of the processors this process and its worker processes have used."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def process_and_children_s() -> float:
    """Processor seconds of this process and of its children, those that have ended included."""
    total, tick = sum(os.times()[:4]), os.sysconf("SC_CLK_TCK")
    for children in Path("/proc/self/task").glob("*/children"):  # by the thread that started them
        pids: list[str] = []
        with contextlib.suppress(OSError):
            pids = children.read_text().split()
        for pid in pids:
            with contextlib.suppress(OSError, IndexError):  # it has ended; the file may be empty at that moment
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / tick
    return total
