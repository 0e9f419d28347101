"""The part ``paged`` of ``benchmarks/size.py``: a remote set whose index is paged, read by all ranks of a node.

All shards are the same file of tiny images, and all pages the same file, which a shell command gives out under every
name. So a set of a billion images takes as much disk as its table of shards, twice, and a few shards. The ranks are
processes: each opens the set, computes batches late in the training, downloads the shards of these and reads images.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.pages import table_record
from hpcssl.data.shards import INDEX, PAGE_ROW, PAGED_FORMAT, TABLE, Shard, table_dtype
from hpcssl.errors import format_bytes

PER_SHARD, WINDOW, BATCH, STEPS = 1000, 16, 4096, 3

_SERVE = """
case "$1" in
    {index} | {table}) cat "{root}/$1" ;;
    *.npy) cat "{root}/page" ;;
    *) cat "{root}/shard" ;;
esac
"""
# One rank: reads its part of some steps, prints their digests, waits for a line, and prints its memory in KiB
_RANK = """
import hashlib, json, sys, time
import webdataset.gopen
from hpcssl.data.cache import Cache
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.data.stream import Remote
address, folder, owner, rank, ranks, first, steps, batch, window, limit = sys.argv[1:]
rank, ranks, first, steps, batch, window, limit = map(int, (rank, ranks, first, steps, batch, window, limit))
def memory():
    fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return {name: int(fields[name].split()[0]) for name in ("Anonymous", "Pss")}
before, cpu = memory(), time.process_time()
remote = Remote(address, allow_pipe=True)
cache = Cache(remote, remote.read_index(), folder, limit=limit, owner=owner)
opened = time.process_time() - cpu
order = Order(cache.shards.samples_per_shard, seed=0, global_batch=batch, window=window)
first = first if first >= 0 else order.steps_per_epoch + order.steps_per_epoch // 2 - first - 1
cpu = time.process_time()
order.batch(first)
ordered, digests = time.process_time() - cpu, []
with Reader(cache.shards, locate=cache.path) as reader:
    cache.start_prefetch(order, first, first + steps, lookahead=1, release=reader.keep_only)
    for step in range(first, first + steps):
        cache.set_position(step, step + 1)
        digest = hashlib.sha256()
        for index in order.local_batch(step, rank, ranks).tolist():
            digest.update(b"%d %d " % (index, reader.label(index)) + reader.read(index))
        digests.append(digest.hexdigest())
    cache.close()
    print(json.dumps([digests, opened, ordered]), flush=True)
    sys.stdin.readline()
    after = memory()
    print(json.dumps([before, after]), flush=True)
    sys.stdin.readline()
"""


def write_set(root: Path, shards: int) -> str:
    """Write what the set is made of, and return its address."""
    root.mkdir()
    image, tar = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (16, 16)).save(image, "JPEG")
    page = np.zeros(PER_SHARD, PAGE_ROW)
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for row in page:
            row["header"] = archive.offset
            member = tarfile.TarInfo(f"{row['header']:08d}.jpg")
            member.size = row["size"] = len(image.getvalue())
            row["offset"], row["label"] = archive.offset + tarfile.BLOCKSIZE, -1
            archive.addfile(member, io.BytesIO(image.getvalue()))
    body = io.BytesIO()
    np.save(body, page)
    (root / "page").write_bytes(body.getvalue())
    (root / "shard").write_bytes(tar.getvalue())
    sha256, page_sha256 = hashlib.sha256(tar.getvalue()).hexdigest(), hashlib.sha256(body.getvalue()).digest()
    size = len(tar.getvalue())
    table = np.empty(shards, table_dtype(len(_name(0))))
    table[:] = table_record(Shard(name=_name(0), bytes=size, samples=PER_SHARD, sha256=sha256), page_sha256)
    table["name"] = [_name(number).encode() for number in range(shards)]
    np.save(root / TABLE, table)
    meta = {
        "format": PAGED_FORMAT,
        "samples": shards * PER_SHARD,
        "shard_count": shards,
        "classes": [],
        "labeled": 0,
        "with_second": 0,
        "table_sha256": hashlib.sha256((root / TABLE).read_bytes()).hexdigest(),
    }
    (root / INDEX).write_text(json.dumps(meta))
    script = root / "serve.sh"
    script.write_text(_SERVE.format(root=root, index=INDEX, table=TABLE))
    return f"pipe:sh {script} {{}}"


def _name(number: int) -> str:
    return f"shard-{number:07d}.tar"


def run_ranks(address: str, folder: Path, ranks: list[int], size: int, first: int, limit: int) -> list[Any]:
    """Run these ranks of a node at the same time, and return what each of them printed."""
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in ranks:
            numbers = (rank, size, first, STEPS, BATCH, WINDOW, limit)
            command = [sys.executable, "-c", _RANK, address, str(folder), "paged", *map(str, numbers)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        answers = [[] for _ in ranks]
        for _ in range(2):  # what was read, and then, once all have read it, the memory of all
            for process, answer in zip(processes, answers, strict=True):
                assert process.stdout is not None
                line = process.stdout.readline()
                if not line:
                    raise SystemExit("benchmarks.size: a rank of the part `paged` failed")
                answer += json.loads(line)
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
        return answers


def measure_paged(folder: Path, quick: bool) -> dict[str, Any]:
    """Memory of a node whose ranks read a paged set, and a resume in the middle of its second epoch."""
    shards, size = (10_000, 2) if quick else (1_000_000, 8)
    address = write_set(folder / "remote", shards)
    limit = 100 * (folder / "remote" / "shard").stat().st_size
    answers = run_ranks(address, folder, list(range(size)), size, -1, limit)
    resumed = run_ranks(address, folder, [0], size, -2, limit)[0]
    if resumed[0][:-1] != answers[0][0][1:]:
        raise SystemExit("benchmarks.size: another batch after a resume")
    pss = sum(after["Pss"] for *_, after in answers)
    imports = sum(before["Pss"] for *_, before, _ in answers)
    private = max(after["Anonymous"] - before["Anonymous"] for *_, before, after in answers)
    opened, ordered = (max(answer[n] for answer in answers) for n in (1, 2))
    local = next(folder.glob("hpcssl-*-remote-*"))
    files = [path.stat().st_size for path in local.rglob("*") if path.is_file()]
    name = f"{shards * PER_SHARD} samples in {shards} shards, {size} ranks"
    return {
        f"{name}: memory of the node": f"{(pss - imports) / 1024:.0f} MiB beside {imports / 1024:.0f} MiB of imports",
        f"{name}: memory of a rank": f"{private / 1024:.0f} MiB of its own for index and order",
        f"{name}: opening": f"{opened:.2f} s of CPU per rank; the first batch of an epoch {ordered:.2f} s of CPU",
        f"{name}: disk of the node": f"{format_bytes(sum(files))} in {len(files)} files, table of shards and "
        f"{sum(path.suffix == '.tar' for path in local.iterdir())} shards with their pages",
        f"{name}: resume in the second epoch": "the same images as without it, each byte compared by sha256",
    }
