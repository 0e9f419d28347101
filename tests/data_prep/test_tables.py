"""Images in Parquet and Arrow files, and in the folders that Hugging Face's ``save_to_disk`` writes."""

import json

import pytest

from data_prep.sources import tables
from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError
from tests.data_prep.conftest import encode
from tests.data_prep.test_own_images import KINDS, encode_kind, read_sources, sources_of

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ["ant", "bee", "cow"]
BODIES = [
    encode_kind(n, KINDS[n % len(KINDS)][0], KINDS[n % len(KINDS)][2]) for n in range(70)
]  # over one batch of rows
CLASS_LABEL = {"_type": "ClassLabel", "names": NAMES}


def make_table(labels, feature=None, *, paths=True, column="label"):
    """A table as ``datasets`` stores images: a struct of bytes and path, and the features in the metadata."""
    images = [{"bytes": body, "path": f"{n}.img" if paths else None} for n, body in enumerate(BODIES)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(images, kind)} | ({column: pa.array(labels)} if labels is not None else {})
    features = {"image": {"_type": "Image"}} | ({column: feature} if feature else {})
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def save_to_disk(table, folder):
    """Write what ``Dataset.save_to_disk`` writes: a stream of Arrow beside two small JSON files."""
    folder.mkdir(parents=True)
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table, max_chunksize=40)
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_text("{}")


