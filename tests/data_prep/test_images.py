"""The shards of ``hpcssl-shard images``, read by the webdataset library and by the index."""

import csv
import json
import os
import tarfile

import numpy as np
import pytest
import webdataset

from data_prep.catalog.names import drop_suffix, sample_key, source_stem
from data_prep.shards import images, reader
from hpcssl.data.shards import ShardSet
from tests.printed import numbers_in


def source_files(src):
    return {p.relative_to(src).as_posix(): p.read_bytes() for p in src.rglob("*") if p.is_file()}


def read_back(folder):
    """All samples that webdataset reads, by key."""
    shards = sorted(str(p) for p in folder.glob("shard-*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert len({s["__key__"] for s in samples}) == len(samples)
    return {s["__key__"]: s for s in samples}


def test_webdataset_reads_every_sample_unchanged(tree, tmp_path, run_shard):
    assert run_shard("images", tree, tmp_path / "out", "--samples-per-shard", 6, "--workers", 1) == 0
    sources = source_files(tree)
    samples = read_back(tmp_path / "out")
    assert {source_stem(key) for key in samples} == {drop_suffix(name) for name in sources}
    for sample in samples.values():
        source = json.loads(sample["json"])["source"]
        suffix = "png" if source.endswith("PNG") else "jpg"
        assert sample[suffix] == sources[source]
        assert int(sample["cls"]) == ["cat", "dog", "yak"].index(source.split("/")[0])


def test_the_index_points_at_the_bytes_of_the_sources(tree, tmp_path, run_shard):
    run_shard("images", tree, tmp_path / "out", "--samples-per-shard", 4, "--workers", 1)
    shards, sources = ShardSet.open(tmp_path / "out"), source_files(tree)
    assert shards.classes == ["cat", "dog", "yak"]
    assert len(shards) == len(sources) == sum(s.samples for s in shards.shards)
    assert [s.samples for s in shards.shards] == [4] * (len(sources) // 4) + [len(sources) % 4] * (len(sources) % 4 > 0)
    stems = {drop_suffix(name): body for name, body in sources.items()}
    for i, row in enumerate(shards.rows):
        with open(shards.path(row["shard"]), "rb") as file:
            body = os.pread(file.fileno(), int(row["size"]), int(row["offset"]))
        stem = source_stem(shards.key(i))
        assert body == stems[stem]
        assert shards.classes[row["label"]] == stem.split("/")[0]


def test_a_survey_of_a_shard_equals_what_its_writer_returned(tree, tmp_path, run_shard):
    run_shard("images", tree, tmp_path / "out", "--samples-per-shard", 6, "--workers", 1)
    shards = ShardSet.open(tmp_path / "out")
    sums = np.load(tmp_path / "out" / "sums.npy")
    surveys = [reader.survey_shard(shards.path(n), n) for n in range(len(shards.shards))]
    assert np.array_equal(np.concatenate([a.rows for a in surveys]), shards.rows)
    assert np.array_equal(np.concatenate([a.sums for a in surveys]), sums)
    assert [a.sha256 for a in surveys] == [s.sha256 for s in shards.shards]


def test_the_bytes_do_not_depend_on_workers_folder_and_file_times(tree, tmp_path, run_shard, run_command, content):
    common = ["--samples-per-shard", 4, "--seed", 3]
    assert run_shard("images", tree, tmp_path / "one", *common, "--workers", 1) == 0
    moved = tree.rename(tmp_path / "elsewhere")
    for path in moved.rglob("*"):
        os.utime(path, (1, 1))
    done = run_command("images", moved, tmp_path / "two", *common, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_the_seed_changes_the_order_only(tree, tmp_path, run_shard):
    for seed in (0, 1):
        run_shard("images", tree, tmp_path / str(seed), "--seed", seed, "--workers", 1)
    a, b = (ShardSet.open(tmp_path / str(seed)) for seed in (0, 1))
    keys = [[s.key(i) for i in range(len(s))] for s in (a, b)]
    assert keys[0] != keys[1] and sorted(keys[0]) == sorted(keys[1])
    assert keys[0] != sorted(keys[0])


@pytest.mark.parametrize("ending, mode", [("tar", "w:"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz"), ("tar.bz2", "w:bz2")])
def test_an_archive_gives_the_same_shards_as_its_folder(tree, tmp_path, run_shard, content, ending, mode):
    archive = tmp_path / f"photos.{ending}"
    with tarfile.open(archive, mode) as tar:
        tar.add(tree, "data/train")
    assert run_shard("images", tree, tmp_path / "a", "--workers", 1) == 0
    assert run_shard("images", archive, tmp_path / "b", "--subdir", "data/train", "--workers", 1) == 0
    below = tmp_path.parent / f"{tmp_path.name}-c"
    assert run_shard("images", tree.parent, below, "--subdir", tree.name, "--workers", 1) == 0
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(below)


def test_a_labels_file_for_a_folder_without_class_folders(tmp_path, run_shard, encode_image):
    flat = tmp_path / "flat"
    flat.mkdir()
    names = [f"im {i}.jpg" for i in range(6)]
    for i, name in enumerate(names):
        (flat / name).write_bytes(encode_image(i))
    lines = [f"{name} {'odd' if i % 2 else 'even'}" for i, name in enumerate(names)]
    lines[0] = "im 0\teven"  # a tab, and no suffix
    (tmp_path / "labels").write_text("\n".join(lines) + "\n\n")
    assert run_shard("images", flat, tmp_path / "out", "--labels", tmp_path / "labels", "--workers", 1) == 0
    shards = ShardSet.open(tmp_path / "out")
    assert shards.classes == ["even", "odd"]
    assert {source_stem(shards.key(i)): int(shards.labels[i]) for i in range(6)} == {f"im {i}": i % 2 for i in range(6)}


def test_a_classes_file_orders_the_class_numbers(tree, tmp_path, run_shard):
    (tmp_path / "classes").write_text("yak\ncat\ndog\n")
    run_shard("images", tree, tmp_path / "out", "--classes", tmp_path / "classes", "--workers", 1)
    shards = ShardSet.open(tmp_path / "out")
    assert shards.classes == ["yak", "cat", "dog"]
    assert all(shards.classes[shards.labels[i]] == shards.key(i).split("/")[0] for i in range(len(shards)))


def test_links_are_followed_and_other_files_ignored(tree, tmp_path, run_shard, caplog):
    links = tmp_path / "links"
    (links / "cat").mkdir(parents=True)
    (links / "cat" / "linked.jpg").symlink_to(tree / "cat" / "cat-1.jpg")
    (links / "dog").symlink_to(tree / "dog", target_is_directory=True)
    (links / "cat" / "notes.txt").write_text("not an image")
    (links / "cat" / "._linked.jpg").write_bytes(b"\0\5\x16\7")
    (links / ".git").mkdir()
    assert run_shard("images", links, tmp_path / "out", "--workers", 1) == 0
    assert len(ShardSet.open(tmp_path / "out")) == 6
    (message,) = (message for message in caplog.messages if "notes.txt" in message)
    assert 3 in numbers_in(message)  # files and folders that are no images
    rows = list(csv.reader((tmp_path / "out" / "left_out.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["name", ".git/", "cat/._linked.jpg", "cat/notes.txt"]
    assert {row[2] for row in rows[1:]} == {"no"}  # not broken


def test_the_suffix_in_the_shard_depends_on_the_content(tmp_path, run_shard, encode_image):
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "src" / "a" / "really.JPEG").write_bytes(encode_image(1, "PNG"))
    assert run_shard("images", tmp_path / "src", tmp_path / "out", "--workers", 1) == 0
    (sample,) = read_back(tmp_path / "out").values()
    assert sample["png"] == encode_image(1, "PNG") and json.loads(sample["json"]) == {"source": "a/really.JPEG"}


@pytest.mark.parametrize(
    "name",
    [
        "a/b.c.d.jpg",
        "a.b/c.jpg",
        "%41/%2E.png",
        ".x/..hidden.jpg",
        "__a__/__b__.jpg",
        "a/new\nline.jpg",
        b"a/\xe9.jpg".decode("utf-8", "surrogateescape"),
        "noext",
        "a/b.tar",
    ],
)
def test_keys_are_reversible_and_safe_for_webdataset(name):
    key = sample_key(name)
    assert source_stem(key) == drop_suffix(name)
    assert webdataset.tariterators.base_plus_ext(key + ".b.jpg") == (key, "b.jpg")
    assert not key.startswith("__")


def test_damaged_images_are_detected(encode_image):
    jpeg, png = encode_image(3, side=96), encode_image(3, "PNG", side=96)
    for mode in ("RGB", "L", "CMYK"):
        assert images.find_damage(memoryview(encode_image(5, mode=mode))) is None
    assert images.find_damage(encode_image(5, "PNG", mode="P")) is None
    assert images.find_damage(b"") == "empty file"
    assert images.find_damage(encode_image(1, "GIF")) is None and images.find_damage(b"<html>") is not None
    for body in (jpeg, png):
        for part in (0.3, 0.6, 0.95):
            assert "decoded" in images.find_damage(body[: int(part * len(body))])
    assert "decoded" in images.find_damage(png[:200] + bytes(40) + png[240:])
    assert images.find_damage(jpeg + b"trailing bytes of a camera") is None
