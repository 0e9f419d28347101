"""Raw samples per second: ``python -m benchmarks.reading --data SHARDS_OR_TAR [--out FILE]``.

Bytes without decoding, from the page cache, in one process. Our reader reads in random order, the iterators in theirs.
"""

from __future__ import annotations

import tarfile
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
import webdataset

from benchmarks import common
from hpcssl import rng
from hpcssl.data.reader import Reader


def main(
    data: Annotated[Path, typer.Option(help="A folder of shards, or a tar of JPEG images.")],
    rounds: int = 9,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Compare indexed reads with the iterator of webdataset and with tarfile."""
    with tempfile.TemporaryDirectory() as scratch:
        images = common.prepare(data, Path(scratch))
        shards = images.shards
        order = rng.permutation(rng.key(0, "reading"), len(shards)).tolist()
        paths = [str(shards.path(n)) for n in range(len(shards.shards))]
        plain, mapped = Reader(shards), Reader(shards, mapped=True)

        def random_access(reader):
            def turn() -> int:
                for index in order:
                    reader.read(index)
                return len(order)

            return turn

        def iterate() -> int:
            return sum(1 for _ in webdataset.WebDataset(paths, shardshuffle=False))

        def with_tarfile() -> int:
            count = 0
            for path in paths:
                with tarfile.open(path) as tar:
                    for member in tar:
                        count += member.name.endswith((".jpg", ".jpeg", ".png"))
                        tar.extractfile(member).read()
            return count

        candidates = {
            "ours, pread, random order": random_access(plain),
            "ours, mmap, random order": random_access(mapped),
            "webdataset's iterator": iterate,
            "tarfile": with_tarfile,
        }
        seconds = common.take_turns(candidates, rounds, time.process_time)
        common.report(
            "reading",
            f"{len(shards)} samples, {rounds} rounds",
            {
                "samples per CPU second": common.rates(seconds),
                "ours on shared storage (pread, random order) is times faster than": {
                    peer: common.ratio(seconds, "ours, pread, random order", peer)
                    for peer in ("webdataset's iterator", "tarfile")
                },
                "ours on staged shards (mmap, bytes copied, random order) is times faster than": {
                    "webdataset's iterator": common.with_goal(
                        common.ratio(seconds, "ours, mmap, random order", "webdataset's iterator"), 10.0
                    ),
                    "tarfile": common.ratio(seconds, "ours, mmap, random order", "tarfile"),
                },
            },
            out,
        )


if __name__ == "__main__":
    typer.run(main)
