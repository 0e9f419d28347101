"""Features of a data set by a frozen backbone: in index order, the same bits on any number of ranks, resumable.

The set is cut into *parts* of whole batches. Parts and batches depend on the set alone, never on the number of
ranks, so that every forward pass sees the same rows in the same shape wherever it runs. A finished part is one
safetensors file; a killed run goes on with the parts that are missing.

Letters in shapes: N samples, D features.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcssl import config
from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError, EvalError, HpcsslError, nearest
from hpcssl.evals import cache
from hpcssl.evals.images import Batches, Images
from hpcssl.evals.together import Stop, agree, as_error, never
from hpcssl.nets import importers, resnet, weights
from hpcssl.nets.importers import Source
from hpcssl.views import augment
from hpcssl.views.augment import NAMED, ViewSpec
from hpcssl.world import World

log = logging.getLogger("hpcssl")

_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_STORES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """How an image is shown to the network; the base of the options of every evaluation.

    ``view``: the centre crop, ``auto`` being ``eval`` (short side to 256/224 of the size) for images above 64 pixels
    and ``eval_whole`` up to 64, where the whole image is the view. ``interpolation`` of its resize: ``auto`` is the
    protocol's, which is bilinear where it does not say otherwise. ``batch``: images per forward pass.
    """

    view: str = "auto"
    interpolation: str = "auto"
    batch: int = 128

    def __post_init__(self):
        one_of("view", self.view, ("auto", *(name for name, a in NAMED.items() if a.crop != "random")))
        one_of("interpolation", self.interpolation, ("auto", "bilinear", "bicubic"))
        if self.batch < 1:
            raise ConfigError("evaluation option batch", got=self.batch, expected="at least 1", mend="batch=128")


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(ViewOptions):
    """How features are made; the base of the options of every evaluation on frozen features.

    ``precision`` of the forward pass. ``store``: what finished features are kept as; ``fp16`` takes half the room
    and rounds them to 11 bits, as MSF's k-NN does (eval_knn.py: faiss with useFloat16).
    """

    precision: str = "fp32"
    store: str = "fp32"

    def __post_init__(self):
        super().__post_init__()
        one_of("precision", self.precision, _PRECISIONS)
        one_of("store", self.store, _STORES)


def one_of(field: str, value: object, known: Iterable[str]) -> None:
    """Raise ``ConfigError`` unless an option's value is a known one."""
    known = tuple(known)
    if value not in known:
        raise ConfigError(f"evaluation option {field}", got=repr(value), expected=" or ".join(known),
                          mend=nearest(str(value), known))


@dataclass(frozen=True)
class Encoder:
    """A frozen backbone with the header of its weights file and that file's sha256."""

    backbone: nn.Module
    meta: dict
    sha256: str
    path: Path

    @classmethod
    def open(cls, path: Source | Path | str, world: World) -> Encoder:
        """Load strictly, ours or another project's, onto the world's device. Raises ``EvalError``."""
        source = Source.of(path)
        backbone, meta = importers.load(source)
        backbone = backbone.to(world.device, memory_format=torch.channels_last)
        return cls(backbone, meta, source.sha256, Path(source.path))

    @property
    def width(self) -> int:
        return getattr(self.backbone, "width", None) or resnet.width_of(self.backbone)

    def view(self, options: ViewOptions) -> ViewSpec:
        size, name, kind = self.meta["size"], options.view, options.interpolation
        if name == "auto":
            name = "eval" if size > weights.WHOLE_UP_TO else "eval_whole"
        augment = NAMED[name] if kind == "auto" else replace(NAMED[name], interpolation=kind)
        return ViewSpec(name=name, augment=augment, size=size)

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
    """Raw features [N, D] as parts in index order on the CPU (of the page cache, where parts are files).

    ``parts`` hold what ``FeatureOptions.store`` says; what is read from them by ``unit`` and ``rows`` is fp32.
    """

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
            yield int(start), F.normalize(part.float(), dim=1)

    def rows(self, index: Tensor) -> Tensor:
        """Raw rows [len(index), D] of any global indices, int64."""
        index = index.cpu()
        if len(self.parts) == 1:
            return self.parts[0][index].float()
        part = torch.as_tensor(np.searchsorted(self.starts, index.numpy(), side="right") - 1)
        found = torch.empty(len(index), self.width)
        for i in part.unique().tolist():
            here = part == i
            found[here] = self.parts[i][index[here] - int(self.starts[i])].float()
        return found

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance [D] of the unit-length rows, summed in double precision in index order."""
        mean = sum(rows.double().sum(0) for _, rows in self.unit()) / len(self)
        var = sum((rows.double() - mean).square().sum(0) for _, rows in self.unit()) / (len(self) - 1)
        return mean.float(), var.float()


class Union:
    """Shard sets one after another, as if they were one set of images, for ``Context.features``."""

    def __init__(self, *sets: ShardSet):
        self.sets, self.classes = sets, sets[0].classes
        self.labels = np.concatenate([data.labels for data in sets])

    def __len__(self) -> int:
        return len(self.labels)


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
                                       "batch": options.batch, "store": options.store})
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
                    rows = _part(stream, -(-(last - first) // options.batch), _STORES[options.store], stop)
                    if rows is not None and folder is not None:
                        cache.write(cache.name(folder, here[world.rank]), rows)
            except (HpcsslError, OSError) as caught:
                error = as_error(caught)
            agree(world, f"features of {data.root.name}", stop=stop() or (rows is None and world.rank < len(here)),
                  error=error)
            if folder is None:
                made |= _exchange(rows, here, parts, most, encoder.width, _STORES[options.store], world)
            if time.monotonic() - began > 10:
                began = time.monotonic()
                log.info("features of %s: %d of %d parts", data.root.name, turn * world.size + len(here), len(todo))
    return made


def _part(stream: Stream, batches: int, dtype: torch.dtype, stop: Stop) -> Tensor | None:
    rows = []
    for _ in range(batches):
        if stop():
            return None
        rows.append(next(stream)[0].to(dtype).cpu())
    whole = torch.cat(rows)
    if not torch.isfinite(whole).all():  # they were before they were rounded
        raise EvalError(f"features by {stream.encoder.path}", got=f"values above {torch.finfo(dtype).max:g}",
                        expected="numbers that fp16 can hold", mend="store=fp32")
    return whole


def _exchange(rows, here, parts, most, width, dtype, world) -> dict[int, Tensor]:
    padded = torch.zeros(most, width, dtype=dtype, device=world.device)
    if rows is not None:
        padded[:len(rows)] = rows.to(world.device)
    every = world.gather(padded).cpu().split(most)
    return {i: every[rank][:parts[i][1] - parts[i][0]].clone() for rank, i in enumerate(here)}


class Stream:
    """Features of an order's batches one after another: (features [B, D] on the device, global indices [B])."""

    def __init__(self, encoder: Encoder, data: ShardSet, view: ViewSpec, order: Batches, precision: str, *,
                 seed: int = 0, threads: int = 1):
        self.encoder, self.view, self.precision = encoder, view, precision
        pin = next(encoder.backbone.parameters()).device.type == "cuda"
        self.images = Images(data, view, order, range(len(order.steps)), seed=seed, threads=threads, pin=pin)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[Tensor, np.ndarray]:
        batch = next(self.images)
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

    def __exit__(self, *exc: object) -> None:
        self.images.__exit__(*exc)
