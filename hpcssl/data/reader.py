"""Random access to the samples of a shard folder: one read per image, without iteration, extraction or state."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from hpcssl import rng
from hpcssl.data.decode import DamagedImageError, ScratchBuffer, decode
from hpcssl.data.shard_files import ShardFiles
from hpcssl.data.shards import ShardSet
from hpcssl.errors import DataError

LOG = logging.getLogger("hpcssl")
_MAX_REPLACEMENTS = 16  # replacements tried for one sample; each is drawn from the whole set
_MAX_SHOWN = 8  # damaged samples that an error names


@dataclass(frozen=True)
class DamagedSample:
    """A sample that could not be decoded.

    Attributes:
        index: Global sample index.
        key: The sample's name inside its shard.
        shard: File name of the shard.
        reason: What is wrong with the image.
    """

    index: int
    key: str
    shard: str
    reason: str


class Reader:
    """Reads and decodes the samples of a shard folder. Safe for any number of threads.

    Args:
        shards: The set to read.
        limit: Number of different damaged samples that are tolerated; the next one raises ``DataError``. None where the
            caller counts them.
        seed: Seed of the replacements of damaged samples.
        mapped: Whether to map the shards into memory; only for files that nobody else writes to.
        locate: Gives the path of shard n, for shards that come and go (``data/cache.py``). By default the path that
            ``shards`` gives.

    Attributes:
        damaged: The damaged samples met so far, by global index.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        limit: int | None = 0,
        seed: int = 0,
        mapped: bool = False,
        locate: Callable[[int], Path] | None = None,
    ):
        self.shards, self.limit, self.seed = shards, limit, seed
        self.damaged: dict[int, DamagedSample] = {}
        self._files = ShardFiles(shards, mapped=mapped, locate=locate)
        self._samples = shards.samples
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, index: int) -> bytes:
        """The encoded image of sample ``index``. Raises ``DataError`` where the shard cannot be read."""
        return self._files.read(*self._samples.image(index))

    def read_second(self, index: int) -> bytes:
        """The encoded second modality (``KEY.b.*``) of sample ``index``. Raises ``DataError`` like ``read``."""
        return self._files.read(*self._samples.second(index))

    def label(self, index: int) -> int:
        """Class number of sample ``index``, -1 without a label."""
        return self._samples.label(index)

    def read_images(
        self,
        index: int,
        epoch: int,
        *,
        first: bool = True,
        second: bool = False,
        body: bytes | None = None,
        scratch: tuple[ScratchBuffer, ScratchBuffer] | None = None,
    ) -> tuple[int, npt.NDArray[np.uint8] | None, npt.NDArray[np.uint8] | None]:
        """Read and decode a sample, or its replacement where it is damaged.

        The replacement is drawn with the key (seed, "replace", epoch, index, attempt), so that it is the same one on
        every rank, in every thread and after a resume.

        Args:
            index: Global sample index.
            epoch: Epoch that the replacement is drawn for.
            first: Whether to decode the image.
            second: Whether to decode the second modality.
            body: The encoded image, where the caller has read it already.
            scratch: This thread's buffers to decode into, for the image and for the second modality.

        Returns:
            The index of the sample that was really read, so that the label stays with its image; the image, uint8
            [H, W, 3], or None without ``first``; the second modality, uint8 [H, W, 3], or None without ``second``.

        Raises:
            DataError: If there are more damaged samples than ``limit``, or a shard cannot be read.
        """
        chosen = index
        for attempt in range(_MAX_REPLACEMENTS):
            try:
                image = second_image = None
                if first:
                    image = decode(self.read(chosen) if body is None else body, scratch[0] if scratch else None)
                if second:
                    second_image = decode(self.read_second(chosen), scratch[1] if scratch else None)
                return chosen, image, second_image
            except DamagedImageError as error:
                self._files.check_shard(self._samples.shard(chosen))
                self._record_damage(chosen, str(error))
            body = None
            draw = rng.raw(rng.key(self.seed, "replace", epoch, index, attempt), 1)[0]
            chosen = int(draw % np.uint64(len(self)))
        raise self._limit_error(f"{_MAX_REPLACEMENTS} samples in a row that cannot be decoded")

    def keep_only(self, shards: set[int]) -> None:
        """Close the files of all other shards. A thread that is reading one of them finishes its read first."""
        self._files.keep_only(shards)

    def close(self) -> None:
        """Close every file. A later read opens its file again."""
        self._files.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _record_damage(self, index: int, reason: str) -> None:
        with self._lock:
            if index not in self.damaged:
                shard = self.shards.shards[self._samples.shard(index)].name
                sample = self.damaged[index] = DamagedSample(index, self.shards.key(index), shard, reason)
                LOG.warning(
                    "Damaged sample %s (%s in %s): %s. Another sample replaces it.",
                    sample.index,
                    sample.key,
                    sample.shard,
                    sample.reason,
                )
            if self.limit is not None and len(self.damaged) > self.limit:
                raise self._limit_error(f"{len(self.damaged)} damaged")

    def _limit_error(self, got: str) -> DataError:
        return damage_limit_error(self.shards, got, self.damaged.values(), self.limit)


def damage_limit_error(shards: ShardSet, got: str, damaged: Iterable[DamagedSample], limit: int | None) -> DataError:
    """Make the error for more damaged samples than are tolerated. It names the first ones.

    Args:
        shards: The set that the samples belong to.
        got: What was found, such as ``3 damaged``.
        damaged: All damaged samples.
        limit: The number that is tolerated; None where there is no limit.

    Returns:
        The error, for the caller to raise.
    """
    samples = sorted(damaged, key=lambda sample: sample.index)
    names = "; ".join(f"{x.key} (sample {x.index}, {x.shard}): {x.reason}" for x in samples[:_MAX_SHOWN])
    more = f"; and {len(samples) - _MAX_SHOWN} more" if len(samples) > _MAX_SHOWN else ""
    return DataError(
        f"samples of {shards.root}",
        got=f"{got}: {names}{more}",
        expected="samples that can be decoded" if limit is None else f"at most {limit} damaged samples",
        fix="copy or write these shards again, or allow more with data.max_damaged",
    )
