"""The two official archives, made small: nested train tar, flat validation tar, labels from a file or the devkit."""

import io
import json

import numpy as np
import pytest
from scipy.io import savemat

from hpcssl.data.shards import ShardSet

WNIDS = ["n01440764", "n02105855", "n03000134"]
VAL = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in range(1, 8)]
TRUTH = [3, 1, 2, 2, 1, 3, 1]  # ILSVRC2012_ID of each validation image
IDS = {1: "n03000134", 2: "n01440764", 3: "n02105855"}  # ids are not in the order of the WordNet ids


@pytest.fixture
def train_files(picture):
    return {wnid: {f"{wnid}_{i}.JPEG": picture(100 * k + i) for i in range(3 + k)} for k, wnid in enumerate(WNIDS)}


@pytest.fixture
def archives(tmp_path, tar_of, picture, train_files):
    train, val = tmp_path / "ILSVRC2012_img_train.tar", tmp_path / "ILSVRC2012_img_val.tar"
    train.write_bytes(tar_of({f"{wnid}.tar": tar_of(files) for wnid, files in train_files.items()}))
    val.write_bytes(tar_of({name: picture(900 + i) for i, name in enumerate(VAL)}))
    return train, val


@pytest.fixture
def devkit(tmp_path, tar_of):
    """As published: a struct array with high-level synsets after the thousand leaves."""
    kind = np.dtype([(n, object) for n in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")])
    rows = [(i, wnid, "a word", "a gloss", 0) for i, wnid in IDS.items()] + [(1001, "n00001740", "entity", "all", 9)]
    mat = io.BytesIO()
    savemat(mat, {"synsets": np.array(rows, kind).reshape(-1, 1)})
    base = "ILSVRC2012_devkit_t12"
    path = tmp_path / f"{base}.tar.gz"
    path.write_bytes(tar_of({f"{base}/readme.txt": b"hello", f"{base}/data/meta.mat": mat.getvalue(),
                             f"{base}/data/ILSVRC2012_validation_ground_truth.txt":
                                 "".join(f"{t}\n" for t in TRUTH).encode()}, "w:gz"))
    return path


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "val.txt"
    path.write_text("".join(f"{name} {IDS[t]}\n" for name, t in zip(VAL, TRUTH, strict=True)))
    return path


def test_labels_are_those_of_the_archives(archives, devkit, tmp_path, shard, train_files, picture):
    out = tmp_path / "out"
    assert shard("imagenet", *archives, out, "--devkit", devkit, "--samples-per-shard", 5, "--workers", 1) == 0
    train, val = ShardSet.open(out / "train"), ShardSet.open(out / "val")
    assert train.classes == val.classes == WNIDS
    assert {train.key(i): WNIDS[train.labels[i]] for i in range(len(train))} == {
        f"{wnid}/{name[:-5]}": wnid for wnid, files in train_files.items() for name in files}
    assert {val.key(i): WNIDS[val.labels[i]] for i in range(len(val))} == {
        name[:-5]: IDS[t] for name, t in zip(VAL, TRUTH, strict=True)}
    for i, row in enumerate(val.rows):
        body = val.path(row["shard"]).read_bytes()[row["offset"] :][: row["size"]]
        assert body == picture(900 + VAL.index(val.key(i) + ".JPEG"))
    assert shard("verify", out / "train", "--workers", 1) == shard("verify", out / "val", "--workers", 1) == 0


def test_edges_and_a_list_of_one_per_cent(archives, labels, tmp_path, shard):
    """The lists that SimCLR published hold names such as n01440764_10026.JPEG."""
    out = tmp_path / "out"
    assert shard("imagenet", *archives, out, "--labels", labels, "--second", "edges", "--workers", 1) == 0
    assert ShardSet.open(out / "train").has_second and ShardSet.open(out / "val").second == "edges (surrogate)"
    (tmp_path / "1percent.txt").write_text("n01440764_2.JPEG\nn03000134_4.JPEG\n")
    assert shard("subset", out / "train", tmp_path / "semi", "--list", tmp_path / "1percent.txt", "--rest",
                 "unlabelled", "--workers", 1) == 0
    found = ShardSet.open(tmp_path / "semi")
    assert found.has_second and len(found) == 12
    assert {found.key(i): int(found.labels[i]) for i in np.flatnonzero(found.labels >= 0)} == {
        "n01440764/n01440764_2": 0, "n03000134/n03000134_4": 2}


def test_labels_file_gives_what_the_devkit_gives(archives, devkit, labels, tmp_path, shard, content):
    shard("imagenet", *archives, tmp_path / "a", "--devkit", devkit, "--workers", 1)
    shard("imagenet", *archives, tmp_path / "b", "--labels", labels, "--workers", 1)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_the_archive_gives_the_shards_of_the_unpacked_tree(archives, labels, tmp_path, shard, train_files):
    for wnid, files in train_files.items():
        (tmp_path / "tree" / wnid).mkdir(parents=True)
        for name, body in files.items():
            (tmp_path / "tree" / wnid / name).write_bytes(body)
    shard("imagenet", *archives, tmp_path / "a", "--labels", labels, "--workers", 1)
    shard("images", tmp_path / "tree", tmp_path / "b", "--workers", 1)
    assert ShardSet.open(tmp_path / "a" / "train").digest == ShardSet.open(tmp_path / "b").digest


def test_png_among_the_jpegs(archives, labels, tmp_path, shard, tar_of, picture):
    """ImageNet's n02105855_2933.JPEG is a PNG: it must reach readers as one."""
    train, val = archives
    train.write_bytes(tar_of({f"{w}.tar": tar_of({f"{w}_2933.JPEG": picture(k, "PNG" if k == 1 else "JPEG")})
                              for k, w in enumerate(WNIDS)}))
    assert shard("imagenet", train, val, tmp_path / "out", "--labels", labels, "--workers", 1) == 0
    assert b"n02105855/n02105855_2933.png\0" in (tmp_path / "out" / "train" / "shard-000000.tar").read_bytes()


def test_swapped_cut_and_corrupt_archives(archives, labels, tmp_path, refused, tar_of, train_files):
    train, val = archives
    out, end = tmp_path / "out", ("--labels", labels)
    assert "training archive first" in refused("imagenet", val, train, out, *end)
    whole = train.read_bytes()
    train.write_bytes(whole[: len(whole) // 2])
    assert str(train) in refused("imagenet", train, val, out, *end)
    train.write_bytes(whole[: len(whole) - len(whole) % 10240 - 10240])  # at a member's edge: no end mark
    assert "archive" in refused("imagenet", train, val, out, *end)
    inner = {wnid: bytearray(tar_of(files)) for wnid, files in train_files.items()}
    second = 512 + -(-len(train_files[WNIDS[1]][f"{WNIDS[1]}_0.JPEG"]) // 512) * 512
    inner[WNIDS[1]][second + 5] ^= 1  # the second header of one class archive
    train.write_bytes(tar_of({f"{wnid}.tar": bytes(body) for wnid, body in inner.items()}))
    sentence = refused("imagenet", train, val, out, *end)
    assert f"{WNIDS[1]}.tar in it" in sentence and f"a damaged header at byte {second}" in sentence
    train.write_bytes(tar_of({f"{WNIDS[0]}.tar": b"no archive at all" * 100}))
    assert f"{WNIDS[0]}.tar in it" in refused("imagenet", train, val, out, *end)
    train.write_bytes(tar_of({f"{WNIDS[0]}.tar": tar_of({})}))
    assert "class archives without an image" in refused("imagenet", train, val, out, *end)
    assert not out.exists() or not list(out.rglob("*.tar"))


def test_missing_and_unknown_labels(archives, devkit, tmp_path, refused, tar_of):
    out, bad = tmp_path / "out", tmp_path / "bad.txt"
    assert "none" in refused("imagenet", *archives, out, code=2)
    bad.write_text(f"{VAL[0]} n01440764\n")
    assert "no label for 6 images" in refused("imagenet", *archives, out, "--labels", bad)
    bad.write_text("".join(f"{name} n09999999\n" for name in VAL))
    assert "unknown classes n09999999" in refused("imagenet", *archives, out, "--labels", bad)
    assert "both" in refused("imagenet", *archives, out, "--labels", bad, "--devkit", devkit, code=2)
    for name in (devkit.parent / "absent.tar.gz", archives[1]):
        assert "--devkit" in refused("imagenet", *archives, out, "--devkit", name, code=2)
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(tar_of({"data/meta.mat": b"no matrix", "data/ILSVRC2012_validation_ground_truth.txt": b"1\n"},
                              "w:gz"))
    assert "ids that cannot be resolved" in refused("imagenet", *archives, out, "--devkit", broken)
    assert not out.exists() or not list(out.rglob("*.tar"))


def test_source_is_noted_as_in_the_unpacked_tree(archives, labels, tmp_path, shard):
    import tarfile

    shard("imagenet", *archives, tmp_path / "out", "--labels", labels, "--workers", 1)
    with tarfile.open(tmp_path / "out" / "train" / "shard-000000.tar") as tar:
        notes = {m.name: json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith(".json")}
    assert notes["n01440764/n01440764_0.json"] == {"source": "n01440764/n01440764_0.JPEG"}
