"""What a shard folder holds, as records: a table is made of them on a terminal, a pipe gets them plain."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np

from hpcssl.data.shards import INDEX, ShardSet


def records(root: Path) -> Iterator[tuple[str, ...]]:
    """Yield rows ``(kind, name, value, …)``: of a shard folder, or of a ``data.stage`` folder with the sets in it.

    Raises DataError for any other folder.
    """
    if not (root / INDEX).exists() and (copies := sorted(root.glob("hpcssl-[0-9]*/"))):
        yield from map(_staged, copies)
        return
    found = ShardSet.open(root)
    sizes = found.rows["size"].astype(np.int64)
    yield "samples", str(len(found))
    yield "classes", str(len(found.classes))
    labelled = found.labels >= 0 if found.targets is None else found.targets.any(1)
    yield "unlabelled", str(int((~labelled).sum()))
    yield "shards", str(len(found.shards))
    yield "bytes", str(sum(shard.bytes for shard in found.shards))
    if len(found):
        yield "image bytes", f"min {sizes.min()}", f"median {int(np.median(sizes))}", f"max {sizes.max()}"
    yield "second modality", (found.second or "yes") if found.has_second else "no"
    yield "digest", found.digest
    for name, value in sorted(found.made.items()):
        yield "made", name, str(value)
    for entry in found.meta.get("skipped", []):
        yield "skipped", entry["source"], entry["reason"]
    if found.targets is None:
        counts = np.bincount(found.labels[labelled], minlength=len(found.classes))
    else:
        counts = (found.targets == 1).sum(0)
    for number, (name, count) in enumerate(zip(found.classes, counts, strict=True)):
        yield "class", str(number), name, str(count)
    for shard in found.shards:
        yield "shard", shard.name, str(shard.samples), str(shard.bytes), shard.sha256


def _staged(copy: Path) -> tuple[str, ...]:
    """One set in a staging folder: what is there of it, and when a job last began with it. Stale ones are removed with
    ``rm -r``: a job that still reads one of a folder keeps its open files, one of an address fetches them again."""
    lock = copy / "lock"
    used = datetime.fromtimestamp((lock if lock.exists() else copy).stat().st_mtime).isoformat(" ", "minutes")
    tars = [path.stat().st_size for path in copy.glob("*.tar")]
    whole = "?"
    if (copy / INDEX).exists():
        whole = str(len(ShardSet.open(copy, check_sizes=False).shards))
    return "staged", copy.name, f"{len(tars)} of {whole} shards", str(sum(tars)), f"last used {used}"


def tables(rows: Iterator[tuple[str, ...]], title: str, at_most: int = 20) -> list:
    """The records as rich tables, long lists cut to their first rows (a pipe gets them whole)."""
    from rich.table import Table

    facts = Table(title=title, title_justify="left", show_header=False)
    lists = {"class": ("number", "class", "samples"), "shard": ("shard", "samples", "bytes", "sha256")}
    grids = {kind: Table(*columns) for kind, columns in lists.items()}
    counts = dict.fromkeys(lists, 0)
    for kind, *values in rows:
        if kind not in grids:
            facts.add_row(kind, "  ".join(values))
            continue
        counts[kind] += 1
        if counts[kind] <= at_most:
            short = [v[:12] + "…" if kind == "shard" and len(v) == 64 else v for v in values]
            grids[kind].add_row(*short)
    for kind, count in counts.items():
        if count > at_most:
            grids[kind].caption = f"and {count - at_most} more: `hpcssl-shard show {title} | cat` lists all"
    return [facts, *grids.values()]
