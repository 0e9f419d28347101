"""Random access to the bytes of samples, and the replacement of damaged samples."""

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from hpcssl.data import shard_files
from hpcssl.data.reader import Reader
from hpcssl.errors import DataError
from tests.data.test_shard_watch import write_in_place
from tests.printed import numbers_in


@pytest.fixture
def damaged(tmp_path, make_shards, picture, encode):
    """20 samples; 3 is cut in half, 8 is empty."""
    samples = [(f"p/{i:03d}", encode(picture(i)), i) for i in range(20)]
    samples[3] = ("p/003", samples[3][1][: len(samples[3][1]) // 2] + b"\xff\xd9", 3)
    samples[8] = ("p/008", b"", 8)
    return make_shards(tmp_path / "set", samples), [body for _, body, _ in samples]


@pytest.mark.parametrize("mapped", [False, True])
def test_samples_can_be_read_in_any_order(damaged, mapped):
    shards, bodies = damaged
    with Reader(shards, mapped=mapped) as reader:
        for index in [19, 0, 7, 8, 12, 0]:
            assert reader.read(index) == bodies[index]


def test_the_second_modality_is_read(tmp_path, make_shards, picture, encode):
    samples = [(f"{i}", encode(picture(i)), 0, encode(picture(50 + i), "PNG")) for i in range(5)]
    with Reader(make_shards(tmp_path / "two", samples, per_shard=2)) as reader:
        assert [reader.read_second(i) for i in range(5)] == [s[3] for s in samples]
        index, first, second = reader.read_images(4, 0, second=True)
    assert index == 4
    np.testing.assert_array_equal(second, picture(54))
    assert first.shape == second.shape


def test_threads_share_one_open_file_per_shard(damaged, monkeypatch):
    shards, bodies = damaged
    opened, lock, real = [], threading.Lock(), os.open

    def count(path, *args):
        with lock:
            opened.append(str(path))
        return real(path, *args)

    monkeypatch.setattr(os, "open", count)
    reader, wrong = Reader(shards), []

    def work():
        wrong.extend(i for i in range(20) if reader.read(i) != bodies[i])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader.close()
    assert wrong == []
    assert len([p for p in opened if p.endswith(".tar")]) == 3


def test_a_short_read_is_continued(damaged, monkeypatch):
    shards, bodies = damaged
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: real(fd, min(size, 700), offset))
    with Reader(shards) as reader:
        assert reader.read(5) == bodies[5]


def test_damaged_samples_are_recorded_and_replaced_in_the_same_way_by_every_reader(damaged, caplog):
    shards, _ = damaged
    one, two = Reader(shards, limit=2, seed=1), Reader(shards, limit=2, seed=1)
    for reader, order in ((one, (3, 8)), (two, (8, 3))):
        images = {i: reader.read_images(i, 5) for i in order}
        assert images[3][0] not in (3, 8) and images[8][0] not in (3, 8)
        if reader is one:
            first = images
    assert {i: x[0] for i, x in first.items()} == {i: x[0] for i, x in images.items()}
    np.testing.assert_array_equal(first[3][1], two.read_images(first[3][0], 0)[1])  # the replacement's own image
    assert {i: (x.key, x.shard) for i, x in one.damaged.items()} == {
        3: ("p/003", "shard-000000.tar"),
        8: ("p/008", "shard-000001.tar"),
    }
    assert "remature" in one.damaged[3].reason and one.damaged[8].reason == "no bytes"
    assert sum("p/003" in message for message in caplog.messages) == 2  # one warning per reader
    one.read_images(3, 6)
    assert len([m for m in caplog.messages if "p/003" in m]) == 2  # and no second one


def test_replacements_differ_between_epochs_and_seeds(damaged):
    shards, _ = damaged
    chosen = {
        (seed, epoch): Reader(shards, limit=2, seed=seed).read_images(3, epoch)[0]
        for seed in range(3)
        for epoch in range(4)
    }
    assert len(set(chosen.values())) > 3


def test_more_damaged_samples_than_the_limit_are_an_error_that_names_them(damaged):
    shards, _ = damaged
    with pytest.raises(DataError) as caught:
        Reader(shards).read_images(3, 0)
    assert caught.value.what == f"samples of {shards.root}"
    assert numbers_in(caught.value.got)[0] == 1 and numbers_in(caught.value.expected) == [0]
    assert "p/003 (sample 3, shard-000000.tar)" in caught.value.got
    reader = Reader(shards, limit=1)
    reader.read_images(3, 0)
    reader.read_images(3, 0)  # the same sample is not counted twice
    with pytest.raises(DataError) as caught:
        reader.read_images(8, 0)
    first, _, second = caught.value.got.partition("; ")
    assert numbers_in(first)[0] == 2 and numbers_in(caught.value.expected) == [1]
    assert "p/003 (sample 3, shard-000000.tar)" in first
    assert second == f"p/008 (sample 8, shard-000001.tar): {reader.damaged[8].reason}"


def test_a_set_of_damaged_samples_only_is_an_error(tmp_path, make_shards):
    shards = make_shards(tmp_path / "bad", [(f"{i}", b"", 0) for i in range(3)])
    with pytest.raises(DataError) as caught:
        Reader(shards, limit=3).read_images(0, 0)
    assert numbers_in(caught.value.got)[0] == 16  # replacements that were tried


def test_a_missing_shard_is_an_error_that_names_it(damaged):
    shards, _ = damaged
    shards.path(2).unlink()
    with pytest.raises(DataError) as caught:
        Reader(shards).read(19)
    assert caught.value.what == f"shard {shards.path(2)}" and caught.value.got == os.strerror(errno.ENOENT)


def test_a_shard_of_another_size_than_in_the_index_is_an_error_that_names_it(damaged):
    shards, _ = damaged
    os.truncate(shards.path(2), 1000)
    for mapped in (False, True):
        with pytest.raises(DataError) as caught:
            Reader(shards, limit=4, mapped=mapped).read_images(19, 0)
        assert caught.value.what == f"shard {shards.path(2)}"
        assert numbers_in(caught.value.got) == [1000] and numbers_in(caught.value.expected) == [20480]


def test_a_changed_shard_is_no_damaged_sample(damaged):
    shards, _ = damaged
    with Reader(shards, limit=4) as reader:
        reader.read(0)
        write_in_place(shards.path(0))
        with pytest.raises(DataError) as caught:
            reader.read_images(0, 0)
        assert caught.value.what == f"shard {shards.path(0)}" and reader.damaged == {}


@pytest.mark.parametrize("number, times", [(errno.EIO, 2), (errno.ESTALE, 1), (errno.EIO, 99)])
def test_a_failed_read_is_retried(damaged, monkeypatch, number, times):
    shards, bodies = damaged
    monkeypatch.setattr(shard_files, "_PAUSES_S", (0.0, 0.0, 0.0))
    real, failed, opened = os.pread, [], []
    reader = Reader(shards)
    open_file = reader._files._open_file
    reader._files._open_file = lambda shard: opened.append(shard) or open_file(shard)

    def pread(*arguments):
        if len(failed) < times:
            failed.append(1)
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    monkeypatch.setattr(os, "pread", pread)
    if times == 99:
        with pytest.raises(DataError) as caught:
            reader.read(0)
        offset = int(shards.rows["offset"][0])
        assert caught.value.what == f"shard {shards.path(0)}" and os.strerror(errno.EIO) in caught.value.got
        assert numbers_in(caught.value.got) == [offset, 4]  # 4 times
    else:
        assert reader.read(0) == bodies[0]
        assert opened == [0] * (times + 1), "a stale handle stays stale: the file is opened again"


def test_keep_only_closes_the_other_files(damaged):
    shards, bodies = damaged
    for mapped in (False, True):
        with Reader(shards, mapped=mapped) as reader:
            assert reader.read(0) == bodies[0] and reader.read(19) == bodies[19]
            reader.keep_only({2})
            names = [
                os.readlink(f"/proc/self/fd/{fd}")
                for fd in os.listdir("/proc/self/fd")
                if os.path.exists(f"/proc/self/fd/{fd}")
            ]
            held = "\n".join(names) + Path("/proc/self/maps").read_text()
            assert str(shards.path(0)) not in held and str(shards.path(2)) in held
            assert reader.read(1) == bodies[1]
