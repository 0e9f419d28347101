"""Files, locks, clocks and addresses, as the doctor looks at them on each node.

Like ``probe``, this file needs the standard library only: it is also passed to the nodes as text.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType
from typing import Any

MARK = "hpcssl-doctor"
PATIENCE_S = 20.0
"""Seconds to wait for what another node writes."""
ARRIVED: dict[str, float] = {}
"""When each signal has arrived, by name (Unix time)."""


def report(check: str, **values: object) -> None:
    """Print one result. ``values``: further fields of the line."""
    line = {"check": check, "node": node_name(), "rank": rank_of(), "time": time.time(), **values}
    sys.stdout.write("\n" + MARK + " " + json.dumps(line) + "\n")
    sys.stdout.flush()


def rank_of() -> int:
    """Return the number of this task, from 0."""
    return int(os.environ.get("SLURM_PROCID", "0"))


def node_name() -> str:
    """Return the node's name in SLURM."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def write_file(path: str, text: str) -> None:
    """Write a file, sync it, and rename it to its name. Raises ``OSError``."""
    part = f"{path}.{node_name()}.tmp"
    with open(part, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def wait_for(path: str, seconds: float = PATIENCE_S) -> bool:
    """Wait until a file is there. A listing of its folder makes NFS look again."""
    deadline = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            return False
        with contextlib.suppress(OSError):
            os.listdir(os.path.dirname(path))
        time.sleep(0.05)
    return True


def try_lock(path: str, seconds: float = 0.0) -> str:
    """Try to take the lock of a file.

    Returns:
        ``free`` (it was taken, and is free again), ``held`` by another process, or the error of the file system.
    """
    deadline = time.monotonic() + seconds
    with open(path, "a") as file:
        while True:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                return "free"
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    return "held"
            except OSError as error:
                return str(error.strerror)
            time.sleep(0.05)


def free_bytes(folder: str) -> int:
    """Return the free space of a folder's file system in bytes. Raises ``OSError``."""
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


def list_addresses() -> dict[str, str]:
    """Return the IPv4 address of each network interface, by name."""
    addresses = {}
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            packed = fcntl.ioctl(probe.fileno(), 0x8915, name.encode()[:15].ljust(40, b"\0"))  # SIOCGIFADDR
            addresses[name] = socket.inet_ntoa(packed[20:24])
    return addresses


def serve_time(listener: socket.socket) -> None:
    """Answer every connection with the clock of this node, until the process ends."""
    while True:
        with contextlib.suppress(OSError):
            connection = listener.accept()[0]
            with connection:
                connection.sendall(repr(time.time()).encode())


def ask_time(address: str, port: int) -> dict[str, Any]:
    """Connect to a node and compare the clocks.

    Returns:
        ``local`` (own address of the connection), ``offset`` and ``error`` (other clock minus own, and its uncertainty
        in seconds); or ``failure``.
    """
    began = time.time()
    try:
        with socket.create_connection((address, port), timeout=5) as connection:
            local = connection.getsockname()[0]
            text = connection.recv(100)
            took = time.time() - began
            return {"local": local, "offset": float(text) - began - took / 2, "error": took / 2}
    except (OSError, ValueError) as error:
        return {"failure": str(error) or type(error).__name__}


def node_address(node: str) -> str:
    """Return a node's address as SLURM knows it. Raises ``OSError`` if scontrol does not work here."""
    answer = run_program("scontrol", "show", "node", "-o", node)
    words = [word for word in answer.stdout.split() if word.startswith("NodeAddr=")]
    if not words:
        raise OSError("`scontrol show node` fails: " + " ".join(answer.stderr.split())[:200])
    return words[0].partition("=")[2]


def run_program(*words: str, seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run a program, and return its result; a missing one has the code 127, one that hangs 124.

    It does not get the signals of this check, which SLURM sends to every process of a step.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGUSR2))
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        return subprocess.CompletedProcess(words, 127, "", str(error))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        output, errors = process.communicate(timeout=seconds)
        return subprocess.CompletedProcess(words, process.returncode, output, errors)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return subprocess.CompletedProcess(words, 124, output, f"no end within {seconds:g} s")


def record_signal(number: int, _frame: FrameType | None) -> None:
    """Handle a signal: note in ``ARRIVED`` when it came first."""
    ARRIVED.setdefault(signal.Signals(number).name, time.time())
