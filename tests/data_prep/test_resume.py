"""A killed command continues: finished shards are kept, and the result equals that of an undisturbed run."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import build
from data_prep.shards import writer
from data_prep.sources import classes, folders
from hpcssl.data.shards import ShardSet
from tests.printed import numbers_in, printed_error
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
WORK = ".hpcssl-shard"


@pytest.fixture
def eighty_images(tmp_path, encode_image):
    src = tmp_path / "source"
    for i in range(80):
        path = src / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(i))
    return src


def identities(folder):
    """Inode and modification time of every shard: a file that is written again gets others."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("shard-*.tar")}


def start(*args):
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep", *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_after(process, out, shards):
    """Send SIGKILL once so many shards are finished; returns the process ids of its workers."""

    def has_finished_shards():
        assert process.poll() is None, process.communicate()[0]
        return len(list((out / WORK).glob("0*.json"))) >= shards

    wait_until(has_finished_shards, f"{shards} finished shards", pause=0.0005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    return [int(pid) for pid in children]


def has_ended(pid):
    """Whether the process does not exist any more, or is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_command_continues_and_keeps_finished_shards(eighty_images, tmp_path, content, workers):
    args = ["images", eighty_images, tmp_path / "out", "--samples-per-shard", 1, "--workers", workers]
    process = start(*args)
    children = kill_after(process, tmp_path / "out", 6)
    wait_until(lambda: all(map(has_ended, children)), "the workers of a killed parent must end")

    recorded = {json.loads(p.read_text())["shard"]["name"] for p in (tmp_path / "out" / WORK).glob("0*.json")}
    before = {name: mark for name, mark in identities(tmp_path / "out").items() if name in recorded}
    assert 6 <= len(before) < 80 and not (tmp_path / "out" / "index.json").exists()

    second = start(*args)
    output = second.communicate(timeout=60)[0]
    assert second.returncode == 0, output
    after = identities(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    # the line of the folder ends with the number of shards, of those that were kept, and the megabytes
    (line,) = (line for line in output.splitlines() if line.startswith(f"{tmp_path / 'out'}: "))
    assert numbers_in(line)[-3:-1] == [80, len(before)], output

    undisturbed = start("images", eighty_images, tmp_path / "undisturbed", "--samples-per-shard", 1, "--workers", 1)
    assert undisturbed.wait(60) == 0
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def write_partly(src, out, after, monkeypatch, **options):
    """Leave ``out`` as a command leaves it that was stopped after so many shards."""
    write_shard, count = writer.write_shard, []

    def write_or_stop(*args):
        if len(count) == after:
            raise KeyboardInterrupt
        count.append(1)
        return write_shard(*args)

    monkeypatch.setattr(writer, "write_shard", write_or_stop)
    with pytest.raises(KeyboardInterrupt), build.claim_folder(out) as work:
        catalog = classes.classes_from_folders(folders.list_source(src, "", work / "source.tar"))
        catalog.provenance["verb"] = "images"
        build.write_folder(work, catalog, build.WriteOptions(workers=1, **options))
    monkeypatch.undo()


def test_other_options_or_another_source_are_refused(tree, tmp_path, monkeypatch, error_of, run_shard, encode_image):
    out = tmp_path / "out"
    write_partly(tree, out, 2, monkeypatch, samples_per_shard=5)
    for options, in_got in (
        (("--seed", 1), "seed was 0 and is 1"),
        (("--samples-per-shard", 7), "_shard was 5 and is 7"),
    ):
        error = error_of("images", tree, out, "--samples-per-shard", 5, *options)
        assert error.what == f"OUT {out}" and in_got in error.got
    (tree / "cat" / "new.jpg").write_bytes(encode_image(99))
    error = error_of("images", tree, out, "--samples-per-shard", 5)
    assert numbers_in(error.got) == [21, 3, 22, 3]  # samples and classes before and now
    (tree / "cat" / "new.jpg").unlink()
    (tree / "cat" / "cat-1.jpg").rename(tree / "cat" / "other.jpg")
    error = error_of("images", tree, out, "--samples-per-shard", 5)
    assert error.what == f"OUT {out}" and "names" in error.got
    (tree / "cat" / "other.jpg").rename(tree / "cat" / "cat-1.jpg")
    assert run_shard("images", tree, out, "--samples-per-shard", 5, "--workers", 1) == 0


def test_a_shard_is_written_again_if_one_of_its_images_changed(
    tree, tmp_path, monkeypatch, run_shard, encode_image, content
):
    out = tmp_path / "out"
    write_partly(tree, out, 3, monkeypatch, samples_per_shard=5)
    before = identities(out)
    name = json.loads(read_first_json(out / "shard-000001.tar"))["source"]
    os.utime(tree / name, ns=(1, 1))
    assert run_shard("images", tree, out, "--samples-per-shard", 5, "--workers", 1) == 0
    after = identities(out)
    assert [after[f"shard-{n:06d}.tar"] == before[f"shard-{n:06d}.tar"] for n in range(3)] == [True, False, True]
    run_shard("images", tree, tmp_path / "undisturbed", "--samples-per-shard", 5, "--workers", 1)
    assert content(out) == content(tmp_path / "undisturbed")


def read_first_json(path):
    import tarfile

    with tarfile.open(path) as tar:
        return tar.extractfile(next(m for m in tar if m.name.endswith(".json"))).read()


def test_the_same_command_repairs_a_finished_folder(tree, tmp_path, run_shard, content, error_of, encode_image):
    out = tmp_path / "out"
    command = ["images", tree, out, "--samples-per-shard", 5, "--workers", 1]
    run_shard(*command)
    whole, before = content(out), identities(out)
    (out / "shard-000001.tar").unlink()
    damaged = bytearray((out / "shard-000002.tar").read_bytes())
    damaged[3000] ^= 1
    (out / "shard-000002.tar").write_bytes(damaged)
    (out / "index.npy").unlink()
    (out / "sums.npy").write_bytes(b"")
    assert run_shard(*command) == 0
    assert content(out) == whole
    assert identities(out)["shard-000000.tar"] == before["shard-000000.tar"]
    (tree / "cat" / "cat-1.jpg").write_bytes(encode_image(1, side=48))
    error = error_of(*command)
    assert error.what == f"OUT {out}" and "sizes" in error.got
    assert content(out) == whole


def test_a_second_writer_is_refused(tree, tmp_path, error_of):
    with build.claim_folder(tmp_path / "out"):
        error = error_of("images", tree, tmp_path / "out", "--workers", 1)
    assert error.what == f"OUT {tmp_path / 'out'}" and "hpcssl-shard" in error.got


def test_a_full_disk_leaves_no_partial_shard(tree, tmp_path, error_of, run_shard, content):
    """The operating system refuses a write beyond the limit of file sizes, as it does on a full disk."""
    out = tmp_path / "out"
    command = ["images", tree, out, "--samples-per-shard", 5, "--workers", 1, "--seed", 1]
    run_shard("images", tree, tmp_path / "undisturbed", *command[3:])
    sizes = [p.stat().st_size for p in sorted((tmp_path / "undisturbed").glob("shard-*.tar"))]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) - 1, limits[1]))
    try:
        error = error_of(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    failed = sizes.index(max(sizes))
    assert failed > 0  # otherwise there is no finished shard to keep
    assert error.what == f"writing {out}/shard-{failed:06d}.tar" and error.got == os.strerror(errno.EFBIG)
    assert sorted(p.name for p in out.iterdir()) == [WORK] + [f"shard-{n:06d}.tar" for n in range(failed)]
    assert run_shard(*command) == 0
    assert content(out) == content(tmp_path / "undisturbed")


def test_too_little_space_is_an_error_before_anything_is_written(tree, tmp_path, error_of, monkeypatch):
    usage = build.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    error = error_of("images", tree, tmp_path / "out", "--workers", 1)
    assert error.what == f"OUT {tmp_path / 'out'}" and error.got.startswith("0.001 MB")
    assert not (tmp_path / "out").exists()


def test_damaged_images_are_refused_by_name_unless_skip_bad_allows_them(tree, tmp_path, error_of, run_shard, content):
    out, whole = tmp_path / "out", (tree / "dog" / "1.v2.final.JPEG").read_bytes()
    (tree / "cat" / "cat-3.jpg").write_bytes(b"")
    (tree / "dog" / "1.v2.final.JPEG").write_bytes(whole[:-300])
    (tree / "yak" / "nowhere.png").symlink_to("missing.png")
    command = ["images", tree, out, "--samples-per-shard", 3, "--workers", 1]
    error = error_of(*command)
    assert numbers_in(error.got)[0] == 3 and "--skip-bad 3" in error.fix
    for name in ("cat/cat-3.jpg", "dog/1.v2.final.JPEG", "yak/nowhere.png"):
        assert error.got.count(f"{name}: ") == 1
    assert f"yak/nowhere.png: cannot be read ({os.strerror(errno.ENOENT)})" in error.got
    assert not (out / "index.json").exists()
    assert numbers_in(error_of(*command, "--skip-bad", 2).expected) == [2]
    before = identities(out)
    assert run_shard(*command, "--skip-bad", 3) == 0
    shards = ShardSet.open(out)
    assert sorted(s["source"] for s in shards.meta["skipped"]) == [
        "cat/cat-3.jpg",
        "dog/1.v2.final.JPEG",
        "yak/nowhere.png",
    ]
    changed = {s["shard"] for s in shards.meta["skipped"]}
    assert {n: m for n, m in identities(out).items() if n not in changed} == {
        n: m for n, m in before.items() if n not in changed
    }
    assert len(shards) == 19
    assert run_shard("verify", out) == 0
    finished = content(out)
    assert run_shard(*command, "--skip-bad", 3) == 0
    assert content(out) == finished


def test_a_repaired_image_is_added_to_the_finished_shards(tree, tmp_path, error_of, run_shard, content):
    body = (tree / "cat" / "cat-3.jpg").read_bytes()
    (tree / "cat" / "cat-3.jpg").write_bytes(body[:400])
    command = ["images", tree, tmp_path / "out", "--samples-per-shard", 3, "--workers", 1]
    assert "cat/cat-3.jpg: " in error_of(*command).got
    (tree / "cat" / "cat-3.jpg").write_bytes(body)
    assert run_shard(*command) == 0
    run_shard("images", tree, tmp_path / "undisturbed", "--samples-per-shard", 3, "--workers", 1)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_a_killed_worker_is_an_error(eighty_images, tmp_path):
    args = ["images", eighty_images, tmp_path / "out", "--samples-per-shard", 1, "--workers", 2]
    process = start(*args)
    while not list((tmp_path / "out" / WORK).glob("0*.json")):
        assert process.poll() is None
        time.sleep(0.0005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    error = printed_error(output)
    assert process.returncode == 1 and "worker" in error.what and "Traceback" not in output, output


def test_ctrl_c_stops_the_command_and_the_same_command_continues(eighty_images, tmp_path, run_shard):
    out = tmp_path / "out"
    process = start("images", eighty_images, out, "--samples-per-shard", 1, "--workers", 2)
    while not list((out / WORK).glob("0*.json")):
        assert process.poll() is None
        time.sleep(0.0005)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and "Traceback" not in output, output
    (line,) = (line for line in output.splitlines() if not line.startswith(str(eighty_images)))
    assert line.startswith("hpcssl-shard: ")
    assert not list(out.glob(".*.tmp")) and not (out / "index.json").exists()
    assert run_shard("images", eighty_images, out, "--samples-per-shard", 1, "--workers", 1) == 0
    assert run_shard("verify", out, "--workers", 1) == 0
