"""``hpcssl-shard webdataset``: tars of other programs, in which the members of a sample may lie apart."""

import io
import json
import tarfile

import pytest

from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from tests.printed import numbers_in


def tar(path, members):
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as file:  # padded to 10 KiB, as GNU tar does
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            file.addfile(info, io.BytesIO(body))


@pytest.fixture
def foreign_tars(tmp_path, encode_image):
    src = tmp_path / "foreign_tars"
    src.mkdir()
    members = [
        (f"{i:06d}.{kind}", body)
        for i in range(5)
        for kind, body in (("cls", str(i % 3).encode()), ("jpg", encode_image(i)), ("txt", b"a caption"))
    ]
    tar(src / "train-0.tar", members)
    tar(
        src / "train-1.tar",
        [(f"{i:06d}.PNG", encode_image(9 + i, "PNG")) for i in range(4)]
        + [(f"{i:06d}.cls", b"%d\n" % (2 - i % 3)) for i in range(3)],
    )
    return src


def test_members_of_a_sample_that_lie_apart_are_joined(foreign_tars, tmp_path, run_shard, encode_image, caplog):
    assert run_shard("webdataset", foreign_tars, tmp_path / "out", "--samples-per-shard", 4, "--workers", 1) == 0
    (message,) = (message for message in caplog.messages if "(000000, 000001, 000002)" in message)
    assert numbers_in(message)[0] == 3
    shards = ShardSet.open(tmp_path / "out")
    expected = {f"train-0/{i:06d}": (encode_image(i), i % 3) for i in range(5)}
    expected |= {f"train-1/{i:06d}": (encode_image(9 + i, "PNG"), 2 - i if i < 3 else -1) for i in range(4)}
    with Reader(shards) as reader:
        assert {shards.key(i): (reader.read(i), int(shards.labels[i])) for i in range(len(shards))} == expected
    assert shards.classes == ["0", "1", "2"] and run_shard("verify", tmp_path / "out", "--workers", 1) == 0


def test_a_classes_file_names_the_classes(foreign_tars, tmp_path, run_shard):
    (tmp_path / "names").write_text("ant\nbee\ncow\n")
    assert (
        run_shard("webdataset", foreign_tars, tmp_path / "named", "--classes", tmp_path / "names", "--workers", 1) == 0
    )
    assert ShardSet.open(tmp_path / "named").classes == ["ant", "bee", "cow"]


def test_a_classes_file_with_too_few_names_is_refused(foreign_tars, tmp_path, error_of):
    (tmp_path / "names").write_text("ant\n")
    error = error_of("webdataset", foreign_tars, tmp_path / "out", "--classes", tmp_path / "names")
    assert str(tmp_path / "names") in error.what and numbers_in(error.got) == [1, 2]  # names, and the largest label
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "values, field, classes, labels",
    [
        ([2, 0, -1], "label", ["0", "1", "2"], [2, 0, -1]),
        (["cow", "ant", None], "label", ["ant", "cow"], [1, 0, -1]),
        ([{"id": 1}, {"id": 0}, {"id": 1}], "label.id", ["0", "1"], [1, 0, 1]),
        ([["b", "a"], [], ["b"]], "label", ["a", "b"], [[1, 1], [-1, -1], [-1, 1]]),
        ([[1], [0, 1], None], "label", ["0", "1"], [[-1, 1], [1, 1], [0, 0]]),
    ],
)
def test_labels_in_json(tmp_path, run_shard, encode_image, caplog, values, field, classes, labels):
    src = tmp_path / "src"
    src.mkdir()
    members = [
        (f"{n}.{kind}", body)
        for n, value in enumerate(values)
        for kind, body in (
            ("webp", encode_image(n, "WEBP")),
            ("json", json.dumps({"caption": "x", "label": value}).encode()),
        )
    ]
    tar(src / "x.tar", members)
    assert run_shard("webdataset", src, tmp_path / "plain", "--workers", 1) == 0
    assert (ShardSet.open(tmp_path / "plain").labels == -1).all()
    (note,) = (message for message in caplog.messages if "--label json:" in message)
    assert "caption, label" in note
    assert run_shard("webdataset", src, tmp_path / "out", "--label", f"json:{field}", "--workers", 1) == 0
    shards = ShardSet.open(tmp_path / "out")
    found = shards.labels if shards.targets is None else shards.targets
    assert shards.classes == classes
    assert {shards.key(n): row for n, row in enumerate(found.tolist())} == {f"x/{n}": v for n, v in enumerate(labels)}
    assert run_shard("verify", tmp_path / "out", "--workers", 1) == 0


@pytest.mark.parametrize(
    "body, label, code",
    [(b"{", "json:label", 1), (b'{"label": 0.5}', "json:label", 1), (b'{"a": 1}', "json:b", 2), (b"{}", "txt", 2)],
)
def test_labels_in_json_that_cannot_be_used_are_refused(tmp_path, error_of, encode_image, body, label, code):
    (tmp_path / "src").mkdir()
    tar(tmp_path / "src" / "x.tar", [("0.jpg", encode_image(0)), ("0.json", body)])
    error = error_of("webdataset", tmp_path / "src", tmp_path / "out", "--label", label, code=code)
    assert not (tmp_path / "out").exists() and (str(tmp_path / "src") in error.what or "--label" in error.what)


def test_tars_are_divided_too(foreign_tars, tmp_path, run_shard):
    assert run_shard("webdataset", foreign_tars, tmp_path / "out", "--val", 0.3, "--workers", 1) == 0
    assert [len(ShardSet.open(tmp_path / "out" / part)) for part in ("train", "val")] == [6, 3]


def test_folders_without_tars_of_others_are_refused(foreign_tars, tmp_path, error_of, run_shard):
    (tmp_path / "empty").mkdir()
    assert run_shard("webdataset", foreign_tars, tmp_path / "written", "--workers", 1) == 0
    for folder, in_got in ((tmp_path / "empty", "*.tar"), (tmp_path / "absent", ""), (tmp_path / "written", "")):
        error = error_of("webdataset", folder, tmp_path / "out")
        assert str(folder) in error.what and in_got in error.got
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "members, in_got",
    [
        ([("a.jpg", 0), ("a.cls", b"cat")], "b'cat'"),
        ([("a.cls", b"1")], "sample a with cls"),
        ([("a.jpg", 0), ("a.png", 0)], "sample a with jpg, png"),
        ([("a.jpg", 0), ("a.jpg", 1)], "a.jpg twice"),
    ],
)
def test_samples_without_one_image_and_one_class_number_are_refused(tmp_path, error_of, encode_image, members, in_got):
    src = tmp_path / "src"
    src.mkdir()
    kinds = {"jpg": "JPEG", "png": "PNG"}
    tar(
        src / "x.tar",
        [(n, encode_image(body, kinds[n[-3:]]) if isinstance(body, int) else body) for n, body in members],
    )
    error = error_of("webdataset", src, tmp_path / "out")
    assert str(src) in error.what and in_got in error.got and not (tmp_path / "out").exists()


def test_a_truncated_tar_is_refused(foreign_tars, tmp_path, error_of):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "x.tar").write_bytes((foreign_tars / "train-0.tar").read_bytes()[:3000])
    error = error_of("webdataset", tmp_path / "src", tmp_path / "out")
    assert str(tmp_path / "src" / "x.tar") in error.what and not (tmp_path / "out").exists()
