"""``hpcssl-shard subset`` and ``hpcssl-shard digits``."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data_prep.sources import digits
from hpcssl.data.shards import ShardSet
from tests.printed import numbers_in


@pytest.fixture
def out(tmp_path, encode_image, run_shard):
    """Three classes of 40, 20 and 10 samples."""
    src = tmp_path / "src"
    for name, count in (("ant", 40), ("bee", 20), ("cow", 10)):
        (src / name).mkdir(parents=True)
        for i in range(count):
            (src / name / f"{name}_{i}.JPEG").write_bytes(encode_image(i, side=16))
    assert run_shard("images", src, tmp_path / "all", "--samples-per-shard", 32, "--workers", 1) == 0
    return tmp_path / "all"


def samples(folder):
    """key -> (label, image bytes, content of KEY.json), read with Python's tarfile."""
    members = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.rpartition(".")
                members.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return {key: (int(s["cls"]), s["jpg"], json.loads(s["json"])) for key, s in members.items()}


@pytest.mark.parametrize("style", ["{0}_{1}.JPEG", "{0}/{0}_{1}.JPEG", "{0}/{0}_{1}", "{0}_{1}"])
def test_a_list_may_hold_file_names_sources_or_keys(out, tmp_path, run_shard, style):
    wanted = [("cow", 3), ("ant", 7), ("bee", 0), ("ant", 39)]
    (tmp_path / "list.txt").write_text("".join(style.format(*w) + "\n" for w in wanted))
    assert run_shard("subset", out, tmp_path / "some", "--list", tmp_path / "list.txt", "--workers", 1) == 0
    every, some = samples(out), samples(tmp_path / "some")
    assert some == {f"{a}/{a}_{i}": every[f"{a}/{a}_{i}"] for a, i in wanted}
    assert ShardSet.open(tmp_path / "some").classes == ["ant", "bee", "cow"]


def test_unknown_and_ambiguous_names_of_a_list_are_refused(out, tmp_path, error_of, run_shard, encode_image):
    (tmp_path / "list.txt").write_text("ant_1.JPEG\nelk_1.JPEG\n")
    error = error_of("subset", out, tmp_path / "some", "--list", tmp_path / "list.txt")
    assert error.what == f"--list {tmp_path / 'list.txt'}"
    assert numbers_in(error.got) == [1] and error.got.endswith("(elk_1.JPEG)")
    for name in ("a", "b"):
        (tmp_path / "repeated" / name).mkdir(parents=True)
        (tmp_path / "repeated" / name / "same.jpg").write_bytes(encode_image(1))
    run_shard("images", tmp_path / "repeated", tmp_path / "shards", "--workers", 1)
    (tmp_path / "list.txt").write_text("same.jpg\n")
    error = error_of("subset", tmp_path / "shards", tmp_path / "some", "--list", tmp_path / "list.txt")
    assert numbers_in(error.got) == [1] and error.got.endswith("(same.jpg)")
    assert not (tmp_path / "some").exists()


def test_a_list_tells_images_apart_that_differ_in_their_suffix(tmp_path, error_of, run_shard, encode_image):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for number, suffix in enumerate(("jpeg", "jpg")):
        (tmp_path / "images" / "a" / f"x.{suffix}").write_bytes(encode_image(number))
    (tmp_path / "images" / "b").mkdir()
    (tmp_path / "images" / "b" / "y.jpg").write_bytes(encode_image(2))
    run_shard("images", tmp_path / "images", tmp_path / "shards", "--workers", 1)
    keys = sorted(key for key in samples(tmp_path / "shards") if key.startswith("a/"))
    assert len(keys) == 2
    for name, key in zip(("a/x.jpeg", "a/x.jpg", *keys), (*keys, *keys), strict=True):
        (tmp_path / "list.txt").write_text(f"{name}\nb/y\n")
        out = tmp_path / f"of {name.replace('/', ' ')} {key.replace('/', ' ')}"
        assert run_shard("subset", tmp_path / "shards", out, "--list", tmp_path / "list.txt", "--workers", 1) == 0
        assert sorted(samples(out)) == [key, "b/y"], name
    (tmp_path / "list.txt").write_text("x\n")
    error = error_of("subset", tmp_path / "shards", tmp_path / "some", "--list", tmp_path / "list.txt")
    assert "several samples" in error.got


