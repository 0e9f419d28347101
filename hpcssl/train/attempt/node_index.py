"""The index of a shard folder, read by one process of each node and shared by the others.

With 40 bytes per sample, the index of 100 million samples takes 4 GB. Each process of a node of eight would otherwise
read it from the shared file system, keep a copy of its own, and look up the size of every shard.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcssl.data.shards import INDEX, ReadIndexFile, ShardSet
from hpcssl.distributed.liveness.record import node_name
from hpcssl.distributed.world import World
from hpcssl.errors import HpcsslError
from hpcssl.storage.node_memory import NodeMemory, attach


def open_on_node(folder: Path | str, world: World) -> ShardSet:
    """Open a shard folder on all ranks. A collective.

    The first process of each node opens it, and offers its index files in sealed memory. Others map them and compare
    their sha256. Where they cannot, as between containers that do not see each other's processes, they open the folder
    themselves. The nodes share the work of comparing the size of each shard with the index: a shard that is truncated
    on another node only is found when it is opened there.

    Args:
        folder: The folder.
        world: The processes.

    Raises:
        DataError: On all ranks: the folder cannot be read on some node, or a shard is missing or truncated.
    """
    if world.size == 1:
        return ShardSet.open(folder)
    offers: dict[str, NodeMemory] = {}
    shards, error, node = None, None, node_name()
    nodes = sorted(set(world.all_gather_text(node)))
    if world.local_rank == 0:
        try:
            part = nodes.index(node), len(nodes)
            shards = ShardSet.open(folder, part=part, keep=lambda name, content: _offer(offers, name, content))
        except HpcsslError as caught:
            error = caught
    try:
        own = {
            "node": node,
            "error": error.to_json() if error else None,
            "files": {name: offer.address for name, offer in offers.items()},
        }
        reports = [json.loads(text) for text in world.all_gather_text(json.dumps(own))]
        if error is not None:
            raise error
        for report in reports:
            if report["error"]:
                raise HpcsslError.from_json(report["error"])
        shards = shards or _attach(folder, reports, node) or ShardSet.open(folder, check_sizes=False)
        world.barrier()  # all have mapped what this process offers
    finally:
        for offer in offers.values():
            offer.close()
    return shards


def _offer(offers: dict[str, NodeMemory], name: str, content: bytes) -> bytes | mmap.mmap:
    try:
        offers[name] = NodeMemory(content)
    except OSError:
        return content
    return offers[name].mapped


def _content_of(files: Mapping[str, mmap.mmap]) -> ReadIndexFile:
    return lambda name, _: files[name]


def _attach(folder: Path | str, reports: list[dict[str, Any]], node: str) -> ShardSet | None:
    """The set that a process of this node has opened; None where its memory cannot be reached."""
    root = Path(folder).absolute()
    for report in reports:
        if report["node"] == node and INDEX in report["files"]:
            files = {name: attach(address) for name, address in report["files"].items()}
            present = {name: content for name, content in files.items() if content is not None}
            # another process may have this number in another container: then the sha256 differs, or the text is none
            with contextlib.suppress(HpcsslError, ValueError, KeyError):
                text = present[INDEX][:].decode()
                return ShardSet.from_index(f"shard folder {root}", root, text, _content_of(present))
    return None
