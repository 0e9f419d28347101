"""Write a shard folder from a catalog: plan, parallel shards, resume after a kill, and the index at the end.

While a folder is being written it holds ``.hpcssl-shard/`` with the plan, a note per finished shard, and a lock that
ends with its process. After a kill the same command reads them, keeps every shard whose inputs and content agree with
its note, and writes the others. The index is written last, so an unfinished folder is never mistaken for data.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import index
from data_prep.catalog import Catalog, LeftOut, SampleTable
from data_prep.catalog.names import format_examples
from data_prep.jobs import (
    PLAN_FILE,
    WORK_FOLDER,
    ShardJob,
    ShardJobs,
    check_same_plan,
    make_jobs,
    make_plan,
    read_finished_index,
    require_free_space,
)
from data_prep.shards import edges, pool, reader, writer
from hpcssl import files
from hpcssl.data.shards import INDEX
from hpcssl.errors import ConfigError, DataError, require_choice

LOG = logging.getLogger("hpcssl")


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How to write a folder.

    Attributes:
        samples_per_shard: Samples in each shard, 1 or more; the last one holds the rest.
        seed: Seed of the order of the samples.
        second_modality: A second modality to compute for each image, ``edges`` or ``none``.
        workers: Number of processes, 1 or more; None for one per usable core.
        skip_bad: Number of images that may be left out because they cannot be decoded.
        min_side: Leave out images whose smaller side has fewer pixels.
    """

    samples_per_shard: int = 1000
    seed: int = 0
    second_modality: str = edges.NONE
    workers: int | None = None
    skip_bad: int = 0
    min_side: int = 1

    def __post_init__(self) -> None:
        for name, least in (("samples_per_shard", 1), ("workers", 1), ("skip_bad", 0), ("min_side", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                option = "--" + name.replace("_", "-")
                raise ConfigError(option, got=value, expected=f"{least} or more", fix=f"raise {option} or omit it")
        require_choice("--second-modality", self.second_modality, edges.CHOICES)


@dataclass(frozen=True)
class WriteSummary:
    """What a command has written.

    Attributes:
        out: The folder.
        samples: Number of samples.
        classes: Number of classes.
        shards: Number of shards.
        kept: Number of shards of an earlier attempt among them.
        bytes: Bytes of all shards.
        skipped: Number of images that were left out.
    """

    out: Path
    samples: int
    classes: int
    shards: int
    kept: int
    bytes: int
    skipped: int


@dataclass
class WrittenFolder:
    """Shards on the disk that have no index yet.

    Attributes:
        work: The work folder.
        catalog: What was to be written.
        plan: The plan, as ``jobs.make_plan`` returns it.
        jobs: The shards to write.
        results: Each of them as written, and whether an earlier attempt had written it.
        finished: The index of a folder that was finished before; None without one.
    """

    work: Path
    catalog: Catalog
    plan: dict[str, Any]
    jobs: ShardJobs
    results: list[tuple[writer.WrittenShard, bool]]
    finished: dict[str, Any] | None

    @property
    def rejected(self) -> list[LeftOut]:
        """The images that were left out."""
        return [image for shard, _ in self.results for image in shard.rejected]


@contextlib.contextmanager
def claim_folder(out: Path) -> Iterator[Path]:
    """Hold the lock of a folder, so that only one process writes there.

    A command that ends before its first shard leaves nothing behind.

    Args:
        out: The folder; it is created if it is absent.

    Yields:
        Its work folder.

    Raises:
        ConfigError: It is a file.
        DataError: It holds other files, or another process writes there.
    """
    out = Path(out).absolute()
    if out.exists() and not out.is_dir():
        raise ConfigError(
            f"OUT {out}", got="a file", expected="a folder, or a path that does not exist", fix="choose another OUT"
        )
    entries = sorted(os.listdir(out)) if out.exists() else []
    if entries and INDEX not in entries and WORK_FOLDER not in entries:
        raise DataError(
            f"OUT {out}",
            got=f"a folder that holds other files ({format_examples(entries)})",
            expected="a new or empty folder, or one that this command began",
            fix="choose another OUT",
        )
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    work = out / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        locked = files.lock_descriptor(lock.fileno())
        if locked is False:
            raise DataError(
                f"OUT {out}",
                got="another hpcssl-shard that is writing there",
                expected="one writer per folder",
                fix="wait until it has ended",
            )
        if locked is None:
            LOG.warning("The file system of %s has no locks: make sure that nobody else writes there.", out)
        try:
            yield work
        finally:
            (work / "source.tar").unlink(missing_ok=True)
            if not (work / PLAN_FILE).exists() or not any(out.glob("shard-*.tar")):
                shutil.rmtree(work, ignore_errors=True)
                with contextlib.suppress(OSError):  # a folder that is not empty stays
                    for folder in created:
                        folder.rmdir()


def write_folder(work: Path, catalog: Catalog, options: WriteOptions) -> WriteSummary:
    """Write the shards and the index of a catalog, and list what was left out.

    Args:
        work: The work folder that ``claim_folder`` yields.
        catalog: What to write.
        options: How to write it.

    Raises:
        DataError: More than ``options.skip_bad`` images cannot be decoded (each is named), the folder holds the
            shards of another plan, or the disk is full or not writable.
    """
    folder = write_shards(work, catalog, options)
    left_out = [*catalog.left_out, *folder.rejected]
    index.write_left_out(work.parent, left_out)
    index.check_broken(left_out, options.skip_bad)
    return write_index(folder)


def write_shards(work: Path, catalog: Catalog, options: WriteOptions) -> WrittenFolder:
    """Write the shards of a catalog without their index, which makes them a data set.

    Args:
        work: The work folder that ``claim_folder`` yields.
        catalog: What to write.
        options: How to write it.

    Raises:
        DataError: The folder holds the shards of another plan, or the disk is full or not writable.
    """
    out = work.parent
    if options.second_modality != edges.NONE:
        catalog = Catalog(
            catalog.classes,
            SampleTable(s._replace(second=edges.COMPUTE_EDGES) for s in catalog.samples),
            {**catalog.provenance, "second": edges.PROVENANCE_NAMES[options.second_modality]},
        )
    provenance = {**catalog.provenance, "seed": options.seed, "samples_per_shard": options.samples_per_shard}
    if options.min_side > 1:
        provenance["min_side"] = options.min_side
    plan = make_plan(catalog, provenance)
    finished = read_finished_index(out)
    check_same_plan(out, plan, finished, catalog)
    _remove_temporary_files(out)
    files.atomic_write(work / PLAN_FILE, json.dumps(plan, sort_keys=True))
    jobs = make_jobs(out, catalog, options.samples_per_shard, options.seed, options.min_side, finished)
    require_free_space(out, jobs)

    results: dict[int, tuple[writer.WrittenShard, bool]] = {}
    for number, result in pool.run_jobs(write_or_keep_shard, jobs, options.workers, jobs.sizes, "writing"):
        results[number] = result
    return WrittenFolder(work, catalog, plan, jobs, [results[n] for n in range(len(jobs))], finished)


def write_index(folder: WrittenFolder) -> WriteSummary:
    """Write the index of the shards, and remove the work folder.

    Raises:
        DataError: No image is left, or the disk is full or not writable.
    """
    out, jobs = folder.work.parent, folder.jobs
    shards = [shard for shard, _ in folder.results]
    skipped = [
        {"shard": name, "source": image.source, "reason": image.reason}
        for name, shard in zip(jobs.names, shards, strict=True)
        for image in shard.rejected
    ]
    meta = index.make_meta(folder.catalog, folder.plan, jobs.names, shards, skipped)
    left_out = {entry["source"] for entry in skipped}
    if len(left_out) == len(folder.catalog.samples):
        raise DataError(
            f"OUT {out}",
            got="no image that can be used",
            expected="at least one",
            fix="replace the broken images, or lower --min-side or --dedup-distance",
        )
    written = (s for number in range(len(jobs)) for s in jobs.find_samples(number) if s.source not in left_out)
    targets = index.collect_targets(written)
    index.write_index(out, meta, shards, targets, folder.finished)
    shutil.rmtree(folder.work, ignore_errors=True)
    return WriteSummary(
        out,
        samples=meta["samples"],
        classes=len(folder.catalog.classes),
        shards=len(jobs),
        kept=sum(kept for _, kept in folder.results),
        bytes=sum(shard.bytes for shard in shards),
        skipped=len(skipped),
    )


def write_or_keep_shard(job: ShardJob) -> tuple[writer.WrittenShard, bool]:
    """Write one shard, in a worker, or keep it if it is the one that an earlier attempt recorded.

    Returns:
        The shard, and whether it was kept.
    """
    previous = job.previous
    if previous is not None and job.path.is_file() and files.sha256_of_file(job.path) == previous["sha256"]:
        return reader.survey_shard(job.path, job.number), True
    shard = writer.write_shard(job.path, job.number, job.samples, job.min_side)
    if shard.rejected:  # an image may become readable without a change of its time, so try it again next time
        return shard, False
    try:
        files.atomic_write(job.note, json.dumps({"inputs": job.inputs, "shard": index.shard_entry(job.name, shard)}))
    except OSError as error:
        raise writer.write_error(job.note, error) from error
    return shard, False


def _remove_temporary_files(out: Path) -> None:
    for name in ("shard-*", "index.*", "sums.*", "targets.*"):
        for path in out.glob(f".{name}.tmp"):
            path.unlink(missing_ok=True)


def describe_summary(summary: WriteSummary) -> str:
    """Return the line that the command prints at the end."""
    kept = f", {summary.kept} of them kept from before" if summary.kept else ""
    skipped = f"; {summary.skipped} images left out" if summary.skipped else ""
    classes = f"of {summary.classes} classes" if summary.classes else "without classes"
    return (
        f"{summary.out}: {summary.samples} samples {classes} in {summary.shards} shards{kept}, "
        f"{summary.bytes / 1e6:.1f} MB{skipped}"
    )
