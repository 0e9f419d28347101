"""Plan a shard folder: which samples go into which shard, and what of an earlier attempt is still valid."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from data_prep.catalog import Catalog, Sample, sha256_of_lines
from data_prep.shards.writer import FREE_SPACE_FIX
from hpcssl.data.shards import INDEX, PAGED_FORMAT
from hpcssl.errors import DataError, format_bytes

WORK_FOLDER = ".hpcssl-shard"
"""Folder in OUT that holds the plan, a note per finished shard, and a lock, while OUT is being written."""
PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class ShardJob:
    """One shard to write, or to keep if it is still valid.

    Attributes:
        out: Folder of the shards.
        number: Number of the shard.
        samples: What it holds.
        inputs: Digest of the samples, to tell whether an earlier attempt had the same ones.
        previous: Entry in the index that an earlier attempt with the same inputs has made of it; None without one.
        min_side: Leave out images whose smaller side has fewer pixels.
    """

    out: Path
    number: int
    samples: list[Sample]
    inputs: str
    previous: dict[str, Any] | None
    min_side: int = 1

    @property
    def name(self) -> str:
        """File name of the shard."""
        return shard_name(self.number)

    @property
    def path(self) -> Path:
        """The shard."""
        return self.out / self.name

    @property
    def note(self) -> Path:
        """The note that the shard is finished, in the work folder."""
        return note_path(self.out, self.number)


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:06d}.tar"


def note_path(out: Path, number: int) -> Path:
    """Return the note that a shard is finished."""
    return out / WORK_FOLDER / f"{number:06d}.json"


@dataclass(frozen=True)
class ShardJobs(Sequence[ShardJob]):
    """The shards to write. The samples of a job are looked up when it is asked for: all at once would fill memory.

    Attributes:
        out: Folder of the shards.
        samples: The samples of all shards.
        order: Rows of the samples in the order of the shards, int64 [N].
        samples_per_shard: Samples in each shard; the last one holds the rest.
        min_side: Leave out images whose smaller side has fewer pixels.
        inputs: ``ShardJob.inputs`` of the jobs.
        previous: ``ShardJob.previous`` of the jobs.
    """

    out: Path
    samples: Sequence[Sample]
    order: npt.NDArray[np.int64]
    samples_per_shard: int
    min_side: int
    inputs: list[str] = field(default_factory=list)
    previous: list[dict[str, Any] | None] = field(default_factory=list)

    def __len__(self) -> int:
        return -(-len(self.order) // self.samples_per_shard)

    @overload
    def __getitem__(self, number: int) -> ShardJob: ...
    @overload
    def __getitem__(self, number: slice) -> list[ShardJob]: ...
    def __getitem__(self, number: int | slice) -> ShardJob | list[ShardJob]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        samples = self.find_samples(number)
        return ShardJob(self.out, number, samples, self.inputs[number], self.previous[number], self.min_side)

    def find_samples(self, number: int) -> list[Sample]:
        """Return the samples of a shard."""
        start = number * self.samples_per_shard
        return [self.samples[row] for row in self.order[start : start + self.samples_per_shard].tolist()]

    @property
    def names(self) -> list[str]:
        """File names of the shards."""
        return [shard_name(number) for number in range(len(self))]

    @property
    def sizes(self) -> list[int]:
        """Number of samples of each shard."""
        starts = range(0, len(self.order), self.samples_per_shard)
        return [min(self.samples_per_shard, len(self.order) - start) for start in starts]


def make_plan(catalog: Catalog, provenance: dict[str, Any]) -> dict[str, Any]:
    """Return what identifies the content of a folder; a folder is only continued with an equal plan."""
    return {
        "made": provenance,
        "names": catalog.names_digest(),
        "classes": len(catalog.classes),
        "samples": len(catalog.samples),
    }


def make_jobs(
    out: Path, catalog: Catalog, samples_per_shard: int, seed: int, min_side: int, finished: dict[str, Any] | None
) -> ShardJobs:
    """Cut the shuffled samples into shards.

    Args:
        out: Folder of the shards.
        catalog: What to write.
        samples_per_shard: Samples in each shard; the last one holds the rest.
        seed: Seed of the order.
        min_side: Leave out images whose smaller side has fewer pixels.
        finished: The index of a folder that was finished before; None or empty without one.
    """
    from hpcssl import rng  # imports torch, which the workers never need

    order = rng.permutation(rng.key(seed, "shard", "order"), len(catalog.samples))
    skipped = {entry["shard"] for entry in finished["skipped"]} if finished else set()
    previous = {s["name"]: s for s in finished["shards"] if s["name"] not in skipped} if finished else {}
    jobs = ShardJobs(out, catalog.samples, order, samples_per_shard, min_side)
    for number, name in enumerate(jobs.names):
        inputs = sha256_of_lines(json.dumps(_identity(sample)) for sample in jobs.find_samples(number))
        entry, note_file = previous.get(name), note_path(out, number)
        if note_file.exists():
            note = json.loads(note_file.read_text())
            entry = note["shard"] if note["inputs"] == inputs else None
        jobs.inputs.append(inputs)
        jobs.previous.append(entry)
    return jobs


def _identity(s: Sample) -> tuple[Any, ...]:
    """Everything that decides about the bytes of a sample."""
    extra = () if s.extra_json is None else (s.extra_json,)
    return (s.source, s.label, s.size, s.mtime_ns, s.second, s.original_label, *extra)


def read_finished_index(out: Path) -> dict[str, Any] | None:
    """Return the index of a finished folder, empty if it cannot be used; None if there is none.

    Raises:
        DataError: The index is paged.
    """
    try:
        meta = json.loads((out / INDEX).read_text())
        if meta.get("format") == PAGED_FORMAT:
            raise DataError(
                f"shard folder {out}",
                got="a paged index",
                expected="one that hpcssl-shard wrote and that was not paged since",
                fix="copy damaged shards again from where they came, or write the set to another folder",
            )
        return meta if {"plan", "shards", "sizes", "skipped"} <= meta.keys() else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError):
        return {}


def check_same_plan(out: Path, plan: dict[str, Any], finished: dict[str, Any] | None, catalog: Catalog) -> None:
    """Refuse a folder whose shards come from another source or other options.

    Args:
        out: Folder of the shards.
        plan: The plan of this command.
        finished: The index of the folder, as ``read_finished_index`` returns it.
        catalog: What this command is to write.

    Raises:
        DataError: The folder has another plan, or an index that cannot be read.
    """
    what, fix = f"OUT {out}", "choose another OUT, or remove this one first"
    plan_file = out / WORK_FOLDER / PLAN_FILE
    if plan_file.exists():
        old = json.loads(plan_file.read_text())
    elif finished:
        old = finished["plan"]
    elif finished is None:
        return
    else:
        raise DataError(
            what,
            got=f"an {INDEX} that hpcssl-shard did not write or that is damaged",
            expected="a new folder, or one that this command wrote",
            fix=fix,
        )
    differences = _differences(old, plan)
    if not differences and finished and finished["sizes"] != catalog.sizes_digest():
        differences = ["images of other sizes"]
    if differences:
        raise DataError(
            what,
            got="shards of another source or with other options: " + "; ".join(differences),
            expected="the command that began this folder, on an unchanged source",
            fix=fix,
        )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Describe how two plans differ."""
    before, now = old["made"], new["made"]
    differences = [
        f"{name} was {before.get(name)} and is {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differences or old == new:
        return differences
    if (old["samples"], old["classes"]) == (new["samples"], new["classes"]):
        return ["other names or labels"]
    return [f"{old['samples']} samples in {old['classes']} classes before, {new['samples']} in {new['classes']} now"]


def require_free_space(out: Path, jobs: ShardJobs) -> None:
    """Refuse to start where the disk would be full after hours of writing."""
    absent = (number for number, name in enumerate(jobs.names) if not (out / name).exists())
    needed = sum(sample.size for number in absent for sample in jobs.find_samples(number))
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DataError(
            f"OUT {out}",
            got=f"{format_bytes(free)} of free space",
            expected=f"at least {format_bytes(needed)}",
            fix=FREE_SPACE_FIX,
        )
