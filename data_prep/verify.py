"""Compare a shard folder with its index: every shard, every byte, every sample by name."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.index import SUMS
from data_prep.shards import images, pool, reader, ustar
from data_prep.shards.writer import sample_sums
from hpcssl.data.shards import ShardSet
from hpcssl.storage.npy import array_of

UNKNOWN_KEY = "(its name is unreadable)"


class Problem(NamedTuple):
    """A difference between a folder and its index.

    Attributes:
        shard: File name of the shard, or of the file of the index.
        text: What is wrong.
        sample: Global index of the damaged sample; None when the file as a whole is meant.
        key: KEY of the damaged sample, likewise.
    """

    shard: str
    text: str
    sample: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        where = "" if self.sample is None else f"\tsample {self.sample}\t{self.key}"
        return f"{self.shard}{where}\t{self.text}"


@dataclass(frozen=True)
class VerifyJob:
    """One shard to verify.

    Attributes:
        path: The shard.
        bytes: Its size, by the index.
        sha256: Its digest, by the index.
        first: Global index of its first sample.
        rows: Index rows of its samples, ``ROW`` [n].
        sums: Checksums of its samples, uint64 [n]; None if they cannot be read.
        targets: Targets of its samples, int8 [n, C], if the set has them.
        classes: Number of classes.
        quick: Whether only sizes, labels and offsets are compared.
    """

    path: Path
    bytes: int
    sha256: str
    first: int
    rows: npt.NDArray[Any]
    sums: npt.NDArray[np.uint64] | None
    targets: npt.NDArray[np.int8] | None
    classes: int
    quick: bool


def verify_folder(root: Path, *, quick: bool = False, workers: int | None = None) -> tuple[ShardSet, list[Problem]]:
    """Find every difference between a folder and its index.

    Args:
        root: The shard folder.
        quick: Compare names, sizes, labels and the index with itself, without reading the images. By default every
            byte is read and every image decoded.
        workers: Number of processes; None for one per usable core.

    Returns:
        The shards, and the differences.

    Raises:
        DataError: The index cannot be read.
    """
    shards = ShardSet.open(root, check_sizes=False)
    problems = _check_index(root, shards)
    sums = _read_sums(root, shards, problems)
    first = np.searchsorted(shards.rows["shard"], np.arange(len(shards.shards) + 1))
    jobs = [
        VerifyJob(
            shards.path(n),
            shard.bytes,
            shard.sha256,
            int(first[n]),
            shards.rows[first[n] : first[n + 1]],
            None if sums is None else sums[first[n] : first[n + 1]],
            None if shards.targets is None else shards.targets[first[n] : first[n + 1]],
            len(shards.classes),
            quick,
        )
        for n, shard in enumerate(shards.shards)
    ]
    sizes = [len(job.rows) for job in jobs]
    results = dict(pool.run_jobs(verify_shard, jobs, 1 if quick else workers, sizes, "verifying"))
    return shards, problems + [problem for n in sorted(results) for problem in results[n]]


def describe_success(shards: ShardSet, *, quick: bool) -> str:
    """Describe a folder without problems in one line: its size, and what was compared."""
    checks = "sizes, labels and offsets agree" if quick else "every byte agrees and every image decodes"
    classes = f"of {len(shards.classes)} classes" if shards.classes else "without classes"
    size = f"{len(shards)} samples {classes} in {len(shards.shards)} shards"
    return f"{shards.root}: {size}; {checks}"


def _check_index(root: Path, shards: ShardSet) -> list[Problem]:
    """Compare the arrays and the list of shards with each other and with the files in the folder."""
    problems = []
    unlisted = {p.name for p in root.glob("*.tar")} - {s.name for s in shards.shards}
    problems += [Problem(name, "not in the index, but a reader of *.tar would read it") for name in sorted(unlisted)]
    counts = np.bincount(shards.rows["shard"], minlength=len(shards.shards))
    if len(counts) > len(shards.shards) or (np.diff(shards.rows["shard"].astype(int)) < 0).any():
        problems.append(Problem("index.npy", "its rows do not follow the list of shards"))
    with_second = int((shards.rows["size_b"] > 0).sum())
    if 0 < with_second < len(shards) or (shards.second_name and with_second < len(shards)):
        problems.append(Problem("index.npy", f"{len(shards) - with_second} samples have no second modality"))
    if shards.targets is not None and (
        shards.targets.shape != (len(shards), len(shards.classes)) or np.abs(shards.targets).max(initial=0) > 1
    ):
        problems.append(Problem("targets.npy", "not a -1, 0 or 1 for every sample and class"))
    problems += [
        Problem(s.name, f"the index says {s.samples} samples and lists {n}")
        for s, n in zip(shards.shards, counts, strict=False)
        if s.samples != n
    ]
    return problems


def _read_sums(root: Path, shards: ShardSet, problems: list[Problem]) -> npt.NDArray[np.uint64] | None:
    """Return the checksums of the samples, or None with a problem added.

    Without them damage is located by shard, and by decoding.
    """
    try:
        body = (root / SUMS).read_bytes()
    except OSError as error:
        problems.append(Problem(SUMS, f"cannot be read ({error.strerror})"))
        return None
    if hashlib.sha256(body).hexdigest() != shards.meta.get("sums_sha256"):
        problems.append(Problem(SUMS, "another sha256 than the index records"))
        return None
    return array_of(body)


def verify_shard(job: VerifyJob) -> list[Problem]:
    """Find what is wrong with one shard."""
    name = job.path.name
    if not job.path.is_file():
        return [Problem(name, f"missing, with its {len(job.rows)} samples")]
    with open(job.path, "rb") as file:
        problems = [
            Problem(
                name,
                f"label {row['label']} outside of the {job.classes} classes",
                job.first + i,
                _key_of_header(os.pread(file.fileno(), ustar.BLOCK, int(row["header"]))),
            )
            for i, row in enumerate(job.rows)
            if not -1 <= row["label"] < job.classes
        ]
    size = job.path.stat().st_size
    if size != job.bytes:
        problems.append(Problem(name, f"{size} bytes, the index says {job.bytes}"))
    bounds = reader.sample_extents(job.rows, job.bytes)
    if bounds[0] != 0 or (np.diff(bounds) <= 0).any():
        return [*problems, Problem(name, "the offsets in the index do not follow each other")]
    if not job.quick or size < job.bytes:
        problems += _check_contents(job, bounds, size)
    return problems


def _check_contents(job: VerifyJob, bounds: npt.NDArray[np.int64], size: int) -> list[Problem]:
    """Read the shard. With ``quick``, only what a truncated file has lost."""
    name, digest = job.path.name, hashlib.sha256()
    problems: list[Problem] = []
    with open(job.path, "rb") as file:
        for i in range(len(job.rows)):
            start, end = int(bounds[i]), int(bounds[i + 1])
            if job.quick and end <= size:
                continue
            data = os.pread(file.fileno(), end - start, start)
            digest.update(data)
            text, key = _check_sample(data, job, i, start, end)
            if text:
                problems.append(Problem(name, text, job.first + i, key))
        tail = os.pread(file.fileno(), max(size - int(bounds[-1]), 0), int(bounds[-1]))
    digest.update(tail)
    if size == job.bytes and not job.quick and digest.hexdigest() != job.sha256:
        problems.insert(0, Problem(name, "another sha256 than the index records"))
    if size == job.bytes and not job.quick and tail != ustar.END:
        problems.append(Problem(name, "the end mark is damaged"))
    return problems


def _check_sample(data: bytes, job: VerifyJob, i: int, start: int, end: int) -> tuple[str, str]:
    """Return what is wrong with the bytes of sample i of the shard ('' for nothing), and its key if readable."""
    row, image, second = job.rows[i], b"", b""
    try:
        ((key, members),) = reader.iterate_samples(io.BytesIO(data + ustar.END), start)
        label = int(data[members["cls"].offset - start :][: members["cls"].size]) if "cls" in members else -1
        read_row = reader.index_row(int(row["shard"]), members, label)
        image = data[read_row[2] - start :][: read_row[3]]
        second = data[read_row[5] - start :][: read_row[6]] if read_row[6] else b""
        problem = "" if read_row == tuple(row.item()) else "its headers or label are not those of the index"
        if "json" in members:
            fields = reader.parse_sample_json(data[members["json"].offset - start :][: members["json"].size])
            if "source" not in fields:
                problem = "its .json is damaged"
            elif fields.get("targets") != (None if job.targets is None else job.targets[i].tolist()):
                problem = "its .json has other targets than the index"
    except (tarfile.TarError, ValueError, StopIteration):
        key, problem = _key_of_header(data), "its headers are damaged"
    if len(data) < end - start:
        return "cut off", key
    if not problem and (reason := images.find_damage(image)):
        problem = reason
    if not problem and len(second) and (reason := images.find_damage(second)):
        problem = f"its second modality: {reason}"
    if not problem and job.sums is not None and int(sample_sums(memoryview(data), [0])[0]) != int(job.sums[i]):
        problem = "its bytes have changed (it still decodes)"
    return problem, key


def _key_of_header(data: bytes) -> str:
    """Return the key in a first header whose checksum may be wrong: a name with a damaged letter still helps."""
    name = data[:100].split(b"\0")[0].decode("utf-8", "replace")
    return reader.split_member_name(name)[0] if name else UNKNOWN_KEY
