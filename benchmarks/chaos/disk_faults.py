"""Faults of the disk: damaged and incomplete checkpoints, damaged weights, copied shards, and a full disk.

Each function injects one fault, and returns what was hit.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from benchmarks.chaos.commands import PERIOD, StuckError
from benchmarks.chaos.plan import Fault
from benchmarks.chaos.session import TargetMissing, TrainingSession
from hpcssl.errors import EvalError
from hpcssl.files import atomic_write
from hpcssl.nets import weights


def flip_bit(session: TrainingSession, fault: Fault) -> str:
    """Flip one bit in a part of the newest checkpoint."""
    path = _select_part(session, fault)
    with open(path, "r+b") as file:
        file.seek(int(fault.share * path.stat().st_size))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1 << fault.number % 8]))
    return f"{path.parent.name}/{path.name}"


def truncate_part(session: TrainingSession, fault: Fault) -> str:
    """Cut a part of the newest checkpoint."""
    path = _select_part(session, fault)
    os.truncate(path, int(fault.share * path.stat().st_size))
    return f"{path.parent.name}/{path.name}"


def remove_manifest(session: TrainingSession, _fault: Fault) -> str:
    """Remove the manifest of the newest checkpoint."""
    folder = _newest_of_two(session)
    (folder / "manifest.json").unlink()
    return folder.name


def damage_export(session: TrainingSession, fault: Fault) -> str:
    """Flip one bit in the exported weights. Whoever reads them must refuse them; they are restored afterwards."""
    path = session.run.weights_at(0)
    if not path.exists():
        raise TargetMissing
    body = path.read_bytes()
    damaged = bytearray(body)
    damaged[int(len(body) * (1 + fault.share) / 2)] ^= 1 << fault.number % 8  # in the second half, which holds tensors
    atomic_write(path, bytes(damaged))
    try:
        weights.load(path)
    except EvalError:
        return path.name
    finally:
        atomic_write(path, body)
    raise StuckError(f"{path.name} was read with a flipped bit")


def copy_shards(session: TrainingSession, _fault: Fault) -> str:
    """Replace every shard by a copy of itself. The next attempt must compare them with the index, and accept them."""
    paths = sorted(session.commands.data.glob("*.tar"))
    for path in paths:
        atomic_write(path, path.read_bytes())
    return f"{len(paths)} shards"


def leave_half_save(session: TrainingSession, fault: Fault) -> str:
    """Leave what a killed writer leaves: a temporary file beside the parts, and a folder with one part only."""
    newest = _wait_for_sealed(session)[-1]
    body = next(newest.glob("part-*")).read_bytes()
    (newest / ".part-0.safetensors.0badc0de.tmp").write_bytes(body[: int(fault.share * len(body))])
    step = int(newest.name[5:]) + 1
    folder = session.run.checkpoint(step + (step % PERIOD == 0))  # the folder must not look like a periodic save
    folder.mkdir(exist_ok=True)
    (folder / "part-0.safetensors").write_bytes(body)
    return folder.name


def fill_disk(session: TrainingSession, fault: Fault) -> str:
    """Fill the disk of the run for some seconds."""
    filler = session.run.root.parent / "filler"
    try:
        with open(filler, "wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        time.sleep(0.5 + 2 * fault.share)
    finally:
        filler.unlink()
    return "the run's disk"


def _wait_for_sealed(session: TrainingSession, count: int = 1) -> list[Path]:
    """Complete checkpoints, oldest first, once there are ``count`` of them."""
    deadline = time.monotonic() + 60
    while True:
        sealed = [folder for folder in session.checkpoints() if (folder / "manifest.json").exists()]
        if len(sealed) >= count:
            return sealed
        if session.is_finished or time.monotonic() > deadline:
            raise TargetMissing
        time.sleep(0.05)


def _newest_of_two(session: TrainingSession) -> Path:
    """The newest checkpoint, once there is another one: no run can continue without any checkpoint."""
    return _wait_for_sealed(session, 2)[-1]


def _select_part(session: TrainingSession, fault: Fault) -> Path:
    folder = _newest_of_two(session)
    names: list[str] = [part["file"] for part in json.loads((folder / "manifest.json").read_text())["parts"]]
    return folder / names[fault.rank]
