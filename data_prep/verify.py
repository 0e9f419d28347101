"""Comparing a shard folder with its index: every shard, every byte, every sample by name."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep import images, pool, tars, ustar
from data_prep.build import SUMS
from data_prep.writer import sample_sums
from hpcssl.data.shards import ShardSet

LOST = "(its name is lost)"


class Problem(NamedTuple):
    """``key`` and ``index`` name the damaged sample; both are None when the shard as a whole is meant."""

    shard: str
    text: str
    index: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        sample = "" if self.index is None else f"\tsample {self.index}\t{self.key}"
        return f"{self.shard}{sample}\t{self.text}"


@dataclass(frozen=True)
class Job:
    path: Path
    bytes: int
    sha256: str
    first: int  # global index of its first sample
    rows: np.ndarray
    sums: np.ndarray | None
    targets: np.ndarray | None
    classes: int
    quick: bool


def verify(root: Path, *, quick: bool = False, workers: int | None = None) -> tuple[ShardSet, list[Problem]]:
    """Every difference between a folder and its index. Raises DataError when the index itself is unreadable.

    ``quick`` compares names, sizes, labels and the index with itself; without it every byte is read and every
    image decoded.
    """
    found = ShardSet.open(root, check_sizes=False)
    problems = _folder(found)
    sums = _sums(found, problems)
    first = np.searchsorted(found.rows["shard"], np.arange(len(found.shards) + 1))
    jobs = [Job(found.path(n), shard.bytes, shard.sha256, int(first[n]), found.rows[first[n] : first[n + 1]],
                None if sums is None else sums[first[n] : first[n + 1]],
                None if found.targets is None else found.targets[first[n] : first[n + 1]], len(found.classes), quick)
            for n, shard in enumerate(found.shards)]
    sizes = [len(job.rows) for job in jobs]
    done = dict(pool.run(check, jobs, 1 if quick else workers, sizes, "verifying"))
    return found, problems + [problem for n in sorted(done) for problem in done[n]]


def _folder(found: ShardSet) -> list[Problem]:
    """What is wrong with the list of shards itself."""
    problems = []
    strange = {p.name for p in found.root.glob("*.tar")} - {s.name for s in found.shards}
    problems += [Problem(name, "not in the index, but a reader of *.tar would take it") for name in sorted(strange)]
    counts = np.bincount(found.rows["shard"], minlength=len(found.shards))
    if len(counts) > len(found.shards) or (np.diff(found.rows["shard"].astype(int)) < 0).any():
        problems.append(Problem("index.npy", "its rows do not follow the list of shards"))
    with_second = int((found.rows["size_b"] > 0).sum())
    if 0 < with_second < len(found) or (found.second and with_second < len(found)):
        problems.append(Problem("index.npy", f"{len(found) - with_second} samples have no second modality"))
    if found.targets is not None and (found.targets.shape != (len(found), len(found.classes))
                                      or np.abs(found.targets).max(initial=0) > 1):
        problems.append(Problem("targets.npy", "not a -1, 0 or 1 for every sample and class"))
    problems += [Problem(s.name, f"the index says {s.samples} samples and lists {n}")
                 for s, n in zip(found.shards, counts, strict=False) if s.samples != n]
    return problems


def _sums(found: ShardSet, problems: list[Problem]) -> np.ndarray | None:
    """The per-sample sums, or None with a problem noted: without them damage is named by shard and by decoding."""
    try:
        body = (found.root / SUMS).read_bytes()
    except OSError as error:
        problems.append(Problem(SUMS, f"cannot be read ({error.strerror})"))
        return None
    if hashlib.sha256(body).hexdigest() != found.meta.get("sums_sha256"):
        problems.append(Problem(SUMS, "another sha256 than the index records"))
        return None
    return np.load(io.BytesIO(body), allow_pickle=False)


def check(job: Job) -> list[Problem]:
    """What is wrong with one shard."""
    name = job.path.name
    if not job.path.is_file():
        return [Problem(name, f"missing, with its {len(job.rows)} samples")]
    with open(job.path, "rb") as file:
        problems = [Problem(name, f"label {row['label']} outside of the {job.classes} classes", job.first + i,
                            _name(os.pread(file.fileno(), ustar.BLOCK, int(row["header"]))))
                    for i, row in enumerate(job.rows) if not -1 <= row["label"] < job.classes]
    size = job.path.stat().st_size
    if size != job.bytes:
        problems.append(Problem(name, f"{size} bytes, the index says {job.bytes}"))
    edges = tars.extents(job.rows, job.bytes)
    if edges[0] != 0 or (np.diff(edges) <= 0).any():
        return [*problems, Problem(name, "the index's offsets do not follow each other")]
    if not job.quick or size < job.bytes:
        problems += _contents(job, edges, size)
    return problems


def _contents(job: Job, edges: np.ndarray, size: int) -> list[Problem]:
    name, whole, problems = job.path.name, hashlib.sha256(), []
    with open(job.path, "rb") as file:
        for i, row in enumerate(job.rows):
            start, end = int(edges[i]), int(edges[i + 1])
            if job.quick and end <= size:
                continue
            data = os.pread(file.fileno(), end - start, start)
            whole.update(data)
            text, key = _sample(data, row, start, end, None if job.sums is None else int(job.sums[i]),
                                None if job.targets is None else job.targets[i].tolist())
            if text:
                problems.append(Problem(name, text, job.first + i, key))
        tail = os.pread(file.fileno(), max(size - int(edges[-1]), 0), int(edges[-1]))
    whole.update(tail)
    if size == job.bytes and not job.quick and whole.hexdigest() != job.sha256:
        problems.insert(0, Problem(name, "another sha256 than the index records"))
    if size == job.bytes and not job.quick and tail != ustar.END:
        problems.append(Problem(name, "the end mark is damaged"))
    return problems


def _sample(data: bytes, row, start: int, end: int, expected: int | None,
            targets: list[int] | None) -> tuple[str, str]:
    """What is wrong with the bytes of one sample ('' for nothing), and its key as far as that can be read."""
    key, members, image, second = LOST, {}, b"", b""
    try:
        (key, members), = tars.walk(io.BytesIO(data + ustar.END), start)
        label = int(data[members["cls"].offset - start :][: members["cls"].size]) if "cls" in members else -1
        found = tars.row_of(int(row["shard"]), members, label)
        image = data[found[2] - start :][: found[3]]
        second = data[found[5] - start :][: found[6]] if found[6] else b""
        wrong = "" if found == tuple(row.item()) else "its headers or label are not those of the index"
        for _, offset, size in (members[suffix] for suffix in ("json",) if suffix in members):
            note = tars.note(data[offset - start :][:size])
            if "source" not in note:
                wrong = "its .json is damaged"
            elif note.get("targets") != targets:
                wrong = "its .json has other targets than the index"
    except (tarfile.TarError, ValueError, StopIteration):
        key, wrong = _name(data), "its headers are damaged"
    if len(data) < end - start:
        return "cut off", key
    if not wrong and (reason := images.damage(image)):
        wrong = reason
    if not wrong and len(second) and (reason := images.damage(second)):
        wrong = f"its second modality: {reason}"
    if not wrong and expected is not None and int(sample_sums(memoryview(data), [0])[0]) != expected:
        wrong = "its bytes have changed (it still decodes)"
    return wrong, key


def _name(data: bytes) -> str:
    """The key in a first header whose checksum may be wrong: a name with a damaged letter is better than none."""
    name = data[:100].split(b"\0")[0].decode("utf-8", "replace")
    return tars.split(name)[0] if name else LOST
