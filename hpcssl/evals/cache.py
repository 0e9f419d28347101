"""Parts of a feature set as files: whole or absent, mapped when read, shared by the ranks of all nodes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpcssl import files
from hpcssl.errors import EvalError
from hpcssl.nets import weights

PARTS = 256  # of a large set: what a kill costs is at most one part per rank
_PATIENCE_S = 60.0  # a file of another node may take this long to show on a network file system


def plan(samples: int, batch: int) -> list[tuple[int, int]]:
    """First and last-plus-one row of each part: whole batches, about ``PARTS`` parts of a large set."""
    rows = -(-samples // (batch * PARTS)) * batch
    return [(first, min(first + rows, samples)) for first in range(0, samples, rows)]


def name(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.safetensors"


def write(path: Path, rows: Tensor) -> None:
    files.atomic_write(path, weights.pack({"features": rows}, {"format": "hpcssl-features-1"}))


def read(path: Path, rows: int, width: int) -> Tensor | None:
    """The part, mapped from its file (ours alone and never rewritten), or None where it is absent or not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            found = file.get_tensor("features")
    except (OSError, SafetensorError):
        return None
    return found if found.shape == (rows, width) else None


def wait(path: Path, rows: int, width: int) -> Tensor:
    began = time.monotonic()
    while (found := read(path, rows, width)) is None:
        if time.monotonic() - began > _PATIENCE_S:
            raise EvalError(f"features {path}", got="no such file after a minute",
                            expected="a folder that every node sees",
                            mend="put the run folder on a shared file system")
        time.sleep(0.2)
        os.listdir(path.parent)  # makes a network file system look again
    return found
