"""Tensors in a safetensors file: the same bytes for the same content, and a checksum of them in the header.

The format is described at https://huggingface.co/docs/safetensors ("Format"). It has no checksum of its own: a flipped
bit in a weight gives another encoder, and nothing notices. Here the header's metadata holds the sha256 of the rest of
the header and of all tensors. Other programs ignore it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpcssl import files
from hpcssl.storage.records import CHECKSUM

_CHUNK = 1 << 22  # bytes that are hashed at a time


class DamagedFileError(Exception):
    """The file is not what was written; the text says what it is instead."""


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, checksum: bool = True) -> bytes:
    """Build a safetensors file in memory, with the same bytes for the same content.

    The library writes its metadata in the order of a randomly seeded hash map. Here the header is sorted.

    Args:
        tensors: Tensors by key.
        metadata: Strings for the header.
        checksum: Whether the header gets a checksum; not in files for other projects.

    Returns:
        Content of the file.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    body = safetensors.torch.save(plain)
    size = int.from_bytes(body[:8], "little")
    values = {key: value for key, value in metadata.items() if key != CHECKSUM}
    header = {**json.loads(body[8 : 8 + size]), "__metadata__": dict(sorted(values.items()))}
    tensor_bytes = memoryview(body)[8 + size :]
    if checksum:
        digest = _hash_header(header)
        digest.update(tensor_bytes)
        header["__metadata__"] = dict(sorted({**values, CHECKSUM: digest.hexdigest()}.items()))
    text = _dump(header)
    text += b" " * (-len(text) % 8)  # the format wants tensors to start at a multiple of 8
    return b"".join([len(text).to_bytes(8, "little"), text, tensor_bytes])


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file of ``pack`` atomically. Raises ``OSError``."""
    files.atomic_write(path, pack(tensors, metadata))


def read(path: Path | str, *, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file.

    Args:
        path: The file.
        verify: Whether to compare its content with its checksum, which reads every byte. Files of other programs and
            of version 0.1.0 have no checksum, and are accepted.

    Returns:
        The tensors by key, memory-mapped; and the metadata.

    Raises:
        DamagedFileError: It is no safetensors file, or its content is not that of its checksum.
        OSError: It cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:  # checks that the header fits the file's size
            if verify:
                _check(path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        raise DamagedFileError(f"a file that safetensors cannot read ({error})") from error


def _check(path: Path | str) -> None:
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        expected = header.get("__metadata__", {}).pop(CHECKSUM, None)
        if expected is None:
            return
        digest = _hash_header(header)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        if digest.hexdigest() != expected:
            raise DamagedFileError(f"other content than its checksum says: sha256 {digest.hexdigest()[:12]}…")


def _hash_header(header: Mapping[str, Any]) -> Any:  # a hashlib object, whose type has no public name
    return hashlib.sha256(_dump(header))


def _dump(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()
