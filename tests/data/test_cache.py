"""The cache of remote shards gives the same batches as local shards, within its limit and without partial files."""

import errno
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
from hpcssl.data.cache import Cache, open_shard_set
from hpcssl.data.loader import Loader
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.data.stream import Remote
from hpcssl.distributed.liveness.heartbeat import Heartbeat
from hpcssl.distributed.liveness.limits import PhaseLimits
from hpcssl.errors import ConfigError, DataError
from hpcssl.views.augment import AUGMENTATIONS, ViewSpec
from tests.printed import numbers_in
from tests.waiting import PATIENCE_S, wait_for_exit, wait_until

VIEWS = [ViewSpec(name="query", augment=AUGMENTATIONS["crop_only"], size=16)]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(stream, "_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "_RETRY_S", 0.05)


def make_cache(url, folder, limit=0, progress=lambda: None, **options):
    # stall_s is so long that no working server reaches it on a slow machine; no test here is about silent servers
    remote = Remote(url, **{"stall_s": 60, "tries": 2} | options)
    return Cache(remote, remote.read_index(), folder, limit=limit, owner="a run", progress=progress)


def order(shards, window=1, batch=4):
    return Order([s.samples for s in shards.shards], seed=1, global_batch=batch, window=window)


def batches(shards, locate=None, *, start=0, stop=30, window=1, progress=None, reader=None):
    """Sample indices and image bytes of the batches of steps ``start`` .. ``stop`` - 1."""
    reader = reader or Reader(shards, seed=1, mapped=locate is not None, locate=locate)
    with reader, Loader(reader, order(shards, window), VIEWS, seed=1, threads=2, progress=progress) as loader:
        return [(b.index.tolist(), b.images[0].numpy().tobytes()) for b in loader.iterate(start, stop)]


def bytes_in(cache):
    """Bytes of the shards that are in the cache at this moment.

    Sizes come from the index and not from the files: the cache may delete a shard between the listing of the folder
    and a ``stat`` of the file. A shard is complete or absent (``test_a_killed_process_leaves_no_partial_shard``).
    """
    size = {shard.name: shard.bytes for shard in cache.shards.shards}
    return sum(size[name] for name in os.listdir(cache.folder) if name.endswith(".tar"))


def bytes_of_largest(shards, count):
    return sum(sorted((shard.bytes for shard in shards.shards), reverse=True)[:count])


def test_a_node_downloads_the_index_table_once(shards, server, tmp_path):
    caches = [make_cache(server.url, tmp_path) for _ in range(3)]
    assert server.requests.count("index.npy") == 1
    assert {cache.shards.digest for cache in caches} == {shards.digest}
    assert (caches[2].shards.rows == shards.rows).all() and caches[2].shards.path(0).parent == caches[0].folder


def test_a_fetched_shard_counts_as_progress_in_the_data_phase_only(server, tmp_path):
    """The first step of a fully shuffled set waits for nearly all of its shards, which may take hours."""
    heartbeat = Heartbeat(None, limits=PhaseLimits(600), leave=lambda *_: None)
    cache, progressed = make_cache(server.url, tmp_path, progress=lambda: heartbeat.report_progress("data")), []
    for phase in ("data", "step"):
        heartbeat.set_phase(phase)
        heartbeat.activity.last_progress = 0.0
        cache.path(len(progressed))
        progressed.append(heartbeat.activity.last_progress > 0)
    assert progressed == [True, False]


@pytest.mark.parametrize("start, bounded", [(0, True), (17, True), (0, False)])
def test_batches_equal_those_of_local_shards(shards, server, tmp_path, start, bounded):
    """Through three epochs, in a cache that cannot hold the whole set, and from any step on."""
    room = bytes_of_largest(shards, 4)
    cache = make_cache(server.url, tmp_path, room if bounded else 0)
    read, sizes = run_through_cache(shards, cache, start)
    assert read == batches(shards, start=start)
    tars = [name for name in server.requests if name.endswith(".tar")]
    if bounded:
        assert max(sizes) <= room < sum(shard.bytes for shard in shards.shards)
        assert len(tars) > 5 or start > 0, "a shard was removed and downloaded again"
    else:
        assert sorted(tars) == sorted(shard.name for shard in shards.shards)


def run_through_cache(shards, cache, start):
    """The batches read through a cache, and the bytes in the cache at each step."""
    window = order(shards)
    window.max_shards_read = lambda steps: 4  # enough here; the method's own bound holds for sets of any shape
    sizes, reader = [], Reader(cache.shards, seed=1, mapped=True, locate=cache.path)

    def progress(step, opened):
        sizes.append(bytes_in(cache))
        cache.set_position(step, opened)

    cache.start_prefetch(window, start, 30, lookahead=4, release=reader.keep_only)
    try:
        return batches(cache.shards, start=start, progress=progress, reader=reader), sizes
    finally:
        cache.close()


def test_the_limit_holds_when_the_loader_overtakes_the_prefetch_thread(shards, server, tmp_path, monkeypatch):
    """The loader then downloads the next shard itself, before the thread has removed those that were passed."""
    fetch_one = Cache._fetch_one

    def slow(cache, missing):
        pause = fetch_one(cache, missing)
        time.sleep(0.1)
        return pause

    monkeypatch.setattr(Cache, "_fetch_one", slow)
    room = bytes_of_largest(shards, 4)
    read, sizes = run_through_cache(shards, make_cache(server.url, tmp_path, room), 0)
    assert read == batches(shards)
    assert max(sizes) <= room


def test_the_limit_holds_for_a_shard_out_of_the_order(shards, server, tmp_path):
    """The replacement of a damaged sample may lie in any shard."""
    room, plan = bytes_of_largest(shards, 4), order(shards)
    plan.max_shards_read = lambda steps: 4
    cache = make_cache(server.url, tmp_path, room)
    cache.start_prefetch(plan, 0, 30, lookahead=4, release=lambda keep: None)
    try:
        upcoming = cache._upcoming_shards(plan, 0, 30)
        wait_until(lambda: all(cache.has(n) for n in upcoming), "the shards of the first steps")
        (other,) = {*range(5)} - {*upcoming}
        assert cache.path(other).exists() and bytes_in(cache) <= room
    finally:
        cache.close()


def test_a_shard_that_somebody_wrote_to_is_downloaded_again(shards, server, tmp_path):
    body = make_cache(server.url, tmp_path).path(2).read_bytes()
    path = make_cache(server.url, tmp_path).path(2)
    with open(path, "r+b") as file:
        file.write(b"?")
    assert make_cache(server.url, tmp_path).path(2).read_bytes() == body


def test_shards_are_downloaded_in_the_order_of_the_steps(shards, server, tmp_path):
    cache = make_cache(server.url, tmp_path)
    wanted = [int(n) for window in order(shards, 2).upcoming_windows(12, 30) for n in window]
    cache.start_prefetch(order(shards, 2), 12, 30, lookahead=4, release=lambda keep: None)
    cache._thread.join()
    assert [n for n in server.requests if n.endswith(".tar")] == [shards.shards[n].name for n in dict.fromkeys(wanted)]


def test_upcoming_windows_are_the_shards_that_batches_read(shards):
    """Sample by sample: each lies in a shard of the current window, or in the next one, which takes its place."""
    shard_of = np.repeat(np.arange(5), 8)
    for window, batch in ((1, 6), (2, 6), (3, 3), ("all", 7)):
        plan = order(shards, window, batch)
        for step in (0, 1, 7, 13):
            windows = plan.upcoming_windows(step, 25)
            current = set(next(windows).tolist())
            for sample in np.concatenate([plan.batch(s) for s in range(step, 25)]):
                while shard_of[sample] not in current:
                    current = set(next(windows).tolist())
            assert len(list(windows)) <= 5, "no more than the rest of the last epoch"
        for steps in (1, 2, 4):
            most = max(len(set().union(*(set(shard_of[plan.batch(s + i)]) for i in range(steps)))) for s in range(30))
            assert most <= plan.max_shards_read(steps) <= 5


def test_a_limit_below_what_a_step_reads_is_refused(shards, server, tmp_path):
    limit = shards.shards[0].bytes
    cache = make_cache(server.url, tmp_path, limit=limit)
    for window, change in ((1, "data.shuffle_window"), ("all", "data.shuffle_window=16")):
        with pytest.raises(ConfigError) as caught:
            cache.start_prefetch(order(shards, window), 0, 30, lookahead=4, release=lambda keep: None)
        error = caught.value
        assert error.what == "data.stage_limit_gb" and numbers_in(error.got) == [limit / 1e9]
        assert numbers_in(error.expected)[0] > limit / 1e9
        assert f"data.shuffle_window={window}" in error.expected and change in error.fix


def test_prefetching_continues_after_a_failed_download(shards, server, tmp_path, caplog):
    """A download that fails for good is only logged as long as training does not need the shard."""
    server.fail("shard-000003.tar", "cut", 4)
    cache = make_cache(server.url, tmp_path)
    cache.start_prefetch(order(shards, "all"), 0, 30, lookahead=4, release=lambda keep: None)
    try:
        wait_until(lambda: all(cache.has(n) for n in range(5)), "all shards to be fetched")
    finally:
        cache.close()
    logged = [record.args[0] for record in caplog.records if record.args and isinstance(record.args[0], DataError)]
    # once: the faults last for two attempts, each with a second request that asks for the reason
    assert [error.what for error in logged] == [f"shard-000003.tar of {server.url}"]


def test_a_failed_download_is_an_error_once_training_needs_the_shard(shards, server, tmp_path):
    server.fail("shard-000003.tar", "cut")
    cache = make_cache(server.url, tmp_path)
    cache.start_prefetch(order(shards, "all"), 0, 30, lookahead=4, release=lambda keep: None)
    try:
        with pytest.raises(DataError) as caught:
            batches(cache.shards, cache.path, window="all")
    finally:
        cache.close()
    assert caught.value.what == f"shard-000003.tar of {server.url}"
    assert numbers_in(caught.value.got)[-2:] == [2, 2]  # attempt 2 of 2


def _fetch_all(url, folder, barrier):
    barrier.wait(PATIENCE_S)
    os._exit(0 if len(make_cache(url, folder).fetch_all()) == 40 else 1)


def test_processes_of_a_node_fetch_each_shard_once(shards, server, tmp_path):
    barrier = multiprocessing.get_context("fork").Barrier(3)
    processes = [
        multiprocessing.get_context("fork").Process(target=_fetch_all, args=(server.url, tmp_path, barrier))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        assert wait_for_exit(process) == 0
    assert sorted(n for n in server.requests if n.endswith(".tar")) == sorted(s.name for s in shards.shards)


def test_a_killed_process_leaves_no_partial_shard(shards, server, tmp_path):
    server.fail("shard-000002.tar", "stall", 1)
    barrier = multiprocessing.get_context("fork").Barrier(1)
    process = multiprocessing.get_context("fork").Process(target=_fetch_all, args=(server.url, tmp_path, barrier))
    process.start()
    try:
        wait_until(lambda: list(tmp_path.glob("*/.shard-000002.tar.*.tmp")), "the shard whose transfer stalls")
    finally:
        os.kill(process.pid, signal.SIGKILL)
    assert wait_for_exit(process) == -signal.SIGKILL
    assert list(tmp_path.glob("*/.shard-000002.tar.*.tmp"))
    staged = make_cache(server.url, tmp_path).fetch_all()
    assert batches(staged) == batches(shards)
    assert not list(staged.root.glob(".*")) and server.requests.count("shard-000000.tar") == 1


def test_a_disk_without_space_is_refused_before_and_during_the_download(shards, server, tmp_path, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    cache = make_cache(server.url, tmp_path)
    for download in (
        cache.fetch_all,
        lambda: cache.start_prefetch(order(shards), 0, 30, lookahead=4, release=lambda keep: None),
    ):
        with pytest.raises(DataError) as caught:
            download()
        assert caught.value.what == f"staging to {cache.folder}" and caught.value.got.startswith("0.001 MB")
    monkeypatch.undo()

    def full(shard, target):
        raise OSError(28, "No space left on device", str(target))

    cache = make_cache(server.url, tmp_path)
    cache.remote.fetch = full
    with pytest.raises(DataError) as caught:
        cache.fetch_all()
    assert caught.value.what == f"staging to {cache.folder}" and " GB" in caught.value.got
    assert "data.stage_limit_gb=N" in caught.value.fix
    assert len(make_cache(server.url, tmp_path).fetch_all()) == 40


def test_a_damaged_index_on_the_disk_is_downloaded_again(shards, server, tmp_path):
    cache = make_cache(server.url, tmp_path)
    (cache.folder / "index.npy").write_bytes(b"x" * (cache.folder / "index.npy").stat().st_size)
    (cache.folder / "index.json").write_text("half of")
    assert make_cache(server.url, tmp_path).shards.digest == shards.digest


def test_a_cleaned_folder_is_filled_again_and_a_removed_one_is_an_error(shards, server, tmp_path):
    cache = make_cache(server.url, tmp_path)
    cache.path(0)
    shutil.rmtree(cache.folder / "locks")
    cache.path(0).unlink()
    assert cache.path(0).exists()
    shutil.rmtree(cache.folder)
    with pytest.raises(DataError) as caught:
        cache.path(1)
    assert caught.value.what == f"staging to {cache.folder}" and os.strerror(errno.ENOENT) in caught.value.got


def test_opening_a_remote_set_downloads_the_index_and_to_local_the_shards(shards, server, tmp_path):
    remote = open_shard_set(server.url, stage=str(tmp_path / "disk"), key="data.val")
    assert remote.digest == shards.digest and not (tmp_path / "disk").exists()
    assert batches(remote.to_local()) == batches(shards)
    assert open_shard_set(shards.root, key="data.val").to_local().root == shards.root


def test_a_shell_command_and_a_path_that_is_an_address_are_refused(server):
    with pytest.raises(ConfigError) as caught:
        open_shard_set("pipe:cat {}", key="data.val")
    assert caught.value.what == "data.val" and "'pipe:cat {}'" in caught.value.got
    with pytest.raises(DataError) as caught:
        open_shard_set(Path(server.url), key="--train")
    assert "127.0.0.1" in caught.value.what and caught.value.got == "an address"
