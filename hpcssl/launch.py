"""Where this process stands among the processes that run together, read from whoever started it.

torchrun and our own jobs set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. SLURM's variables count
only inside an srun step of several tasks: in an interactive allocation they are set too, for one lone shell.
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
TOKEN = "HPCSSL_TOKEN"


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process among ``size``: where it meets the others, and the token that keeps strangers out."""

    rank: int
    local_rank: int
    size: int
    address: str
    port: int
    token: str

    def environment(self) -> dict[str, str]:
        """The variables that ``find`` reads back in a child process."""
        values = (self.rank, self.local_rank, self.size, self.address, self.port)
        return dict(zip(TORCHRUN, map(str, values), strict=True)) | {TOKEN: self.token}


def find(environ: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place, or None where it runs alone. Raises ``WorldError`` for half-set variables."""
    if any(name in environ for name in ("RANK", "WORLD_SIZE")):
        return _from_torchrun(environ)
    if environ.get("SLURM_STEP_ID", "").isdigit() and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _from_slurm_step(environ)
    return None


def _from_torchrun(environ: Mapping[str, str]) -> Place:
    missing = [name for name in TORCHRUN if name not in environ]
    try:
        if missing:
            raise ValueError("no " + ", ".join(missing))
        rank, local, size = (int(environ[n]) for n in TORCHRUN[:3])
        port = int(environ["MASTER_PORT"])
        if not 0 <= rank < size:
            raise ValueError(f"RANK {rank} with WORLD_SIZE {size}")
        if not 0 < port < 65536:
            raise ValueError(f"MASTER_PORT {port}")
    except ValueError as error:
        raise WorldError("launcher's variables", got=str(error), expected="all of " + ", ".join(TORCHRUN),
                         mend="start through torchrun, srun or hpcssl-submit, or unset RANK and WORLD_SIZE "
                              "to run one process") from error
    restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps one store for all of them
    token = environ.get(TOKEN) or environ.get("TORCHELASTIC_RUN_ID", "none") + (f".{restart}" if restart != "0" else "")
    return Place(rank=rank, local_rank=local, size=size, address=environ["MASTER_ADDR"], port=port, token=token)


def _from_slurm_step(environ: Mapping[str, str]) -> Place:
    attempt = "-".join(environ.get(n, "0") for n in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"))
    return Place(rank=int(environ["SLURM_PROCID"]), local_rank=int(environ["SLURM_LOCALID"]),
                 size=int(environ["SLURM_STEP_NUM_TASKS"]), token=attempt, port=port_of(attempt),
                 address=first_address(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]))


def port_of(token: str) -> int:
    """A port from a token that changes with every attempt, below the range that kernels hand out by themselves."""
    return 10_000 + int.from_bytes(hashlib.blake2b(token.encode(), digest_size=4).digest(), "little") % 20_000


def first_address(nodelist: str) -> str:
    """Address of the first node of a SLURM node list, as scontrol knows it: node names need not resolve."""
    node = _scontrol("show", "hostnames", nodelist).split()[0]
    found = re.search(r"\bNodeAddr=(\S+)", _scontrol("show", "node", node))
    return found.group(1) if found else node


def _scontrol(*words: str) -> str:
    try:
        return subprocess.run(["scontrol", *words], check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise WorldError(f"`scontrol {' '.join(words)}`", got=" ".join(detail.split()), expected="an answer",
                         mend="run inside a SLURM job on a node where scontrol works") from error
