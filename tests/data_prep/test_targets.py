"""Several labels per image: ``ShardSet.targets`` through writing, resuming, subsets and verification."""

import hashlib
import io
import json

import numpy as np
import pytest

from data_prep import build
from data_prep.catalogue import Catalogue, Sample
from hpcssl.data.shards import ShardSet
from hpcssl.data.stage import stage
from hpcssl.errors import DataError

TRUTH = {f"{i}.jpg": [(-1, 0, 1)[(i + c) % 3] for c in range(4)] for i in range(10)}


@pytest.fixture
def out(tmp_path, picture):
    """Ten images with targets for four classes, in shards of four; calling it writes them again."""
    body = picture(1)
    (tmp_path / "image").write_bytes(body)

    def write():
        rows = [Sample(source, -1, str(tmp_path / "image"), 0, len(body), 0, more=json.dumps({"targets": targets}))
                for source, targets in TRUTH.items()]
        with build.claim(tmp_path / "out") as work:
            build.write(work, Catalogue(list("abcd"), rows, {"dataset": "toy"}),
                        build.Options(workers=1, samples_per_shard=4))

    write()
    return write


def by_key(folder):
    found = ShardSet.open(folder)
    assert found.targets.dtype == np.int8 and found.targets.shape == (len(found), len(found.classes))
    return {f"{found.key(i)}.jpg": found.targets[i].tolist() for i in range(len(found))}


def test_targets_follow_their_samples(out, tmp_path, shard, content, capsys):
    assert by_key(tmp_path / "out") == TRUTH and ShardSet.open(tmp_path / "out").meta["dataset"] == "toy"
    before = content(tmp_path / "out")
    for lost in ("shard-000001.tar", "targets.npy"):
        (tmp_path / "out" / lost).unlink()
        out()
        assert content(tmp_path / "out") == before
    assert shard("verify", tmp_path / "out", "--workers", 1) == 0
    capsys.readouterr()
    assert shard("show", tmp_path / "out") == 0
    said = capsys.readouterr().out
    counts = [sum(t[c] == 1 for t in TRUTH.values()) for c in range(4)]
    assert "unlabelled\t0\n" in said and all(f"class\t{c}\t{'abcd'[c]}\t{n}\n" in said for c, n in enumerate(counts))


def test_a_subset_keeps_targets_and_the_data_set(out, tmp_path, shard):
    assert shard("subset", tmp_path / "out", tmp_path / "half", "--fraction", 0.5, "--workers", 1) == 0
    half = by_key(tmp_path / "half")
    assert len(half) == 5 and half.items() <= TRUTH.items()
    assert ShardSet.open(tmp_path / "half").meta["dataset"] == "toy"
    assert shard("subset", tmp_path / "out", tmp_path / "semi", "--fraction", 0.5, "--rest", "unlabelled",
                 "--workers", 1) == 0
    assert by_key(tmp_path / "semi") == {key: t if key in half else [0] * 4 for key, t in TRUTH.items()}


def test_staged_targets_are_the_same(out, tmp_path):
    found = ShardSet.open(tmp_path / "out")
    staged = stage(found, tmp_path / "disk")
    assert staged.root != found.root and np.array_equal(staged.targets, found.targets)


def test_single_labels_have_no_targets(tree, tmp_path, shard):
    shard("images", tree, tmp_path / "single", "--workers", 1)
    assert ShardSet.open(tmp_path / "single").targets is None and "dataset" not in ShardSet.open(
        tmp_path / "single").meta


def test_damaged_targets_are_refused_and_other_ones_found(out, tmp_path, shard, capsys):
    path = tmp_path / "out" / "targets.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 2]))
    with pytest.raises(DataError, match=r"targets\.npy with another sha256"):
        ShardSet.open(tmp_path / "out")
    path.unlink()
    with pytest.raises(DataError, match="an index that cannot be read"):
        ShardSet.open(tmp_path / "out")

    wrong = np.load(io.BytesIO(whole))  # as a wrong writer would leave it: consistent, and not what the shards say
    wrong[3] = -wrong[3]
    body = io.BytesIO()
    np.save(body, wrong)
    path.write_bytes(body.getvalue())
    meta = json.loads((tmp_path / "out" / "index.json").read_text())
    meta["targets_sha256"] = hashlib.sha256(body.getvalue()).hexdigest()
    (tmp_path / "out" / "index.json").write_text(json.dumps(meta))
    capsys.readouterr()
    assert shard("verify", tmp_path / "out", "--workers", 1) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "\tsample 3\t" in lines[0] and lines[0].endswith("other targets than the index")
