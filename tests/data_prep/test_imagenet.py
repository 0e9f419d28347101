"""Small copies of the two official archives, with nested tars for training and labels from a file or the devkit."""

import io
import json

import numpy as np
import pytest
from scipy.io import savemat

from hpcssl.data.shards import ShardSet
from tests.printed import numbers_in

WNIDS = ["n01440764", "n02105855", "n03000134"]
VAL = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in range(1, 8)]
TRUTH = [3, 1, 2, 2, 1, 3, 1]  # ILSVRC2012_ID of each validation image
IDS = {1: "n03000134", 2: "n01440764", 3: "n02105855"}  # ids are not in the order of the WordNet ids


@pytest.fixture
def train_files(encode_image):
    return {wnid: {f"{wnid}_{i}.JPEG": encode_image(100 * k + i) for i in range(3 + k)} for k, wnid in enumerate(WNIDS)}


@pytest.fixture
def archives(tmp_path, tar_of, encode_image, train_files):
    train, val = tmp_path / "ILSVRC2012_img_train.tar", tmp_path / "ILSVRC2012_img_val.tar"
    train.write_bytes(tar_of({f"{wnid}.tar": tar_of(files) for wnid, files in train_files.items()}))
    val.write_bytes(tar_of({name: encode_image(900 + i) for i, name in enumerate(VAL)}))
    return train, val


