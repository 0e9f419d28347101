"""What a shard folder holds: records for a pipe, tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpcssl.data.shards import INDEX, ShardSet

if TYPE_CHECKING:
    from rich.table import Table


def read_records(root: Path) -> Iterator[tuple[str, ...]]:
    """Describe a shard folder, or a ``data.stage_dir`` folder with the sets that are staged in it.

    Args:
        root: The folder.

    Yields:
        Records ``(kind, name, value, …)``.

    Raises:
        DataError: It is neither of the two.
    """
    if not (root / INDEX).exists() and (copies := sorted(root.glob("hpcssl-[0-9]*/"))):
        yield from map(_staged_record, copies)
        return
    shards = ShardSet.open(root)
    sizes = shards.rows["size"].astype(np.int64)
    yield "samples", str(len(shards))
    yield "classes", str(len(shards.classes))
    labeled = shards.labels >= 0 if shards.targets is None else shards.targets.any(1)
    yield "unlabeled", str(int((~labeled).sum()))
    yield "shards", str(len(shards.shards))
    yield "bytes", str(sum(shard.bytes for shard in shards.shards))
    if len(shards):
        yield "image bytes", f"min {sizes.min()}", f"median {int(np.median(sizes))}", f"max {sizes.max()}"
    yield "second modality", (shards.second_name or "yes") if shards.has_second else "no"
    yield "digest", shards.digest
    for name, value in sorted(shards.provenance.items()):
        yield "provenance", name, str(value)
    for entry in shards.meta.get("skipped", []):
        yield "skipped", entry["source"], entry["reason"]
    if shards.targets is None:
        counts = np.bincount(shards.labels[labeled], minlength=len(shards.classes))
    else:
        counts = (shards.targets == 1).sum(0)
    for number, (name, count) in enumerate(zip(shards.classes, counts, strict=True)):
        yield "class", str(number), name, str(count)
    for shard in shards.shards:
        yield "shard", shard.name, str(shard.samples), str(shard.bytes), shard.sha256


def _staged_record(copy: Path) -> tuple[str, ...]:
    """Describe one set in a staging folder: how many of its shards are there, and when a job last opened it.

    Users remove stale sets with ``rm -r``. A job that still reads a copied folder keeps its open files; a job that
    reads from an address downloads the shards again.
    """
    lock = copy / "lock"
    used = datetime.fromtimestamp((lock if lock.exists() else copy).stat().st_mtime).isoformat(" ", "minutes")
    sizes = [path.stat().st_size for path in copy.glob("*.tar")]
    total = "?"
    if (copy / INDEX).exists():
        total = str(len(ShardSet.open(copy, check_sizes=False).shards))
    return "staged", copy.name, f"{len(sizes)} of {total} shards", str(sum(sizes)), f"last used {used}"


def make_tables(records: Iterator[tuple[str, ...]], title: str, limit: int = 20) -> list[Table]:
    """Arrange records in tables for a terminal.

    Args:
        records: The records.
        title: The folder, for titles.
        limit: Rows of a long list that are shown; a pipe gets all of them.

    Returns:
        One table of facts, then one of the classes and one of the shards.
    """
    from rich.table import Table

    facts = Table(title=title, title_justify="left", show_header=False)
    columns = {"class": ("number", "class", "samples"), "shard": ("shard", "samples", "bytes", "sha256")}
    lists = {kind: Table(*names) for kind, names in columns.items()}
    counts = dict.fromkeys(columns, 0)
    for kind, *values in records:
        if kind not in lists:
            facts.add_row(kind, "  ".join(values))
            continue
        counts[kind] += 1
        if counts[kind] <= limit:
            short = [v[:12] + "…" if kind == "shard" and len(v) == 64 else v for v in values]
            lists[kind].add_row(*short)
    for kind, count in counts.items():
        if count > limit:
            lists[kind].caption = f"and {count - limit} more: `hpcssl-shard show {title} | cat` lists all"
    return [facts, *lists.values()]
