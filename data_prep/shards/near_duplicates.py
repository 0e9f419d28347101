"""Find images that look alike by perceptual hashes: 64 bits that change little with size, format and compression."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.catalog import Sample
from data_prep.shards import pool
from data_prep.shards.source_reader import SourceReader
from hpcssl.data.decode import DamagedImageError, decode
from hpcssl.errors import ConfigError

_JOB_IMAGES = 256
_BLOCK_PAIRS = 1 << 20
_BITS_SET = np.array([bin(n).count("1") for n in range(256)], np.uint8)


def hash_samples(samples: Sequence[Sample], workers: int | None) -> list[int | None]:
    """Hash images: the signs of the 8x8 lowest frequencies of the picture at 32x32, as imagehash's ``phash``.

    Args:
        samples: The images.
        workers: Number of processes; None for one per usable core.

    Returns:
        The hash of each image, 64 bits; None for an image that cannot be read, which the writer reports.

    Raises:
        ConfigError: imagehash is missing.
    """
    try:
        import imagehash  # noqa: F401 - the workers use it; its absence is reported here
    except ImportError as error:
        raise ConfigError(
            "--dedup",
            got="no imagehash",
            expected="imagehash, for perceptual hashes",
            fix="pip install 'hpcssl[images]'",
        ) from error
    jobs = [list(samples[start : start + _JOB_IMAGES]) for start in range(0, len(samples), _JOB_IMAGES)]
    results = dict(pool.run_jobs(hash_job, jobs, workers, [len(job) for job in jobs], "comparing"))
    return [value for number in range(len(jobs)) for value in results[number]]


def hash_job(samples: list[Sample]) -> list[int | None]:
    """Hash some images, in a worker."""
    reader = SourceReader()
    try:
        return [_hash_sample(reader, sample) for sample in samples]
    finally:
        reader.close()


def _hash_sample(reader: SourceReader, sample: Sample) -> int | None:
    import imagehash

    body = bytearray(sample.size)
    try:
        reader.read_image(memoryview(body), sample)
        picture = Image.fromarray(decode(bytes(body)))
    except (OSError, DamagedImageError):
        return None
    return int(str(imagehash.phash(picture)), 16)


def find_nearest(queries: Sequence[int | None], others: Sequence[int | None], distance: int) -> npt.NDArray[np.int64]:
    """Find for each hash one of the others that differs in at most ``distance`` bits.

    Two such hashes agree in at least one of ``distance + 1`` bands of bits, whatever the bits that differ. So only
    pairs that share a band are compared: a million images take seconds, and no pair is missed.

    Args:
        queries: Hashes of 64 bits; None finds nothing.
        others: Hashes to compare with; None is never found.
        distance: Largest number of different bits, 0 to 63.

    Returns:
        For each query the position of the nearest of the others, the first of several; -1 without one.
    """
    query_rows = np.array([n for n, value in enumerate(queries) if value is not None], np.int64)
    other_rows = np.array([n for n, value in enumerate(others) if value is not None], np.int64)
    query_hash, query_group = np.unique(np.array([queries[n] for n in query_rows], np.uint64), return_inverse=True)
    other_hash, other_first = np.unique(np.array([others[n] for n in other_rows], np.uint64), return_index=True)
    best = np.full(len(query_hash), 65 << 32, np.int64)  # distance in the upper half, position in the lower
    positions = other_rows[other_first]
    for shift, bits in _bands(distance + 1):
        mask = np.uint64((1 << bits) - 1)
        query_band = (query_hash >> np.uint64(shift)) & mask
        other_band = (other_hash >> np.uint64(shift)) & mask
        order = np.argsort(other_band, kind="stable")
        start = np.searchsorted(other_band[order], query_band, "left")
        count = np.searchsorted(other_band[order], query_band, "right") - start
        for first, last in _blocks(count):
            pairs = count[first:last]
            query = np.repeat(np.arange(first, last), pairs)
            offset = np.arange(len(query)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
            other = order[start[query] + offset]
            bytes_differ = (query_hash[query] ^ other_hash[other]).view(np.uint8).reshape(-1, 8)
            differ = _BITS_SET[bytes_differ].sum(1, dtype=np.int64)
            near = differ <= distance
            np.minimum.at(best, query[near], (differ[near] << 32) | positions[other[near]])
    result = np.full(len(queries), -1, np.int64)
    found = best[query_group] if len(query_rows) else best
    result[query_rows] = np.where(found < 65 << 32, found & 0xFFFFFFFF, -1)
    return result


def _bands(number: int) -> list[tuple[int, int]]:
    """Divide 64 bits into bands: position of the lowest bit and number of bits of each."""
    edges = [64 * n // number for n in range(number + 1)]
    return [(low, high - low) for low, high in itertools.pairwise(edges)]


def _blocks(counts: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Divide queries into ranges of about ``_BLOCK_PAIRS`` pairs, so that memory stays bounded."""
    block = np.cumsum(counts) // _BLOCK_PAIRS
    edges = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(counts)]
    return [(first, last) for first, last in itertools.pairwise(edges) if last > first]
