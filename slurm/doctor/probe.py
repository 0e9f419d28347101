"""What every node of the doctor's job checks, before it is known whether the node can see the code of hpcssl.

So this file and ``probe_tools`` need the standard library only, and are passed as text (``job.read_probe``):
``python -c TEXT FOLDER TOKEN PORT``. It prints one line per result, ``MARK {"check": …, "node": …, …}``, to the
standard output, which SLURM carries to the first node. ``slurm.doctor.nodes`` judges the results.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import signal
import socket
import sys
import threading
import time
from typing import Any

from slurm.doctor.probe_tools import (
    ARRIVED,
    MARK,
    PATIENCE_S,
    ask_time,
    free_bytes,
    list_addresses,
    node_address,
    node_name,
    rank_of,
    record_signal,
    report,
    run_program,
    serve_time,
    try_lock,
    wait_for,
    write_file,
)

SIGNAL_WAIT_S = 75.0
"""Seconds after the start within which the warning of the time limit must come (up to 60 s early, measured)."""
COMPUTE_S = 150.0
BLOCK, RENAMES = 1 << 16, 40
"""Bytes of the file that is replaced again and again, and how often."""


class Probe:
    """The checks of one node.

    Args:
        folder: The folder of the check.
        token: What the file of the login node contains.
        port: The port at which rank 0 would host a rendezvous.
    """

    def __init__(self, folder: str, token: str, port: int):
        self.folder, self.token, self.port = folder, token, port
        self.rank, self.size = rank_of(), int(os.environ.get("SLURM_NTASKS", "1"))
        self.began = time.time()
        self.peers: dict[int, dict[str, Any]] = {}

    def path(self, name: str) -> str:
        """Return the path of a file in the folder."""
        return os.path.join(self.folder, name)

    def check_folder(self) -> bool:
        """Read the login node's file, write one, and announce this node to the others. Returns whether it works."""
        try:
            with open(self.path("login")) as file:
                content = file.read()
            listener = socket.create_server(("", 0))
            threading.Thread(target=serve_time, args=[listener], daemon=True).start()
            own = {"node": node_name(), "port": listener.getsockname()[1], "addresses": list_addresses()}
            if self.rank == 0:  # both are held until the process ends
                self.lock = open(self.path("lock"), "w")  # noqa: SIM115
                with contextlib.suppress(OSError):
                    fcntl.flock(self.lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(OSError):
                    server = socket.create_server(("", self.port))
                    threading.Thread(target=serve_time, args=[server], daemon=True).start()
            write_file(self.path(f"node-{self.rank}"), json.dumps(own))
        except OSError as error:
            report("folder", failure=f"{error.strerror}: {error.filename}")
            return False
        report("folder", same=content == self.token, free=free_bytes(self.folder))
        return True

    def check_clock(self) -> None:
        """Report the least by which the login node's clock is ahead: it wrote each tick before it was read here."""
        leads = []
        for _ in range(15):
            with contextlib.suppress(OSError, ValueError), open(self.path("tick")) as file:
                leads.append(float(file.read()) - time.time())
            time.sleep(0.1)
        report("clock", ahead_s=max(leads) if leads else None)

    def check_shared_files(self) -> bool:
        """Look for the files of the other nodes, then at locks and renames between them."""
        for rank in range(self.size):
            path = self.path(f"node-{rank}")
            if wait_for(path):
                with open(path) as file:
                    self.peers[rank] = json.load(file)
        missing = [rank for rank in range(self.size) if rank not in self.peers]
        report("shared", missing=missing)
        if missing:
            return False
        if self.rank == 0:
            for rank in range(1, self.size):
                wait_for(self.path(f"tried-{rank}"))
            self.lock.close()
            write_file(self.path("released"), "")
            for number in range(RENAMES):
                write_file(self.path("renamed"), chr(ord("a") + number % 26) * BLOCK)
            write_file(self.path("renamed"), "Z" * BLOCK)
        else:
            while_held = try_lock(self.path("lock"))
            write_file(self.path(f"tried-{self.rank}"), "")
            wait_for(self.path("released"))
            report("lock", while_held=while_held, after=try_lock(self.path("lock"), PATIENCE_S))
            self._check_renames()
        return True

    def _check_renames(self) -> None:
        """Read a file that rank 0 replaces again and again: each content must be whole."""
        torn, content = "", ""
        wait_for(self.path("renamed"))
        deadline = time.monotonic() + PATIENCE_S
        while content[:1] != "Z" and not torn and time.monotonic() < deadline:
            try:
                with open(self.path("renamed")) as file:
                    content = file.read()
            except OSError as error:
                torn = str(error.strerror)
            if not torn and content != content[:1] * BLOCK:
                torn = f"{len(content)} bytes of several versions"
        report("rename", torn=torn, newest=content[:1] == "Z")

    def check_network(self) -> bool:
        """Connect to the next nodes and to rank 0. Returns whether every node reaches its peers."""
        works = True
        targets = {(self.rank + step) % self.size for step in range(1, min(self.size, 5))} | {0} - {self.rank}
        for rank in sorted(targets):
            peer = self.peers[rank]
            try:
                address = node_address(peer["node"])
            except OSError as error:
                report("scontrol", failure=str(error))
                works = False
                break
            answer = ask_time(address, peer["port"])
            names = [name for name, own in list_addresses().items() if own == answer.get("local")]
            common = [name for name in peer["addresses"] if name in list_addresses() and not name.startswith("lo")]
            also = [name for name in common if "failure" not in ask_time(peer["addresses"][name], peer["port"])]
            line = {**answer, "peer": peer["node"], "address": address, "interface": names[:1], "also": also}
            if rank == 0:
                line["rendezvous"] = ask_time(address, self.port).get("failure", "")
            report("network", **line)
            works = works and "failure" not in answer and not line.get("rendezvous")
        write_file(self.path(f"net-{self.rank}"), "works" if works else "")
        for rank in range(self.size):
            if not wait_for(self.path(f"net-{rank}")):
                return False
            with open(self.path(f"net-{rank}")) as file:
                works = works and bool(file.read())
        return works

    def check_disk(self) -> None:
        """Report the free space of the folders that belong to this node alone."""
        spaces: dict[str, Any] = {}
        for folder in (os.environ.get("TMPDIR", "/tmp"), "/dev/shm"):
            try:
                write_file(os.path.join(folder, f".{MARK}-{self.token}-{self.rank}"), "")
                os.remove(os.path.join(folder, f".{MARK}-{self.token}-{self.rank}"))
                spaces[folder] = free_bytes(folder)
            except OSError as error:
                spaces[folder] = str(error.strerror)
        report("disk", spaces=spaces)

    def check_compute(self, together: bool) -> None:
        """Run ``slurm.doctor.compute`` in a process of its own.

        Args:
            together: Whether the nodes reach each other, so that they can join in a process group.
        """
        size = self.size if together else 1
        rank = self.rank if together else 0
        variables = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": size, "MASTER_PORT": self.port + 1}
        os.environ.update({name: str(value) for name, value in variables.items()})
        os.environ["MASTER_ADDR"] = node_address(self.peers[0]["node"]) if together else "127.0.0.1"
        os.environ["HPCSSL_TOKEN"] = self.token
        done = run_program(sys.executable, "-m", "slurm.doctor.compute", seconds=COMPUTE_S)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        for line in lines:
            report(**json.loads(line))
        if done.returncode:
            error = " ".join(done.stderr.splitlines()[-1:])[-400:]
            report("compute", failure=error or f"exit code {done.returncode}", together=together)

    def check_signals(self) -> None:
        """Send a signal to all tasks of this step, and wait for it and for the warning of the time limit."""
        write_file(self.path(f"ready-{self.rank}"), "")
        sent = ""
        if self.rank == 0:
            for rank in range(self.size):
                wait_for(self.path(f"ready-{rank}"), SIGNAL_WAIT_S)
            step = os.environ["SLURM_JOB_ID"] + "." + os.environ["SLURM_STEP_ID"]
            sent = run_program("scancel", "--signal=USR1", step).stderr.strip()
        deadline = self.began + SIGNAL_WAIT_S
        while time.time() < deadline and not {"SIGUSR1", "SIGUSR2"} <= set(ARRIVED):
            time.sleep(0.05)
        after = {name: round(when - self.began, 1) for name, when in ARRIVED.items()}
        report("signals", after=after, refused=sent)

    def request_requeue(self) -> None:
        """Rank 0 asks SLURM to requeue the job when all others are ready; every rank waits for its end."""
        write_file(self.path(f"done-{self.rank}"), "")
        if self.rank == 0:
            for rank in range(self.size):
                wait_for(self.path(f"done-{rank}"), SIGNAL_WAIT_S)
            answer = run_program("scontrol", "requeue", os.environ["SLURM_JOB_ID"])
            report("requeue", refused=" ".join(answer.stderr.split())[:300] if answer.returncode else "")
            write_file(self.path("requeued"), "")
            if answer.returncode:
                return
        wait_for(self.path("requeued"), SIGNAL_WAIT_S)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and "SIGTERM" not in ARRIVED:
            time.sleep(0.05)


def main(folder: str, token: str, port: str) -> None:
    """Run all checks of this node. See ``Probe``."""
    report("start", python=platform.python_version(), host=socket.gethostname(), cores=len(os.sched_getaffinity(0)))
    probe = Probe(folder, token, int(port))
    if not probe.check_folder():
        return
    probe.check_clock()
    probe.check_disk()
    if probe.check_shared_files():
        probe.check_compute(probe.check_network())
        probe.check_signals()
        probe.request_requeue()


if __name__ == "__main__":
    for _number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(_number, record_signal)
    main(*sys.argv[1:])
