"""Writing shards: our writer compared with ShardWriter of webdataset, tarfile and ``cat``, in one run.

    python -m benchmarks.sharder [--folder DIR] [--files 3000] [--repeats 5] [--out FILE.json]

All candidates write the same files to the same disk without fsync, from a warm page cache, in turns. A row is the
median of its repeats, and its ratios are medians of ratios within one round, since absolute rates vary with the load of
the machine. Our writer has three rows: bytes and offsets (the peers also write the bytes), then with the sha256 and the
checksums of the index, then with the full decoding of every image, which is what a user waits for.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table

from data_prep.catalog import WHOLE_FILE, Sample
from data_prep.shards import images, pack, writer
from hpcssl.data.shards import IMAGE_SUFFIXES

PER_SHARD = 1000


def ours(samples: list[Sample], out: Path, layer: str) -> None:
    """Write with our writer up to a layer: ``bytes``, ``sums`` or ``decode``."""
    check = images.find_damage if layer == "decode" else lambda view: None
    for number in range(0, len(samples), PER_SHARD):
        digest = hashlib.sha256()
        rejected: list = []
        with open(out / f"shard-{samples[number].mtime_ns:06d}.tar", "wb") as file:
            for chunk in pack.pack_samples(samples[number : number + PER_SHARD], rejected, check):
                file.write(chunk.data)
                if layer != "bytes":
                    digest.update(chunk.data)
                    writer.sample_sums(chunk.data, chunk.starts)


def write_with_webdataset(samples: list[Sample], out: Path) -> None:
    with webdataset.ShardWriter(str(out / "wds-%06d.tar"), maxcount=PER_SHARD, verbose=0) as sink:
        for sample in samples:
            body = Path(sample.path, sample.source).read_bytes()
            sink.write(
                {
                    "__key__": sample.source.rpartition(".")[0],
                    "jpg": body,
                    "cls": sample.label,
                    "json": {"source": sample.source},
                }
            )


def write_with_tarfile(samples: list[Sample], out: Path) -> None:
    for number in range(0, len(samples), PER_SHARD):
        with tarfile.open(out / f"tar-{number:06d}.tar", "w") as tar:
            for sample in samples[number : number + PER_SHARD]:
                stem = sample.source.rpartition(".")[0]
                body = Path(sample.path, sample.source).read_bytes()
                fields = json.dumps({"source": sample.source}).encode()
                for name, part in (("jpg", body), ("cls", b"%d" % sample.label), ("json", fields)):
                    info = tarfile.TarInfo(f"{stem}.{name}")
                    info.size = len(part)
                    tar.addfile(info, io.BytesIO(part))


def write_with_cat(samples: list[Sample], out: Path) -> None:
    for number in range(0, len(samples), PER_SHARD):
        names = [f"{s.path}/{s.source}" for s in samples[number : number + PER_SHARD]]
        with open(out / f"cat-{number:06d}", "wb") as file:
            subprocess.run(["cat", *names], stdout=file, check=True)


def copy_bytes(samples: list[Sample], out: Path) -> None:
    """Only read and write: the limit for a program that must look at the bytes (cat copies inside the kernel)."""
    buffer = memoryview(bytearray(max(s.size for s in samples)))
    for number in range(0, len(samples), PER_SHARD):
        with open(out / f"copy-{number:06d}", "wb", buffering=0) as file:
            for sample in samples[number : number + PER_SHARD]:
                with open(f"{sample.path}/{sample.source}", "rb", buffering=0) as source:
                    file.write(buffer[: source.readinto(buffer)])


def write_in_two_processes(executor: ProcessPoolExecutor, samples: list[Sample], out: Path, layer: str) -> None:
    """Write with our writer in two processes that are already running, one shard at a time."""
    parts = [samples[n : n + PER_SHARD] for n in range(0, len(samples), PER_SHARD)]
    list(executor.map(ours, parts, [out] * len(parts), [layer] * len(parts)))


def generate_images(folder: Path, files: int) -> None:
    """Write images of about 100 kB with noise, which cost as much per byte to decode as photographs."""
    noise = np.random.Generator(np.random.Philox(key=0)).integers(0, 256, (256, 320, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((640, 512), Image.Resampling.BICUBIC)
    for i in range(files):
        with open(folder / f"{i:06d}.jpg", "wb") as file:
            smooth.rotate(0, translate=(i % 97, i % 89)).save(file, "JPEG", quality=82)


def list_samples(folder: Path, files: int) -> list[Sample]:
    """Return the images of a folder, repeated up to ``files``; ``mtime_ns`` holds the number of the shard."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not names:
        raise typer.BadParameter(f"There is no image in {folder}.")
    chosen = [names[i % len(names)] for i in range(files)]
    return [
        Sample(name, i % 1000, str(folder), WHOLE_FILE, (folder / name).stat().st_size, i // PER_SHARD)
        for i, name in enumerate(chosen)
    ]


def measure(samples: list[Sample], base: Path, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every candidate in every round; the candidates take turns."""
    seconds: dict[str, list[float]] = {}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
        list(executor.map(ours, [samples[:1]] * 4, [base] * 4, ["decode"] * 4))  # imports the modules
        candidates = {
            "webdataset.ShardWriter": write_with_webdataset,
            "python tarfile": write_with_tarfile,
            "cat (no headers)": write_with_cat,
            "read and write, no headers": copy_bytes,
            "ours: bytes and offsets": lambda s, o: ours(s, o, "bytes"),
            "ours: + sha256 and sums": lambda s, o: ours(s, o, "sums"),
            "ours: + full decode": lambda s, o: ours(s, o, "decode"),
            "2 processes: bytes and offsets": lambda s, o: write_in_two_processes(executor, s, o, "bytes"),
            "2 processes: + sha256 and sums": lambda s, o: write_in_two_processes(executor, s, o, "sums"),
            "2 processes: + full decode": lambda s, o: write_in_two_processes(executor, s, o, "decode"),
        }
        for round_ in range(repeats + 1):  # the first one warms the page cache and does not count
            for name, candidate in candidates.items():
                out = base / "out"
                out.mkdir()
                start = time.perf_counter()
                candidate(samples, out)
                elapsed = time.perf_counter() - start
                shutil.rmtree(out)
                if round_:
                    seconds.setdefault(name, []).append(elapsed)
    return seconds


def make_rows(seconds: dict[str, list[float]], samples: list[Sample]) -> list[dict]:
    """Return one record per candidate: MB/s of image bytes, images/s, and its ratios."""
    total = sum(s.size for s in samples)

    def ratio(name: str, to: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds[name], seconds[to], strict=True))

    rows = []
    for name, times in seconds.items():
        middle = statistics.median(times)
        one = name.replace("2 processes:", "ours:")
        rows.append(
            {
                "candidate": name,
                "MB/s": total / middle / 1e6,
                "images/s": len(samples) / middle,
                "x webdataset": ratio(name, "webdataset.ShardWriter"),
                "x cat": ratio(name, "cat (no headers)"),
                "x one process": ratio(name, one) if one != name else None,
            }
        )
    return rows


def main(
    folder: Annotated[Path | None, typer.Option(help="Images to write; generated ones by default.")] = None,
    files: Annotated[int, typer.Option(help="How many files; a smaller folder is repeated in turn.")] = 3000,
    repeats: Annotated[int, typer.Option(help="Rounds that count.")] = 5,
    scratch: Annotated[Path | None, typer.Option(help="Disk to write to [the system's temporary folder].")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the figures and versions as JSON.")] = None,
) -> None:
    """Compare shard writers."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        base = Path(name)
        if folder is None:
            (base / "images").mkdir()
            generate_images(base / "images", min(files, 500))
        samples = list_samples(folder or base / "images", files)
        rows = make_rows(measure(samples, base, repeats), samples)
    table = Table(
        "candidate",
        "MB/s",
        "images/s",
        "x webdataset",
        "x cat",
        "x one process",
        title=f"{len(samples)} images, mean {sum(s.size for s in samples) / len(samples) / 1e3:.0f} kB",
    )
    for row in rows:
        table.add_row(
            row["candidate"],
            *(
                f"{row[k]:.{d}f}" if row[k] is not None else ""
                for k, d in (("MB/s", 0), ("images/s", 0), ("x webdataset", 2), ("x cat", 2), ("x one process", 2))
            ),
        )
    Console(width=110).print(table)
    if out is not None:
        facts = {
            "python": platform.python_version(),
            "webdataset": webdataset.__version__,
            "numpy": np.__version__,
            "cores": len(os.sched_getaffinity(0)),
            "machine": platform.machine(),
            "repeats": repeats,
            "images": len(samples),
            "bytes": sum(s.size for s in samples),
        }
        out.write_text(json.dumps({"benchmark": "sharder", **facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    from benchmarks import sharder  # under its own name, so that worker processes find its functions

    typer.run(sharder.main)
