"""The lines of a file from the last to the first: a journal may have millions, of which the last few matter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

BLOCK_BYTES = 1 << 16
MAX_LINE_BYTES = 4 << 20
"""Longest line of a JSON-lines file. The sample ids of a step with half a million images fit."""


def read_backward(path: Path | str, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, the last one first.

    A line that is longer than ``MAX_LINE_BYTES`` comes as an empty line, so that no more than that is held in memory.

    Args:
        path: The file, which must exist.
        block_bytes: Bytes that are read at once.

    Yields:
        The offset of the line's first byte, and the line without its newline. Empty lines are left out.
    """
    with open(path, "rb") as file:
        position, tail, is_too_long = file.seek(0, os.SEEK_END), b"", False
        while position > 0:
            offset, size = position, min(block_bytes, position)
            position -= size
            file.seek(position)
            first, *lines = file.read(size).split(b"\n")
            for line in reversed(lines):
                offset -= len(line)
                if line or tail or is_too_long:
                    yield offset, b"" if is_too_long else _bounded(line + tail)
                tail, is_too_long = b"", False
                offset -= 1
            tail = first + tail
            if len(tail) > MAX_LINE_BYTES:
                tail, is_too_long = b"", True
        if tail or is_too_long:
            yield 0, b"" if is_too_long else tail


def _bounded(line: bytes) -> bytes:
    return line if len(line) <= MAX_LINE_BYTES else b""
