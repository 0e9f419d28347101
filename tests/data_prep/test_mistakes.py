"""What a new user gets wrong: one sentence with four parts, and nothing left behind."""

import errno
import os

import pytest

from data_prep import cli, writer
from hpcssl import door


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_wrong_paths(tree, tmp_path, out, refused):
    assert "no such file or folder" in refused("images", tmp_path / "absent", out, code=1)
    (tmp_path / "notes.txt").write_text("hello " * 500)
    assert "whole tar archive" in refused("images", tmp_path / "notes.txt", out)
    assert "no such folder" in refused("images", tree, out, "--under", "trian", code=2)
    for absent in ("--labels", "--devkit"):
        sentence = refused("imagenet", tmp_path / "a", tmp_path / "b", out, absent, tree / "x", code=2)
        assert absent in sentence and "No such file" in sentence
    (tmp_path / "labels").write_text("a b")
    for pair in (("absent", "labels"), ("labels", "absent")):
        sentence = refused("imagenet", *(tmp_path / p for p in pair), out, "--labels", tmp_path / "labels",
                           code=2 if pair[0] == "absent" else 1)
        assert str(tmp_path / pair[0]) in sentence
    assert "no such folder" in refused("verify", tmp_path / "absent")
    assert "no index.json" in refused("show", tree)
    assert not out.exists()


def test_sources_without_what_they_should_hold(tree, tmp_path, out, refused, picture):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "nothing in it" in refused("images", empty, out)
    (empty / "text").mkdir()
    assert "1 folders without any file" in refused("images", empty, out)
    (empty / "text" / "a.txt").write_text("a")
    assert "no image among its 1 files (text/a.txt)" in refused("images", empty, out)
    (tree / "emu").mkdir()
    (tree / "fox").mkdir()
    (tree / "fox" / "readme.md").write_text("later")
    assert "class folders without an image: emu, fox" in refused("images", tree, out)
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.jpg").write_bytes(picture(1))
    assert "1 images directly in it (a.jpg)" in refused("images", flat, out)
    (flat / "cat").mkdir()
    (flat / "cat" / "b.jpg").write_bytes(picture(1))
    assert "outside of any class folder: a.jpg" in refused("images", flat, out)
    assert not out.exists()


@pytest.mark.parametrize("pair", [("cat/A.jpg", "cat/a.jpg"), ("cat/a.jpg", "cat/a.png"), ("cat/a.JPEG", "cat/a.jpg")])
def test_names_that_clash(tmp_path, out, refused, picture, pair):
    for name in pair:
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_bytes(picture(1))
    sentence = refused("images", tmp_path / "src", out)
    assert all(name in sentence for name in pair)
    assert not out.exists()


def test_classes_that_clash_by_case(tree, out, refused, picture):
    (tree / "Cat").mkdir()
    (tree / "Cat" / "unlike.jpg").write_bytes(picture(1))
    assert "got Cat and cat" in refused("images", tree, out)


