"""Random access to bytes, and the one policy for damaged samples."""

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from hpcssl.data import reader as module
from hpcssl.data.reader import Reader
from hpcssl.errors import DataError


@pytest.fixture
def damaged(tmp_path, make_shards, picture, encode):
    """20 samples; 3 is cut in half, 8 is empty."""
    samples = [(f"p/{i:03d}", encode(picture(i)), i) for i in range(20)]
    samples[3] = ("p/003", samples[3][1][:len(samples[3][1]) // 2] + b"\xff\xd9", 3)
    samples[8] = ("p/008", b"", 8)
    return make_shards(tmp_path / "set", samples), [body for _, body, _ in samples]


@pytest.mark.parametrize("mapped", [False, True])
def test_every_sample_in_any_order(damaged, mapped):
    shards, bodies = damaged
    with Reader(shards, mapped=mapped) as reader:
        for index in [19, 0, 7, 8, 12, 0]:
            assert reader.read(index) == bodies[index]


def test_second_modality(tmp_path, make_shards, picture, encode):
    samples = [(f"{i}", encode(picture(i)), 0, encode(picture(50 + i), "PNG")) for i in range(5)]
    with Reader(make_shards(tmp_path / "two", samples, per_shard=2)) as reader:
        assert [reader.read_second(i) for i in range(5)] == [s[3] for s in samples]
        index, first, second = reader.images(4, 0, second=True)
    assert index == 4
    np.testing.assert_array_equal(second, picture(54))
    assert first.shape == second.shape


def test_one_descriptor_per_shard_for_all_threads(damaged, monkeypatch):
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


def test_damage_is_replaced_named_and_the_same_everywhere(damaged, caplog):
    shards, _ = damaged
    one, two = Reader(shards, limit=2, seed=1), Reader(shards, limit=2, seed=1)
    for reader, order in ((one, (3, 8)), (two, (8, 3))):
        found = {i: reader.images(i, 5) for i in order}
        assert found[3][0] not in (3, 8) and found[8][0] not in (3, 8)
        if reader is one:
            first = found
    assert {i: x[0] for i, x in first.items()} == {i: x[0] for i, x in found.items()}
    np.testing.assert_array_equal(first[3][1], two.images(first[3][0], 0)[1])  # the replacement's own image
    assert {i: (x.key, x.shard) for i, x in one.damaged.items()} == {
        3: ("p/003", "shard-000000.tar"), 8: ("p/008", "shard-000001.tar")}
    assert "remature" in one.damaged[3].reason and one.damaged[8].reason == "no bytes"
    assert sum("p/003" in message for message in caplog.messages) == 2  # once per reader
    one.images(3, 6)
    assert len([m for m in caplog.messages if "p/003" in m]) == 2  # and not again


def test_replacements_differ_between_epochs_and_seeds(damaged):
    shards, _ = damaged
    chosen = {(seed, epoch): Reader(shards, limit=2, seed=seed).images(3, epoch)[0]
              for seed in range(3) for epoch in range(4)}
    assert len(set(chosen.values())) > 3


def test_the_limit_stops_the_run_and_names_the_samples(damaged):
    shards, _ = damaged
    with pytest.raises(DataError, match=r"1 damaged: p/003 \(sample 3, shard-000000.tar\).*at most 0"):
        Reader(shards).images(3, 0)
    reader = Reader(shards, limit=1)
    reader.images(3, 0)
    reader.images(3, 0)  # the same sample is not counted twice
    with pytest.raises(DataError, match=r"2 damaged: p/003.*; p/008 \(sample 8, shard-000001.tar\): no bytes"):
        reader.images(8, 0)


def test_a_set_without_a_whole_sample_ends(tmp_path, make_shards):
    shards = make_shards(tmp_path / "bad", [(f"{i}", b"", 0) for i in range(3)])
    with pytest.raises(DataError, match="16 samples in a row"):
        Reader(shards, limit=3).images(0, 0)


def test_a_shard_that_vanished_is_one_sentence(damaged):
    shards, _ = damaged
    shards.path(2).unlink()
    with pytest.raises(DataError, match=r"shard-000002.tar: got No such file"):
        Reader(shards).read(19)


def test_a_shard_that_shrank_before_it_was_opened_is_named(damaged):
    shards, _ = damaged
    os.truncate(shards.path(2), 1000)
    for mapped in (False, True):
        with pytest.raises(DataError, match=r"shard-000002.tar: got 1000 bytes; expected 20480 bytes"):
            Reader(shards, limit=4, mapped=mapped).images(19, 0)


def _in_place(path, at=700):
    body = bytearray(path.read_bytes())
    body[at:at + 300] = bytes(300)
    with open(path, "r+b") as file:
        file.write(body)


def _renamed(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    _in_place(other)
    other.rename(path)


CHANGES = {"other bytes in place": _in_place, "another file renamed over it": _renamed,
           "truncated in place": lambda path: os.truncate(path, 900),
           "grown": lambda path: path.write_bytes(path.read_bytes() + bytes(512)),
           "removed and made anew": lambda path: (path.unlink(), path.write_bytes(b"x" * 900))}


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_while_it_is_read_is_named(damaged, change):
    shards, _ = damaged
    with Reader(shards, limit=4) as reader:
        reader.read(0)
        reader.check()
        CHANGES[change](shards.path(0))
        if "place" in change and "renamed" not in change:  # who reads it first may not know, and must not count damage
            with pytest.raises(DataError, match=r"shard-000000.tar: got another file than when it was opened"):
                reader.images(0, 0)
            assert reader.damaged == {}
        with pytest.raises(DataError, match=r"shard-000000.tar: got another file than when it was opened.*unchanged"):
            reader.check()


def test_the_same_bytes_written_anew_may_go_on(damaged, caplog):
    shards, bodies = damaged
    path = shards.path(0)
    with Reader(shards, limit=4) as reader:
        reader.read(0)
        body = path.read_bytes()
        path.unlink()
        reader.check()
        reader.check()
        assert caplog.text.count("was removed; this attempt goes on") == 1
        assert reader.read(1) == bodies[1]
        path.write_bytes(body)
        reader.check()
        assert "written again with the same bytes" in caplog.text and reader.read(1) == bodies[1]
        _in_place(path)
        with pytest.raises(DataError, match="another file"):
            reader.check()


@pytest.mark.parametrize("number, times", [(errno.EIO, 2), (errno.ESTALE, 1), (errno.EIO, 99)])
def test_a_read_that_fails_is_tried_again(damaged, monkeypatch, number, times):
    shards, bodies = damaged
    monkeypatch.setattr(module, "_PAUSES_S", (0.0, 0.0, 0.0))
    real, failed, opened = os.pread, [], []
    reader = Reader(shards)
    honest = reader._opened
    reader._opened = lambda shard: opened.append(shard) or honest(shard)

    def pread(*arguments):
        if len(failed) < times:
            failed.append(1)
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    monkeypatch.setattr(os, "pread", pread)
    if times == 99:
        with pytest.raises(DataError, match=r"shard-000000.tar: got Input/output error at byte \d+, 4 times"):
            reader.read(0)
    else:
        assert reader.read(0) == bodies[0]
        assert opened == [0] * (times + 1), "a stale handle never heals: the file is opened again"


def test_files_that_are_let_go_of_are_closed(damaged):
    shards, bodies = damaged
    for mapped in (False, True):
        with Reader(shards, mapped=mapped) as reader:
            assert reader.read(0) == bodies[0] and reader.read(19) == bodies[19]
            reader.keep_only({2})
            names = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                     if os.path.exists(f"/proc/self/fd/{fd}")]
            held = "\n".join(names) + Path("/proc/self/maps").read_text()
            assert str(shards.path(0)) not in held and str(shards.path(2)) in held
            assert reader.read(1) == bodies[1]
