"""What ``hpcssl-shard images`` writes, read back by the webdataset library and by our own index."""

import json
import os
import tarfile

import numpy as np
import pytest
import webdataset

from data_prep import images, tars
from data_prep.catalogue import drop_suffix, key_of, source_stem
from hpcssl.data.shards import ShardSet


def source_files(src):
    return {p.relative_to(src).as_posix(): p.read_bytes() for p in src.rglob("*") if p.is_file()}


def read_back(folder):
    """Everything webdataset sees, by key."""
    shards = sorted(str(p) for p in folder.glob("shard-*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert len({s["__key__"] for s in samples}) == len(samples)
    return {s["__key__"]: s for s in samples}


def test_webdataset_reads_every_sample_untouched(tree, tmp_path, shard):
    assert shard("images", tree, tmp_path / "out", "--samples-per-shard", 6, "--workers", 1) == 0
    wanted = source_files(tree)
    found = read_back(tmp_path / "out")
    assert {source_stem(key) for key in found} == {drop_suffix(name) for name in wanted}
    for sample in found.values():
        source = json.loads(sample["json"])["source"]
        suffix = "png" if source.endswith("PNG") else "jpg"
        assert sample[suffix] == wanted[source]
        assert int(sample["cls"]) == ["cat", "dog", "yak"].index(source.split("/")[0])


def test_index_points_at_the_same_bytes(tree, tmp_path, shard):
    shard("images", tree, tmp_path / "out", "--samples-per-shard", 4, "--workers", 1)
    found, wanted = ShardSet.open(tmp_path / "out"), source_files(tree)
    assert found.classes == ["cat", "dog", "yak"]
    assert len(found) == len(wanted) == sum(s.samples for s in found.shards)
    assert [s.samples for s in found.shards] == [4] * (len(wanted) // 4) + [len(wanted) % 4] * (len(wanted) % 4 > 0)
    stems = {drop_suffix(name): body for name, body in wanted.items()}
    for i, row in enumerate(found.rows):
        with open(found.path(row["shard"]), "rb") as file:
            body = os.pread(file.fileno(), int(row["size"]), int(row["offset"]))
        stem = source_stem(found.key(i))
        assert body == stems[stem]
        assert found.classes[row["label"]] == stem.split("/")[0]


def test_survey_finds_what_the_writer_returned(tree, tmp_path, shard):
    shard("images", tree, tmp_path / "out", "--samples-per-shard", 6, "--workers", 1)
    found = ShardSet.open(tmp_path / "out")
    sums = np.load(tmp_path / "out" / "sums.npy")
    again = [tars.survey(found.path(n), n) for n in range(len(found.shards))]
    assert np.array_equal(np.concatenate([a.rows for a in again]), found.rows)
    assert np.array_equal(np.concatenate([a.sums for a in again]), sums)
    assert [a.sha256 for a in again] == [s.sha256 for s in found.shards]


def test_same_input_same_bytes_whatever_the_workers_and_the_place(tree, tmp_path, shard, command, content):
    common = ["--samples-per-shard", 4, "--seed", 3]
    assert shard("images", tree, tmp_path / "one", *common, "--workers", 1) == 0
    moved = tree.rename(tmp_path / "elsewhere")
    for path in moved.rglob("*"):
        os.utime(path, (1, 1))
    done = command("images", moved, tmp_path / "two", *common, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_seed_changes_the_order_and_nothing_else(tree, tmp_path, shard):
    for seed in (0, 1):
        shard("images", tree, tmp_path / str(seed), "--seed", seed, "--workers", 1)
    a, b = (ShardSet.open(tmp_path / str(seed)) for seed in (0, 1))
    keys = [[s.key(i) for i in range(len(s))] for s in (a, b)]
    assert keys[0] != keys[1] and sorted(keys[0]) == sorted(keys[1])
    assert keys[0] != sorted(keys[0])


@pytest.mark.parametrize("ending, mode", [("tar", "w:"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz"), ("tar.bz2", "w:bz2")])
def test_an_archive_gives_what_its_folder_gives(tree, tmp_path, shard, content, ending, mode):
    archive = tmp_path / f"photos.{ending}"
    with tarfile.open(archive, mode) as tar:
        tar.add(tree, "data/train")
    assert shard("images", tree, tmp_path / "a", "--workers", 1) == 0
    assert shard("images", archive, tmp_path / "b", "--under", "data/train", "--workers", 1) == 0
    assert shard("images", tree.parent, tmp_path.parent / f"{tmp_path.name}-c", "--under", tree.name,
                 "--workers", 1) == 0
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(tmp_path.parent / f"{tmp_path.name}-c")


def test_labels_file_for_a_flat_folder(tmp_path, shard, picture):
    flat = tmp_path / "flat"
    flat.mkdir()
    names = [f"im {i}.jpg" for i in range(6)]
    for i, name in enumerate(names):
        (flat / name).write_bytes(picture(i))
    lines = [f"{name} {'odd' if i % 2 else 'even'}" for i, name in enumerate(names)]
    lines[0] = "im 0\teven"  # a tab, and no suffix
    (tmp_path / "labels").write_text("\n".join(lines) + "\n\n")
    assert shard("images", flat, tmp_path / "out", "--labels", tmp_path / "labels", "--workers", 1) == 0
    found = ShardSet.open(tmp_path / "out")
    assert found.classes == ["even", "odd"]
    assert {source_stem(found.key(i)): int(found.labels[i]) for i in range(6)} == {f"im {i}": i % 2 for i in range(6)}


def test_classes_file_orders_the_numbers(tree, tmp_path, shard):
    (tmp_path / "classes").write_text("yak\ncat\ndog\n")
    shard("images", tree, tmp_path / "out", "--classes", tmp_path / "classes", "--workers", 1)
    found = ShardSet.open(tmp_path / "out")
    assert found.classes == ["yak", "cat", "dog"]
    assert all(found.classes[found.labels[i]] == found.key(i).split("/")[0] for i in range(len(found)))


def test_links_are_followed_and_other_files_left_out(tree, tmp_path, shard, caplog):
    farm = tmp_path / "farm"
    (farm / "cat").mkdir(parents=True)
    (farm / "cat" / "linked.jpg").symlink_to(tree / "cat" / "cat-1.jpg")
    (farm / "dog").symlink_to(tree / "dog", target_is_directory=True)
    (farm / "cat" / "notes.txt").write_text("not an image")
    (farm / "cat" / "._linked.jpg").write_bytes(b"\0\5\x16\7")
    (farm / ".git").mkdir()
    assert shard("images", farm, tmp_path / "out", "--workers", 1) == 0
    assert len(ShardSet.open(tmp_path / "out")) == 6
    assert "2 files" in caplog.text and "notes.txt" in caplog.text


def test_the_suffix_in_the_shard_follows_the_content(tmp_path, shard, picture):
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "src" / "a" / "really.JPEG").write_bytes(picture(1, "PNG"))
    assert shard("images", tmp_path / "src", tmp_path / "out", "--workers", 1) == 0
    (sample,) = read_back(tmp_path / "out").values()
    assert sample["png"] == picture(1, "PNG") and json.loads(sample["json"]) == {"source": "a/really.JPEG"}


@pytest.mark.parametrize("name", ["a/b.c.d.jpg", "a.b/c.jpg", "%41/%2E.png", ".x/..hidden.jpg", "__a__/__b__.jpg",
                                  "a/new\nline.jpg",
                                  b"a/\xe9.jpg".decode("utf-8", "surrogateescape"), "noext", "a/b.tar"])
def test_keys_are_reversible_and_safe_for_webdataset(name):
    key = key_of(name)
    assert source_stem(key) == drop_suffix(name)
    assert webdataset.tariterators.base_plus_ext(key + ".b.jpg") == (key, "b.jpg")
    assert not key.startswith("__")


def test_every_damage_is_found(picture):
    jpeg, png = picture(3, side=96), picture(3, "PNG", side=96)
    for mode in ("RGB", "L", "CMYK"):
        assert images.damage(memoryview(picture(5, mode=mode))) is None
    assert images.damage(picture(5, "PNG", mode="P")) is None
    assert images.damage(b"") == "empty file"
    assert "no JPEG" in images.damage(picture(1, "GIF"))
    for body in (jpeg, png):
        for part in (0.3, 0.6, 0.95):
            assert "decoded" in images.damage(body[: int(part * len(body))])
    assert "decoded" in images.damage(png[:200] + bytes(40) + png[240:])
    assert images.damage(jpeg + b"trailing bytes of a camera") is None