def test_one_name_twice_in_an_archive(tmp_path, out, refused, tar_of, picture):
    archive = tmp_path / "twice.tar"
    body = tar_of({"cat/a.jpg": picture(1), "cat/b.jpg": picture(2)})
    archive.write_bytes(body.replace(b"cat/b.jpg", b"cat/a.jpg"))  # the same letters, so only the checksum differs
    assert "a damaged header" in refused("images", archive, out)
    import io
    import tarfile

    with tarfile.open(archive, "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("cat/a.jpg")
            info.size = len(picture(1))
            tar.addfile(info, io.BytesIO(picture(1)))
    assert "cat/a.jpg twice" in refused("images", archive, out)
    with tarfile.open(archive, "w") as tar:
        tar.addfile(tarfile.TarInfo("cat/../../up.jpg"))
    assert "leads out of the archive" in refused("images", archive, out)


@pytest.mark.parametrize("ending, mode", [("tar", "w:"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz")])
def test_cut_archives(tmp_path, out, refused, tar_of, picture, ending, mode):
    whole = tar_of({f"cat/{i}.jpg": picture(i, side=128) for i in range(8)}, mode)
    for part in (0.2, 0.7):
        (tmp_path / f"a.{ending}").write_bytes(whole[: int(part * len(whole))])
        assert f"a.{ending}" in refused("images", tmp_path / f"a.{ending}", out)
        assert not out.exists()


def test_labels_that_do_not_fit(tmp_path, out, refused, picture):
    flat, labels = tmp_path / "flat", tmp_path / "labels.txt"
    flat.mkdir()
    for i in range(3):
        (flat / f"{i}.jpg").write_bytes(picture(i))
    cases = [("0.jpg cat\n1.jpg dog\n", "no label for 1 images: 2.jpg", 1),
             ("0.jpg cat\n0.jpg dog\n", "0.jpg as cat and as dog", 2), ("0.jpg\n", "the line '0.jpg'", 2),
             ("\n\n", "no line with text", 2), ("0.jpg Cat\n1.jpg cat\n2.jpg dog\n", "Cat and cat", 1)]
    for text, said, code in cases:
        labels.write_text(text)
        assert said in refused("images", flat, out, "--labels", labels, code=code)
    labels.write_bytes(b"\xff\xfe\x00")
    assert "no UTF-8" in refused("images", flat, out, "--labels", labels, code=2)
    assert "No such file" in refused("images", flat, out, "--labels", tmp_path / "none", code=2)
    labels.write_text("0.jpg cat\n1.jpg dog\n2.jpg cat\n")
    (tmp_path / "classes").write_text("cat\n")
    assert "it misses dog" in refused("images", flat, out, "--labels", labels, "--classes", tmp_path / "classes",
                                     code=2)


def test_class_lists_that_do_not_fit(tree, tmp_path, out, refused):
    names = tmp_path / "classes.txt"
    for text, said in (("cat\ndog\n", "it misses yak"), ("cat\ndog\nyak\nzebu\n", "it adds zebu"),
                       ("cat\ndog\nyack\n", "it misses yak and it adds yack"),
                       ("cat\ncat\ndog\nyak\n", "cat more than once")):
        names.write_text(text)
        assert said in refused("images", tree, out, "--classes", names, code=2)
    assert not out.exists()


def test_out_that_is_taken(tree, tmp_path, refused):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    assert "holds other files (thesis.tex)" in refused("images", tree, mine)
    assert [p.name for p in mine.iterdir()] == ["thesis.tex"]
    assert "got a file" in refused("images", tree, mine / "thesis.tex", code=2)
    (mine / "thesis.tex").rename(mine / "index.json")
    assert "did not write" in refused("images", tree, mine)
    for out in (tree, tree / "cat" / "shards", tree.parent):
        assert "lies in or holds SRC" in refused("images", tree, out, code=2)


@pytest.mark.parametrize("option, value", [("--samples-per-shard", 0), ("--workers", 0), ("--skip-bad", -1)])
def test_numbers_out_of_range(tree, out, refused, option, value):
    sentence = refused("images", tree, out, option, value, code=2)
    assert f"{option}: got {value}" in sentence and not out.exists()


def test_subset_options(tree, tmp_path, out, refused, shard):
    shard("images", tree, out, "--workers", 1)
    part = tmp_path / "part"
    assert "none of them" in refused("subset", out, part, code=2)
    assert "--fraction and --corrupt" in refused("subset", out, part, "--fraction", 0.5, "--corrupt", 0.5, code=2)
    for value in (0, -1, 1.5):
        assert "--fraction" in refused("subset", out, part, "--fraction", value, code=2)
    assert "did you mean 'unlabelled'" in refused("subset", out, part, "--fraction", 0.5, "--rest", "unlabeled", code=2)
    assert "leaves no sample out" in refused("subset", out, part, "--corrupt", 0.5, "--rest", "unlabelled", code=2)
    assert "no such folder" in refused("subset", tmp_path / "none", part, "--fraction", 0.5)
    assert not part.exists()


def test_a_folder_that_cannot_be_read(tree, out, refused, monkeypatch):
    """Rights do not bind the superuser, whom tests often run as, so the system's refusal is played."""
    real = os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    sentence = refused("images", tree, out)
    assert "dog: got Permission denied" in sentence and not out.exists()


def test_a_circle_of_links(tree, out, refused):
    (tree / "cat" / "again").symlink_to(tree, target_is_directory=True)
    assert "a link back" in refused("images", tree, out)


def test_disk_errors_while_writing(tree, out, refused, monkeypatch, shard):
    real, calls = writer.pack, []

    def pack(*args):
        for chunk in real(*args):
            calls.append(1)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            yield chunk

    monkeypatch.setattr(writer, "pack", pack)
    command = ["images", tree, out, "--samples-per-shard", 4, "--workers", 1]
    sentence = refused(*command)
    assert "shard-000002.tar: got No space left on device" in sentence and "finished shards are kept" in sentence
    assert sorted(p.name for p in out.iterdir()) == [".hpcssl-shard", "shard-000000.tar", "shard-000001.tar"]
    monkeypatch.undo()
    assert shard(*command) == 0


def test_an_image_that_grows_while_it_is_read(tree, out, refused, monkeypatch, picture):
    real = writer.Reader.fill_whole

    def fill_whole(self, view, path):
        if path.endswith("cat-2.jpg"):
            with open(path, "ab") as file:
                file.write(b"more")
        return real(self, view, path)

    monkeypatch.setattr(writer.Reader, "fill_whole", fill_whole)
    assert "cat-2.jpg: got another size" in refused("images", tree, out, "--workers", 1)


def test_usage_errors_are_one_line(capsys):
    for argv in (["imgaes"], ["images"], ["images", "a", "b", "--sampels-per-shard", "3"],
                 ["subset", "a", "b", "--seed", "x"]):
        assert door.run(cli.app, argv, "hpcssl-shard") == 2
        err = capsys.readouterr().err
        assert err.startswith("hpcssl-shard: ") and err.count("\n") == 1
