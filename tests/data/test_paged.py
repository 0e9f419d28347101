"""A paged index: the same samples and batches, and nothing in memory that has an entry per sample."""

import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_prep import pages as page_writer
from data_prep.pages import page_index
from hpcssl.data.index_files import sample_rows
from hpcssl.data.index_files.records import ShardTable, table_dtype
from hpcssl.data.index_files.sample_rows import PagedRows
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.data.shards import INDEX, ROWS, TABLE, ShardSet
from hpcssl.data.stage import stage
from hpcssl.data.stream import Remote
from hpcssl.errors import DataError
from tests.data.test_cache import batches, bytes_in, bytes_of_largest, make_cache, run_through_cache

ROOT = Path(__file__).resolve().parents[2]
BILLION, PER_SHARD = 10**9, 1000


@pytest.fixture
def paged(shards, tmp_path):
    """A copy of the set with a paged index."""
    root = tmp_path / "paged"
    shutil.copytree(shards.root, root)
    return page_index(root)


@pytest.fixture
def paged_server(paged, server):
    """A server of the paged set."""
    for path in server.folder.iterdir():
        path.unlink()
    shutil.copytree(paged.root, server.folder, dirs_exist_ok=True)
    return server


def test_every_sample_is_found_as_in_the_array(shards, paged, monkeypatch):
    monkeypatch.setattr(sample_rows, "KEPT_PAGES", 2)
    assert not (paged.root / ROWS).exists() and len(paged) == len(shards) and paged.digest != shards.digest
    assert list(paged.shards) == shards.shards and paged.shards[1:3] == shards.shards[1:3]
    assert paged.samples_per_shard.tolist() == [shard.samples for shard in shards.shards]
    assert (paged.classes, paged.has_second) == (shards.classes, shards.has_second)
    with Reader(shards) as plain, Reader(paged) as reader:
        for index in np.random.default_rng(0).permutation(len(shards)).tolist():
            assert reader.read(index) == plain.read(index) and reader.label(index) == plain.label(index)
            assert reader.read_second(index) == plain.read_second(index) and paged.key(index) == shards.key(index)
            assert len(paged.pages._pages) <= 2
    with pytest.raises(IndexError):
        paged.samples.image(len(paged))
    assert (paged.rows == shards.rows).all() and (paged.labels == shards.labels).all()


def test_labels_of_a_set_without_labels_take_no_memory_and_read_no_page(copy):
    root = copy
    rows = np.load(root / ROWS)
    unlabeled = ShardSet.open(root)
    unlabeled.rows = rows.copy()
    unlabeled.rows["label"] = -1
    page_writer._write_pages(root, unlabeled)
    paged = ShardSet.open(root)
    for shard in paged.shards:
        (root / shard.page).unlink()
    assert (paged.labels == -1).all() and len(paged.labels) == len(rows) and paged.labels.strides == (0,)


def test_batches_equal_those_of_the_array_from_any_step(shards, paged):
    for window in (1, 3, "all"):
        expected = batches(shards, window=window)
        assert batches(paged, window=window) == expected and batches(paged, start=17, window=window) == expected[17:]


@pytest.mark.parametrize("start, bounded", [(0, True), (17, True), (0, False)])
def test_a_remote_paged_set_gives_the_same_batches_within_its_limit(shards, paged_server, tmp_path, start, bounded):
    """Its index is never downloaded as a whole, and pages come and go with their shards."""
    room = bytes_of_largest(shards, 4)
    cache = make_cache(paged_server.url, tmp_path / "node", room if bounded else 0)
    read, sizes = run_through_cache(cache.shards, cache, start)
    assert read == batches(shards, start=start)
    assert ROWS not in paged_server.requests and paged_server.requests.count(TABLE) == 1
    if bounded:
        assert max(sizes) <= room
        kept = {path.stem for path in cache.folder.glob("shard-*.tar")}
        assert {path.stem for path in cache.folder.glob("shard-*.npy")} == kept and len(kept) <= 4
    else:
        assert bytes_in(cache) == sum(shard.bytes for shard in shards.shards)


def test_a_page_that_was_removed_from_the_node_is_downloaded_again(shards, paged_server, tmp_path):
    cache = make_cache(paged_server.url, tmp_path / "node")
    with Reader(cache.shards, locate=cache.path) as reader, Reader(shards) as plain:
        cache.path(0)
        (cache.folder / cache.shards.shards[0].page).unlink()
        assert reader.read(0) == plain.read(0)
    assert paged_server.requests.count(cache.shards.shards[0].page) == 2


