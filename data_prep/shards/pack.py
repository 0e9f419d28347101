"""Lay samples out as a tar in memory: source bytes are read straight to their final place in a buffer.

A buffer receives header, image, padding, header, label, ... in their final places and is written in one call, so an
image is copied once on its way from file to file. All offsets are known before anything is written: the index costs
no further pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data_prep.catalog import LeftOut, Sample
from data_prep.catalog.names import sample_key
from data_prep.shards import edges, images, ustar
from data_prep.shards.source_reader import SourceReader
from hpcssl.data.decode import DamagedImageError

BUFFER_BYTES = 1 << 20  # stays in the second-level cache between read, checksums and write; grows for a larger image
MAX_IMAGE_BYTES = 0xFFFFFFFF  # the index holds sizes in 32 bits
_encode_json = json.JSONEncoder(sort_keys=True).encode  # json.dumps would build a new encoder for every sample

Row = tuple[int, int, int, int, int, int]
"""header, offset, size, label, offset_b, size_b of a sample: ``hpcssl.data.shards.ROW`` without the shard's number."""
_SUFFIX_LETTERS = 8  # of the longest suffix of a member, jpeg2000
ImageCheck = Callable[[memoryview], str | None]
"""Gives the reason why an image cannot be used, or None."""


class Chunk(NamedTuple):
    """Some samples of a shard, one after the other.

    Attributes:
        data: Their bytes; valid until the next chunk is produced.
        rows: Their index rows.
        starts: Offset in ``data`` at which each sample begins.
    """

    data: memoryview
    rows: list[Row]
    starts: list[int]


def pack_samples(
    samples: list[Sample], rejected: list[LeftOut], check: ImageCheck = images.find_damage, min_side: int = 1
) -> Iterator[Chunk]:
    """Lay samples out as members of a tar.

    Args:
        samples: What the shard is to hold.
        rejected: Receives the images that cannot be read, or that ``check`` rejects.
        check: Gives the reason why an image cannot be used, or None.
        min_side: Leave out images whose smaller side has fewer pixels.

    Yields:
        The shard in chunks of whole samples; the last one ends with the end mark of the tar.

    Raises:
        DataError: A source changed while it was read.
    """
    packer = _Packer(rejected, check, min_side)
    base = position = 0  # bytes of the shard before this buffer, and bytes used in it
    rows: list[Row] = []
    starts: list[int] = []
    try:
        for listed in samples:
            sample = packer.with_edges(listed) if listed.second == edges.COMPUTE_EDGES else listed
            if sample is None:
                continue
            key = sample_key(sample.source, keep_suffix=sample.key_suffix)
            small = _small_members(sample)
            needed = _max_size(key, sample, small)
            if position and position + needed > len(packer.buffer):
                yield Chunk(packer.buffer[:position], rows, starts)
                base, position, rows, starts = base + position, 0, [], []
            packer.reserve(needed)
            placed = packer.place(position, base, key, sample, small)
            if placed is not None:
                row, end = placed
                rows.append(row)
                starts.append(position)
                position = end
        packer.buffer[position : position + len(ustar.END)] = ustar.END
        yield Chunk(packer.buffer[: position + len(ustar.END)], rows, starts)
    finally:
        packer.reader.close()


