"""Plan a shard folder: which samples go into which shard, and what of an earlier attempt is still valid."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
        return f"shard-{self.number:06d}.tar"

    @property
    def path(self) -> Path:
        """The shard."""
        return self.out / self.name

    @property
    def note(self) -> Path:
        """The note that the shard is finished, in the work folder."""
        return self.out / WORK_FOLDER / f"{self.number:06d}.json"


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
) -> list[ShardJob]:
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
    jobs = []
    for number, start in enumerate(range(0, len(order), samples_per_shard)):
        samples = [catalog.samples[i] for i in order[start : start + samples_per_shard]]
        inputs = sha256_of_lines(json.dumps(_identity(sample)) for sample in samples)
        job = ShardJob(out, number, samples, inputs, None, min_side)
        entry = previous.get(job.name)
        if job.note.exists():
            note = json.loads(job.note.read_text())
            entry = note["shard"] if note["inputs"] == inputs else None
        jobs.append(replace(job, previous=entry))
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


def require_free_space(out: Path, jobs: list[ShardJob]) -> None:
    """Refuse to start where the disk would be full after hours of writing."""
    needed = sum(s.size for job in jobs if not job.path.exists() for s in job.samples)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DataError(
            f"OUT {out}",
            got=f"{format_bytes(free)} of free space",
            expected=f"at least {format_bytes(needed)}",
            fix=FREE_SPACE_FIX,
        )
