"""The index of a shard folder in memory: without copies, and once for all processes of a node."""

import os
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from hpcssl.data import shards as shards_module
from hpcssl.data.shards import INDEX, ROWS, ShardSet
from hpcssl.errors import DataError
from hpcssl.storage.node_memory import NodeMemory, attach
from hpcssl.storage.npy import array_of
from hpcssl.train.attempt import node_index
from tests.memory.threads import ThreadedRanks, run_ranks

ATTACH = "import sys; from hpcssl.storage.node_memory import attach; print(bytes(attach(sys.argv[1])[:]).decode())"


class NodeRanks(ThreadedRanks):
    """Ranks as threads, of which every second one is the first process of a node."""

    def __init__(self, rank, size, barrier, table):
        super().__init__(rank, size, barrier, table)
        self.local_rank = rank % 2

    def all_gather_text(self, text):
        return self._exchange(text)

    def barrier(self):
        self._exchange(None)


def open_on_nodes(folder, monkeypatch, ranks=4):
    """The sets of all ranks, and the number of times that a rank has opened the folder itself."""
    opened, open_folder = [], ShardSet.open
    monkeypatch.setattr(ShardSet, "open", lambda *args, **options: opened.append(1) or open_folder(*args, **options))
    return run_ranks(ranks, lambda world: node_index.open_on_node(folder, world), NodeRanks), len(opened)


def test_one_process_of_each_node_reads_the_index(shards, monkeypatch):
    sets, opened = open_on_nodes(shards.root, monkeypatch)
    assert opened == 2  # one for each first process of a node
    for one in sets:
        assert np.array_equal(one.rows, shards.rows) and one.digest == shards.digest and one.root == shards.root
        assert not one.rows.flags.writeable and not one.rows.flags.owndata


def test_where_memory_cannot_be_shared_each_process_opens_the_folder(shards, monkeypatch):
    monkeypatch.setattr(node_index, "attach", lambda _: None)
    sets, opened = open_on_nodes(shards.root, monkeypatch)
    assert opened == 4 and {one.digest for one in sets} == {shards.digest}


def test_memory_with_another_content_is_not_taken(shards, monkeypatch):
    other = NodeMemory(b"the memory of another container's process")
    monkeypatch.setattr(node_index, "attach", lambda _: other.mapped)
    sets, opened = open_on_nodes(shards.root, monkeypatch)
    other.close()
    assert opened == 4 and {one.digest for one in sets} == {shards.digest}


def test_a_missing_shard_is_reported_by_all_ranks(shards, tmp_path, monkeypatch):
    folder = tmp_path / "broken"
    shutil.copytree(shards.root, folder)
    (folder / shards.shards[1].name).unlink()
    errors = []

    def work(world):
        with pytest.raises(DataError) as caught:
            node_index.open_on_node(folder, world)
        errors.append(caught.value.what)

    run_ranks(4, work, NodeRanks)
    assert len(errors) == 4 and all(shards.shards[1].name in what for what in errors)


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_the_nodes_share_the_look_ups_of_shard_sizes(shards, monkeypatch, nodes):
    """However many nodes there are, each shard is looked up once."""
    thread, looked_up = threading.local(), []
    monkeypatch.setattr(node_index, "node_name", lambda: f"n{thread.rank // 2}")
    monkeypatch.setattr(shards_module, "_check_size", lambda path, shard: looked_up.append(shard.name))

    def work(world):
        thread.rank = world.rank
        return node_index.open_on_node(shards.root, world).digest

    assert set(run_ranks(2 * nodes, work, NodeRanks)) == {shards.digest}
    assert sorted(looked_up) == [shard.name for shard in shards.shards]


# -- memory -------------------------------------------------------------------------------------------------------


def test_another_process_maps_what_is_offered_until_it_is_closed():
    offer = NodeMemory(b"forty bytes per sample")

    def ask():
        command = [sys.executable, "-c", ATTACH, offer.address]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})

    assert ask().stdout == "forty bytes per sample\n"
    descriptor = os.open(offer.address, os.O_RDWR)
    for change in (lambda: os.ftruncate(descriptor, 1), lambda: os.pwrite(descriptor, b"x", 0)):
        with pytest.raises(PermissionError):
            change()
    os.close(descriptor)
    offer.close()
    assert attach(offer.address) is None and offer.mapped[:5] == b"forty"


def test_only_sealed_memory_is_mapped(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 5000)
    os.mkfifo(tmp_path / "fifo")
    empty = os.memfd_create("empty", os.MFD_ALLOW_SEALING)
    for address in (tmp_path / "file", tmp_path / "fifo", tmp_path / "absent", f"/proc/self/fd/{empty}"):
        assert attach(str(address)) is None
    os.close(empty)
    with pytest.raises(OSError, match=re.escape("nothing to share")):
        NodeMemory(b"")


def test_arrays_are_views_of_the_bytes(tmp_path):
    for array in (np.arange(6), np.zeros(3, [("a", "<u4"), ("b", "<u8")]), np.zeros((0, 4)), np.eye(3).T[:, :2]):
        np.save(tmp_path / "x.npy", array)
        content = (tmp_path / "x.npy").read_bytes()
        assert np.array_equal(array_of(content), array) and array_of(content).dtype == array.dtype
        for wrong in (content[:-1], content[1:], b""):
            if array.size or wrong != content[:-1]:
                with pytest.raises((ValueError, EOFError)):
                    array_of(wrong)
    np.save(tmp_path / "x.npy", np.arange(1000))
    assert not array_of((tmp_path / "x.npy").read_bytes()).flags.owndata
    np.save(tmp_path / "x.npy", np.array([None]))
    with pytest.raises(ValueError, match="pickle"):
        array_of((tmp_path / "x.npy").read_bytes())


def test_an_index_is_kept_without_a_second_copy(shards):
    kept = {}
    opened = ShardSet.open(shards.root, keep=lambda name, content: kept.setdefault(name, content))
    assert set(kept) == {INDEX, ROWS} and kept[ROWS] == (opened.root / ROWS).read_bytes()
    address = opened.rows.__array_interface__["data"][0]
    start = np.frombuffer(kept[ROWS], np.uint8).__array_interface__["data"][0]
    assert start <= address < start + len(kept[ROWS])
