"""Rank, world size and rendezvous address of this process, from the variables that its launcher has set.

torchrun and hpcssl's own jobs set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. SLURM's variables count
only inside an ``srun`` step of several tasks: in an interactive allocation they are set as well, for a single shell.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from hpcssl.errors import WorldError

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of torchrun, in the order rank, local rank, size, address, port."""
TOKEN = "HPCSSL_TOKEN"
"""Variable that holds the token of the attempt."""
PORTS = 8
"""Number of ports that rank 0 tries for the rendezvous."""


@dataclass(frozen=True, kw_only=True)
class LaunchInfo:
    """One process among all that were launched together.

    Attributes:
        rank: Index of this process, from 0.
        local_rank: Index of this process among those of its node.
        size: Number of processes.
        address: Host name or IP address of rank 0.
        port: TCP port of the rendezvous on that host.
        token: Text that differs for every attempt, so that a rank of another attempt is recognized.
    """

    rank: int
    local_rank: int
    size: int
    address: str
    port: int
    token: str

    def environment(self) -> dict[str, str]:
        """The variables from which ``detect_launcher`` restores this value in a child process."""
        values = (self.rank, self.local_rank, self.size, self.address, self.port)
        return dict(zip(TORCHRUN, map(str, values), strict=True)) | {TOKEN: self.token}


def detect_launcher(environ: Mapping[str, str] = os.environ) -> LaunchInfo | None:
    """Read what the launcher has set.

    Args:
        environ: Environment variables.

    Returns:
        This process's place, or None if it was started by itself.

    Raises:
        WorldError: If only some of the variables are set, or a value is impossible.
    """
    if any(name in environ for name in ("RANK", "WORLD_SIZE")):
        return _from_torchrun(environ)
    if environ.get("SLURM_STEP_ID", "").isdigit() and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _from_slurm_step(environ)
    return None


def is_main_process(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is rank 0, or was started by itself; no address is looked up."""
    return environ.get("RANK", environ.get("SLURM_PROCID", "0")) == "0"


def count_processes(environ: Mapping[str, str] = os.environ) -> int | None:
    """Number of processes that the launcher has started, 1 without a launcher; no address is looked up.

    None if the variables are incomplete or impossible: ``detect_launcher`` says what is wrong.
    """
    if any(name in environ for name in ("RANK", "WORLD_SIZE")):
        size = environ.get("WORLD_SIZE", "")
    elif environ.get("SLURM_STEP_ID", "").isdigit():
        size = environ.get("SLURM_STEP_NUM_TASKS", "1")
    else:
        size = "1"
    return int(size) if size.isdecimal() and int(size) > 0 else None


def _from_torchrun(environ: Mapping[str, str]) -> LaunchInfo:
    missing = [name for name in TORCHRUN if name not in environ]
    try:
        if missing:
            raise ValueError("no " + ", ".join(missing))
        rank, local, size = (int(environ[name]) for name in TORCHRUN[:3])
        port = int(environ["MASTER_PORT"])
        if not 0 <= rank < size:
            raise ValueError(f"RANK {rank} with WORLD_SIZE {size}")
        if not 0 < port < 65536:
            raise ValueError(f"MASTER_PORT {port}")
    except ValueError as error:
        raise WorldError(
            "launcher's variables",
            got=str(error),
            expected="all of " + ", ".join(TORCHRUN),
            fix="start through torchrun, srun or hpcssl-submit, or unset RANK and WORLD_SIZE to run one process",
        ) from error
    restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps one store for all restarts
    token = environ.get(TOKEN) or environ.get("TORCHELASTIC_RUN_ID", "none") + (f".{restart}" if restart != "0" else "")
    return LaunchInfo(rank=rank, local_rank=local, size=size, address=environ["MASTER_ADDR"], port=port, token=token)


def _from_slurm_step(environ: Mapping[str, str]) -> LaunchInfo:
    attempt = "-".join(environ.get(n, "0") for n in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"))
    return LaunchInfo(
        rank=int(environ["SLURM_PROCID"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        size=int(environ["SLURM_STEP_NUM_TASKS"]),
        token=attempt,
        port=port_for(attempt),
        address=first_address(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]),
    )


def port_for(token: str) -> int:
    """A port from 10000 to 29999 for this token; below the range that kernels assign to outgoing connections."""
    return 10_000 + int.from_bytes(hashlib.blake2b(token.encode(), digest_size=4).digest(), "little") % 20_000


def ports_for(info: LaunchInfo) -> list[int]:
    """The ports at which rank 0 may host the rendezvous, in the order in which it tries them."""
    others = (port_for(f"{info.token}:{info.port}:{number}") for number in range(1, PORTS))
    return list(dict.fromkeys((info.port, *others)))


def first_address(nodelist: str) -> str:
    """Address of the first node of a SLURM node list, as ``scontrol`` knows it, since node names may not resolve.

    Raises:
        WorldError: If ``scontrol`` fails.
    """
    node = _scontrol("show", "hostnames", nodelist).split()[0]
    match = re.search(r"\bNodeAddr=(\S+)", _scontrol("show", "node", node))
    return match.group(1) if match else node


def _scontrol(*words: str) -> str:
    try:
        return subprocess.run(["scontrol", *words], check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise WorldError(
            f"`scontrol {' '.join(words)}`",
            got=" ".join(detail.split()),
            expected="output of scontrol",
            fix="run inside a SLURM job, on a node where scontrol works",
        ) from error
