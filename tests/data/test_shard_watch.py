"""Shard files that change while an attempt reads them: found at the end of an epoch, by one rank for all."""

import hashlib
import os
import shutil
import threading
from collections import Counter

import pytest

from hpcssl.data import node_folder
from hpcssl.data.reader import Reader
from hpcssl.data.shard_files import identity_of
from hpcssl.data.shards import ShardSet
from hpcssl.distributed.world import World
from hpcssl.errors import DataError
from hpcssl.train.attempt import shard_watch
from hpcssl.train.attempt.shard_watch import ShardWatch
from tests.memory.threads import ThreadedRanks, run_ranks

SINGLE = World.single_process()


class WatchRanks(ThreadedRanks):
    """Ranks as threads, two per node."""

    def all_gather_text(self, text):
        return self._exchange(text)

    def any(self, flag):
        return any(self._exchange(flag))

    def set_phase(self, phase):
        pass


@pytest.fixture
def own(shards, tmp_path):
    """A copy of a set that the test may change."""
    return ShardSet.open(shutil.copytree(shards.root, tmp_path / "own"))


def watch_shared(shards, world=SINGLE):
    """A watch of files that all nodes share, as they are now."""
    numbers = range(len(shards.shards))[world.rank :: world.size]
    return ShardWatch(shards, world, {n: identity_of(os.stat(shards.path(n))) for n in numbers})


def mark_copies(shards):
    """Mark the files as copies on a node's disk."""
    for number, shard in enumerate(shards.shards):
        with open(shards.path(number), "r+b") as file:
            node_folder.mark_verified(file, shard)


@pytest.fixture
def looked_up(own, monkeypatch):
    """How often each file of the shard folder was looked up, in whichever thread; imports look up files as well."""
    counts, lock, stat = Counter(), threading.Lock(), os.stat

    def count(path, *args, **options):
        folder, name = os.path.split(path)
        if folder == os.fspath(own.root):
            with lock:
                counts[name] += 1
        return stat(path, *args, **options)

    monkeypatch.setattr(shard_watch.os, "stat", count)
    return counts


def write_in_place(path, at=700):
    body = bytearray(path.read_bytes())
    body[at : at + 300] = bytes(300)
    with open(path, "r+b") as file:
        file.write(body)


def _renamed(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    write_in_place(other)
    other.rename(path)


CHANGES = {
    "other bytes in place": write_in_place,
    "another file renamed over it": _renamed,
    "truncated in place": lambda path: os.truncate(path, 900),
    "grown": lambda path: path.write_bytes(path.read_bytes() + bytes(512)),
    "removed and written again": lambda path: (path.unlink(), path.write_bytes(b"x" * 900)),
}


@pytest.mark.parametrize("kind", ["shared", "copies"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_is_an_error_that_names_it(own, change, kind):
    mark_copies(own)
    watch = watch_shared(own) if kind == "shared" else ShardWatch(own, SINGLE)
    watch.check()
    CHANGES[change](own.path(1))
    body = own.path(1).read_bytes()
    with pytest.raises(DataError) as caught:
        watch.check()
    assert caught.value.what == f"shard {own.path(1)}"
    assert str(len(body)) in caught.value.got and hashlib.sha256(body).hexdigest()[:12] in caught.value.got
    assert str(own.shards[1].bytes) in caught.value.expected and own.shards[1].sha256[:12] in caught.value.expected


@pytest.mark.parametrize("kind", ["shared", "copies"])
def test_a_shard_that_is_written_again_with_the_same_bytes_is_accepted(own, caplog, kind):
    mark_copies(own)
    path, body = own.path(0), own.path(0).read_bytes()
    with Reader(own) as reader:
        image = reader.read(0)
        watch = watch_shared(own) if kind == "shared" else ShardWatch(own, SINGLE)
        path.unlink()
        watch.check()
        watch.check()
        assert [str(path) in message for message in caplog.messages] == [True]  # one warning that it was removed
        assert reader.read(0) == image
        path.write_bytes(body)
        watch.check()
        watch.check()
        assert [str(path) in message for message in caplog.messages] == [True, True]  # and one that it is back
        assert reader.read(0) == image
    write_in_place(path)
    with pytest.raises(DataError) as caught:
        watch.check()
    assert caught.value.what == f"shard {path}"


@pytest.mark.parametrize("ranks", [1, 2, 6])
def test_each_shared_file_is_looked_up_once_however_many_ranks_there_are(own, looked_up, ranks):
    barrier = threading.Barrier(ranks)

    def work(world):
        watch = watch_shared(own, world)
        if barrier.wait(60) == 0:
            looked_up.clear()
        barrier.wait(60)
        watch.check()

    run_ranks(ranks, work, WatchRanks)
    assert looked_up == {shard.name: 1 for shard in own.shards}


def test_the_ranks_of_each_node_share_its_copies(own, looked_up, monkeypatch):
    mark_copies(own)
    thread = threading.local()
    monkeypatch.setattr(shard_watch, "node_name", lambda: f"n{thread.rank // 2}")

    def work(world):
        thread.rank = world.rank
        ShardWatch(own, world).check()

    run_ranks(6, work, WatchRanks)
    assert looked_up == {shard.name: 3 for shard in own.shards}  # three nodes


@pytest.mark.parametrize("changed", [[1], [0, 2]])
def test_all_ranks_raise_the_same_error(own, changed):
    errors = []

    def work(world):
        watch = watch_shared(own, world)
        watch.check()
        world._exchange(None)
        if world.rank == 3:
            for number in changed:
                write_in_place(own.path(number))
        world._exchange(None)
        with pytest.raises(DataError) as caught:
            watch.check()
        errors.append(caught.value.to_json())

    run_ranks(4, work, WatchRanks)
    assert len(errors) == 4 and {tuple(error) for error in errors} == {tuple(errors[0])}
    assert errors[0][1] == f"shard {own.path(changed[0])}"


def test_a_file_that_cannot_be_looked_up_is_an_error(own, monkeypatch):
    watch, stat = watch_shared(own), os.stat

    def fail(path, *args, **options):
        if os.path.basename(path) == own.shards[1].name:
            raise OSError(5, "Input/output error")
        return stat(path, *args, **options)

    monkeypatch.setattr(shard_watch.os, "stat", fail)
    with pytest.raises(DataError) as caught:
        watch.check()
    assert caught.value.what == f"shard {own.path(1)}" and caught.value.got == "Input/output error"


def test_copies_that_come_and_go_are_looked_up_while_they_are_kept(own, looked_up, caplog):
    mark_copies(own)
    kept = [0, 1]
    watch = ShardWatch(own, SINGLE, kept=lambda: kept)
    own.path(1).unlink()  # not here yet
    watch.check()
    assert caplog.messages == [] and own.shards[2].name not in looked_up
    kept[:] = [2]
    write_in_place(own.path(0))  # no longer kept
    watch.check()
    write_in_place(own.path(2))
    with pytest.raises(DataError) as caught:
        watch.check()
    assert caught.value.what == f"shard {own.path(2)}"