@pytest.fixture
def devkit(tmp_path, tar_of):
    """As published: a struct array, in which the synsets above the thousand classes come last."""
    kind = np.dtype([(n, object) for n in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")])
    rows = [(i, wnid, "a word", "a gloss", 0) for i, wnid in IDS.items()] + [(1001, "n00001740", "entity", "all", 9)]
    mat = io.BytesIO()
    savemat(mat, {"synsets": np.array(rows, kind).reshape(-1, 1)})
    base = "ILSVRC2012_devkit_t12"
    path = tmp_path / f"{base}.tar.gz"
    path.write_bytes(
        tar_of(
            {
                f"{base}/readme.txt": b"hello",
                f"{base}/data/meta.mat": mat.getvalue(),
                f"{base}/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{t}\n" for t in TRUTH).encode(),
            },
            "w:gz",
        )
    )
    return path


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "val.txt"
    path.write_text("".join(f"{name} {IDS[t]}\n" for name, t in zip(VAL, TRUTH, strict=True)))
    return path


def test_images_and_labels_equal_the_archives(archives, devkit, tmp_path, run_shard, train_files, encode_image):
    out = tmp_path / "out"
    assert run_shard("imagenet", *archives, out, "--devkit", devkit, "--samples-per-shard", 5, "--workers", 1) == 0
    train, val = ShardSet.open(out / "train"), ShardSet.open(out / "val")
    assert train.classes == val.classes == WNIDS
    assert {train.key(i): WNIDS[train.labels[i]] for i in range(len(train))} == {
        f"{wnid}/{name[:-5]}": wnid for wnid, files in train_files.items() for name in files
    }
    assert {val.key(i): WNIDS[val.labels[i]] for i in range(len(val))} == {
        name[:-5]: IDS[t] for name, t in zip(VAL, TRUTH, strict=True)
    }
    for i, row in enumerate(val.rows):
        body = val.path(row["shard"]).read_bytes()[row["offset"] :][: row["size"]]
        assert body == encode_image(900 + VAL.index(val.key(i) + ".JPEG"))
    assert run_shard("verify", out / "train", "--workers", 1) == run_shard("verify", out / "val", "--workers", 1) == 0


def test_a_subset_by_a_published_list_keeps_edges(archives, labels, tmp_path, run_shard):
    """The lists of SimCLR hold names such as n01440764_10026.JPEG."""
    out = tmp_path / "out"
    assert run_shard("imagenet", *archives, out, "--labels", labels, "--second-modality", "edges", "--workers", 1) == 0
    assert ShardSet.open(out / "train").has_second and ShardSet.open(out / "val").second_name == "edges (surrogate)"
    (tmp_path / "1percent.txt").write_text("n01440764_2.JPEG\nn03000134_4.JPEG\n")
    assert (
        run_shard(
            "subset",
            out / "train",
            tmp_path / "semi",
            "--list",
            tmp_path / "1percent.txt",
            "--rest",
            "unlabeled",
            "--workers",
            1,
        )
        == 0
    )
    shards = ShardSet.open(tmp_path / "semi")
    assert shards.has_second and len(shards) == 12
    assert {shards.key(i): int(shards.labels[i]) for i in np.flatnonzero(shards.labels >= 0)} == {
        "n01440764/n01440764_2": 0,
        "n03000134/n03000134_4": 2,
    }


def test_a_labels_file_gives_the_same_shards_as_the_devkit(archives, devkit, labels, tmp_path, run_shard, content):
    run_shard("imagenet", *archives, tmp_path / "a", "--devkit", devkit, "--workers", 1)
    run_shard("imagenet", *archives, tmp_path / "b", "--labels", labels, "--workers", 1)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_the_archive_gives_the_same_shards_as_the_unpacked_folder(archives, labels, tmp_path, run_shard, train_files):
    for wnid, files in train_files.items():
        (tmp_path / "tree" / wnid).mkdir(parents=True)
        for name, body in files.items():
            (tmp_path / "tree" / wnid / name).write_bytes(body)
    run_shard("imagenet", *archives, tmp_path / "a", "--labels", labels, "--workers", 1)
    run_shard("images", tmp_path / "tree", tmp_path / "b", "--workers", 1)
    assert ShardSet.open(tmp_path / "a" / "train").digest == ShardSet.open(tmp_path / "b").digest


def test_a_png_named_jpeg_is_stored_as_png(archives, labels, tmp_path, run_shard, tar_of, encode_image):
    """ImageNet's n02105855_2933.JPEG is a PNG, and readers must get it as one."""
    train, val = archives
    train.write_bytes(
        tar_of(
            {
                f"{w}.tar": tar_of({f"{w}_2933.JPEG": encode_image(k, "PNG" if k == 1 else "JPEG")})
                for k, w in enumerate(WNIDS)
            }
        )
    )
    assert run_shard("imagenet", train, val, tmp_path / "out", "--labels", labels, "--workers", 1) == 0
    assert b"n02105855/n02105855_2933.png\0" in (tmp_path / "out" / "train" / "shard-000000.tar").read_bytes()


def test_swapped_truncated_and_damaged_archives_are_refused(archives, labels, tmp_path, error_of, tar_of, train_files):
    train, val = archives
    out, end = tmp_path / "out", ("--labels", labels)
    error = error_of("imagenet", val, train, out, *end)
    assert error.what == f"TRAIN_TAR {val}" and VAL[0] in error.got
    whole = train.read_bytes()
    train.write_bytes(whole[: len(whole) // 2])
    assert error_of("imagenet", train, val, out, *end).what == f"archive {train}"
    train.write_bytes(whole[: len(whole) - len(whole) % 10240 - 10240])  # between two members: the end mark is missing
    assert error_of("imagenet", train, val, out, *end).what == f"archive {train}"
    inner = {wnid: bytearray(tar_of(files)) for wnid, files in train_files.items()}
    second = 512 + -(-len(train_files[WNIDS[1]][f"{WNIDS[1]}_0.JPEG"]) // 512) * 512
    inner[WNIDS[1]][second + 5] ^= 1  # the second header of one class archive
    train.write_bytes(tar_of({f"{wnid}.tar": bytes(body) for wnid, body in inner.items()}))
    error = error_of("imagenet", train, val, out, *end)
    assert str(train) in error.what and f"{WNIDS[1]}.tar" in error.what
    assert numbers_in(error.got)[0] == second
    train.write_bytes(tar_of({f"{WNIDS[0]}.tar": b"no archive at all" * 100}))
    assert f"{WNIDS[0]}.tar" in error_of("imagenet", train, val, out, *end).what
    train.write_bytes(tar_of({f"{WNIDS[0]}.tar": tar_of({})}))
    error = error_of("imagenet", train, val, out, *end)
    assert error.what == f"TRAIN_TAR {train}" and error.got.endswith(f": {WNIDS[0]}")
    assert not out.exists() or not list(out.rglob("*.tar"))


def test_missing_and_unknown_labels_are_refused(archives, devkit, tmp_path, error_of, tar_of):
    out, bad = tmp_path / "out", tmp_path / "bad.txt"
    error = error_of("imagenet", *archives, out, code=2)
    assert "--labels" in error.expected and "--devkit" in error.expected and "--" not in error.got
    bad.write_text(f"{VAL[0]} n01440764\n")
    error = error_of("imagenet", *archives, out, "--labels", bad)
    assert str(bad) in error.what and numbers_in(error.got)[0] == 6 and VAL[1] in error.got
    bad.write_text("".join(f"{name} n09999999\n" for name in VAL))
    error = error_of("imagenet", *archives, out, "--labels", bad)
    assert str(bad) in error.what and "n09999999" in error.got and all(wnid in error.expected for wnid in WNIDS)
    error = error_of("imagenet", *archives, out, "--labels", bad, "--devkit", devkit, code=2)
    assert "--labels" in error.got and "--devkit" in error.got
    for name in (devkit.parent / "absent.tar.gz", archives[1]):
        assert error_of("imagenet", *archives, out, "--devkit", name, code=2).what == f"--devkit {name}"
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(
        tar_of({"data/meta.mat": b"no matrix", "data/ILSVRC2012_validation_ground_truth.txt": b"1\n"}, "w:gz")
    )
    error = error_of("imagenet", *archives, out, "--devkit", broken)
    assert error.what == f"--devkit {broken}" and "MatReadError" in error.got and "meta.mat" in error.expected
    assert not out.exists() or not list(out.rglob("*.tar"))


def test_the_source_is_recorded_with_its_name_in_the_unpacked_folder(archives, labels, tmp_path, run_shard):
    import tarfile

    run_shard("imagenet", *archives, tmp_path / "out", "--labels", labels, "--workers", 1)
    with tarfile.open(tmp_path / "out" / "train" / "shard-000000.tar") as tar:
        notes = {m.name: json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith(".json")}
    assert notes["n01440764/n01440764_0.json"] == {"source": "n01440764/n01440764_0.JPEG"}