def test_a_fraction_is_taken_of_every_class(out, tmp_path, run_shard):
    every = samples(out)
    for share, counts in ((0.1, [4, 2, 1]), (0.01, [1, 1, 1]), (1.0, [40, 20, 10])):
        part = tmp_path / f"part-{share}"
        assert run_shard("subset", out, part, "--fraction", share, "--workers", 1) == 0
        some = samples(part)
        assert np.bincount([label for label, _, _ in some.values()], minlength=3).tolist() == counts
        assert all(every[key] == value for key, value in some.items())
    run_shard("subset", out, tmp_path / "seed1", "--fraction", 0.1, "--seed", 1, "--workers", 1)
    assert set(samples(tmp_path / "seed1")) != set(samples(tmp_path / "part-0.1"))


def test_corrupt_changes_a_share_of_the_labels_and_records_the_original_ones(out, tmp_path, run_shard, content):
    every = samples(out)
    for run in ("a", "b"):
        assert run_shard("subset", out, tmp_path / run, "--corrupt", 0.5, "--seed", 4, "--workers", 1) == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")
    noisy = samples(tmp_path / "a")
    changed = {key for key in every if noisy[key][0] != every[key][0]}
    assert noisy.keys() == every.keys() and len(changed) == 35
    for key, (label, image, note) in noisy.items():
        assert image == every[key][1]
        truth = {"original_label": every[key][0]} if key in changed else {}
        assert note == {"source": every[key][2]["source"], **truth} and 0 <= label < 3
    moved = np.array([(every[key][0], noisy[key][0]) for key in changed])
    assert len({tuple(pair) for pair in moved.tolist()}) == 6  # labels of each class change to both others
    assert ShardSet.open(tmp_path / "a").labels.tolist() != ShardSet.open(out).labels.tolist()


def test_a_second_subset_keeps_corrupted_and_original_labels(out, tmp_path, run_shard):
    run_shard("subset", out, tmp_path / "noisy", "--corrupt", 1.0, "--workers", 1)
    run_shard("subset", tmp_path / "noisy", tmp_path / "less", "--fraction", 0.5, "--workers", 1)
    noisy, less = samples(tmp_path / "noisy"), samples(tmp_path / "less")
    assert len(less) == 35 and all(noisy[key] == value for key, value in less.items())
    run_shard("subset", tmp_path / "noisy", tmp_path / "again", "--corrupt", 1.0, "--seed", 1, "--workers", 1)
    assert all(
        value[2]["original_label"] == noisy[key][2]["original_label"]
        for key, value in samples(tmp_path / "again").items()
    )


def test_a_subset_keeps_the_second_modality(tmp_path, tar_of, encode_image, run_shard):
    """Every sample with KEY.b.png keeps it."""
    from data_prep import build, subset
    from data_prep.catalog import Catalog, Sample

    body = encode_image(1) + encode_image(2, "PNG")
    (tmp_path / "pieces").write_bytes(body)
    cut = len(encode_image(1))
    rows = [Sample(f"x/{i}.jpg", 0, str(tmp_path / "pieces"), 0, cut, 0, (cut, len(body) - cut)) for i in range(4)]
    with build.claim_folder(tmp_path / "two") as work:
        build.write_folder(work, Catalog(["x"], rows), build.WriteOptions(workers=1))
    shards = ShardSet.open(tmp_path / "two")
    assert shards.has_second and run_shard("verify", tmp_path / "two", "--workers", 1) == 0
    with build.claim_folder(tmp_path / "half") as work:
        chosen = subset.choose_samples(shards, subset.SubsetOptions(fraction=0.5), 0)
        build.write_folder(work, chosen, build.WriteOptions(workers=1))
    half = ShardSet.open(tmp_path / "half")
    assert len(half) == 2 and half.has_second
    for row in half.rows:
        whole = half.path(0).read_bytes()
        assert whole[row["offset_b"] :][: row["size_b"]] == encode_image(2, "PNG")
        assert whole[row["offset"] :][: row["size"]] == encode_image(1)


