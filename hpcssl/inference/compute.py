"""Features of the images of a source, in parts that can be kept as files.

Parts and batches depend on the number of images and the batch size alone, and a damaged image is left out of its batch.
A part that is computed after a kill therefore has the rows that it would have had before.

Shapes: b images of a batch, S pixels, D features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hpcssl.data.crop import crop_view
from hpcssl.data.decode import DamagedImageError, ScratchBuffer, decode
from hpcssl.errors import Stopped
from hpcssl.evals.common.encoder import FrozenEncoder
from hpcssl.inference.images import ImageSource
from hpcssl.nets import tensor_file
from hpcssl.nets.tensor_file import DamagedFileError
from hpcssl.views.augment import ViewSpec, draw_params

_FORMAT = "hpcssl-embedding-part-1"


@dataclass(frozen=True)
class Part:
    """Features of consecutive images.

    Attributes:
        features: fp32 [n, D] of the images that could be decoded; on the CPU, perhaps mapped from a file.
        index: Their numbers in the source, int64 [n].
        keys: Their names.
        damaged: Names of the other images, each with the reason.
    """

    features: Tensor
    index: npt.NDArray[np.int64]
    keys: list[str]
    damaged: list[tuple[str, str]]

    def write(self, path: Path) -> None:
        """Write the part to a file that ``read_part`` reads. Raises ``OSError``."""
        notes = {"format": _FORMAT, "keys": json.dumps(self.keys), "damaged": json.dumps(self.damaged)}
        tensor_file.write(path, {"features": self.features, "index": torch.from_numpy(self.index)}, notes)


def read_part(path: Path) -> Part | None:
    """Read a part, with its features mapped from the file; None if the file is absent or damaged."""
    try:
        tensors, notes = tensor_file.read(path)
        damaged = [(str(key), str(reason)) for key, reason in json.loads(notes["damaged"])]
        return Part(tensors["features"], tensors["index"].numpy(), json.loads(notes["keys"]), damaged)
    except (OSError, DamagedFileError, KeyError, ValueError):
        return None


class _Row(NamedTuple):
    """One image before the network: its name, and its pixels and parameters or the damage."""

    key: str
    pixels: Tensor | None
    params: np.void | None
    damage: str


@dataclass(frozen=True)
class Computation:
    """How features are computed.

    Attributes:
        encoder: The frozen encoder.
        view: How an image is cropped and resized.
        batch: Images per forward pass.
        precision: A key of ``evals.common.options.PRECISIONS``.
        normalize: Whether features are scaled to unit length.
        threads: Threads that decode images.
        stop: Whether to stop; asked before each batch.
        report: Called with the number of images of each batch that is done.
    """

    encoder: FrozenEncoder
    view: ViewSpec
    batch: int
    precision: str
    normalize: bool
    threads: int
    stop: Callable[[], bool]
    report: Callable[[int], None]

    def compute(self, source: ImageSource, spans: Sequence[tuple[int, int]]) -> Iterator[Part]:
        """Compute one part after the other. The threads read one batch ahead.

        Args:
            source: The images.
            spans: First number, and number after the last one, of each part.

        Raises:
            EvalError: Features that are not finite.
            DataError: A shard that cannot be read.
            Stopped: After a request to stop; parts that were yielded are whole.
        """
        batches = [
            (part, range(first, min(first + self.batch, span[1])))
            for part, span in enumerate(spans)
            for first in range(*span, self.batch)
        ]
        scratch = ScratchBuffer(), ScratchBuffer()
        with ThreadPoolExecutor(self.threads) as pool:
            ahead = iter(batches)

            def read_next() -> Iterator[_Row] | None:
                batch = next(ahead, None)
                return None if batch is None else pool.map(lambda i: self._load(source, i, scratch), batch[1])

            reading, done = read_next(), list[tuple[range, list[_Row], Tensor]]()
            for number, (part, indices) in enumerate(batches):
                if self.stop():
                    pool.shutdown(cancel_futures=True)
                    raise Stopped(
                        "features",
                        got=f"a request to stop after {batches[number][1].start} images of the source",
                        expected="to finish",
                        fix="run the same command again, which goes on from the finished parts",
                    )
                assert reading is not None
                current, reading = reading, read_next()
                rows = list(current)
                done.append((indices, rows, self._encode(rows)))
                self.report(len(indices))
                if number + 1 == len(batches) or batches[number + 1][0] != part:
                    yield _join(done)
                    done = []

    def _load(self, source: ImageSource, index: int, scratch: tuple[ScratchBuffer, ScratchBuffer]) -> _Row:
        key, side = source.key(index), self.view.size
        try:
            image = decode(source.read(index), scratch[0])
            params = draw_params(self.view.augment, 0, *image.shape[:2])  # crops of evaluations draw nothing
            pixels = torch.empty(side, side, 3, dtype=torch.uint8)
            crop_view(image, params["box"].tolist(), self.view, pixels[None].permute(0, 3, 1, 2), scratch[1])
        except DamagedImageError as error:
            return _Row(key, None, None, str(error))
        return _Row(key, pixels, params, "")

    def _encode(self, rows: list[_Row]) -> Tensor:
        """Features of the images of a batch that could be decoded, fp32 [b, D] on the CPU."""
        pixels = [row.pixels for row in rows if row.pixels is not None]
        if not pixels:
            return torch.empty(0, self.encoder.width)
        params = np.stack([row.params for row in rows if row.params is not None])
        features = self.encoder.encode(torch.stack(pixels), params, self.view, self.precision)
        names = [row.key for row in rows if row.pixels is not None]
        self.encoder.check_finite(features, names, self.precision)
        return (F.normalize(features, dim=1) if self.normalize else features).cpu()


def _join(done: list[tuple[range, list[_Row], Tensor]]) -> Part:
    numbered = [(i, row) for indices, rows, _ in done for i, row in zip(indices, rows, strict=True)]
    kept = [(i, row.key) for i, row in numbered if row.pixels is not None]
    return Part(
        torch.cat([features for *_, features in done]),
        np.array([i for i, _ in kept], np.int64),
        [key for _, key in kept],
        [(row.key, row.damage) for _, row in numbered if row.pixels is None],
    )
