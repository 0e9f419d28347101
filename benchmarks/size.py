"""What large runs cost: ``python -m benchmarks size [--quick] [--parts NAME …] [--folder DIR] [--out FILE]``.

Each part is measured by itself, on synthetic data of the size that its row names, and stored in ``DIR/size.json`` as
soon as it is done. A run that is repeated with the same folder measures only what is missing there. ``--quick`` takes
sizes that need less than 1 GB of disk and memory and a few minutes; without it, up to 10 GB of each, and half an hour.

    sharding     tiny images written by ``hpcssl-shard images``: CPU seconds per image
    catalog      what ``hpcssl-shard`` holds of the images before it writes them: memory and CPU seconds per image
    imagenet     1,281,167 tiny images: sharded, opened by a node, an epoch with 256 open files, a late resume
    index        ``index.npy``: bytes, time to open, memory of the process that reads it and of one that shares it
    paged        a remote set of a billion images with a paged index: memory of a node with eight ranks, and a resume
    order        the first batch of an epoch, every further one, and the memory for them
    resume       a late step: the journal cut back to it, and the watched scores looked up
    bank         a bank: init, push, search, checkpoint, digest, resume
    knn          k-NN of 50,000 x 1,281,167 features of 2,048 entries, computed from a slice
    exchange     bytes that a rank moves per step and search of a sharded bank, computed from shapes
    store        heartbeats of 8 and of 64 forked ranks: bytes per second through rank 0's store, and a formula
    files        file operations of a rank at its start, per epoch and per save, counted with strace
    runs         status, tables and curves of 40 long runs

Wall times depend on what else the machine does, so CPU seconds stand beside them. Rows that end with "computed" are
products of measured or exact numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from benchmarks import common
from benchmarks.file_operations import measure_files
from benchmarks.many_runs import measure_runs
from benchmarks.paged import measure_paged
from benchmarks.store_traffic import measure_store
from benchmarks.whole_set import measure_whole_set
from data_prep.cli import app
from hpcssl import cli_runner, rng
from hpcssl.checkpoint.manager import CheckpointManager, CheckpointState, checkpoint_digest
from hpcssl.data.order import Order
from hpcssl.data.shards import FORMAT, INDEX, ROW, ROWS
from hpcssl.distributed.world import World
from hpcssl.json_lines import read_scored_steps, truncate_after
from hpcssl.memory import search
from hpcssl.memory.bank import Bank
from hpcssl.memory.columns import ColumnSpec
from hpcssl.run_dir import RunDir
from hpcssl.storage.node_memory import NodeMemory

IMAGENET, QUERIES, FEATURES, PER_SHARD, MIB = 1_281_167, 50_000, 2048, 1000, 2**20
BILLION = 10**9
WORLDS = (64, 512, 4096)

# For a fresh process: opens an index and prints wall and CPU seconds, and the KiB of private and mapped memory it took
_OPEN = """
import json, sys, time
import numpy
from pathlib import Path
from hpcssl.data.shards import ROWS, ShardSet
from hpcssl.storage.node_memory import attach
def memory():
    fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    size = {name: int(value.split()[0]) for name, value in fields.items()}
    return size["Anonymous"], size["Rss"] - size["Anonymous"]
folder, address = Path(sys.argv[1]), sys.argv[2]
before, start, cpu = memory(), time.perf_counter(), time.process_time()
if address:
    memory_map = attach(address)
    shards = ShardSet.from_index("index", folder, (folder / "index.json").read_text(), lambda name, _: memory_map)
else:
    shards = ShardSet.open(folder, check_sizes=False)
seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps([seconds, cpu_s, *(b - a for a, b in zip(before, memory()))]))
"""


# For a fresh process: lists images, plans their shards, and prints CPU seconds and the bytes that it took at most
_CATALOG = """
import json, sys, time
from pathlib import Path
from data_prep.catalog import SourceFile, SourceListing
from data_prep.jobs import make_jobs, make_plan
from data_prep.sources.classes import classes_from_folders
from hpcssl import rng  # it imports torch, whose memory is none of the catalog
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
count, before, start = int(sys.argv[1]), peak(), time.process_time()
listing = SourceListing(Path("source"), "/source")
for n in range(count):
    listing.images.append(SourceFile(f"n{n % 1000:08d}/n{n % 1000:08d}_{n}.JPEG", -1, 110_000, 17 * 10**17 + n))
listing.folders = {f"n{n:08d}" for n in range(1000)}
catalog = classes_from_folders(listing)
del listing
make_plan(catalog, {})
jobs = make_jobs(Path("/nowhere"), catalog, 1000, 0, 1, None)
assert sum(jobs.sizes) == count
print(json.dumps([time.process_time() - start, peak() - before]))
"""


def _timed(work: Callable[[], Any]) -> tuple[Any, str]:
    start, cpu = time.perf_counter(), time.process_time()
    value = work()
    return value, f"{time.perf_counter() - start:.3g} s ({time.process_time() - cpu:.3g} s of CPU)"


def measure_sharding(folder: Path, quick: bool) -> dict[str, Any]:
    """CPU seconds per image of ``hpcssl-shard images``, which decodes every image."""
    count = 1000 if quick else 20_000
    source, out = folder / "images", folder / "shards"
    for number in range(count):
        path = source / f"class{number % 10}" / f"{number:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((rng.raw(number, 4 * 4 * 3) % 256).astype(np.uint8).reshape(4, 4, 3)).resize((64, 64)).save(
            path
        )
    before, start = os.times(), time.perf_counter()
    if cli_runner.run(app, ["images", str(source), str(out)], "hpcssl-shard"):
        raise SystemExit(1)
    after, wall = os.times(), time.perf_counter() - start
    cpu = sum(after[:4]) - sum(before[:4])
    return {
        f"{count} images of 64 x 64": f"{wall:.3g} s ({cpu:.3g} s of CPU)",
        "per image": f"{1e6 * cpu / count:.0f} us of CPU",
        f"{IMAGENET} images, computed": f"{IMAGENET * cpu / count / 60:.1f} min of CPU",
    }


def measure_catalog(_folder: Path, quick: bool) -> dict[str, Any]:
    """Memory of the list of all images, with their order and the plan of the shards."""
    result = {}
    for count in (100_000,) if quick else (IMAGENET, 20_000_000):
        command = [sys.executable, "-c", _CATALOG, str(count)]
        cpu, size = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        result[f"{count} images, names of 30 bytes"] = (
            f"{cpu:.1f} s of CPU ({1e6 * cpu / count:.1f} us per image), at most {size / MIB:.0f} MiB "
            f"({size / count:.0f} bytes per image)"
        )
    result["100 million images, computed"] = f"{size / count * 1e8 / 1e9:.1f} GB"
    return result


def write_index(folder: Path, samples: int) -> None:
    """Write the index of a set that has no shards."""
    folder.mkdir(exist_ok=True)
    rows = np.zeros(samples, ROW)
    rows["shard"], rows["size"] = np.arange(samples) // PER_SHARD, 100_000
    rows["offset"], rows["label"] = np.arange(samples) % PER_SHARD * 102_400, np.arange(samples) % 1000
    np.save(folder / ROWS, rows)
    counts = np.bincount(rows["shard"]).tolist()
    digests = [hashlib.sha256(b"%d" % n).hexdigest() for n in range(len(counts))]
    shards = [
        {"name": f"shard-{n:06d}.tar", "bytes": 10**8, "samples": count, "sha256": digest}
        for n, (count, digest) in enumerate(zip(counts, digests, strict=True))
    ]
    sha256 = hashlib.sha256((folder / ROWS).read_bytes()).hexdigest()
    index = {"format": FORMAT, "shards": shards, "classes": [str(n) for n in range(1000)], "rows_sha256": sha256}
    (folder / INDEX).write_text(json.dumps(index))


def measure_index(folder: Path, quick: bool) -> dict[str, Any]:
    """Size of the index, and what it takes to open it for the first process of a node and for the others."""
    result = {}
    for samples in (200_000,) if quick else (IMAGENET, 20_000_000):
        root = folder / f"index-{samples}"
        write_index(root, samples)
        size = (root / ROWS).stat().st_size
        offer = NodeMemory((root / ROWS).read_bytes())
        for name, address in (("alone", ""), ("sharing", offer.address)):
            command = [sys.executable, "-c", _OPEN, str(root), address]
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            seconds, cpu, private, mapped = json.loads(answer)
            result[f"{samples} samples, a process {name}"] = (
                f"opened in {seconds:.2f} s ({cpu:.2f} s of CPU), {private / 1024:.0f} MiB private, "
                f"{mapped / 1024:.0f} MiB mapped from memory of the node"
            )
        offer.close()
        result[f"{samples} samples, bytes of {ROWS}"] = f"{size} ({size / samples:.0f} per sample)"
        for name in (ROWS, INDEX):
            (root / name).unlink()
    result["a billion samples, computed"] = f"{ROW.itemsize * BILLION / 1e9:.0f} GB per node, unless the index is paged"
    return result


def measure_order(_folder: Path, quick: bool) -> dict[str, Any]:
    """Batches of 4,096 of an epoch of shards of 1,000 samples."""
    import tracemalloc

    result = {}
    for samples in (IMAGENET, 20_000_000, 100_000_000, *(() if quick else (BILLION,))):
        counts = np.full(-(-samples // PER_SHARD), PER_SHARD)
        for window in ("all", 16):
            order = Order(counts, seed=0, global_batch=4096, window=window)
            tracemalloc.start()
            order.batch(0)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            _, first = _timed(lambda order=order: order.batch(order.steps_per_epoch))
            start = time.process_time()
            for step in range(20):
                order.batch(order.steps_per_epoch + 1 + step)
            further = 50 * (time.process_time() - start)
            result[f"{samples} samples, window {window}"] = (
                f"first batch {first}, each further one {further:.2g} ms of CPU, peak {peak / MIB:.1f} MiB"
            )
    return result


def measure_resume(folder: Path, quick: bool) -> dict[str, Any]:
    """A journal of many steps that a resume cuts back by 1,000 steps."""
    steps = 50_000 if quick else 1_000_000
    path = folder / "journal.jsonl"
    with open(path, "w") as file:
        for step in range(1, steps + 1):
            line = {"step": step, "epoch": step / 312, "loss": 1.25, "lr": 0.05, "images_s": 1234.5, "wait": 0.01}
            file.write(json.dumps(line) + "\n")
    size = path.stat().st_size
    _, cut = _timed(lambda: truncate_after(path, steps - 1000))
    _, looked = _timed(lambda: read_scored_steps(path, steps - 2000))
    path.unlink()
    return {f"a journal of {steps} steps, {size / MIB:.0f} MiB": f"cut back in {cut}, scores looked up in {looked}"}


def measure_bank(folder: Path, quick: bool) -> dict[str, Any]:
    """A replicated bank of one process."""
    size, width = (2**16, 128) if quick else (2**20, 512)
    world = World.single_process()
    columns = {"key": ColumnSpec(width), "index": ColumnSpec()}
    result = {}
    bank, result["init"] = _timed(lambda: Bank(size, columns, world, key=0))
    rows = F.normalize(torch.randn(4096, width, generator=rng.generator(1)), dim=1)
    _, result["push of 4,096 rows"] = _timed(lambda: bank.push(key=rows, index=torch.arange(4096)))
    bank.nearest(rows[:32], 5)  # the library's first call
    _, result["search, 256 queries, k = 5"] = _timed(lambda: bank.nearest(rows[:256], 5))
    run = RunDir(folder / "run")
    manager = CheckpointManager(run, world)
    for name in ("first save, which allocates the host copy", "later save"):
        tensors, numbers = bank.state()
        state = CheckpointState(len(result), tensors, {"bank": numbers}, "size", {}, {})
        _, blocked = _timed(lambda state=state: manager.begin(state))
        problem, finished = _timed(manager.finish)
        if problem:
            raise SystemExit(f"benchmarks.size: {problem}")
        result[name] = f"blocks for {blocked}, then {finished} until it is on the disk"
    digest, result["digest of the checkpoint"] = _timed(lambda: checkpoint_digest(run))
    other = Bank(size, columns, world, key=1, init="empty")
    saved, found = _timed(manager.latest)
    assert saved is not None  # it was saved above
    _, loaded = _timed(lambda: other.load(numbers, lambda name, a, b: saved.rows(name, a, b - a)))
    assert digest and torch.equal(other.all_rows("key"), bank.all_rows("key"))
    result["resume"] = f"found and verified in {found}, loaded in {loaded}"
    return {f"{size} rows of {width}: {name}": value for name, value in result.items()}


def measure_knn(_folder: Path, quick: bool) -> dict[str, Any]:
    """The exact search of the k-NN evaluation on a slice; its time is proportional to queries times rows."""
    queries, rows = (128, 16_384) if quick else (1024, 131_072)
    draw = rng.generator(2)
    query = F.normalize(torch.randn(queries, FEATURES, generator=draw), dim=1)
    features = F.normalize(torch.randn(rows, FEATURES, generator=draw), dim=1)
    search.nearest(query[:8], features[:8192], 20)
    start, cpu = time.perf_counter(), time.process_time()
    search.nearest(query, features, 20)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    factor = QUERIES / queries * IMAGENET / rows
    measured = f"{wall:.3g} s ({cpu:.3g} s of CPU), {torch.get_num_threads()} threads"
    return {
        f"{queries} x {rows} x {FEATURES}, k = 20": measured,
        f"{QUERIES} x {IMAGENET} x {FEATURES}, computed": f"{factor * cpu / 3600:.2g} hours of CPU",
    }


def compute_exchange(_folder: Path, _quick: bool) -> dict[str, Any]:
    """Bytes that a rank receives, with winners spread evenly over the bank; ``test_shard_exchange.py`` counts them."""
    result = {}
    for batch, k, width in ((4096, 10, 512), (4096, 5, 512)):
        for world in WORLDS:
            own = batch // world
            parts = {
                "queries": batch * width * 4,
                "candidates": batch * k * 16,
                "requests": batch * k * 8,
                "winning rows": own * k * width * 4,
                "pushed rows": own * width * 4,
            }
            text = " + ".join(f"{name} {size / 1e6:.2f}" for name, size in parts.items())
            result[f"batch {batch}, k = {k}, D = {width}, {world} ranks, computed"] = (
                f"{sum(parts.values()) / 1e6:.1f} MB: {text}"
            )
    return result


PARTS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "sharding": measure_sharding,
    "catalog": measure_catalog,
    "imagenet": measure_whole_set,
    "index": measure_index,
    "paged": measure_paged,
    "order": measure_order,
    "resume": measure_resume,
    "bank": measure_bank,
    "knn": measure_knn,
    "exchange": compute_exchange,
    "store": measure_store,
    "files": measure_files,
    "runs": measure_runs,
}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.size", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for a first look")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--folder", type=Path, default=None, help="where to work and to keep finished parts")
    parser.add_argument("--out", type=Path, default=None, help="write the figures here as JSON")
    options = parser.parse_args()
    mode = "quick" if options.quick else "full"
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        store = folder / "size.json"
        finished = json.loads(store.read_text()) if store.exists() else {}
        for name in options.parts:
            key = f"{name} ({mode})"
            if key not in finished:
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    finished[key] = PARTS[name](Path(work), options.quick)
                partial = store.with_suffix(".tmp")
                partial.write_text(json.dumps(finished, indent=2))
                partial.replace(store)
        body = {name: finished[f"{name} ({mode})"] for name in options.parts}
    common.report("size", f"large runs, {mode} sizes", body, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
