"""Features of a folder of images or of shards by an encoder: ``hpcssl.embed`` and ``hpcssl embed``."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from hpcssl import config, files
from hpcssl.distributed.devices import choose_device
from hpcssl.distributed.world import World
from hpcssl.errors import ResumeError
from hpcssl.evals.common.encoder import FrozenEncoder
from hpcssl.evals.common.feature_cache import part_path, plan_parts
from hpcssl.evals.common.options import FeatureOptions
from hpcssl.inference import embeddings as tables
from hpcssl.inference.compute import Computation, Part, read_part
from hpcssl.inference.embeddings import Embeddings
from hpcssl.inference.images import ImageSource, open_images
from hpcssl.inference.left_out import LEFT_OUT, check_damaged, check_damaged_count, write_left_out
from hpcssl.nets.importers import WeightsSource
from hpcssl.nets.run_weights import find_run, resolve_weights
from hpcssl.storage.folders import make_folder
from hpcssl.terminal.progress import ProgressBar, ProgressLog

LOG = logging.getLogger("hpcssl")


def embed(
    weights: WeightsSource | Path | str,
    images: Path | str | Sequence[Path | str],
    to: Path | str | None = None,
    *,
    step: int | str = "last",
    batch: int = 128,
    devices: str = "auto",
    precision: str = "fp32",
    normalize: bool = False,
    skip_bad: int = 0,
    threads: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Embeddings:
    """Compute the features of images with a trained encoder.

    Images are decoded, resized and cropped as in the evaluations. With ``to``, finished parts are kept beside the file,
    and a call that was killed goes on from them; the same call for a finished file reads it.

    Args:
        weights: A run folder, a weights file of this project or another one, or a ``WeightsSource``.
        images: A folder of images in any layout, a shard folder, an image, or a list of images.
        to: File to write, .parquet or .npy; None to keep the features in memory.
        step: Which weights of a run folder: ``last`` (of a finished training, else the newest export), ``first``, or a
            number.
        batch: Images per forward pass.
        devices: ``cpu``, ``gpu`` or ``auto``. One GPU is used.
        precision: ``fp32``, or ``bf16`` or ``fp16`` for autocast.
        normalize: Whether to scale each row to unit length.
        skip_bad: Number of images that may be damaged. They have no row, and are listed in a file beside ``to`` with
            its full name and the suffix ``.left_out.csv``.
        threads: Threads that decode images; None for one per available core.
        stop: Polled between batches; once it returns True, ``Stopped`` is raised.

    Returns:
        Names (``keys``), ``labels`` where the source has them, and ``features``, fp32 [N, D].

    Raises:
        ConfigError: An option that cannot be used.
        DataError: There are no such images, or more than ``skip_bad`` are damaged.
        EvalError: The weights cannot be used.
        ResumeError: ``to`` holds other features, or another process is writing it.
        Stopped: After a request to stop.
    """
    options = FeatureOptions(forward_batch=batch, precision=precision)
    if to is not None:
        tables.check_target(Path(to))
    choice = WeightsSource.coerce(weights)
    choice = replace(choice, path=resolve_weights(choice.path, step))
    source = open_images(images)
    encoder = FrozenEncoder.open(choice, World.single_process(choose_device(devices, 0)))
    metadata = _describe(choice, encoder, source, options, normalize)
    computation = _plan(encoder, options, normalize, threads, stop)
    return _embed(computation, source, metadata, skip_bad, None if to is None else Path(to))


def _plan(
    encoder: FrozenEncoder,
    options: FeatureOptions,
    normalize: bool,
    threads: int | None,
    stop: Callable[[], bool],
) -> Computation:
    return Computation(
        encoder=encoder,
        view=encoder.view(options),
        batch=options.forward_batch,
        precision=options.precision,
        normalize=normalize,
        threads=threads or len(os.sched_getaffinity(0)),
        stop=stop,
        report=lambda count: None,
    )


def _embed(
    computation: Computation, source: ImageSource, metadata: dict[str, Any], skip_bad: int, target: Path | None
) -> Embeddings:
    spans = plan_parts(len(source), computation.batch)
    if target is None:
        result = tables.collect(_run(computation, source, spans, len(source)), source.labels, metadata)
        check_damaged(result, source, skip_bad)
        return result
    stored = tables.read_metadata(target)
    if stored is None or _parts_folder(target).exists() or _temporaries(target):
        with _claim(target) as folder:
            stored = tables.read_metadata(target)  # another process may have written it meanwhile
            if stored is None:
                parts = _complete(computation, source, spans, _open_parts(folder, metadata["identity"]))
                result = tables.collect(parts, source.labels, metadata)
                write_left_out(result.damaged, source.left_out, tables.companion(target, LEFT_OUT))
                check_damaged(result, source, skip_bad, keeps_parts=True)
                tables.write(result, target)
    if stored is not None:
        _check_same(target, stored, metadata)
        check_damaged_count(target, stored["damaged"], skip_bad)
        LOG.info("%s: the file holds these features already", target)
    return tables.read(target)  # not from the parts, which are removed


def _describe(
    choice: WeightsSource, encoder: FrozenEncoder, source: ImageSource, options: FeatureOptions, normalize: bool
) -> dict[str, Any]:
    """The record of a file of features. Its ``identity`` is a digest of everything that decides them."""
    meta, run = encoder.meta, find_run(choice.path)
    settings = {
        "weights_sha256": encoder.sha256,
        "images_sha256": source.digest,
        "view": asdict(encoder.view(options)),
        "batch": options.forward_batch,
        "precision": options.precision,
        "normalized": normalize,
    }
    return {
        **settings,
        "identity": config.fingerprint(settings),
        "weights": str(Path(choice.path).absolute()),
        "weights_options": {name: getattr(choice, name) for name in ("layout", "encoder", "mean", "std", "size")},
        "recipe": "" if run is None else str(config.read_yaml(run.config).get("name", "")),
        **{name: meta[name] for name in ("step", "method", "fingerprint", "mean", "std", "size")},
        "arch": meta["arch"].arch,
        "images": source.root,
        "classes": source.classes if source.labels is not None else [],
    }


def _check_same(target: Path, stored: dict[str, Any], metadata: dict[str, Any]) -> None:
    if stored["identity"] != metadata["identity"]:
        names = ("weights_sha256", "images_sha256", "view", "batch", "precision", "normalized")
        differing = [name for name in names if stored.get(name) != metadata[name]]
        raise ResumeError(
            f"--to {target}",
            got=f"features that differ in {' and '.join(differing)}",
            expected="a new file, or the same weights, images and options",
            fix="choose another name, or remove the file",
        )


def _parts_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.parts")


def _temporaries(target: Path) -> list[Path]:
    """What killed commands left of the file, the files beside it and the folder of its parts."""
    written = [target, *(tables.companion(target, suffix) for suffix in (*tables.COMPANIONS, LEFT_OUT))]
    names = [path.name for path in (*written, _parts_folder(target))]
    return [path for name in names for path in files.temporaries(target.parent, glob.escape(name))]


@contextlib.contextmanager
def _claim(target: Path) -> Iterator[Path]:
    """Yield the folder of the parts of a file, while no other process writes this file, whatever its options.

    The folder is removed if the block ends without an error.
    """
    folder = _parts_folder(target)
    with _lock(folder, target):
        for outdated in _temporaries(target):
            files.remove(outdated)
        yield folder
        files.remove(folder)
    for rest in _temporaries(target):  # NFS keeps the lock's file, and so the renamed folder, until it is closed
        files.remove(rest)


def _lock(folder: Path, target: Path) -> BinaryIO:
    """Open the lock in a folder, which is created; whoever closes it releases it. Raises ``ResumeError``."""
    path = folder / "lock"
    while True:
        make_folder(folder)
        with contextlib.ExitStack() as on_error, contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
            lock = on_error.enter_context(open(path, "ab"))
            if files.lock_descriptor(lock.fileno()) is False:
                raise ResumeError(
                    f"--to {target}",
                    got="another process that writes this file",
                    expected="one process at a time",
                    fix="wait for it, or choose another name",
                )
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                on_error.pop_all()
                return lock


def _open_parts(folder: Path, identity: str) -> Path:
    """Return the folder of the parts of these weights, images and options; those of others are removed."""
    parts = folder / identity[:16]
    for outdated in folder.iterdir():
        if outdated not in (parts, folder / "lock"):
            files.remove(outdated)
    make_folder(parts)
    return parts


def _complete(computation: Computation, source: ImageSource, spans: list[tuple[int, int]], folder: Path) -> list[Part]:
    """Compute the parts that are missing in a folder, and return all of them."""
    paths = [part_path(folder, number) for number in range(len(spans))]
    parts = [read_part(path) for path in paths]
    missing = [number for number, part in enumerate(parts) if part is None]
    if len(missing) < len(spans):
        LOG.info("%d of %d parts are computed already", len(spans) - len(missing), len(spans))
    done = len(source) - sum(spans[number][1] - spans[number][0] for number in missing)
    with _progress(len(source), done) as report:
        computed = replace(computation, report=report).compute(source, [spans[number] for number in missing])
        for number, part in zip(missing, computed, strict=True):
            part.write(paths[number])
            parts[number] = read_part(paths[number]) or part
    return [part for part in parts if part is not None]


def _run(computation: Computation, source: ImageSource, spans: list[tuple[int, int]], total: int) -> list[Part]:
    with _progress(total, 0) as report:
        return list(replace(computation, report=report).compute(source, spans))


@contextlib.contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number of further images: a bar on a terminal, else a line per tenth."""
    if not (sys.stderr.isatty() and LOG.isEnabledFor(logging.INFO)):
        yield ProgressLog("features", total, "images", first=done).add
        return
    bar, started, count = ProgressBar(total, first=done), time.monotonic(), done

    def report(more: int) -> None:
        nonlocal count
        count += more
        rate = (count - done) / max(time.monotonic() - started, 1e-9)
        bar.update(count, {"images/s": f"{rate:.3g}"})

    try:
        yield report
    finally:
        bar.close()
