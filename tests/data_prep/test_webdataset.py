"""Tars that others wrote: every sample with its own label, wherever its members lie."""

import io
import tarfile

import pytest

from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet


def tar(path, members):
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as file:  # padded to 10 KiB, as GNU tar does
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            file.addfile(info, io.BytesIO(body))


@pytest.fixture
def theirs(tmp_path, picture):
    src = tmp_path / "theirs"
    src.mkdir()
    side_by_side = [(f"{i:06d}.{kind}", body) for i in range(5)
                    for kind, body in (("cls", str(i % 3).encode()), ("jpg", picture(i)), ("txt", b"a caption"))]
    tar(src / "train-0.tar", side_by_side)
    tar(src / "train-1.tar", [(f"{i:06d}.PNG", picture(9 + i, "PNG")) for i in range(4)]
        + [(f"{i:06d}.cls", b"%d\n" % (2 - i % 3)) for i in range(3)])
    return src


def test_members_that_lie_apart_are_joined(theirs, tmp_path, shard, picture, caplog):
    assert shard("webdataset", theirs, tmp_path / "out", "--samples-per-shard", 4, "--workers", 1) == 0
    assert "3 samples have members that do not lie side by side (000000, 000001, 000002)" in caplog.text
    found = ShardSet.open(tmp_path / "out")
    expected = {f"train-0/{i:06d}": (picture(i), i % 3) for i in range(5)}
    expected |= {f"train-1/{i:06d}": (picture(9 + i, "PNG"), 2 - i if i < 3 else -1) for i in range(4)}
    with Reader(found) as reader:
        assert {found.key(i): (reader.read(i), int(found.labels[i])) for i in range(len(found))} == expected
    assert found.classes == ["0", "1", "2"] and shard("verify", tmp_path / "out", "--workers", 1) == 0


def test_names_of_classes_and_mistakes(theirs, tmp_path, shard, picture, capfd):
    (tmp_path / "names").write_text("ant\nbee\ncow\n")
    assert shard("webdataset", theirs, tmp_path / "named", "--classes", tmp_path / "names", "--workers", 1) == 0
    assert ShardSet.open(tmp_path / "named").classes == ["ant", "bee", "cow"]
    (tmp_path / "names").write_text("ant\n")
    (tmp_path / "empty").mkdir()
    cases = [((theirs, "--classes", tmp_path / "names"), "1 names, and a label 2 in the tars"),
             ((tmp_path / "empty",), "no *.tar (nothing)"), ((tmp_path / "nowhere",), "no such folder"),
             ((tmp_path / "named",), "which hpcssl-shard wrote")]
    for members, said in (([("a.jpg", picture(0)), ("a.cls", b"cat")], "a.cls, which says b'cat'"),
                          ([("a.cls", b"1")], "sample a with cls"),
                          ([("a.jpg", picture(0)), ("a.png", picture(0, "PNG"))], "sample a with jpg, png"),
                          ([("a.jpg", picture(0)), ("a.jpg", picture(1))], "a.jpg twice")):
        src = tmp_path / f"bad-{len(cases)}"
        src.mkdir()
        tar(src / "x.tar", members)
        cases.append(((src,), said))
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "x.tar").write_bytes((theirs / "train-0.tar").read_bytes()[:3000])
    for given, said in [*cases, ((cut,), "a whole tar archive")]:
        capfd.readouterr()
        assert shard("webdataset", given[0], tmp_path / "out", *given[1:]) in (1, 2)
        err = capfd.readouterr().err
        assert said in err and err.count("\n") == 1 and not (tmp_path / "out").exists(), err
