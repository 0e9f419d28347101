"""A staged set is complete or absent and copied once, also when processes are killed or stage at the same time."""

import errno
import hashlib
import multiprocessing
import os
import shutil
import signal

import pytest

from hpcssl.data import node_folder
from hpcssl.data import stage as stage_module
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.data.stage import stage
from hpcssl.errors import DataError, format_bytes
from tests.waiting import PATIENCE_S, wait_for_exit, wait_until


@pytest.fixture
def copied(monkeypatch):
    """Names of the shards that this process copied."""
    names, real = [], stage_module._copy
    monkeypatch.setattr(stage_module, "_copy", lambda source, *rest: names.append(source.name) or real(source, *rest))
    return names


def test_a_staged_set_equals_the_original_and_is_copied_once(shards, tmp_path, copied):
    staged = stage(shards, tmp_path)
    assert staged.digest == shards.digest and staged.root.parent == tmp_path
    assert staged.root.stat().st_mode & 0o077 == 0
    with Reader(staged, mapped=True) as copy, Reader(shards) as original:
        assert all(copy.read(i) == original.read(i) for i in range(len(shards)))
        assert [copy.label(i) for i in range(len(shards))] == [original.label(i) for i in range(len(shards))]
    assert len(copied) == 5
    stage(shards, tmp_path)
    assert len(copied) == 5


def test_two_sets_get_different_subfolders(shards, tmp_path, make_shards, picture, encode):
    other = make_shards(tmp_path / "other", [("a", encode(picture(0)), 0)])
    assert stage(other, tmp_path / "disk").root != stage(shards, tmp_path / "disk").root


def _stage_logged(root, folder, log, last, barrier):
    """Stage a set once all processes have reached the barrier.

    ``log`` gets a line for each shard as its copy begins; at shard number ``last`` wait until killed (0: never).
    """
    real, started = stage_module._copy, []

    def slow(source, target, shard, *rest):
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {source.name}\n")
        started.append(source)
        if len(started) == last:
            signal.pause()
        real(source, target, shard, *rest)

    stage_module._copy = slow
    barrier.wait(PATIENCE_S)
    stage(ShardSet.open(root), folder)