class _Packer:
    """The buffer of ``pack_samples`` and what fills it."""

    def __init__(self, rejected: list[LeftOut], check: ImageCheck, min_side: int) -> None:
        self.buffer = memoryview(bytearray(BUFFER_BYTES))
        self.reader = SourceReader()
        self.rejected = rejected
        self.check = check
        self.min_side = min_side

    def reserve(self, needed: int) -> None:
        """Replace the buffer by a larger one if it has fewer than ``needed`` bytes."""
        if needed > len(self.buffer):
            self.buffer = memoryview(bytearray(needed))

    def with_edges(self, sample: Sample) -> Sample | None:
        """Compute the edges of a sample, whose size must be known before it is placed; None if it is rejected."""
        image = bytearray(sample.size)
        try:
            self.reader.read_image(memoryview(image), sample)
            return sample._replace(second=edges.compute_edges(bytes(image)))
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
        except DamagedImageError as error:
            reason = images.find_damage(image) or str(error)
        self.rejected.append(LeftOut(sample.source, reason, broken=True))
        return None

    def place(
        self, start: int, base: int, key: str, sample: Sample, small: list[tuple[str, bytes]]
    ) -> tuple[Row, int] | None:
        """Write one sample into the buffer.

        Args:
            start: Offset in the buffer.
            base: Offset of the buffer in the shard.
            key: KEY of the sample.
            sample: The sample.
            small: Its other members, as (suffix, content).

        Returns:
            The index row and the offset behind the sample; None for a rejected one, which the next one overwrites.
        """
        position = start
        extents = []
        try:
            position, extent = self._place_image(position, base, key, "", sample)
            extents.append(extent)
            if sample.second is None:
                extents.append((0, 0))
            else:
                position, extent = self._place_image(position, base, key, ".b", sample)
                extents.append(extent)
        except OSError as error:
            self.rejected.append(LeftOut(sample.source, f"cannot be read ({error.strerror})", broken=True))
            return None
        except _RejectionError as error:
            self.rejected.append(LeftOut(sample.source, str(error), error.broken))
            return None
        for suffix, body in small:
            header = ustar.make_header(f"{key}.{suffix}", len(body))
            self.buffer[position : position + len(header)] = header
            position += len(header)
            self.buffer[position : position + len(body)] = body
            position = self._pad(position + len(body))
        return (base + start, *extents[0], sample.label, *extents[1]), position

    def _place_image(
        self, position: int, base: int, key: str, infix: str, sample: Sample
    ) -> tuple[int, tuple[int, int]]:
        """Write the image, or with ``infix`` ``.b`` the second modality; returns the offset behind it, and its extent.

        Raises OSError, and ``_RejectionError`` for an image that cannot be used.
        """
        size = _second_size(sample) if infix else sample.size
        start = position
        position += ustar.header_size(f"{key}{infix}.jpg")
        view = self.buffer[position : position + min(size, MAX_IMAGE_BYTES)]
        if not infix:
            self.reader.read_image(view, sample)
        elif isinstance(sample.second, bytes):
            view[:] = sample.second
        elif sample.second is not None:
            self.reader.read_range(view, sample.path, sample.second[0])
        reason = self.check(view) if size <= MAX_IMAGE_BYTES else "larger than 4 GiB"
        if reason:
            raise _RejectionError(reason)
        if self.min_side > 1 and not infix and (side := images.smaller_side(view)) < self.min_side:
            raise _RejectionError(f"{side} pixels on its smaller side, fewer than {self.min_side}", broken=False)
        header = ustar.make_header(f"{key}{infix}.{images.detect_suffix(view)}", size)
        shift = start + len(header) - position  # where a longer suffix makes the name need another block
        if shift:
            self.buffer[position + shift : position + shift + size] = bytes(view)
        position += shift
        self.buffer[start:position] = header
        return self._pad(position + size), (base + position, size)

    def _pad(self, position: int) -> int:
        end = ustar.padded_size(position)
        self.buffer[position:end] = bytes(end - position)
        return end


class _RejectionError(Exception):
    """An image that cannot be used; the text is the reason."""

    def __init__(self, reason: str, *, broken: bool = True) -> None:
        super().__init__(reason)
        self.broken = broken


def _small_members(sample: Sample) -> list[tuple[str, bytes]]:
    """Return the members behind the images: the label and KEY.json."""
    fields = {"source": sample.source} | json.loads(sample.extra_json or "{}")
    if sample.original_label is not None:
        fields["original_label"] = sample.original_label
    label = [("cls", b"%d" % sample.label)] if sample.label >= 0 else []
    return [*label, ("json", _encode_json(fields).encode())]


def _max_size(key: str, sample: Sample, small: list[tuple[str, bytes]]) -> int:
    """Upper bound of the bytes that a sample takes, the end mark of the shard included."""
    header = ustar.header_size(f"{key}.b.{'x' * _SUFFIX_LETTERS}")  # longer than the name of any of its members
    sizes = [sample.size, _second_size(sample), *(len(body) for _, body in small)]
    return sum(header + ustar.padded_size(size) for size in sizes) + len(ustar.END)


def _second_size(sample: Sample) -> int:
    if isinstance(sample.second, bytes):
        return len(sample.second)
    return sample.second[1] if sample.second else 0
