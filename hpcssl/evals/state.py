"""What an unfinished evaluation keeps: one safetensors file, written whole, bound to the evaluation's identity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpcssl import files
from hpcssl.nets import weights


def write(path: Path, identity: str, tensors: Mapping[str, Tensor], note: dict) -> None:
    """Replace the file. ``note`` holds plain values."""
    files.atomic_write(path, weights.pack(tensors, {"identity": identity, "note": json.dumps(note)}))


def read(path: Path | None, identity: str) -> tuple[dict[str, Tensor], dict] | None:
    """Tensors and note of an earlier attempt at the same evaluation, or None where there is none."""
    if path is None:
        return None
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("identity") != identity:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(meta["note"])  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
