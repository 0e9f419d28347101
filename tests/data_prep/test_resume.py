"""Killed half-way, continued by the same command: finished shards stay, the result is that of a quiet run."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import build, catalogue, sources, writer
from hpcssl.data.shards import ShardSet

ROOT = Path(__file__).resolve().parents[2]
WORK = ".hpcssl-shard"


@pytest.fixture
def many(tmp_path, picture):
    src = tmp_path / "many"
    for i in range(80):
        path = src / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    return src


def identity(folder):
    """What a rewrite of a file would change."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("shard-*.tar")}


def start(*args):
    return subprocess.Popen([sys.executable, "-m", "data_prep", *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def kill_after(process, out, shards):
    """SIGKILL once so many shards are finished; returns the pids of the workers that it had."""
    end = time.monotonic() + 60
    while len(list((out / WORK).glob("0*.json"))) < shards:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.0005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    return [int(pid) for pid in children]


def gone(pid):
    """No process any more, or one that only waits for its end to be noted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_then_the_same_command(many, tmp_path, content, workers):
    args = ["images", many, tmp_path / "out", "--samples-per-shard", 1, "--workers", workers]
    process = start(*args)
    children = kill_after(process, tmp_path / "out", 6)
    end = time.monotonic() + 20
    while not all(map(gone, children)):  # workers whose parent was killed must not go on, nor stay
        assert time.monotonic() < end
        time.sleep(0.01)

    noted = {json.loads(p.read_text())["shard"]["name"] for p in (tmp_path / "out" / WORK).glob("0*.json")}
    before = {name: mark for name, mark in identity(tmp_path / "out").items() if name in noted}
    assert 6 <= len(before) < 80 and not (tmp_path / "out" / "index.json").exists()

    again = start(*args)
    said = again.communicate(timeout=60)[0]
    assert again.returncode == 0, said
    after = identity(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert f"{len(before)} of them kept" in said

    quiet = start("images", many, tmp_path / "quiet", "--samples-per-shard", 1, "--workers", 1)
    assert quiet.wait(60) == 0
    assert content(tmp_path / "out") == content(tmp_path / "quiet")


def stopped(src, out, after, monkeypatch, **options):
    """Leave ``out`` as a run that ended after so many shards leaves it."""
    real, count = writer.write_shard, []

    def once(*args):
        if len(count) == after:
            raise KeyboardInterrupt
        count.append(1)
        return real(*args)

    monkeypatch.setattr(writer, "write_shard", once)
    with pytest.raises(KeyboardInterrupt), build.claim(out) as work:
        todo = catalogue.by_folder(sources.find(src, "", work / "source.tar"))
        todo.made["verb"] = "images"
        build.write(work, todo, build.Options(workers=1, **options))
    monkeypatch.undo()


def test_other_options_or_another_source_are_refused(tree, tmp_path, monkeypatch, refused, shard, picture):
    out = tmp_path / "out"
    stopped(tree, out, 2, monkeypatch, samples_per_shard=5)
    assert "seed was 0 and is 1" in refused("images", tree, out, "--samples-per-shard", 5, "--seed", 1)
    assert "samples_per_shard was 5 and is 7" in refused("images", tree, out, "--samples-per-shard", 7)
    (tree / "cat" / "new.jpg").write_bytes(picture(99))
    assert "21 samples in 3 classes before, 22 in 3 now" in refused("images", tree, out, "--samples-per-shard", 5)
    (tree / "cat" / "new.jpg").unlink()
    (tree / "cat" / "cat-1.jpg").rename(tree / "cat" / "other.jpg")
    assert "other names or labels" in refused("images", tree, out, "--samples-per-shard", 5)
    (tree / "cat" / "other.jpg").rename(tree / "cat" / "cat-1.jpg")
    assert shard("images", tree, out, "--samples-per-shard", 5, "--workers", 1) == 0


def test_an_image_that_changed_meanwhile_is_written_anew(tree, tmp_path, monkeypatch, shard, picture, content):
    out = tmp_path / "out"
    stopped(tree, out, 3, monkeypatch, samples_per_shard=5)
    before = identity(out)
    name = json.loads(_first_note(out / "shard-000001.tar"))["source"]
    os.utime(tree / name, ns=(1, 1))
    assert shard("images", tree, out, "--samples-per-shard", 5, "--workers", 1) == 0
    after = identity(out)
    assert [after[f"shard-{n:06d}.tar"] == before[f"shard-{n:06d}.tar"] for n in range(3)] == [True, False, True]
    shard("images", tree, tmp_path / "quiet", "--samples-per-shard", 5, "--workers", 1)
    assert content(out) == content(tmp_path / "quiet")


def _first_note(path):
    import tarfile

    with tarfile.open(path) as tar:
        return tar.extractfile(next(m for m in tar if m.name.endswith(".json"))).read()


def test_a_finished_folder_is_mended_by_its_command(tree, tmp_path, shard, content, refused, picture):
    out = tmp_path / "out"
    command = ["images", tree, out, "--samples-per-shard", 5, "--workers", 1]
    shard(*command)
    whole, before = content(out), identity(out)
    (out / "shard-000001.tar").unlink()
    damaged = bytearray((out / "shard-000002.tar").read_bytes())
    damaged[3000] ^= 1
    (out / "shard-000002.tar").write_bytes(damaged)
    (out / "index.npy").unlink()
    (out / "sums.npy").write_bytes(b"")
    assert shard(*command) == 0
    assert content(out) == whole
    assert identity(out)["shard-000000.tar"] == before["shard-000000.tar"]
    (tree / "cat" / "cat-1.jpg").write_bytes(picture(1, side=48))
    assert "images of other sizes" in refused(*command)
    assert content(out) == whole


def test_two_writers_are_kept_apart(tree, tmp_path, refused):
    with build.claim(tmp_path / "out"):
        assert "another hpcssl-shard" in refused("images", tree, tmp_path / "out", "--workers", 1)


def test_a_full_disk_leaves_nothing_half(tree, tmp_path, refused, shard, content):
    """The operating system refuses the write that exceeds the largest allowed file, as a full disk would."""
    out = tmp_path / "out"
    command = ["images", tree, out, "--samples-per-shard", 5, "--workers", 1, "--seed", 1]
    shard("images", tree, tmp_path / "quiet", *command[3:])
    sizes = [p.stat().st_size for p in sorted((tmp_path / "quiet").glob("shard-*.tar"))]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) - 1, limits[1]))
    try:
        sentence = refused(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    stuck = sizes.index(max(sizes))
    assert stuck > 0  # else there is nothing to keep
    assert f"shard-{stuck:06d}.tar" in sentence and "File too large" in sentence
    assert sorted(p.name for p in out.iterdir()) == [WORK] + [f"shard-{n:06d}.tar" for n in range(stuck)]
    assert shard(*command) == 0
    assert content(out) == content(tmp_path / "quiet")


def test_too_little_room_is_said_before_the_first_byte(tree, tmp_path, refused, monkeypatch):
    usage = build.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "0.00 GB of free space" in refused("images", tree, tmp_path / "out", "--workers", 1)
    assert not (tmp_path / "out").exists()


def test_bad_images_are_named_refused_and_allowed(tree, tmp_path, refused, shard, content):
    out, whole = tmp_path / "out", (tree / "dog" / "1.v2.final.JPEG").read_bytes()
    (tree / "cat" / "cat-3.jpg").write_bytes(b"")
    (tree / "dog" / "1.v2.final.JPEG").write_bytes(whole[:-300])
    (tree / "yak" / "nowhere.png").symlink_to("missing.png")
    command = ["images", tree, out, "--samples-per-shard", 3, "--workers", 1]
    sentence = refused(*command)
    for part in ("3 that cannot be used", "cat/cat-3.jpg: empty file", "dog/1.v2.final.JPEG: cannot be decoded",
                 "yak/nowhere.png: cannot be read (No such file", "--skip-bad 3"):
        assert part in sentence
    assert not (out / "index.json").exists()
    refused(*command, "--skip-bad", 2)
    before = identity(out)
    assert shard(*command, "--skip-bad", 3) == 0
    found = ShardSet.open(out)
    assert sorted(s["source"] for s in found.meta["skipped"]) == ["cat/cat-3.jpg", "dog/1.v2.final.JPEG",
                                                                  "yak/nowhere.png"]
    touched = {s["shard"] for s in found.meta["skipped"]}
    assert {n: m for n, m in identity(out).items() if n not in touched} == {
        n: m for n, m in before.items() if n not in touched}
    assert len(found) == 19
    assert shard("verify", out) == 0
    finished = content(out)
    assert shard(*command, "--skip-bad", 3) == 0
    assert content(out) == finished


def test_a_mended_image_joins_the_finished_shards(tree, tmp_path, refused, shard, content):
    body = (tree / "cat" / "cat-3.jpg").read_bytes()
    (tree / "cat" / "cat-3.jpg").write_bytes(body[:400])
    command = ["images", tree, tmp_path / "out", "--samples-per-shard", 3, "--workers", 1]
    assert "cat/cat-3.jpg" in refused(*command)
    (tree / "cat" / "cat-3.jpg").write_bytes(body)
    assert shard(*command) == 0
    shard("images", tree, tmp_path / "quiet", "--samples-per-shard", 3, "--workers", 1)
    assert content(tmp_path / "out") == content(tmp_path / "quiet")


def test_a_killed_worker_is_one_sentence(many, tmp_path):
    args = ["images", many, tmp_path / "out", "--samples-per-shard", 1, "--workers", 2]
    process = start(*args)
    while not list((tmp_path / "out" / WORK).glob("0*.json")):
        assert process.poll() is None
        time.sleep(0.0005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "one that was killed" in said and "Traceback" not in said, said


def test_the_keyboard_stops_it_cleanly(many, tmp_path, shard):
    out = tmp_path / "out"
    process = start("images", many, out, "--samples-per-shard", 1, "--workers", 2)
    while not list((out / WORK).glob("0*.json")):
        assert process.poll() is None
        time.sleep(0.0005)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and said == "hpcssl-shard: stopped by the keyboard\n", said
    assert not list(out.glob(".*.tmp")) and not (out / "index.json").exists()
    assert shard("images", many, out, "--samples-per-shard", 1, "--workers", 1) == 0
    assert shard("verify", out, "--workers", 1) == 0
