"""Sets of more shards than a process may hold open."""

import contextlib
import errno
import mmap
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.errors import DataError
from hpcssl.storage import open_files

ROOT = Path(__file__).resolve().parents[2]
SHARDS, LIMIT, KEPT = 24, 32, 4


@pytest.fixture
def many(tmp_path, make_shards, picture, encode):
    """A set of 24 shards with one sample each, and the bytes of the samples."""
    samples = [(f"{i:03d}", encode(picture(i)), i % 2) for i in range(SHARDS)]
    return make_shards(tmp_path / "set", samples, per_shard=1), [body for _, body, _ in samples]


@pytest.fixture
def limited(monkeypatch):
    """The process may hold 32 files open, as far as ``open_files`` says."""
    monkeypatch.setattr(open_files, "limit", lambda: LIMIT)


def list_open_shards(root):
    """Paths of the shards of a set that this process holds open; readers of earlier tests may hold others."""
    paths = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed by another thread
            paths.append(os.readlink(f"/proc/self/fd/{number}"))
    return [path for path in paths if path.startswith(f"{root}/")]


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("mapped", [False, True])
def test_an_eighth_of_the_allowed_files_are_kept_open(many, mapped):
    shards, bodies = many
    wrong, open_at_once = [], []
    with Reader(shards, mapped=mapped) as reader:

        def work(first):
            for i in range(4 * SHARDS):
                index = (first + 7 * i) % SHARDS
                wrong.extend([index] if reader.read(index) != bodies[index] else [])
                open_at_once.append(len(list_open_shards(shards.root)))

        threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    # each thread may still hold one that was closed, and a map is opened through another descriptor
    assert KEPT <= max(open_at_once) <= KEPT + len(threads) + mapped
    assert list_open_shards(shards.root) == []


@pytest.mark.usefixtures("limited")
def test_a_shard_that_changes_while_it_is_closed_stops_the_reader(many):
    shards, bodies = many
    with Reader(shards) as reader:
        for index in range(SHARDS):
            assert reader.read(index) == bodies[index]
        path, status = shards.path(0), shards.path(0).stat()
        assert str(path) not in list_open_shards(shards.root)
        content = path.read_bytes()
        path.write_bytes(content)  # the same bytes
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert reader.read(0) == bodies[0]
        path = shards.path(1)
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 2))
        with pytest.raises(DataError) as caught:
            reader.read(1)
    assert caught.value.what == f"shard {path}"


def test_where_others_hold_too_many_files_fewer_shards_are_kept_open(many, monkeypatch):
    shards, bodies = many
    real = os.open

    def refuse(path, *args):
        if str(path).endswith(".tar") and len(list_open_shards(shards.root)) >= 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, *args)

    monkeypatch.setattr(os, "open", refuse)
    with Reader(shards) as reader:
        assert [reader.read(index) for index in range(SHARDS)] == bodies


@pytest.mark.parametrize(
    ("count", "limits"), [(160, (64, 128)), pytest.param(1282, (256, 256), marks=pytest.mark.full)]
)
def test_a_training_gets_the_hard_limit_and_reads_more_shards_than_it_allows(
    tmp_path, make_shards, picture, encode, count, limits
):
    """Fully shuffled; ImageNet has 1,282 shards of 1,000 images."""
    samples = [(f"{i:04d}", encode(picture(i)), i % 2) for i in range(count)]
    shards = make_shards(tmp_path / "set", samples, per_shard=1)
    words = ["digits_msf", "--run", str(tmp_path / "run"), f"data.train={shards.root}", "data.shuffle_window=all"]
    tiny = ["machine.devices=cpu", "views.size=16", "optim.batch=16", "bank.size=32", "schedule.epochs=1"]
    command = [sys.executable, "-m", "hpcssl", "train", *words, *tiny, "schedule.warmup_epochs=0"]
    command += [f"data.val={shards.root}", "evals.knn_every_epochs=1"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits),
    )
    assert done.returncode == 0, done.stderr
    assert f"step {count // 16}/{count // 16}" in done.stderr


def test_the_soft_limit_is_raised_to_the_hard_one():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        raised = open_files.raise_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
        assert raised == (open_files.UNLIMITED if before[1] == resource.RLIM_INFINITY else before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_index_is_mapped_and_no_column_is_copied(many):
    shards, bodies = many
    with Reader(ShardSet.open(shards.root, mapped=True)) as reader:
        base = reader.shards.rows
        while isinstance(base, np.ndarray):
            assert not base.flags.owndata
            base = base.base
        assert isinstance(base, mmap.mmap)
        assert [reader.label(index) for index in range(SHARDS)] == [i % 2 for i in range(SHARDS)]
        assert [reader.read(index) for index in range(SHARDS)] == bodies
