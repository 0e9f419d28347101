"""One rank's part of a checkpoint: a safetensors file, written from a single copy in host memory.

The format is described at https://huggingface.co/docs/safetensors ("Format"). ``safetensors.torch.save`` would build
the whole file in memory beside a copy of the state. Here the copy already has the layout of the file, and its memory
is reused from save to save. If the state is on a GPU the memory is pinned: copies are queued behind the training's own
kernels, and the training continues at once.
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpcssl import files

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in the safetensors format."""
CHUNK = 1 << 24
"""Bytes written or hashed at a time; between chunks other threads get the interpreter."""


class HostCopy:
    """The tensors of one save, in host memory, as the bytes of a safetensors file."""

    def __init__(self) -> None:
        self._header = b""
        self._body = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    @property
    def bytes(self) -> int:
        """Size of the file in bytes."""
        return len(self._header) + len(self._body)

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Copy ``tensors``. What happens to them afterwards does not change the file.

        The previous save must have been written already, since its memory is reused.

        Raises:
            RuntimeError: If there is no memory for the copy.
            KeyError: For a dtype that the format does not have.
        """
        self._header, offsets = _layout(tensors)
        size = max((stop for _, stop in offsets.values()), default=0)
        pinned = any(t.is_cuda for t in tensors.values())
        if len(self._body) != size or self._body.is_pinned() != pinned:
            self._body = torch.empty(0, dtype=torch.uint8)  # free the old memory before asking for new
            self._body = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        for name, (start, stop) in offsets.items():
            tensor = tensors[name]
            self._body[start:stop].view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
        self._copied = None
        if pinned:  # later kernels of this stream write to the tensors only after the copies have read them
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def write(self, path: Path) -> dict[str, Any]:
        """Write the file durably.

        Returns:
            Its entry in the manifest: ``file`` (name), ``bytes`` and ``sha256``.

        Raises:
            OSError: If it cannot be written; then ``path`` is as it was.
        """
        if self._copied is not None:
            self._copied.synchronize()
        body = memoryview(self._body.numpy())  # type: ignore[arg-type]  # NumPy's stub has no buffer protocol
        chunks: list[bytes | memoryview] = [self._header, *(body[at : at + CHUNK] for at in range(0, len(body), CHUNK))]
        sha256 = hashlib.sha256()

        def hash_chunks() -> None:
            for chunk in chunks:
                sha256.update(chunk)

        hasher = threading.Thread(target=hash_chunks, name="sha256", daemon=True)
        hasher.start()
        try:
            with files.atomic_file(path) as file:
                for chunk in chunks:
                    file.write(chunk)
        finally:
            hasher.join()
        return {"file": path.name, "bytes": self.bytes, "sha256": sha256.hexdigest()}


def _layout(tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Header of the file, and first and last byte of each tensor in its body.

    The widest dtypes come first, so that every tensor is aligned.
    """
    offsets: dict[str, tuple[int, int]] = {}
    at = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        size = tensors[name].numel() * tensors[name].element_size()
        offsets[name], at = (at, at + size), at + size
    header = json.dumps(
        {
            name: {
                "dtype": DTYPES[tensors[name].dtype],
                "shape": list(tensors[name].shape),
                "data_offsets": list(span),
            }
            for name, span in offsets.items()
        },
        separators=(",", ":"),
    ).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, offsets
