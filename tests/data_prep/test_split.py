"""``--val``, ``--group-by`` and ``--dedup``: two parts without an image in common, and without near-duplicates."""

import io

import numpy as np
import pytest
from PIL import Image

from data_prep.shards.near_duplicates import find_nearest
from hpcssl.data.shards import ShardSet
from tests.data_prep.conftest import encode
from tests.data_prep.test_own_images import left_out, read_sources, sources_of, write


@pytest.fixture
def classes(tmp_path):
    """Forty images in classes of 20, 15, 4 and 1."""
    names = [f"{name}/{n}.jpg" for name, count in (("a", 20), ("b", 15), ("c", 4), ("d", 1)) for n in range(count)]
    write(tmp_path / "src", {name: encode(n, side=16) for n, name in enumerate(names)})
    return tmp_path / "src"


def parts_of(out):
    return {part: ShardSet.open(out / part) for part in ("train", "val")}


def test_every_class_gives_its_share_to_val(classes, tmp_path, run_shard, content):
    for out, options in (("one", []), ("two", []), ("other", ["--seed", 1])):
        assert run_shard("images", classes, tmp_path / out, "--val", 0.2, "--workers", 1, *options) == 0
    assert content(tmp_path / "one") == content(tmp_path / "two")
    parts = parts_of(tmp_path / "one")
    assert parts["train"].classes == parts["val"].classes == ["a", "b", "c", "d"]
    assert np.bincount(parts["val"].labels, minlength=4).tolist() == [4, 3, 1, 0]
    names = {part: set(sources_of(shards)) for part, shards in parts.items()}
    assert not names["train"] & names["val"] and len(names["train"] | names["val"]) == 40
    assert names["val"] != set(sources_of(parts_of(tmp_path / "other")["val"]))
    assert run_shard("images", classes, tmp_path / "one", "--val", 0.2, "--workers", 1) == 0  # it is finished


def test_another_share_or_an_undivided_folder_is_refused(classes, tmp_path, run_shard, error_of):
    assert run_shard("images", classes, tmp_path / "out", "--val", 0.2, "--workers", 1) == 0
    assert "val was 0.2 and is 0.5" in error_of("images", classes, tmp_path / "out", "--val", 0.5).got
    assert run_shard("images", classes, tmp_path / "whole", "--workers", 1) == 0
    error = error_of("images", classes, tmp_path / "whole", "--val", 0.2)
    assert error.what == f"OUT {tmp_path / 'whole'}" and not (tmp_path / "whole" / "train").exists()


def test_the_images_of_a_folder_stay_together(tmp_path, run_shard, error_of):
    names = [f"{day % 3}/{day}/{n}.jpg" for day in range(12) for n in range(1 + day % 4)]
    write(tmp_path / "src", {name: encode(n, side=16) for n, name in enumerate(names)})
    options = ("--val", 0.3, "--group-by", "folder", "--workers", 1)
    assert run_shard("images", tmp_path / "src", tmp_path / "out", *options) == 0
    folders = {
        part: {n.rpartition("/")[0] for n in sources_of(shards)} for part, shards in parts_of(tmp_path / "out").items()
    }
    assert not folders["train"] & folders["val"]
    assert len(parts_of(tmp_path / "out")["val"]) == round(0.3 * len(names))
    write(tmp_path / "dogs", {f"{n}/{n}.jpg": encode(n, side=16) for n in range(4)})
    error = error_of("images", tmp_path / "dogs", tmp_path / "two", *options, code=2)  # each folder is a class
    assert error.what == "--group-by folder" and not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    "options, what",
    [
        (["--val", 0], "--val"),
        (["--val", 1], "--val"),
        (["--group-by", "folder"], "--group-by"),
        (["--dedup"], "--dedup"),
        (["--val", 0.5, "--group-by", "folders"], "--group-by"),
        (["--val", 0.5, "--dedup", "--dedup-distance", 9], "--dedup-distance"),
        (["--val", 0.5, "--dedup-distance", 3], "--dedup-distance"),
    ],
)
def test_wrong_options_are_refused(classes, tmp_path, error_of, options, what):
    assert error_of("images", classes, tmp_path / "out", *options, code=2).what == what
    assert not (tmp_path / "out").exists()


