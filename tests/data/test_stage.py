"""A staged set is whole or absent, copied once, whoever is killed and whoever comes at the same time."""

import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest

from hpcssl.data import stage as module
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.data.stage import stage
from hpcssl.errors import DataError


@pytest.fixture
def copied(monkeypatch):
    """Names of the shards that this process copied."""
    names, real = [], module._copy
    monkeypatch.setattr(module, "_copy", lambda source, *rest: names.append(source.name) or real(source, *rest))
    return names


def test_a_staged_set_is_the_same_set(shards, tmp_path, copied):
    staged = stage(shards, tmp_path)
    assert staged.digest == shards.digest and staged.root.parent == tmp_path
    assert staged.root.stat().st_mode & 0o077 == 0
    with Reader(staged, mapped=True) as near, Reader(shards) as far:
        assert all(near.read(i) == far.read(i) for i in range(len(shards)))
        np.testing.assert_array_equal(near.labels, far.labels)
    assert len(copied) == 5
    stage(shards, tmp_path)
    assert len(copied) == 5


def test_two_sets_share_a_folder(shards, tmp_path, make_shards, picture, encode):
    other = make_shards(tmp_path / "other", [("a", encode(picture(0)), 0)])
    assert stage(other, tmp_path / "disk").root != stage(shards, tmp_path / "disk").root


def _stage_slowly(root, folder, log, delay):
    real = module._copy

    def slow(source, target, shard):
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {source.name}\n")
        real(source, target, shard)
        time.sleep(delay)

    module._copy = slow
    stage(ShardSet.open(root), folder)


def _start(*arguments):
    process = multiprocessing.get_context("fork").Process(target=_stage_slowly, args=arguments)
    process.start()
    return process


def _wait_for_lines(path, count):
    for _ in range(1000):
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
    raise AssertionError("the copy never came so far")


def test_processes_of_one_node_copy_once(shards, tmp_path):
    log = tmp_path / "log"
    processes = [_start(shards.root, tmp_path / "disk", log, 0.02) for _ in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    lines = log.read_text().split()
    assert sorted(lines[1::2]) == sorted(s.name for s in shards.shards)
    assert len(set(lines[::2])) == 1


def test_a_killed_copy_goes_on_where_it_stopped(shards, tmp_path, copied):
    log = tmp_path / "log"
    process = _start(shards.root, tmp_path / "disk", log, 0.3)
    _wait_for_lines(log, 3)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    target = next((tmp_path / "disk").iterdir())
    assert not (target / "index.json").exists()
    (target / f".{shards.shards[4].name}.abc.tmp").write_bytes(b"half")  # what a kill amid a write leaves
    staged = stage(shards, tmp_path / "disk")
    assert staged.digest == shards.digest
    assert set(copied) <= {s.name for s in shards.shards[2:]} and copied[-1] == shards.shards[4].name
    assert list(target.glob(".*")) == []


def test_too_little_room_is_one_sentence(shards, tmp_path, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    with pytest.raises(DataError, match=r"0\.00 GB of free space; expected .*; to mend: free room"):
        stage(shards, tmp_path)


def test_a_disk_that_fills_up_on_the_way(shards, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_copy", full)
    with pytest.raises(DataError, match="free space"):
        stage(shards, tmp_path)


def test_a_source_that_differs_from_its_index_is_not_staged(tmp_path, make_shards, picture, encode):
    shards = make_shards(tmp_path / "set", [(f"{i}", encode(picture(i)), 0) for i in range(4)], per_shard=2)
    path = shards.path(1)
    body = bytearray(path.read_bytes())
    body[700] ^= 1
    path.write_bytes(body)
    with pytest.raises(DataError, match=r"shard-000001.tar: got sha256"):
        stage(shards, tmp_path / "disk")
    assert not list((tmp_path / "disk").rglob("index.json"))
    assert not list((tmp_path / "disk").rglob("shard-000001.tar"))


def test_show_lists_the_sets_of_a_staging_folder(shards, tmp_path, make_shards, picture, encode):
    from data_prep.show import records

    other = make_shards(tmp_path / "other", [("a", encode(picture(0)), 0)])
    roots = {stage(s, tmp_path / "disk").root: s for s in (shards, other)}
    (target := min(roots)).joinpath("index.json").unlink()  # as a copy that was cut off
    rows = list(records(tmp_path / "disk"))
    assert [row[:4] for row in rows] == [
        ("staged", root.name, f"{len(s.shards)} of {'?' if root == target else len(s.shards)} shards",
         str(sum(x.bytes for x in s.shards))) for root, s in sorted(roots.items())]
    assert all(row[4].startswith("last used 20") for row in rows)


@pytest.mark.parametrize("kind", ["a link", "a file"])
def test_what_others_left_under_our_name_is_refused(shards, tmp_path, kind):
    """In /tmp anybody can make a name first: a link of theirs may lead to any folder of ours."""
    trap = tmp_path / "disk" / f"hpcssl-{os.getuid()}-{shards.digest[:16]}"
    trap.parent.mkdir()
    (tmp_path / "elsewhere").mkdir()
    trap.symlink_to(tmp_path / "elsewhere") if kind == "a link" else trap.write_text("")
    with pytest.raises(DataError, match=rf"staging folder .*got {kind}; expected a folder of our own"):
        stage(shards, tmp_path / "disk")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_folder_of_another_user_is_refused(shards, tmp_path, monkeypatch):
    real = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: real + 1)
    with pytest.raises(DataError, match="a folder of another user"):
        stage(shards, tmp_path)


def test_a_folder_that_others_may_enter_is_closed(shards, tmp_path):
    root = stage(shards, tmp_path).root
    root.chmod(0o777)
    assert stage(shards, tmp_path).root.stat().st_mode & 0o777 == 0o700


def test_a_disk_that_is_not_there_is_one_sentence(shards, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"staging folder .*file.*got Not a directory.*data\.stage"):
        stage(shards, tmp_path / "file" / "disk")


@pytest.mark.parametrize("harm", ["cut", "removed"])
def test_a_staged_set_that_lost_a_part_is_mended(shards, tmp_path, copied, harm):
    """As a cleaner of /tmp does it, or another job that made room."""
    staged = stage(shards, tmp_path)
    os.truncate(staged.path(3), 100) if harm == "cut" else staged.path(3).unlink()
    copied.clear()
    with Reader(stage(shards, tmp_path), mapped=True) as reader:
        assert reader.read(24) == Reader(shards).read(24)
    assert copied == [shards.shards[3].name]
