"""Features of a data set by a frozen backbone: in index order, the same bits on any number of ranks, resumable.

The set is cut into *parts* of whole batches. Parts and batches depend on the set alone, never on the number of
ranks, so that every forward pass sees the same rows in the same shape wherever it runs. A finished part is one
safetensors file; a killed run goes on with the parts that are missing.

Letters in shapes: N samples, D features.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl import config, files
from hpcssl.data.loader import Loader
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError, DataError, EvalError, HpcsslError, nearest
from hpcssl.evals import cache
from hpcssl.evals.together import Stop, agree, as_error, never
from hpcssl.nets import resnet, weights
from hpcssl.views import augment
from hpcssl.views.augment import NAMED, ViewSpec
from hpcssl.world import World

log = logging.getLogger("hpcssl")

_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """How features are made; the base of the options of every evaluation on frozen features.

    ``view``: the centre crop, ``auto`` being ``eval`` (short side to 256/224 of the size) for images above 64 pixels
    and ``eval_whole`` up to 64, where the whole image is the view. ``precision`` of the forward pass; features are
    stored as fp32. ``batch``: images per forward pass.
    """

    view: str = "auto"
    precision: str = "fp32"
    batch: int = 128

    def __post_init__(self):
        views = ("auto", *(name for name, a in NAMED.items() if a.crop == "center"))
        for field, known in (("view", views), ("precision", tuple(_PRECISIONS))):
            if getattr(self, field) not in known:
                raise ConfigError(f"evaluation option {field}", got=repr(getattr(self, field)),
                                  expected=" or ".join(known), mend=nearest(str(getattr(self, field)), known))
        if self.batch < 1:
            raise ConfigError("evaluation option batch", got=self.batch, expected="at least 1", mend="batch=128")


@dataclass(frozen=True)
class Encoder:
    """A frozen backbone with the header of its weights file and that file's sha256."""

    backbone: nn.Module
    meta: dict
    sha256: str
    path: Path

    @classmethod
    def open(cls, path: Path | str, world: World) -> Encoder:
        """Load strictly, onto the world's device. Raises ``EvalError``."""
        backbone, meta = weights.load(path)
        backbone = backbone.to(world.device, memory_format=torch.channels_last)
        return cls(backbone, meta, files.digest(path), Path(path))

    @property
    def width(self) -> int:
        return resnet.width_of(self.backbone)

    def view(self, options: FeatureOptions) -> ViewSpec:
        size, name = self.meta["size"], options.view
        if name == "auto":
            name = "eval" if size > weights.WHOLE_UP_TO else "eval_whole"
        return ViewSpec(name=name, augment=NAMED[name], size=size)

    @torch.no_grad()
    def encode(self, images: Tensor, params: np.ndarray, view: ViewSpec, precision: str) -> Tensor:
        """uint8 [B, S, S, 3] and their drawn parameters -> fp32 features [B, D] on the encoder's device."""
        device = next(self.backbone.parameters()).device
        x = augment.apply(images.to(device, non_blocking=True), params, view.augment, mean=self.meta["mean"],
                          std=self.meta["std"])
        low = _PRECISIONS[precision]
        with torch.autocast(device.type, dtype=low, enabled=low is not None):
            return self.backbone(x).float()


