"""From a catalogue to a finished folder: plan, parallel shards, resume, index last.

While a folder is being written it holds ``.hpcssl-shard/`` with the plan, a note per finished shard, and a lock that
dies with its owner. After a kill the same command finds them, keeps every shard whose inputs and content are what
its note says, and writes the others. The folder gets its index in the end, so an unfinished one cannot be mistaken
for data.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep import pool, second, tars, writer
from data_prep.catalogue import Catalogue, Sample, digest_lines, some
from hpcssl import files
from hpcssl.data.shards import FORMAT, INDEX, ROW, ROWS, TARGETS
from hpcssl.errors import ConfigError, DataError, nearest

log = logging.getLogger("hpcssl")
WORK, SUMS = ".hpcssl-shard", "sums.npy"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to write. Only the first three change what is written."""

    samples_per_shard: int = 1000
    seed: int = 0
    second: str = second.NONE  # a second modality to compute: one of second.CHOICES
    workers: int | None = None
    skip_bad: int = 0

    def __post_init__(self):
        for name, least in (("samples_per_shard", 1), ("workers", 1), ("skip_bad", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                option = "--" + name.replace("_", "-")
                raise ConfigError(option, got=value, expected=f"{least} or more",
                                  mend=f"leave {option} out, or raise it")
        if self.second not in second.CHOICES:
            raise ConfigError("--second", got=self.second, expected=f"one of {', '.join(second.CHOICES)}",
                              mend=nearest(self.second, second.CHOICES))


@dataclass(frozen=True)
class Summary:
    out: Path
    samples: int
    classes: int
    shards: int
    kept: int  # shards of an earlier attempt
    bytes: int
    skipped: int


@dataclass(frozen=True)
class Job:
    """One shard to write, or to keep when the ``known`` one is still true."""

    out: Path
    number: int
    samples: list[Sample]
    inputs: str
    known: dict | None  # the shard's entry in the index, from an earlier attempt with the same inputs

    name = property(lambda self: f"shard-{self.number:06d}.tar")
    path = property(lambda self: self.out / self.name)
    note = property(lambda self: self.out / WORK / f"{self.number:06d}.json")


@contextlib.contextmanager
def claim(out: Path) -> Iterator[Path]:
    """Hold OUT for one writer; yields its work folder. A run that ended before its first shard leaves nothing."""
    out = Path(out).absolute()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"OUT {out}", got="a file", expected="a folder, or a name that is free",
                          mend="choose another OUT")
    inside = sorted(os.listdir(out)) if out.exists() else []
    if inside and INDEX not in inside and WORK not in inside:
        raise DataError(f"OUT {out}", got=f"a folder that holds other files ({some(inside)})",
                        expected="a new or empty folder, or one that this command began", mend="choose another OUT")
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise DataError(f"OUT {out}", got="another hpcssl-shard that is writing there",
                                expected="one writer per folder", mend="wait until it has ended") from error
            log.warning("%s knows no locks (%s): make sure that nobody else writes there", out, error.strerror)
        try:
            yield work
        finally:
            (work / "source.tar").unlink(missing_ok=True)
            if not (work / "plan.json").exists() or not any(out.glob("shard-*.tar")):
                shutil.rmtree(work, ignore_errors=True)
                with contextlib.suppress(OSError):  # somebody put something there meanwhile: it stays
                    for folder in created:
                        folder.rmdir()


def write(work: Path, catalogue: Catalogue, options: Options) -> Summary:
    """Write the shards of ``catalogue`` into the folder that ``claim`` holds.

    Raises DataError for images that cannot be decoded (more than ``options.skip_bad``; each is named), for a folder
    that holds another plan's shards, and where the disk refuses.
    """
    out = work.parent
    if options.second != second.NONE:
        catalogue = Catalogue(catalogue.classes, [s._replace(second=second.EDGES) for s in catalogue.samples],
                              {**catalogue.made, "second": second.NAMES[options.second]})
    made = {**catalogue.made, "seed": options.seed, "samples_per_shard": options.samples_per_shard}
    plan = {"made": made, "names": catalogue.names_digest(), "classes": len(catalogue.classes),
            "samples": len(catalogue.samples)}
    finished = _finished(out)
    _refuse_other(out, work, plan, finished, catalogue)
    for left in (path for name in ("shard-*", "index.*", "sums.*", "targets.*") for path in out.glob(f".{name}.tmp")):
        left.unlink(missing_ok=True)
    files.atomic_write(work / "plan.json", json.dumps(plan, sort_keys=True))
    jobs = _jobs(out, catalogue, options, finished)
    _refuse_full(out, jobs)

    done: dict[int, tuple[writer.Written, bool]] = {}
    sizes = [len(job.samples) for job in jobs]
    for number, result in pool.run(shard, jobs, options.workers, sizes, "writing"):
        done[number] = result
    bad = [(jobs[n].name, *entry) for n in sorted(done) for entry in done[n][0].bad]
    _refuse_bad(bad, options.skip_bad)
    shards = [_record(jobs[n].name, done[n][0]) for n in range(len(jobs))]
    meta = {"format": FORMAT, "shards": shards, "classes": catalogue.classes, "plan": plan,
            "sizes": catalogue.sizes_digest(),
            "skipped": [{"shard": shard, "source": source, "reason": reason} for shard, source, reason in bad]}
    if "dataset" in made:
        meta["dataset"] = made["dataset"]
    left_out = {source for _, source, _ in bad}
    targets = _targets([s for job in jobs for s in job.samples if s.source not in left_out])
    _write_index(out, meta, [done[n][0] for n in range(len(jobs))], targets, finished)
    shutil.rmtree(work, ignore_errors=True)
    return Summary(out, meta["samples"], len(catalogue.classes), len(jobs), sum(kept for _, kept in done.values()),
                   sum(s["bytes"] for s in shards), len(bad))


def shard(job: Job) -> tuple[writer.Written, bool]:
    """Write one shard in a worker, or keep it when it is what its note says; True when kept."""
    if job.known is not None and job.path.is_file() and files.digest(job.path) == job.known["sha256"]:
        return tars.survey(job.path, job.number), True
    written = writer.write_shard(job.path, job.number, job.samples)
    note = {"inputs": job.inputs, "shard": _record(job.name, written)}
    if written.bad:  # the file may be mended without a trace (a right given back), so look again next time
        return written, False
    try:
        files.atomic_write(job.note, json.dumps(note))
    except OSError as error:
        raise writer.write_error(job.note, error) from error
    return written, False


def _record(name: str, written: writer.Written) -> dict:
    return {"name": name, "bytes": written.bytes, "samples": len(written.rows), "sha256": written.sha256}


def _finished(out: Path) -> dict | None:
    """The index of a folder that was finished before; an unreadable one counts as none."""
    try:
        meta = json.loads((out / INDEX).read_text())
        return meta if {"plan", "shards", "sizes", "skipped"} <= meta.keys() else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError):
        return {}


