"""Several labels per image: ``ShardSet.targets`` through writing, resuming, subsets and verification."""

import hashlib
import io
import json

import numpy as np
import pytest

from data_prep import build
from data_prep.catalog import Catalog, Sample
from hpcssl.data.shards import ShardSet
from hpcssl.data.stage import stage
from hpcssl.errors import DataError

TRUTH = {f"{i}.jpg": [(-1, 0, 1)[(i + c) % 3] for c in range(4)] for i in range(10)}


@pytest.fixture
def out(tmp_path, encode_image):
    """A function that writes ten images with targets for four classes, in shards of four; it was called once."""
    body = encode_image(1)
    (tmp_path / "image").write_bytes(body)

    def write():
        rows = [
            Sample(source, -1, str(tmp_path / "image"), 0, len(body), 0, extra_json=json.dumps({"targets": targets}))
            for source, targets in TRUTH.items()
        ]
        with build.claim_folder(tmp_path / "out") as work:
            build.write_folder(
                work,
                Catalog(list("abcd"), rows, {"dataset": "toy"}),
                build.WriteOptions(workers=1, samples_per_shard=4),
            )

    write()
    return write


def targets_by_key(folder):
    shards = ShardSet.open(folder)
    assert shards.targets.dtype == np.int8 and shards.targets.shape == (len(shards), len(shards.classes))
    return {f"{shards.key(i)}.jpg": shards.targets[i].tolist() for i in range(len(shards))}


def test_targets_belong_to_their_samples_after_writing_and_repair(out, tmp_path, run_shard, content, capsys):
    assert targets_by_key(tmp_path / "out") == TRUTH and ShardSet.open(tmp_path / "out").meta["dataset"] == "toy"
    before = content(tmp_path / "out")
    for name in ("shard-000001.tar", "targets.npy"):
        (tmp_path / "out" / name).unlink()
        out()
        assert content(tmp_path / "out") == before
    assert run_shard("verify", tmp_path / "out", "--workers", 1) == 0
    capsys.readouterr()
    assert run_shard("show", tmp_path / "out") == 0
    records = capsys.readouterr().out
    counts = [sum(t[c] == 1 for t in TRUTH.values()) for c in range(4)]
    assert "unlabeled\t0\n" in records and all(
        f"class\t{c}\t{'abcd'[c]}\t{n}\n" in records for c, n in enumerate(counts)
    )


def test_a_subset_keeps_targets_and_the_data_set(out, tmp_path, run_shard):
    assert run_shard("subset", tmp_path / "out", tmp_path / "half", "--fraction", 0.5, "--workers", 1) == 0
    half = targets_by_key(tmp_path / "half")
    assert len(half) == 5 and half.items() <= TRUTH.items()
    assert ShardSet.open(tmp_path / "half").meta["dataset"] == "toy"
    assert (
        run_shard(
            "subset", tmp_path / "out", tmp_path / "semi", "--fraction", 0.5, "--rest", "unlabeled", "--workers", 1
        )
        == 0
    )
    assert targets_by_key(tmp_path / "semi") == {key: t if key in half else [0] * 4 for key, t in TRUTH.items()}


def test_a_staged_set_has_the_same_targets(out, tmp_path):
    shards = ShardSet.open(tmp_path / "out")
    staged = stage(shards, tmp_path / "disk")
    assert staged.root != shards.root and np.array_equal(staged.targets, shards.targets)


def test_shards_with_single_labels_have_no_targets(tree, tmp_path, run_shard):
    run_shard("images", tree, tmp_path / "single", "--workers", 1)
    assert (
        ShardSet.open(tmp_path / "single").targets is None and "dataset" not in ShardSet.open(tmp_path / "single").meta
    )


def test_damaged_targets_are_refused_and_wrong_ones_found_by_verify(out, tmp_path, run_shard, capsys):
    path = tmp_path / "out" / "targets.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 2]))
    with pytest.raises(DataError) as caught:
        ShardSet.open(tmp_path / "out")
    assert caught.value.what == f"shard folder {tmp_path / 'out'}" and "targets.npy" in caught.value.got
    assert hashlib.sha256(whole).hexdigest()[:12] in caught.value.expected
    path.unlink()
    with pytest.raises(DataError) as caught:
        ShardSet.open(tmp_path / "out")
    assert "FileNotFoundError" in caught.value.got and str(path) in caught.value.got

    wrong = np.load(io.BytesIO(whole))  # as a faulty writer leaves it: consistent, but different from the shards
    wrong[3] = -wrong[3]
    body = io.BytesIO()
    np.save(body, wrong)
    path.write_bytes(body.getvalue())
    meta = json.loads((tmp_path / "out" / "index.json").read_text())
    meta["targets_sha256"] = hashlib.sha256(body.getvalue()).hexdigest()
    (tmp_path / "out" / "index.json").write_text(json.dumps(meta))
    capsys.readouterr()
    assert run_shard("verify", tmp_path / "out", "--workers", 1) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "\tsample 3\t" in lines[0] and "targets" in lines[0].split("\t")[-1]
