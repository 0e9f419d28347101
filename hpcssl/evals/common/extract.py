"""Computation of features by a frozen backbone: the same bits on any number of ranks, and resumable.

The set is cut into parts of whole batches (``feature_cache.plan_parts``). Parts and batches depend on the set alone,
so every forward pass has the same rows in the same shape on any number of ranks. A finished part is one safetensors
file; an evaluation that was killed computes only the missing parts.

Shapes: B batch, S pixels, N samples, D features.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpcssl import config
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.world import World
from hpcssl.errors import EvalError, HpcsslError
from hpcssl.evals.common import feature_cache
from hpcssl.evals.common.encoder import FrozenEncoder
from hpcssl.evals.common.features import Features
from hpcssl.evals.common.images import ImageStream, IndexBatches, Indices
from hpcssl.evals.common.options import FEATURE_DTYPES, FeatureOptions
from hpcssl.evals.common.sync import StopCheck, as_eval_error, never_stop, raise_on_any_rank
from hpcssl.terminal.progress import ProgressLog
from hpcssl.views.augment import ViewSpec


class FeatureStream:
    """Iterator over the features of an order's batches. A context manager.

    Yields pairs of features, fp32 [B, D] on the encoder's device, and their global indices, int64 [B].

    Args:
        encoder: The frozen backbone.
        data: The images.
        view: How they are cropped.
        order: The batches.
        precision: Precision of the forward pass, a key of ``options.PRECISIONS``.
        seed: Seed of random crops.
        threads: Loader threads of this process.

    Raises:
        EvalError: On iteration: features that are NaN or infinite, or a damaged image.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        data: ShardSet,
        view: ViewSpec,
        order: IndexBatches,
        precision: str,
        *,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        self.encoder, self.view, self.precision = encoder, view, precision
        pin = next(encoder.backbone.parameters()).device.type == "cuda"
        self.images = ImageStream(data, view, order, range(len(order.steps)), seed=seed, threads=threads, pin=pin)

    def __iter__(self) -> FeatureStream:
        return self

    def __next__(self) -> tuple[Tensor, Indices]:
        batch = next(self.images)
        features = self.encoder.encode(batch.images[0], batch.params[0], self.view, self.precision)
        self.encoder.check_finite(features, [f"sample {i}" for i in batch.index], self.precision)
        return features, np.array(batch.index)

    def __enter__(self) -> FeatureStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.images.close()


def extract_features(
    encoder: FrozenEncoder,
    data: ShardSet,
    options: FeatureOptions,
    world: World,
    *,
    root: Path | None = None,
    threads: int = 1,
    stop: StopCheck = never_stop,
) -> Features:
    """Compute the features of a whole set, or read the parts that exist. A collective.

    Args:
        encoder: The frozen backbone.
        data: The images.
        options: View, precision, and batch of the forward pass.
        world: The processes that share the work.
        root: Folder in which finished parts are kept, below a folder name derived from weights, data and options.
            None keeps them in memory and exchanges them between the ranks.
        threads: Loader threads of this process.
        stop: Whether this process was asked to stop.

    Returns:
        The features of all images, on every rank.

    Raises:
        EvalError: Features that are not finite, a damaged image, an empty set, or a file that cannot be written.
        Stopped: After a request to stop. Finished parts are kept if ``root`` is given.
    """
    if len(data) == 0:
        raise EvalError(
            f"shard folder {data.root}",
            got="no samples",
            expected="at least one",
            fix="name another folder, or write the shards again",
        )
    extraction = _Extraction(encoder, data, options, world, _cache_folder(root, encoder, data, options), threads, stop)
    parts = extraction.compute(extraction.missing_parts())
    if extraction.folder is not None:
        world.barrier()
        parts = extraction.read_parts(extraction.folder)
    return Features([parts[i] for i in range(len(parts))], data.labels, data.classes)


def are_stored(encoder: FrozenEncoder, data: ShardSet, options: FeatureOptions, root: Path) -> bool:
    """Return whether ``extract_features`` would find a file for every part of a set. The files are not verified.

    Args:
        encoder: The frozen backbone.
        data: The images.
        options: View, precision, and batch of the forward pass.
        root: The folder of ``extract_features``.
    """
    folder = _cache_folder(root, encoder, data, options)
    parts = feature_cache.plan_parts(len(data), options.forward_batch)
    return folder is not None and all(feature_cache.part_path(folder, i).exists() for i in range(len(parts)))


def _cache_folder(root: Path | None, encoder: FrozenEncoder, data: ShardSet, options: FeatureOptions) -> Path | None:
    if root is None:
        return None
    settings = config.fingerprint(
        {
            "view": asdict(encoder.view(options)),
            "precision": options.precision,
            "batch": options.forward_batch,
            "store": options.feature_dtype,
        }
    )
    return root / f"{encoder.sha256[:16]}-{data.digest[:16]}-{settings[:8]}"