def _refuse_other(out: Path, work: Path, plan: dict, finished: dict | None, catalogue: Catalogue) -> None:
    """Refuse a folder whose shards come from another source or other options."""
    what, mend = f"OUT {out}", "choose another OUT, or remove this one first"
    if finished is None and not (work / "plan.json").exists():
        return
    if (work / "plan.json").exists():
        old = json.loads((work / "plan.json").read_text())
    elif finished:
        old = finished["plan"]
    else:
        raise DataError(what, got=f"an {INDEX} that hpcssl-shard did not write or that is damaged",
                        expected="a new folder, or one that this command wrote", mend=mend)
    before, now = old["made"], plan["made"]
    differing = [f"{name} was {before.get(name)} and is {now.get(name)}"
                 for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if not differing and old != plan:
        differing = [f"{old['samples']} samples in {old['classes']} classes before, {plan['samples']} in "
                     f"{plan['classes']} now" if (old["samples"], old["classes"]) != (plan["samples"], plan["classes"])
                     else "other names or labels"]
    if not differing and finished and finished["sizes"] != catalogue.sizes_digest():
        differing = ["images of other sizes"]
    if differing:
        raise DataError(what, got="shards of another source or with other options: " + "; ".join(differing),
                        expected="the command that began this folder, on an unchanged source", mend=mend)


def _jobs(out: Path, catalogue: Catalogue, options: Options, finished: dict | None) -> list[Job]:
    """Cut the shuffled samples into shards, and give each what is known of an earlier attempt."""
    from hpcssl import rng  # imports torch, which the workers never need

    order = rng.permutation(rng.key(options.seed, "shard", "order"), len(catalogue.samples))
    step = options.samples_per_shard
    skipped = {entry["shard"] for entry in finished["skipped"]} if finished else set()
    before = {s["name"]: s for s in finished["shards"] if s["name"] not in skipped} if finished else {}
    jobs = []
    for number, start in enumerate(range(0, len(order), step)):
        samples = [catalogue.samples[i] for i in order[start : start + step]]
        inputs = digest_lines(json.dumps((s.source, s.label, s.size, s.stamp, s.second, s.original_label,
                                          *(() if s.more is None else (s.more,)))) for s in samples)
        job = Job(out, number, samples, inputs, None)
        known = before.get(job.name)
        if job.note.exists():
            note = json.loads(job.note.read_text())
            known = note["shard"] if note["inputs"] == inputs else None
        jobs.append(replace(job, known=known))
    return jobs


def _refuse_full(out: Path, jobs: list[Job]) -> None:
    """Hours of writing should not end in a full disk that a look at the sizes foretells."""
    need = sum(s.size for job in jobs if not job.path.exists() for s in job.samples)
    free = shutil.disk_usage(out).free
    if need > free:
        raise DataError(f"OUT {out}", got=f"{free / 1e9:.2f} GB of free space",
                        expected=f"at least {need / 1e9:.2f} GB", mend=writer.ROOM)


def _refuse_bad(bad: list[tuple[str, str, str]], allowed: int) -> None:
    named = some([f"{source}: {reason}" for _, source, reason in bad], 20)
    if len(bad) <= allowed:
        if bad:
            log.warning("left out %d images: %s", len(bad), named)
        return
    raise DataError("images of the source", got=f"{len(bad)} that cannot be used ({named})",
                    expected=f"at most {allowed}" if allowed else "every image to decode",
                    mend=f"replace them, or give --skip-bad {len(bad)} to leave them out, and run the command again: "
                         "only the shards that hold them are written again")


def _targets(samples: list[Sample]) -> np.ndarray | None:
    """The targets that the samples' notes hold, int8 [N, C] in the order of writing; None for single labels."""
    if not samples or "targets" not in json.loads(samples[0].more or "{}"):
        return None
    return np.array([json.loads(sample.more)["targets"] for sample in samples], np.int8)


def _write_index(out: Path, meta: dict, written: list[writer.Written], targets: np.ndarray | None,
                 finished: dict | None) -> None:
    rows = np.concatenate([w.rows for w in written]) if written else np.zeros(0, ROW)
    arrays = {ROWS: ("rows", rows), SUMS: ("sums", np.concatenate([w.sums for w in written]).astype("<u8"))}
    if targets is not None:
        arrays[TARGETS] = "targets", targets
    for name, (what, array) in arrays.items():
        body = io.BytesIO()
        np.save(body, array, allow_pickle=False)
        meta[f"{what}_sha256"] = hashlib.sha256(body.getvalue()).hexdigest()
        _write_small(out / name, body.getvalue())
    meta["samples"] = len(rows)
    if finished and finished["shards"] != meta["shards"]:
        log.warning("%s: the source gave other bytes than when this folder was first written", out)
    _write_small(out / INDEX, json.dumps(meta, indent=1, sort_keys=True) + "\n")


def _write_small(path: Path, content: bytes | str) -> None:
    try:
        files.atomic_write(path, content)
    except OSError as error:
        raise writer.write_error(path, error) from error


def describe(summary: Summary) -> str:
    """The one line that a person reads in the end."""
    kept = f", {summary.kept} of them kept from before" if summary.kept else ""
    skipped = f"; {summary.skipped} images left out" if summary.skipped else ""
    return (f"{summary.out}: {summary.samples} samples of {summary.classes} classes in {summary.shards} shards{kept}, "
            f"{summary.bytes / 1e6:.1f} MB{skipped}")