def test_a_part_without_images_is_refused(tmp_path, error_of):
    write(tmp_path / "src", {"a/0.jpg": encode(0), "b/1.jpg": encode(1)})
    error = error_of(
        "images", tmp_path / "src", tmp_path / "out", "--val", 0.5
    )  # one image of a class cannot leave train
    assert error.what == "--val 0.5" and not (tmp_path / "out").exists()


def test_broken_images_of_both_parts_count_together(classes, tmp_path, run_shard, error_of):
    for n in range(6):
        (classes / "a" / f"{n}.jpg").write_bytes(b"")
    options = ("--val", 0.5, "--workers", 1)
    error_of("images", classes, tmp_path / "out", *options, "--skip-bad", 5)
    assert run_shard("images", classes, tmp_path / "out", *options, "--skip-bad", 6) == 0
    assert set(left_out(tmp_path / "out")) == {f"a/{n}.jpg" for n in range(6)}


def test_near_duplicates_across_the_split_are_taken_out_of_train(tmp_path, run_shard, capsys):
    pytest.importorskip("imagehash")
    generator = np.random.Generator(np.random.Philox(key=5))
    copies = {}
    for n in range(12):  # pictures of their own, each with a copy of another size and format
        coarse = Image.fromarray(generator.integers(0, 256, (7, 7, 3), np.uint8))
        for name, side, kind in ((f"{n}.png", 128, "PNG"), (f"copy of {n}.webp", 96, "WEBP")):
            body = io.BytesIO()
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(body, kind, quality=60)
            copies[name] = body.getvalue()
    write(tmp_path / "src", copies | {"broken.jpg": b"\xff\xd8\xff"})
    options = ("--val", 0.4, "--workers", 1, "--skip-bad", 1)
    assert run_shard("images", tmp_path / "src", tmp_path / "plain", *options) == 0
    assert run_shard("images", tmp_path / "src", tmp_path / "out", *options, "--dedup", "--dedup-distance", 8) == 0

    def picture(name):
        return name.removeprefix("copy of ").split(".")[0]

    plain = {part: set(read_sources(tmp_path / "plain" / part)) for part in ("train", "val")}
    train, val = (set(read_sources(tmp_path / "out" / part)) for part in ("train", "val"))
    leaked = {name for name in plain["train"] if picture(name) in set(map(picture, plain["val"]))}
    assert leaked and val == plain["val"] and train == plain["train"] - leaked
    listed = left_out(tmp_path / "out")
    assert set(listed) == leaked | {"broken.jpg"} and all(listed[name]["broken"] == "no" for name in leaked)
    assert f"{len(leaked)} images of train are near-duplicates" in capsys.readouterr().out


@pytest.mark.parametrize("distance", [0, 1, 4, 12])
def test_find_nearest_equals_a_comparison_of_all_pairs(distance):
    generator = np.random.Generator(np.random.Philox(key=distance))
    queries = [int(value) for value in generator.integers(0, 2**64, 60, np.uint64)]
    others = []
    for value in queries:
        for bit in generator.choice(64, generator.integers(0, distance + 4), replace=False):
            value ^= 1 << int(bit)
        others.append(value)
    queries[3] = others[5] = None
    queries.append(queries[7])
    others.append(others[9])
    expected = []
    for query in queries:
        pairs = [((query ^ x).bit_count(), n) for n, x in enumerate(others) if None not in (query, x)]
        expected.append(min((pair for pair in pairs if pair[0] <= distance), default=(0, -1))[1])
    assert find_nearest(queries, others, distance).tolist() == expected and -1 in expected
    assert find_nearest([], others, distance).tolist() == [] and find_nearest([1], [], distance).tolist() == [-1]