def write_table(table, path, kind):
    """Write a table in one of the forms that are read; returns the source and its options."""
    if kind == "parquet":
        pq.write_table(table, path / "t.parquet")
        return path / "t.parquet", []
    if kind == "feather":
        with pa.OSFile(str(path / "t.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
            out.write_table(table)
        return path / "t.arrow", []
    if kind == "saved":
        save_to_disk(table, path / "saved")
        return path / "saved", []
    if kind == "saved parts":
        for part, rows in (("train", table), ("test", table.slice(0, 3))):
            save_to_disk(rows, path / "saved" / part)
        (path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        return path / "saved", ["--part", "train"]
    (path / "hub" / "data").mkdir(parents=True)  # as the hub lays out Parquet
    for number, rows in enumerate((table.slice(0, 30), table.slice(30))):
        pq.write_table(rows, path / "hub" / "data" / f"train-{number:05d}-of-00002.parquet")
    pq.write_table(table.slice(0, 3), path / "hub" / "data" / "test-00000-of-00001.parquet")
    return path / "hub", ["--part", "train"]


@pytest.mark.parametrize("kind", ["parquet", "feather", "saved", "saved parts", "hub"])
def test_every_kind_of_table_gives_the_same_shards(tmp_path, run_shard, error_of, kind):
    labels = [n % 3 for n in range(len(BODIES))]
    src, options = write_table(make_table(labels, CLASS_LABEL), tmp_path, kind)
    if options:
        error = error_of("images", src, tmp_path / "out", code=2)
        assert "test, train" in error.expected and not (tmp_path / "out").exists()
        assert error_of("images", src, tmp_path / "out", "--part", "tran", code=2).what == "--part tran"
    assert run_shard("images", src, tmp_path / "out", *options, "--workers", 1, "--samples-per-shard", 30) == 0
    shards = ShardSet.open(tmp_path / "out")
    assert shards.classes == NAMES
    assert read_sources(tmp_path / "out") == {f"{n}.img": body for n, body in enumerate(BODIES)}
    truth = {f"{n}.img": label for n, label in enumerate(labels)}
    assert dict(zip(sources_of(shards), shards.labels.tolist(), strict=True)) == truth
    assert not any("source" in path.name for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "labels, feature, classes, first",
    [
        (None, None, [], -1),
        (["b", "a"] * 35, None, ["a", "b"], 1),
        ([2, 0] * 35, None, ["0", "1", "2"], 2),
        ([-1, 0] * 35, CLASS_LABEL, NAMES, -1),
        ([None, "a"] * 35, None, ["a"], -1),
        ([[0, 2], []] * 35, {"_type": "List", "feature": CLASS_LABEL}, NAMES, [1, -1, 1]),
        ([["b"], ["a", "b"]] * 35, None, ["a", "b"], [-1, 1]),
    ],
)
def test_labels_are_numbers_names_or_lists(tmp_path, run_shard, labels, feature, classes, first):
    pq.write_table(make_table(labels, feature, paths=False), tmp_path / "t.parquet")
    assert run_shard("images", tmp_path / "t.parquet", tmp_path / "out", "--workers", 1) == 0
    shards = ShardSet.open(tmp_path / "out")
    position = next(n for n, name in enumerate(sources_of(shards)) if name.startswith("00000000."))
    found = shards.labels if shards.targets is None else shards.targets
    assert shards.classes == classes and found[position].tolist() == first


def test_several_labels_in_a_text_are_separated_on_request(tmp_path, run_shard):
    pq.write_table(make_table(["b|a", "b; c"] * 35), tmp_path / "t.parquet")
    assert run_shard("images", tmp_path / "t.parquet", tmp_path / "out", "--multi-label", "--workers", 1) == 0
    shards = ShardSet.open(tmp_path / "out")
    assert shards.classes == ["a", "b", "c"]
    assert shards.targets[sources_of(shards).index("0.img")].tolist() == [1, 1, -1]


def test_columns_can_be_named(tmp_path, run_shard, error_of):
    table = pa.table({"a": BODIES[:4], "b": [encode(n) for n in range(4)], "kind": ["x", "y"] * 2})
    pq.write_table(table, tmp_path / "t.parquet")
    src, out = tmp_path / "t.parquet", tmp_path / "out"
    assert "a, b" in error_of("images", src, out, code=2).got
    assert error_of("images", src, out, "--image", "kind", code=2).what == "--image kind"
    error = error_of("images", src, out, "--image", "b", "--label", "sort", code=2)
    assert error.what == "--label sort" and "kind" in error.expected and not out.exists()
    assert run_shard("images", src, out, "--image", "b", "--label", "kind", "--workers", 1) == 0
    assert set(read_sources(out).values()) == {encode(n) for n in range(4)}
    assert ShardSet.open(out).classes == ["x", "y"]


@pytest.mark.parametrize("kind", ["parquet", "feather", "saved"])
def test_damaged_tables_are_refused(tmp_path, error_of, kind):
    src, _ = write_table(make_table(None), tmp_path, kind)
    path = src if src.is_file() else next(src.glob("*.arrow"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    error = error_of("images", src, tmp_path / "out", "--workers", 1)
    assert error.what == f"table {path}" and not (tmp_path / "out").exists()


def test_rows_without_an_image_are_broken(tmp_path, run_shard, error_of):
    (tmp_path / "outside.jpg").write_bytes(encode(5))
    cells = [{"bytes": encode(1), "path": "a"}, {"bytes": None, "path": "outside.jpg"}, {"bytes": None, "path": "gone"}]
    pq.write_table(pa.table({"image": cells}), tmp_path / "t.parquet")
    assert "gone" in error_of("images", tmp_path / "t.parquet", tmp_path / "out", "--workers", 1).got
    assert run_shard("images", tmp_path / "t.parquet", tmp_path / "out", "--workers", 1, "--skip-bad", 1) == 0
    assert read_sources(tmp_path / "out") == {"a": encode(1), "outside.jpg": encode(5)}


def test_labels_that_are_no_numbers_of_classes_are_refused(tmp_path, error_of):
    for labels, feature in (([0.5] * 70, None), ([3] * 70, CLASS_LABEL), ([-2, 1] * 35, None)):
        pq.write_table(make_table(labels, feature), tmp_path / "t.parquet")
        code = 2 if feature is None and labels[0] == 0.5 else 1
        error = error_of("images", tmp_path / "t.parquet", tmp_path / "out", code=code)
        assert error.what == f"column label of {tmp_path / 't.parquet'}" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "part", "found"),
    [
        (["0000.parquet", "0001.parquet"], "", ["0000.parquet", "0001.parquet"]),
        (["a-b-0-of-2.parquet", "a-b-1-of-2.parquet"], "", ["a-b-0-of-2.parquet", "a-b-1-of-2.parquet"]),
        (["x-test.arrow", "x-train.arrow"], "x-test", ["x-test.arrow"]),
        (["x-test.arrow", "x-train.arrow"], "", "x-test and x-train"),
    ],
)
def test_numbers_of_files_are_no_parts_and_parts_are_not_mixed(tmp_path, names, part, found):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    if isinstance(found, list):
        assert [path.name for path in tables.find_tables(tmp_path, part)] == found
        return
    with pytest.raises(ConfigError) as caught:
        tables.find_tables(tmp_path, part)
    assert all(name in caught.value.expected for name in found.split(" and "))
