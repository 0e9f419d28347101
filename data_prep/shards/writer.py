"""Write one shard: a tar of samples, its sha256, its index rows and a checksum of every sample."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.catalog import LeftOut, Sample
from data_prep.shards.pack import pack_samples
from hpcssl import files
from hpcssl.data.shards import ROW
from hpcssl.errors import DataError

FREE_SPACE_FIX = "free space, or choose another OUT, then run the same command again: finished shards are kept"


@dataclass
class WrittenShard:
    """A shard on the disk.

    Attributes:
        bytes: Size of the file.
        sha256: Digest of the file.
        rows: Index rows of its samples, ``ROW`` [n].
        sums: Checksum of every sample, uint64 [n]: it tells which sample a damaged byte belongs to.
        rejected: Images that were left out.
    """

    bytes: int
    sha256: str
    rows: npt.NDArray[Any]
    sums: npt.NDArray[np.uint64]
    rejected: list[LeftOut] = field(default_factory=list)


def sample_sums(data: memoryview, starts: list[int]) -> npt.NDArray[np.uint64]:
    """Compute a checksum for every sample: the sum of its 64-bit words.

    Any single changed word changes it, and it runs at the speed of the memory. The sha256 of the shard tells whether
    anything is damaged; these sums tell where.

    Args:
        data: The samples, one after the other; the last one ends with the data.
        starts: Offset of each sample, a multiple of 512.

    Returns:
        uint64 [len(starts)].
    """
    if not starts:
        return np.zeros(0, "<u8")
    return np.add.reduceat(np.frombuffer(data, "<u8"), np.asarray(starts) // 8)


def write_shard(path: Path, number: int, samples: list[Sample], min_side: int = 1) -> WrittenShard:
    """Write one shard atomically: it is complete or absent.

    Args:
        path: File to write.
        number: Number of the shard, for its index rows.
        samples: What it is to hold; images that cannot be used are left out and reported in the result.
        min_side: Leave out images whose smaller side has fewer pixels.

    Returns:
        The shard as written.

    Raises:
        DataError: The file cannot be written, or a source changed meanwhile.
    """
    rejected: list[LeftOut] = []
    rows, sums, size, digest = [], [], 0, hashlib.sha256()
    try:
        with files.atomic_file(path) as file:
            for chunk in pack_samples(samples, rejected, min_side=min_side):
                file.write(chunk.data)
                digest.update(chunk.data)
                size += len(chunk.data)
                rows += [(number, *row) for row in chunk.rows]
                sums.append(sample_sums(chunk.data, chunk.starts))
    except OSError as error:
        raise write_error(path, error) from error
    return WrittenShard(size, digest.hexdigest(), np.array(rows, ROW), np.concatenate(sums), rejected)


def write_error(path: Path, error: OSError) -> DataError:
    """Build the error for a file that cannot be written."""
    return DataError(
        f"writing {path}",
        got=error.strerror or str(error),
        expected="free space and write permission",
        fix=FREE_SPACE_FIX,
    )
