"""Parts of a feature set as files in the run folder.

A part is written atomically: it is whole or absent. Its checksum is verified once per evaluation. It is memory-mapped
when read, and shared by the ranks of all nodes through the file system of the run folder.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from torch import Tensor

from hpcssl.errors import EvalError
from hpcssl.nets import tensor_file
from hpcssl.nets.tensor_file import DamagedFileError

LOG = logging.getLogger("hpcssl")

PARTS = 256
"""Approximate number of parts of a large set. A kill loses at most one part per rank."""
_TIMEOUT_S = 60.0  # how long a file that another node wrote may take to appear on a network file system


def plan_parts(samples: int, batch: int) -> list[tuple[int, int]]:
    """Cut a set into parts of whole batches, about ``PARTS`` of them for a large set.

    The parts depend on the set and the batch only, never on the number of ranks.

    Args:
        samples: Number of images of the set.
        batch: Images per forward pass.

    Returns:
        The first index and the index after the last one of each part.
    """
    rows = -(-samples // (batch * PARTS)) * batch
    return [(first, min(first + rows, samples)) for first in range(0, samples, rows)]


def part_path(folder: Path, part: int) -> Path:
    """The file of a part."""
    return folder / f"part-{part:05d}.safetensors"


def write_part(path: Path, rows: Tensor) -> None:
    """Write the features [n, D] of one part.

    Raises:
        OSError: The file cannot be written.
    """
    tensor_file.write(path, {"features": rows}, {"format": "hpcssl-features-1"})


def read_part(path: Path, rows: int, width: int, *, verify: bool) -> Tensor | None:
    """Return the features of one part, memory-mapped, or None if the file is absent, damaged or of another shape.

    The mapping is safe because a part is never rewritten in place.

    Args:
        path: The file.
        rows: Number of images of the part.
        width: Number of features per image.
        verify: Whether to read every byte and compare it with the checksum. A damaged part is reported in the log.
    """
    if not path.exists():
        return None
    try:
        features = tensor_file.read(path, verify=verify)[0].get("features")
    except (OSError, DamagedFileError) as error:
        LOG.warning("%s is not used, and its features are computed again: it is %s.", path, error)
        return None
    return features if features is not None and features.shape == (rows, width) else None


def wait_for_part(path: Path, rows: int, width: int) -> Tensor:
    """Return the features of a part that some rank has written, waiting for it to appear on a network file system.

    Raises:
        EvalError: The file does not appear within a minute.
    """
    start = time.monotonic()
    while (features := read_part(path, rows, width, verify=False)) is None:
        if time.monotonic() - start > _TIMEOUT_S:
            raise EvalError(
                f"features {path}",
                got="no such file one minute after another rank wrote it",
                expected="a run folder that every node sees",
                fix="put the run folder on a shared file system",
            )
        time.sleep(0.2)
        os.listdir(path.parent)  # makes a network file system refresh its directory cache
    return features
