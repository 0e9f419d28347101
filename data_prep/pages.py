"""Page the index of a shard folder: one small file per shard in place of one file with an entry per sample."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.index import write_file
from hpcssl.data.shards import (
    INDEX,
    PAGE_ROW,
    PAGED_FORMAT,
    ROWS,
    TABLE,
    Shard,
    ShardSet,
    table_dtype,
)
from hpcssl.errors import DataError


def page_index(root: Path) -> ShardSet:
    """Replace ``index.npy`` by pages. A folder that is paged already is left as it is.

    The pages and the table of shards are written beside the old index, which stays valid until ``index.json`` is
    replaced. So the command can be killed at any moment, and repeated.

    Args:
        root: The shard folder.

    Returns:
        The paged set.

    Raises:
        DataError: The folder cannot be read or written, or has several labels per image.
    """
    shards = ShardSet.open(root, mapped=True)
    if shards.pages is None:
        _check_pageable(shards)
        _write_pages(root, shards)
    (root / ROWS).unlink(missing_ok=True)
    return ShardSet.open(root)


def _check_pageable(shards: ShardSet) -> None:
    what = f"shard folder {shards.root}"
    if shards.targets is not None:
        raise DataError(
            what,
            got="several labels per image, which stand in an array of all samples",
            expected="at most one label per image",
            fix="leave its index as it is: such sets are small",
        )
    if (np.diff(shards.rows["shard"].astype(np.int64)) < 0).any():
        raise DataError(what, got="samples that do not follow the list of shards", expected="an index in that order")
    names = {shard.page for shard in shards.shards}
    if taken := sorted(names & {ROWS, TABLE, "sums.npy"}):
        raise DataError(what, got=f"a shard whose page would be {taken[0]}", expected="shards with other names")


def _write_pages(root: Path, shards: ShardSet) -> None:
    ends = np.cumsum(shards.samples_per_shard)
    table = np.zeros(len(shards.shards), table_dtype(max((len(s.name) for s in shards.shards), default=1)))
    labeled = with_second = 0
    for number, shard in enumerate(shards.shards):
        rows = shards.rows[int(ends[number]) - shard.samples : int(ends[number])]
        page = np.empty(shard.samples, PAGE_ROW)
        for name in PAGE_ROW.names or ():
            page[name] = rows[name]
        labeled += int((rows["label"] >= 0).sum())
        with_second += int((rows["size_b"] > 0).sum())
        body = _npy(page)
        write_file(root / shard.page, body)
        table[number] = table_record(shard, hashlib.sha256(body).digest())
    body = _npy(table)
    write_file(root / TABLE, body)
    meta = {key: value for key, value in shards.meta.items() if key not in ("shards", "rows_sha256")} | {
        "format": PAGED_FORMAT,
        "samples": len(shards),
        "shard_count": len(shards.shards),
        "labeled": labeled,
        "with_second": with_second,
        "table_sha256": hashlib.sha256(body).hexdigest(),
    }
    write_file(root / INDEX, json.dumps(meta, indent=1, sort_keys=True) + "\n")


def _npy(array: npt.NDArray[np.void]) -> bytes:
    body = io.BytesIO()
    np.save(body, array, allow_pickle=False)
    return body.getvalue()


def table_record(shard: Shard, page: bytes) -> tuple[Any, ...]:
    """Return the record of a shard in ``shards.npy``; ``page`` is the sha256 of its page."""
    digests = (np.frombuffer(digest, np.uint8) for digest in (bytes.fromhex(shard.sha256), page))
    return shard.name.encode(), shard.bytes, shard.samples, *digests