def _start(count, *arguments):
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(count)
    processes = [fork.Process(target=_stage_logged, args=(*arguments, barrier)) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


def _wait_for_lines(path, count):
    wait_until(lambda: len(path.read_text().splitlines()) >= count, f"{count} shards in {path.name}")


def test_processes_of_one_node_copy_each_shard_once(shards, tmp_path):
    log = tmp_path / "log"
    processes = _start(3, shards.root, tmp_path / "disk", log, 0)
    for process in processes:
        assert wait_for_exit(process) == 0
    lines = log.read_text().split()
    assert sorted(lines[1::2]) == sorted(s.name for s in shards.shards)
    assert len(set(lines[::2])) == 1


def test_an_interrupted_copy_continues_where_it_stopped(shards, tmp_path, copied):
    log = tmp_path / "log"
    (process,) = _start(1, shards.root, tmp_path / "disk", log, 3)
    try:
        _wait_for_lines(log, 3)
    finally:
        os.kill(process.pid, signal.SIGKILL)
    assert wait_for_exit(process) == -signal.SIGKILL
    target = next((tmp_path / "disk").iterdir())
    assert not (target / "index.json").exists()
    (target / f".{shards.shards[4].name}.abc.tmp").write_bytes(
        b"half"
    )  # as a process leaves it that is killed while it writes
    staged = stage(shards, tmp_path / "disk")
    assert staged.digest == shards.digest
    assert set(copied) <= {s.name for s in shards.shards[2:]} and copied[-1] == shards.shards[4].name
    assert list(target.glob(".*")) == []


def test_only_a_staged_shard_that_somebody_wrote_to_is_copied_again(shards, tmp_path):
    staged = stage(shards, tmp_path)
    inodes = [staged.path(n).stat().st_ino for n in range(len(shards.shards))]
    with open(staged.path(1), "r+b") as file:
        file.write(b"?")
    again = stage(shards, tmp_path)
    assert again.path(1).read_bytes() == shards.path(1).read_bytes()
    assert [n for n, inode in enumerate(inodes) if again.path(n).stat().st_ino != inode] == [1]


def test_a_disk_with_too_little_space_is_refused(shards, tmp_path, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    with pytest.raises(DataError) as caught:
        stage(shards, tmp_path)
    assert caught.value.what.startswith(f"staging to {tmp_path}") and caught.value.got.startswith("0.001 MB")
    assert caught.value.expected == format_bytes(sum(shard.bytes for shard in shards.shards))
    assert "data.stage_dir" in caught.value.fix


def test_a_disk_that_fills_up_during_the_copy_is_an_error(shards, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stage_module, "_copy", full)
    with pytest.raises(DataError) as caught:
        stage(shards, tmp_path)
    assert caught.value.what.startswith(f"staging to {tmp_path}") and " GB" in caught.value.got


def test_a_shard_that_differs_from_its_index_is_not_staged(tmp_path, make_shards, picture, encode):
    shards = make_shards(tmp_path / "set", [(f"{i}", encode(picture(i)), 0) for i in range(4)], per_shard=2)
    path = shards.path(1)
    body = bytearray(path.read_bytes())
    body[700] ^= 1
    path.write_bytes(body)
    with pytest.raises(DataError) as caught:
        stage(shards, tmp_path / "disk")
    assert caught.value.what == f"shard {path}"
    assert hashlib.sha256(body).hexdigest()[:12] in caught.value.got
    assert shards.shards[1].sha256[:12] in caught.value.expected
    assert not list((tmp_path / "disk").rglob("index.json"))
    assert not list((tmp_path / "disk").rglob("shard-000001.tar"))


def test_show_lists_the_sets_of_a_staging_folder(shards, tmp_path, make_shards, picture, encode):
    from data_prep.show import read_records

    other = make_shards(tmp_path / "other", [("a", encode(picture(0)), 0)])
    roots = {stage(s, tmp_path / "disk").root: s for s in (shards, other)}
    (target := min(roots)).joinpath("index.json").unlink()  # as after an interrupted copy
    rows = list(read_records(tmp_path / "disk"))
    assert [row[:4] for row in rows] == [
        (
            "staged",
            root.name,
            f"{len(s.shards)} of {'?' if root == target else len(s.shards)} shards",
            str(sum(x.bytes for x in s.shards)),
        )
        for root, s in sorted(roots.items())
    ]
    assert all(row[4].startswith("last used 20") for row in rows)


@pytest.mark.parametrize("kind", ["a link", "a file"])
def test_a_link_or_file_under_the_name_of_the_folder_is_refused(shards, tmp_path, kind):
    """In /tmp anybody can create a name first: another user's link may lead to any folder of this user."""
    target = tmp_path / "disk" / f"hpcssl-{os.getuid()}-{shards.digest[:16]}"
    target.parent.mkdir()
    (tmp_path / "elsewhere").mkdir()
    target.symlink_to(tmp_path / "elsewhere") if kind == "a link" else target.write_text("")
    with pytest.raises(DataError) as caught:
        stage(shards, tmp_path / "disk")
    assert caught.value.what == f"staging folder {target}" and caught.value.got == kind
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_folder_of_another_user_is_refused(shards, tmp_path, monkeypatch):
    uid = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: uid)
    with pytest.raises(DataError) as caught:
        stage(shards, tmp_path)
    assert caught.value.what == f"staging folder {tmp_path}/hpcssl-{uid}-{shards.digest[:16]}"
    assert "another user" in caught.value.got


def test_a_folder_that_others_may_enter_is_made_private(shards, tmp_path):
    root = stage(shards, tmp_path).root
    root.chmod(0o777)
    assert stage(shards, tmp_path).root.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_is_an_error(shards, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as caught:
        stage(shards, tmp_path / "file" / "disk")
    assert caught.value.what.startswith(f"staging folder {tmp_path}/file/disk/")
    assert caught.value.got == os.strerror(errno.ENOTDIR) and "data.stage_dir" in caught.value.fix


@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_staged_set_that_lost_a_shard_is_repaired(shards, tmp_path, copied, damage):
    """A cleaner of /tmp, or another job that needs space, may remove or cut a file."""
    staged = stage(shards, tmp_path)
    os.truncate(staged.path(3), 100) if damage == "cut" else staged.path(3).unlink()
    copied.clear()
    with Reader(stage(shards, tmp_path), mapped=True) as reader:
        assert reader.read(24) == Reader(shards).read(24)
    assert copied == [shards.shards[3].name]


class Interrupted(Exception):
    """What a test raises to end a wait or a copy."""


def test_a_copy_ends_when_its_watcher_raises_and_continues_later(shards, tmp_path, copied):
    blocks = []

    def watch(progress):
        blocks.append(progress)
        if len(blocks) == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        stage(shards, tmp_path, watch)
    assert blocks == [True] * 3 and len(copied) == 3
    assert not list(tmp_path.rglob("*.tmp"))
    stage(shards, tmp_path)
    assert len(copied) == 3 + 3, "two shards were finished"


def test_another_process_counts_as_progress_only_while_its_copy_grows(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(node_folder, "POLL_S", 0.0)
    target = node_folder.make_private_folder(tmp_path, shards.digest[:16])
    part, seen = target / ".shard.tar.abc.tmp", []

    def watch(progress):
        seen.append(progress)
        if len(seen) == 3:
            part.write_bytes(b"grows")
        elif len(seen) == 6:
            raise Interrupted  # as after a signal, while the other process still has the lock

    with node_folder.hold_lock(target / "lock"), pytest.raises(Interrupted):
        stage(shards, tmp_path, watch)
    assert seen == [True, False, False, True, False, False]