class Features:
    """Raw features [N, D] as parts in index order, fp32 on the CPU (of the page cache, where parts are files)."""

    def __init__(self, parts: Sequence[Tensor], labels: np.ndarray, classes: Sequence[str] = ()):
        self.parts = list(parts)
        self.labels = torch.as_tensor(np.asarray(labels, dtype=np.int64))
        self.classes = list(classes)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def width(self) -> int:
        return self.parts[0].shape[1]

    def unit(self) -> Iterator[tuple[int, Tensor]]:
        """(index of its first row, rows of unit length) of each part."""
        for start, part in zip(self.starts, self.parts, strict=False):
            yield int(start), F.normalize(part, dim=1)

    def rows(self, index: Tensor) -> Tensor:
        """Raw rows [len(index), D] of any global indices, int64."""
        index = index.cpu()
        if len(self.parts) == 1:
            return self.parts[0][index]
        part = torch.as_tensor(np.searchsorted(self.starts, index.numpy(), side="right") - 1)
        found = torch.empty(len(index), self.width)
        for i in part.unique().tolist():
            here = part == i
            found[here] = self.parts[i][index[here] - int(self.starts[i])]
        return found

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance [D] of the unit-length rows, summed in double precision in index order."""
        mean = sum(rows.double().sum(0) for _, rows in self.unit()) / len(self)
        var = sum((rows.double() - mean).square().sum(0) for _, rows in self.unit()) / (len(self) - 1)
        return mean.float(), var.float()


class Batches:
    """An order for the loader: whole batches of global indices of which this process takes all.

    ``steps``: the steps, as ``batch_of`` (step -> int64 indices) and ``epoch_of`` number them, that the loader is
    to count 0, 1, 2, …; ``most``: the largest batch.
    """

    def __init__(self, steps: Sequence[int], batch_of: Callable[[int], np.ndarray],
                 epoch_of: Callable[[int], int], most: int):
        self.steps, self.global_batch = steps, most
        self._batch_of, self._epoch_of = batch_of, epoch_of

    def epoch_of(self, step: int) -> int:
        return self._epoch_of(self.steps[step])

    def batch(self, step: int) -> np.ndarray:
        return self._batch_of(self.steps[step])

    def rows(self, size: int) -> int:
        return self.global_batch

    def part(self, step: int, rank: int, size: int) -> np.ndarray:
        return self.batch(step)


def extract(encoder: Encoder, data: ShardSet, options: FeatureOptions, world: World, *, root: Path | None = None,
            threads: int = 1, stop: Stop = never) -> Features:
    """Features of the whole set, on every rank. A collective.

    ``root``: the folder that keeps finished parts under a name made of weights, data and view; without it they stay
    in memory and are exchanged. Raises ``EvalError`` (not-finite features, damaged images) and ``Stopped``.
    """
    if len(data) == 0:
        raise EvalError(f"shard folder {data.root}", got="no samples", expected="at least one",
                        mend="name another folder, or write the shards again")
    view = encoder.view(options)
    folder = None
    if root is not None:
        settings = config.fingerprint({"view": asdict(view), "precision": options.precision,
                                       "batch": options.batch})
        folder = root / f"{encoder.sha256[:16]}-{data.digest[:16]}-{settings[:8]}"
    parts = cache.plan(len(data), options.batch)
    have = [folder is not None and cache.read(cache.name(folder, i), last - first, encoder.width) is not None
            for i, (first, last) in enumerate(parts)] if world.main else []
    have = [flag == "1" for flag in world.tell("".join(str(int(flag)) for flag in have))]
    todo = [i for i in range(len(parts)) if not have[i]]
    made = _compute(encoder, data, view, options, world, todo, parts, folder, threads, stop)
    if folder is not None:
        world.barrier()
        made = {i: cache.wait(cache.name(folder, i), last - first, encoder.width)
                for i, (first, last) in enumerate(parts)}
    return Features([made[i] for i in range(len(parts))], data.labels, data.classes)


def _compute(encoder, data, view, options, world, todo, parts, folder, threads, stop) -> dict[int, Tensor]:
    """Parts ``todo``, dealt out in rounds of one per rank. In memory all ranks return all; on disk none."""
    mine = todo[world.rank::world.size]
    batches = [np.arange(first, min(first + options.batch, parts[i][1]))
               for i in mine for first in range(*parts[i], options.batch)]
    made: dict[int, Tensor] = {}
    began, most = time.monotonic(), max(last - first for first, last in parts)
    order = Batches(range(len(batches)), batches.__getitem__, lambda step: 0, options.batch)
    with Stream(encoder, data, view, order, options.precision, threads=threads) as stream:
        for turn in range(-(-len(todo) // world.size)):
            here = todo[turn * world.size:(turn + 1) * world.size]
            rows, error = None, None
            try:
                if world.rank < len(here):
                    first, last = parts[here[world.rank]]
                    rows = _part(stream, -(-(last - first) // options.batch), stop)
                    if rows is not None and folder is not None:
                        cache.write(cache.name(folder, here[world.rank]), rows)
            except (HpcsslError, OSError) as caught:
                error = as_error(caught)
            agree(world, f"features of {data.root.name}", stop=stop() or (rows is None and world.rank < len(here)),
                  error=error)
            if folder is None:
                made |= _exchange(rows, here, parts, most, encoder.width, world)
            if time.monotonic() - began > 10:
                began = time.monotonic()
                log.info("features of %s: %d of %d parts", data.root.name, turn * world.size + len(here), len(todo))
    return made


def _part(stream: Stream, batches: int, stop: Stop) -> Tensor | None:
    rows = []
    for _ in range(batches):
        if stop():
            return None
        rows.append(next(stream)[0].cpu())
    return torch.cat(rows)


def _exchange(rows, here, parts, most, width, world) -> dict[int, Tensor]:
    padded = torch.zeros(most, width, device=world.device)
    if rows is not None:
        padded[:len(rows)] = rows.to(world.device)
    every = world.gather(padded).cpu().split(most)
    return {i: every[rank][:parts[i][1] - parts[i][0]].clone() for rank, i in enumerate(here)}


class Stream:
    """Features of an order's batches one after another: (features [B, D] on the device, global indices [B])."""

    def __init__(self, encoder: Encoder, data: ShardSet, view: ViewSpec, order: Batches, precision: str, *,
                 seed: int = 0, threads: int = 1):
        self.encoder, self.view, self.precision, self.data = encoder, view, precision, data
        device = next(encoder.backbone.parameters()).device
        self.reader = Reader(data, limit=0)
        self.loader = Loader(self.reader, order, [view], seed=seed, threads=threads, pin=device.type == "cuda")
        self.batches = self.loader.run(0, len(order.steps))

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[Tensor, np.ndarray]:
        try:
            batch = next(self.batches)
        except DataError as error:
            if not self.reader.damaged:
                raise
            # training replaces a few damaged images; a score would then be of other images than its name says
            raise EvalError(error.what, got=error.got, expected="whole images, since the score is of each of them",
                            mend="`hpcssl-shard verify` lists the damaged; write the shards again") from error
        features = self.encoder.encode(batch.images[0], batch.params[0], self.view, self.precision)
        finite = torch.isfinite(features).all(1)
        if not finite.all():
            first = int(batch.index[int((~finite).nonzero()[0, 0])])
            raise EvalError(f"features by {self.encoder.path}", got=f"NaN or infinity for sample {first}",
                            expected="finite numbers",
                            mend="evaluate an earlier step's weights: this training has diverged")
        return features, np.array(batch.index)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.loader.close()
        self.reader.close()