def test_all_labels_of_a_remote_paged_set_are_refused_with_a_reason(paged_server):
    remote = Remote(paged_server.url, stall_s=60, tries=1)
    shards = remote.open()
    with pytest.raises(DataError) as caught:
        shards.labels  # noqa: B018  (a property)
    assert caught.value.what.endswith("shard-000000.npy") and "on this machine only" in caught.value.fix


def test_a_damaged_page_and_a_damaged_table_are_errors(paged):
    page = paged.root / paged.shards[1].page
    body = bytearray(page.read_bytes())
    body[-1] ^= 1
    page.write_bytes(body)
    with Reader(paged) as reader:
        reader.read(0)
        with pytest.raises(DataError) as caught:
            reader.read(paged.shards[0].samples)
    assert caught.value.what == f"page {page}" and "sha256" in caught.value.got
    page.unlink()
    with pytest.raises(DataError, match="No such file"):
        ShardSet.open(paged.root).samples.label(paged.shards[0].samples)
    table = paged.root / TABLE
    table.write_bytes(table.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match=TABLE):
        ShardSet.open(paged.root)


def test_paging_can_be_interrupted_and_repeated(shards, tmp_path, monkeypatch):
    root = tmp_path / "set"
    shutil.copytree(shards.root, root)
    write = page_writer.write_file

    def fail_at_index(path, content):
        if path.name == INDEX:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(page_writer, "write_file", fail_at_index)
    with pytest.raises(KeyboardInterrupt):
        page_index(root)
    assert ShardSet.open(root).digest == shards.digest  # the old index is valid until the new one is complete
    monkeypatch.undo()
    first, second = page_index(root), page_index(root)
    assert first.digest == second.digest and (second.rows == shards.rows).all()


def test_a_paged_set_is_staged_with_its_pages(shards, paged, tmp_path):
    staged = stage(paged, tmp_path / "node")
    assert staged.digest == paged.digest and batches(staged, stop=5) == batches(shards, stop=5)
    assert (staged.rows == shards.rows).all()


def test_an_order_and_pages_of_a_billion_samples_hold_nothing_per_sample():
    """One number of 8 bytes per sample would be 8 GB. The order at a late step is the one of a fresh start there."""
    table = np.zeros(BILLION // PER_SHARD, table_dtype(16))
    table["samples"] = PER_SHARD
    tracemalloc.start()
    try:
        shards = ShardTable(table)
        rows = PagedRows(shards, lambda number: None)
        late = Order(shards.column("samples"), seed=3, global_batch=4096, window=16)
        step = late.steps_per_epoch * 2 - 5
        walked = [late.batch(s) for s in range(step, step + 10)]  # across the border of an epoch
        windows = next(late.upcoming_windows(step, step + 10))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.15 * BILLION  # bytes
    fresh = Order(shards.column("samples"), seed=3, global_batch=4096, window=16)
    assert all((fresh.batch(step + n) == batch).all() for n, batch in reversed(list(enumerate(walked))))
    in_window = {rows.shard(int(index)) for index in walked[0]}
    assert len(in_window) <= 32 and in_window & set(windows.tolist())


@pytest.mark.full
def test_a_training_on_a_remote_paged_set_ends_with_the_weights_of_the_plain_one(shards, paged_server, tmp_path):
    tiny = ["machine.devices=cpu", "views.size=16", "optim.batch=8", "bank.size=16", "schedule.warmup_epochs=0"]
    remote = [f"data.train={paged_server.url}", f"data.stage_dir={tmp_path / 'node'}", "data.stage_limit_gb=1"]

    def train(name, *words, steps=6):
        run = tmp_path / name
        command = [sys.executable, "-m", "hpcssl", "train", "digits_msf", "--run", str(run), *tiny, *words]
        command += ["data.shuffle_window=2", f"schedule.steps={steps}", "machine.checkpoint_steps=3"]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        return load_file(next((run / "weights").glob(f"step-{steps:08d}.safetensors")))

    plain, paged = train("plain", f"data.train={shards.root}"), train("paged", *remote)
    assert plain.keys() == paged.keys() and all((plain[name] == paged[name]).all() for name in plain)
    assert not list((tmp_path / "node").rglob(ROWS))
