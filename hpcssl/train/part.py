"""One rank's part of a checkpoint: a safetensors file (https://huggingface.co/docs/safetensors, "Format"), written from
one host copy that already lies as the file will.

``safetensors.torch.save`` would build the whole file in memory beside the copy. Here a save needs one copy of what the
rank writes, in memory that is kept from save to save (pinned where the state lives on a GPU: the copies are then
queued behind the training's own work, which goes on at once).
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import torch
from torch import Tensor

from hpcssl import files

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
          torch.bool: "BOOL"}
CHUNK = 1 << 24  # bytes between two looks of the other threads at the interpreter


class HostCopy:
    """The tensors of one save as the bytes of a safetensors file, in host memory."""

    def __init__(self):
        self._head = b""
        self._body = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    @property
    def bytes(self) -> int:
        return len(self._head) + len(self._body)

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Copy ``tensors``; what happens to them after this call is not in the file. The save before must be written.

        Raises ``RuntimeError`` where there is no memory for the copy, ``KeyError`` for a type that has no name there.
        """
        self._head, places = _header(tensors)
        size = max((stop for _, stop in places.values()), default=0)
        pinned = any(t.is_cuda for t in tensors.values())
        if len(self._body) != size or self._body.is_pinned() != pinned:
            self._body = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self._body = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        for name, (start, stop) in places.items():
            tensor = tensors[name]
            self._body[start:stop].view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
        self._copied = None
        if pinned:  # later kernels of this stream write to the tensors only after the copies have read them
            self._copied = torch.cuda.Event()
            self._copied.record()

    def write(self, path: Path) -> dict:
        """Write the file, durably, and return its name, bytes and sha256. Raises ``OSError``."""
        if self._copied is not None:
            self._copied.synchronize()
        body = memoryview(self._body.numpy())
        pieces = [self._head, *(body[at:at + CHUNK] for at in range(0, len(body), CHUNK))]
        sha256 = hashlib.sha256()

        def digest() -> None:
            for piece in pieces:
                sha256.update(piece)

        beside = threading.Thread(target=digest, name="sha256", daemon=True)
        beside.start()
        try:
            with files.atomic_file(path) as file:
                for piece in pieces:
                    file.write(piece)
        finally:
            beside.join()
        return {"file": path.name, "bytes": self.bytes, "sha256": sha256.hexdigest()}


def _header(tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The head of the file, and from which byte of its body to which each tensor lies: the widest types first, so that
    every tensor is aligned."""
    places, at = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        size = tensors[name].numel() * tensors[name].element_size()
        places[name], at = (at, at + size), at + size
    told = json.dumps({name: {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape),
                              "data_offsets": list(place)} for name, place in places.items()},
                      separators=(",", ":")).encode()
    told += b" " * (-len(told) % 8)
    return len(told).to_bytes(8, "little") + told, places