@dataclass(frozen=True)
class _Extraction:
    """The inputs of one extraction, and its steps."""

    encoder: FrozenEncoder
    data: ShardSet
    options: FeatureOptions
    world: World
    folder: Path | None
    threads: int
    stop: StopCheck

    @cached_property
    def parts(self) -> list[tuple[int, int]]:
        return feature_cache.plan_parts(len(self.data), self.options.forward_batch)

    @property
    def what(self) -> str:
        return f"features of {Path(self.data.root).name}"

    @property
    def dtype(self) -> torch.dtype:
        return FEATURE_DTYPES[self.options.feature_dtype]

    def missing_parts(self) -> list[int]:
        """Numbers of the parts without an undamaged file. A collective: each rank checks its share of the files."""
        if self.folder is None:
            return list(range(len(self.parts)))
        missing = []
        for i, (first, last) in list(enumerate(self.parts))[self.world.rank :: self.world.size]:
            path = feature_cache.part_path(self.folder, i)
            if feature_cache.read_part(path, last - first, self.encoder.width, verify=True) is None:
                missing.append(i)
        return sorted(i for text in self.world.all_gather_text(json.dumps(missing)) for i in json.loads(text))

    def read_parts(self, folder: Path) -> dict[int, Tensor]:
        """All parts, memory-mapped from their files."""
        return {
            i: feature_cache.wait_for_part(feature_cache.part_path(folder, i), last - first, self.encoder.width)
            for i, (first, last) in enumerate(self.parts)
        }

    def compute(self, missing: list[int]) -> dict[int, Tensor]:
        """Compute missing parts in rounds of one part per rank. A collective.

        Returns:
            Without a folder, all computed parts on every rank; with a folder, nothing, since the parts are files.
        """
        world, batch, parts = self.world, self.options.forward_batch, self.parts
        batches = [
            np.arange(first, min(first + batch, parts[i][1]))
            for i in missing[world.rank :: world.size]
            for first in range(*parts[i], batch)
        ]
        computed: dict[int, Tensor] = {}
        # ranks take turns, so that rank 0 has as much to do as any other
        progress = ProgressLog(self.what, sum(map(len, batches)), "images" if world.size == 1 else "images of rank 0")
        order = IndexBatches(range(len(batches)), batches.__getitem__, lambda step: 0, batch)
        view = self.encoder.view(self.options)
        with FeatureStream(
            self.encoder, self.data, view, order, self.options.precision, threads=self.threads
        ) as stream:
            for first in range(0, len(missing), world.size):
                numbers = missing[first : first + world.size]
                rows = self._compute_round(stream, numbers, progress)
                if self.folder is None:
                    computed |= self._exchange(rows, numbers)
        return computed

    def _compute_round(self, stream: FeatureStream, numbers: list[int], progress: ProgressLog) -> Tensor | None:
        """This rank's part among the parts of one round, None for a rank without one. A collective."""
        rows, error, active = None, None, self.world.rank < len(numbers)
        try:
            if active:
                number = numbers[self.world.rank]
                first, last = self.parts[number]
                rows = self._compute_part(stream, -(-(last - first) // self.options.forward_batch), progress)
                if rows is not None and self.folder is not None:
                    feature_cache.write_part(feature_cache.part_path(self.folder, number), rows)
        except (HpcsslError, OSError) as caught:
            error = as_eval_error(caught)
        stopped = self.stop() or (rows is None and active)
        raise_on_any_rank(self.world, self.what, stop=stopped, error=error)
        return rows

    def _compute_part(self, stream: FeatureStream, batches: int, progress: ProgressLog) -> Tensor | None:
        """The features of the next ``batches`` batches, None after a request to stop."""
        rows = []
        for _ in range(batches):
            if self.stop():
                return None
            rows.append(next(stream)[0].to(self.dtype).cpu())
            progress.add(len(rows[-1]))
        part = torch.cat(rows)
        if not torch.isfinite(part).all():  # the stream checked them before they were rounded
            raise EvalError(
                f"features by {stream.encoder.path}",
                got=f"values above {torch.finfo(self.dtype).max:g}",
                expected="numbers that fp16 can represent",
                fix="set feature_dtype=fp32",
            )
        return part

    def _exchange(self, rows: Tensor | None, numbers: list[int]) -> dict[int, Tensor]:
        """The parts of one round on every rank. A collective."""
        world, parts = self.world, self.parts
        longest = max(last - first for first, last in parts)
        padded = torch.zeros(longest, self.encoder.width, dtype=self.dtype, device=world.device)
        if rows is not None:
            padded[: len(rows)] = rows.to(world.device)
        gathered = torch.split(world.all_gather(padded).cpu(), longest)
        return {i: gathered[rank][: parts[i][1] - parts[i][0]].clone() for rank, i in enumerate(numbers)}
