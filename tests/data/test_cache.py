"""Shards of a server, fetched ahead: the same batches as local ones, a bounded number of files, and no half ones."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from hpcssl.data import cache as module
from hpcssl.data import stream
from hpcssl.data.cache import Cache, opened
from hpcssl.data.loader import Loader
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.data.stream import Remote
from hpcssl.errors import ConfigError, DataError
from hpcssl.pulse import Pulse
from hpcssl.views.augment import NAMED, ViewSpec

VIEWS = [ViewSpec(name="query", augment=NAMED["crop_only"], size=16)]


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(stream, "_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "_AGAIN_S", 0.05)


def cached(url, folder, limit=0, progress=lambda: None, **options):
    remote = Remote(url, **{"stall_s": 0.5, "tries": 2} | options)
    return Cache(remote, remote.text(), folder, limit=limit, owner="a run", progress=progress)


def order(shards, window=1, batch=4):
    return Order([s.samples for s in shards.shards], seed=1, global_batch=batch, window=window)


def batches(shards, near=None, *, start=0, stop=30, window=1, progress=None, reader=None):
    reader = reader or Reader(shards, seed=1, mapped=near is not None, near=near)
    with reader, Loader(reader, order(shards, window), VIEWS, seed=1, threads=2, progress=progress) as loader:
        return [(b.index.tolist(), b.images[0].numpy().tobytes()) for b in loader.run(start, stop)]


def bytes_in(cache):
    return sum(p.stat().st_size for p in cache.folder.glob("*.tar"))


def test_a_node_asks_once_for_what_lies_beside_the_index(shards, server, tmp_path):
    caches = [cached(server.url, tmp_path) for _ in range(3)]
    assert server.asked.count("index.npy") == 1
    assert {cache.shards.digest for cache in caches} == {shards.digest}
    assert (caches[2].shards.rows == shards.rows).all() and caches[2].shards.path(0).parent == caches[0].folder


def test_each_shard_that_comes_is_progress_of_who_waits_for_data(server, tmp_path):
    """The first step of a set that is shuffled as a whole waits for nearly all of its shards, which may take hours."""
    pulse = Pulse(None, hang_s=600, leave=lambda *_: None)
    cache, told = cached(server.url, tmp_path, progress=lambda: pulse.nearer("data")), []
    for phase in ("data", "step"):
        pulse.mark(phase)
        pulse._moved = 0.0
        cache.path(len(told))
        told.append(pulse._moved > 0)
    assert told == [True, False]


@pytest.mark.parametrize("start, bounded", [(0, True), (17, True), (0, False)])
def test_the_same_batches_as_from_local_shards(shards, server, tmp_path, start, bounded):
    """Through three epochs, in a cache that cannot hold the set, and from any step on."""
    window = order(shards)
    room = sum(sorted((s.bytes for s in shards.shards), reverse=True)[:4])
    cache = cached(server.url, tmp_path, room if bounded else 0)
    window.held = lambda steps: 4  # what a run of this length needs; the bound that it gives is safe for any
    seen, reader = [], Reader(cache.shards, seed=1, mapped=True, near=cache.path)

    def progress(step, opened):
        seen.append(bytes_in(cache))
        cache.at(step, opened)

    cache.follow(window, start, 30, ahead=4, forget=reader.keep_only)
    try:
        found = batches(cache.shards, start=start, progress=progress, reader=reader)
    finally:
        cache.close()
    assert found == batches(shards, start=start)
    tars = [name for name in server.asked if name.endswith(".tar")]
    if bounded:
        assert max(seen) <= room < sum(s.bytes for s in shards.shards)
        assert len(tars) > 5 or start > 0, "a shard was dropped and came again"
    else:
        assert sorted(tars) == sorted(s.name for s in shards.shards)


def test_the_shards_of_the_first_step_come_first(shards, server, tmp_path):
    cache = cached(server.url, tmp_path)
    wanted = [int(n) for window in order(shards, 2).ahead(12, 30) for n in window]
    cache.follow(order(shards, 2), 12, 30, ahead=4, forget=lambda keep: None)
    cache._thread.join()
    assert [n for n in server.asked if n.endswith(".tar")] == [shards.shards[n].name for n in dict.fromkeys(wanted)]


def test_what_the_order_says_of_the_future_is_what_it_reads(shards):
    """Sample by sample: each lies in a shard of the current window, or in the next one, which takes its place."""
    shard_of = np.repeat(np.arange(5), 8)
    for window, batch in ((1, 6), (2, 6), (3, 3), ("all", 7)):
        plan = order(shards, window, batch)
        for step in (0, 1, 7, 13):
            windows = plan.ahead(step, 25)
            current = set(next(windows).tolist())
            for sample in np.concatenate([plan.batch(s) for s in range(step, 25)]):
                while shard_of[sample] not in current:
                    current = set(next(windows).tolist())
            assert len(list(windows)) <= 5, "no more than the rest of the last epoch"
        for steps in (1, 2, 4):
            most = max(len(set().union(*(set(shard_of[plan.batch(s + i)]) for i in range(steps)))) for s in range(30))
            assert most <= plan.held(steps) <= 5


def test_a_limit_that_cannot_work_is_refused(shards, server, tmp_path):
    cache = cached(server.url, tmp_path, limit=shards.shards[0].bytes)
    for window, mend in ((1, "smaller data.window"), ("all", "data.window=16")):
        with pytest.raises(ConfigError, match=rf"data.stage_gb: got .* or more, for .*window={window} .*{mend}"):
            cache.follow(order(shards, window), 0, 30, ahead=4, forget=lambda keep: None)


def test_a_server_that_fails_for_a_while_is_outlived(shards, server, tmp_path, caplog):
    """The thread that reads ahead has spent its tries, and goes on: nothing was needed yet."""
    server.fail("shard-000003.tar", "cut", 4)
    cache = cached(server.url, tmp_path)
    cache.follow(order(shards, "all"), 0, 30, ahead=4, forget=lambda keep: None)
    for _ in range(500):
        if all(cache.has(n) for n in range(5)):
            break
        time.sleep(0.02)
    cache.close()
    assert all(cache.has(n) for n in range(5)) and "an error when the training needs it" in caplog.text


def test_a_server_that_fails_for_good_is_an_error_where_it_is_needed(shards, server, tmp_path):
    server.fail("shard-000003.tar", "cut")
    cache = cached(server.url, tmp_path)
    cache.follow(order(shards, "all"), 0, 30, ahead=4, forget=lambda keep: None)
    try:
        with pytest.raises(DataError, match=r"shard-000003.tar of http.*at try 2 of 2"):
            batches(cache.shards, cache.path, window="all")
    finally:
        cache.close()


def _whole(url, folder, barrier):
    barrier.wait(30)
    os._exit(0 if len(cached(url, folder).whole()) == 40 else 1)


def test_processes_of_a_node_fetch_each_shard_once(shards, server, tmp_path):
    barrier = multiprocessing.get_context("fork").Barrier(3)
    processes = [multiprocessing.get_context("fork").Process(target=_whole, args=(server.url, tmp_path, barrier))
                 for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(n for n in server.asked if n.endswith(".tar")) == sorted(s.name for s in shards.shards)


def test_a_process_that_is_killed_leaves_nothing_behind(shards, server, tmp_path):
    server.fail("shard-000002.tar", "stall", 1)
    barrier = multiprocessing.get_context("fork").Barrier(1)
    process = multiprocessing.get_context("fork").Process(target=_whole, args=(server.url, tmp_path, barrier))
    process.start()
    for _ in range(1000):
        if list(tmp_path.glob("*/.shard-000002.tar.*.tmp")):
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert list(tmp_path.glob("*/.shard-000002.tar.*.tmp"))
    staged = cached(server.url, tmp_path).whole()
    assert batches(staged) == batches(shards)
    assert not list(staged.root.glob(".*")) and server.asked.count("shard-000000.tar") == 1


def test_too_little_room_before_and_on_the_way(shards, server, tmp_path, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    with pytest.raises(DataError, match=r"0.00 GB of free space"):
        cached(server.url, tmp_path).whole()
    with pytest.raises(DataError, match=r"0.00 GB of free space"):
        cached(server.url, tmp_path).follow(order(shards), 0, 30, ahead=4, forget=lambda keep: None)
    monkeypatch.undo()

    def full(shard, target):
        raise OSError(28, "No space left on device", str(target))

    cache = cached(server.url, tmp_path)
    cache.remote.fetch = full
    with pytest.raises(DataError, match=r"free space.*data.stage_gb=N"):
        cache.whole()
    assert len(cached(server.url, tmp_path).whole()) == 40


def test_an_index_that_was_harmed_on_the_disk_comes_again(shards, server, tmp_path):
    cache = cached(server.url, tmp_path)
    (cache.folder / "index.npy").write_bytes(b"x" * (cache.folder / "index.npy").stat().st_size)
    (cache.folder / "index.json").write_text("half of")
    assert cached(server.url, tmp_path).shards.digest == shards.digest


def test_a_folder_that_was_swept_is_filled_again_or_told(shards, server, tmp_path):
    cache = cached(server.url, tmp_path)
    cache.path(0)
    shutil.rmtree(cache.folder / "locks")
    cache.path(0).unlink()
    assert cache.path(0).exists()
    shutil.rmtree(cache.folder)
    with pytest.raises(DataError, match=r"staging to .*got No such file or directory"):
        cache.path(1)


def test_a_set_is_described_first_and_fetched_when_it_is_read(shards, server, tmp_path):
    found = opened(server.url, stage=str(tmp_path / "disk"), key="data.val")
    assert found.digest == shards.digest and not (tmp_path / "disk").exists()
    assert batches(found.near()) == batches(shards)
    assert opened(shards.root, key="data.val").near().root == shards.root
    with pytest.raises(ConfigError, match=r"data.val: got 'pipe:cat {}', a shell command"):
        opened("pipe:cat {}", key="data.val")
    with pytest.raises(DataError, match="got an address; expected a folder on this machine"):
        opened(Path(server.url), key="--train")
