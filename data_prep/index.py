"""Write the index of a shard folder: index.json and the arrays of rows, checksums and targets."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.catalog import Catalog, LeftOut, Sample
from data_prep.catalog.names import format_examples
from data_prep.shards import writer
from hpcssl import files
from hpcssl.data.shards import FORMAT, INDEX, ROWS, TARGETS
from hpcssl.errors import DataError

LOG = logging.getLogger("hpcssl")

SUMS = "sums.npy"
"""File of the checksums of the samples, which only ``hpcssl-shard verify`` reads."""
LEFT_OUT = "left_out.csv"
"""File that lists what a command has left out of the source: name, reason, and whether it is a broken image."""


def shard_entry(name: str, shard: writer.WrittenShard) -> dict[str, Any]:
    """Return the entry of a shard in index.json."""
    return {"name": name, "bytes": shard.bytes, "samples": len(shard.rows), "sha256": shard.sha256}


def make_meta(
    catalog: Catalog,
    plan: dict[str, Any],
    names: list[str],
    shards: list[writer.WrittenShard],
    skipped: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the content of index.json, but for what ``write_index`` adds.

    Args:
        catalog: The samples.
        plan: The plan, as ``jobs.make_plan`` returns it.
        names: File names of the shards.
        shards: The shards.
        skipped: Shard, source and reason of every image that was left out.
    """
    meta = {
        "format": FORMAT,
        "shards": [shard_entry(name, shard) for name, shard in zip(names, shards, strict=True)],
        "classes": catalog.classes,
        "plan": plan,
        "sizes": catalog.sizes_digest(),
        "skipped": skipped,
    }
    if "dataset" in plan["made"]:
        meta["dataset"] = plan["made"]["dataset"]
    return meta


def collect_targets(samples: Iterable[Sample]) -> npt.NDArray[np.int8] | None:
    """Return the targets of samples with several labels, int8 [N, C] in the given order; None for single labels."""
    rows = []
    for sample in samples:
        targets = json.loads(sample.extra_json or "{}").get("targets")
        if targets is None:
            return None
        rows.append(np.array(targets, np.int8))
    return np.stack(rows) if rows else None


def write_index(
    out: Path,
    meta: dict[str, Any],
    shards: list[writer.WrittenShard],
    targets: npt.NDArray[np.int8] | None,
    finished: dict[str, Any] | None,
) -> None:
    """Write the arrays, and then index.json with their digests.

    Args:
        out: The shard folder.
        meta: Content of index.json; the digests and the number of samples are added.
        shards: The shards.
        targets: Targets of the samples, or None.
        finished: The index of a folder that was finished before; a difference of its shards is logged.

    Raises:
        DataError: A file cannot be written.
    """
    meta["rows_sha256"] = write_array(out / ROWS, [shard.rows for shard in shards])
    meta["sums_sha256"] = write_array(out / SUMS, [shard.sums.astype("<u8") for shard in shards])
    if targets is not None:
        meta["targets_sha256"] = write_array(out / TARGETS, [targets])
    meta["samples"] = sum(len(shard.rows) for shard in shards)
    if finished and finished["shards"] != meta["shards"]:
        LOG.warning("%s: the images of the source have changed since this folder was first written.", out)
    write_file(out / INDEX, json.dumps(meta, indent=1, sort_keys=True) + "\n")


def write_array(path: Path, parts: Sequence[npt.NDArray[Any]]) -> str:
    """Write the file that ``np.save`` would write of the joined parts, without joining them in memory.

    Args:
        path: The file.
        parts: One array or more, of one type.

    Returns:
        The sha256 of the file.

    Raises:
        DataError: It cannot be written.
    """
    digest, head = hashlib.sha256(), io.BytesIO()
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    descr = np.lib.format.dtype_to_descr(parts[0].dtype)
    np.lib.format.write_array_header_1_0(head, {"descr": descr, "fortran_order": False, "shape": shape})
    blocks = itertools.chain([head.getbuffer()], (np.ascontiguousarray(part).view(np.uint8).data for part in parts))
    try:
        with files.atomic_file(path) as file:
            for block in blocks:
                file.write(block)
                digest.update(block)
    except OSError as error:
        raise writer.write_error(path, error) from error
    return digest.hexdigest()


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file, or leave it as it was. Raises ``DataError``."""
    try:
        files.atomic_write(path, content)
    except OSError as error:
        raise writer.write_error(path, error) from error


def write_left_out(out: Path, left_out: list[LeftOut]) -> None:
    """List the files that are left out in ``left_out.csv``; without any, an older list is removed.

    Args:
        out: Folder of the list.
        left_out: The files.

    Raises:
        DataError: The list cannot be written.
    """
    if not left_out:
        (out / LEFT_OUT).unlink(missing_ok=True)
        return
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("name", "reason", "broken"))
    lines.writerows((*file[:2], "yes" if file.broken else "no") for file in sorted(left_out))
    write_file(out / LEFT_OUT, text.getvalue().encode("utf-8", "surrogateescape"))
    others = [file.source for file in left_out if not file.broken]
    if others:
        LOG.warning("%d other files are left out (%s), see %s.", len(others), format_examples(others), out / LEFT_OUT)


def check_broken(left_out: list[LeftOut], allowed: int) -> None:
    """Refuse more broken images than ``--skip-bad`` allows; log the others.

    Args:
        left_out: The files that are left out.
        allowed: Number of broken images that are no error.

    Raises:
        DataError: More are broken.
    """
    broken = [f"{file.source}: {file.reason}" for file in sorted(left_out) if file.broken]
    if len(broken) > allowed:
        raise DataError(
            "images of the source",
            got=f"{len(broken)} that cannot be used ({format_examples(broken, 20)})",
            expected=f"at most {allowed}" if allowed else "every image to decode",
            fix=f"replace them, or give --skip-bad {len(broken)} to leave them out, and run the command again: "
            "only the shards that hold them are written again",
        )
    if broken:
        LOG.warning("%d images are left out: %s.", len(broken), format_examples(broken, 20))