def test_the_digits_hold_every_scan_once(tmp_path, run_shard, content):
    assert run_shard("digits", tmp_path / "a") == 0
    assert run_shard("digits", tmp_path / "b", "--workers", 2) == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")
    scans, images = load_digits(), {}
    for part in ("train", "val"):
        shards = ShardSet.open(tmp_path / "a" / part)
        assert shards.classes == [str(n) for n in range(10)] and len(shards.shards) > 1
        wanted = (0.2 if part == "val" else 0.8) * np.bincount(scans.target)
        assert (np.abs(np.bincount(shards.labels) - wanted) <= 0.5).all()  # rounded to whole images
        for i, row in enumerate(shards.rows):
            body = shards.path(row["shard"]).read_bytes()[row["offset"] :][: row["size"]]
            number = int(shards.key(i).rpartition("-")[2])
            assert scans.target[number] == row["label"] and number not in images
            image = Image.open(io.BytesIO(body))
            assert image.mode == "L" and image.size == (digits.SIDE, digits.SIDE)
            images[number] = np.asarray(image, float)
    assert len(images) == 1797
    # averaged back over 2x2 pixels, a smooth enlargement is close to its scan
    small = np.stack([images[n] for n in range(1797)]).reshape(-1, 8, 2, 8, 2).mean((2, 4)) / 255 * 16
    assert np.corrcoef(small.ravel(), scans.images.ravel())[0, 1] > 0.97


def test_the_split_of_the_digits_does_not_depend_on_the_seed(tmp_path, run_shard):
    run_shard("digits", tmp_path / "a")
    run_shard("digits", tmp_path / "b", "--seed", 5)
    a, b = (ShardSet.open(tmp_path / run / "val") for run in "ab")
    keys = [[s.key(i) for i in range(len(s))] for s in (a, b)]
    assert keys[0] != keys[1] and sorted(keys[0]) == sorted(keys[1])


def test_rest_unlabeled_keeps_all_images_and_the_labels_of_the_subset(out, tmp_path, run_shard, content):
    """The list holds file names, as those of SimCLR do. Only the listed images keep their class."""
    listed = {"ant/ant_3", "cow/cow_0", "cow/cow_9"}
    (tmp_path / "list.txt").write_text("".join(f"{key.partition('/')[2]}.JPEG\n" for key in sorted(listed)))
    for run in ("a", "b"):
        assert (
            run_shard(
                "subset", out, tmp_path / run, "--list", tmp_path / "list.txt", "--rest", "unlabeled", "--workers", 1
            )
            == 0
        )
    assert (
        content(tmp_path / "a") == content(tmp_path / "b") and run_shard("verify", tmp_path / "a", "--workers", 1) == 0
    )
    shards, before = ShardSet.open(tmp_path / "a"), ShardSet.open(out)
    truth = {before.key(i): int(before.labels[i]) for i in range(len(before))}
    assert {shards.key(i): int(shards.labels[i]) for i in range(len(shards))} == {
        key: label if key in listed else -1 for key, label in truth.items()
    }
    assert shards.classes == before.classes
    with tarfile.open(tmp_path / "a" / "shard-000000.tar") as tar:
        names = tar.getnames()
    assert {name.removesuffix(".cls") for name in names if name.endswith(".cls")} == listed
    assert sum(name.endswith(".jpg") for name in names) == 70

    # --fraction keeps the labels of the samples that it selects without --rest
    assert run_shard("subset", out, tmp_path / "share", "--fraction", 0.1, "--workers", 1) == 0
    assert run_shard("subset", out, tmp_path / "semi", "--fraction", 0.1, "--rest", "unlabeled", "--workers", 1) == 0
    semi = ShardSet.open(tmp_path / "semi")
    assert len(semi) == 70 and {semi.key(i) for i in np.flatnonzero(semi.labels >= 0)} == set(
        samples(tmp_path / "share")
    )


def test_an_unlabeled_sample_has_no_original_label_either(out, tmp_path, run_shard):
    run_shard("subset", out, tmp_path / "noisy", "--corrupt", 1.0, "--workers", 1)
    run_shard("subset", tmp_path / "noisy", tmp_path / "semi", "--fraction", 0.1, "--rest", "unlabeled", "--workers", 1)
    notes = {}
    for path in (tmp_path / "semi").glob("*.tar"):
        with tarfile.open(path) as tar:
            labeled = {name.removesuffix(".cls") for name in tar.getnames() if name.endswith(".cls")}
            notes |= {
                m.name.removesuffix(".json"): json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")
            }
            for key in [k for k in notes if k not in labeled]:
                assert "original_label" not in notes.pop(key)
    assert len(notes) == 7 and all("original_label" in note for note in notes.values())
