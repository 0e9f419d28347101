"""Wrong arguments and sources: an error in one line that names the cause, and no files left behind."""

import errno
import os
import re

import pytest

from data_prep import cli
from data_prep.shards import source_reader, writer
from hpcssl import cli_runner
from tests.printed import numbers_in


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_paths_that_do_not_exist_are_refused(tree, tmp_path, out, error_of):
    assert error_of("images", tmp_path / "absent", out).what == f"source {tmp_path / 'absent'}"
    (tmp_path / "notes.txt").write_text("hello " * 500)
    assert error_of("images", tmp_path / "notes.txt", out).what == f"archive {tmp_path / 'notes.txt'}"
    error = error_of("images", tree, out, "--subdir", "trian", code=2)
    assert "--subdir" in error.what and "trian" in error.what and error.expected.endswith("cat, dog, yak")
    for option in ("--labels", "--devkit"):
        error = error_of("imagenet", tmp_path / "a", tmp_path / "b", out, option, tree / "x", code=2)
        assert error.what == f"{option} {tree / 'x'}" and os.strerror(errno.ENOENT) in error.got
    (tmp_path / "labels").write_text("a b")
    for (train, val), what, code in (
        (("absent", "labels"), "TRAIN_TAR", 2),
        (("labels", "absent"), "archive", 1),
    ):
        options = ("--labels", tmp_path / "labels")
        error = error_of("imagenet", tmp_path / train, tmp_path / val, out, *options, code=code)
        assert error.what == f"{what} {tmp_path / train}"
    assert error_of("verify", tmp_path / "absent").what == f"shard folder {tmp_path / 'absent'}"
    error = error_of("show", tree)
    assert error.what == f"shard folder {tree}" and "index.json" in error.got and "cat, dog, yak" in error.got
    assert not out.exists()


def test_sources_without_images_are_refused(tmp_path, out, error_of):
    empty = tmp_path / "empty"
    empty.mkdir()
    error = error_of("images", empty, out)
    assert error.what == f"source {empty}" and error.expected == "images" and numbers_in(error.got) == []
    (empty / "text").mkdir()
    assert numbers_in(error_of("images", empty, out).got) == [1]  # folder without a file
    (empty / "text" / "a.txt").write_text("a")
    error = error_of("images", empty, out)
    assert numbers_in(error.got) == [1] and "(text/a.txt)" in error.got
    (empty / "text" / "a.txt").rename(empty / "a.tar")
    assert "hpcssl-shard webdataset" in error_of("images", empty, out).fix
    assert not out.exists()


def test_folders_that_cannot_be_classes_are_refused(tree, tmp_path, out, error_of, encode_image):
    folders = ("--classes-from", "folders")
    (tree / "emu").mkdir()
    (tree / "fox").mkdir()
    (tree / "fox" / "readme.md").write_text("later")
    error = error_of("images", tree, out, *folders)
    assert error.what == f"source {tree}" and error.got.endswith(": emu, fox")
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.jpg").write_bytes(encode_image(1))
    error = error_of("images", flat, out, *folders)
    assert error.what == f"source {flat}" and numbers_in(error.got) == [1] and "(a.jpg)" in error.got
    assert "--labels" in error.fix
    (flat / "cat").mkdir()
    (flat / "cat" / "b.jpg").write_bytes(encode_image(1))
    assert error_of("images", flat, out, *folders).got.endswith(": a.jpg")
    (tmp_path / "classes").write_text("cat\n")
    error = error_of("images", flat, out, "--classes", tmp_path / "classes", code=2)
    assert error.what == f"--classes {tmp_path / 'classes'}" and "--classes-from folders" in error.fix
    assert not out.exists()


def test_classes_that_differ_by_case_only_are_refused(tree, out, error_of, encode_image):
    (tree / "Cat").mkdir()
    (tree / "Cat" / "unlike.jpg").write_bytes(encode_image(1))
    assert error_of("images", tree, out).got == "Cat and cat"


def test_archives_with_damaged_repeated_or_unsafe_names_are_refused(tmp_path, out, error_of, tar_of, encode_image):
    archive = tmp_path / "twice.tar"
    body = tar_of({"cat/a.jpg": encode_image(1), "cat/b.jpg": encode_image(2)})
    archive.write_bytes(body.replace(b"cat/b.jpg", b"cat/a.jpg"))  # the same letters, so only the checksum differs
    error = error_of("images", archive, out)
    assert error.what == f"archive {archive}" and numbers_in(error.got) == [1536, len(body)]  # byte 1536 of them
    import io
    import tarfile

    with tarfile.open(archive, "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("cat/a.jpg")
            info.size = len(encode_image(1))
            tar.addfile(info, io.BytesIO(encode_image(1)))
    error = error_of("images", archive, out)
    assert str(archive) in error.what and error.got == "cat/a.jpg twice"
    with tarfile.open(archive, "w") as tar:
        tar.addfile(tarfile.TarInfo("cat/../../up.jpg"))
    assert "(cat/../../up.jpg)" in error_of("images", archive, out).got


@pytest.mark.parametrize("ending, mode", [("tar", "w:"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz")])
def test_truncated_archives_are_refused(tmp_path, out, error_of, tar_of, encode_image, ending, mode):
    whole = tar_of({f"cat/{i}.jpg": encode_image(i, side=128) for i in range(8)}, mode)
    for part in (0.2, 0.7):
        (tmp_path / f"a.{ending}").write_bytes(whole[: int(part * len(whole))])
        assert error_of("images", tmp_path / f"a.{ending}", out).what == f"archive {tmp_path}/a.{ending}"
        assert not out.exists()


@pytest.fixture
def flat(tmp_path, encode_image):
    """A folder of three images without class folders."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(encode_image(i))
    return folder


@pytest.mark.parametrize(
    "text, what, in_got, code",
    [
        ("0.jpg cat\n1.jpg dog\n", "labels of", "1 images: 2.jpg", 1),
        ("0.jpg cat\n0.jpg dog\n", "--labels", "0.jpg as cat and as dog", 2),
        ("0.jpg\n", "--labels", "'0.jpg'", 2),
        ("\n\n", "--labels", "", 2),
        ("0.jpg Cat\n1.jpg cat\n2.jpg dog\n", "classes of", "Cat and cat", 1),
        (b"\xff\xfe\x00", "--labels", "UTF-8", 2),
        (None, "--labels", os.strerror(errno.ENOENT), 2),
    ],
)
def test_labels_files_that_do_not_fit_are_refused(tmp_path, out, error_of, flat, text, what, in_got, code):
    labels = tmp_path / "labels.txt"
    if text is not None:
        labels.write_bytes(text if isinstance(text, bytes) else text.encode())
    error = error_of("images", flat, out, "--labels", labels, code=code)
    assert error.what == f"{what} {labels}" and in_got in error.got
    assert not out.exists()


def test_a_classes_file_without_a_class_of_the_labels_file_is_refused(tmp_path, out, error_of, flat):
    (tmp_path / "labels").write_text("0.jpg cat\n1.jpg dog\n2.jpg cat\n")
    (tmp_path / "classes").write_text("cat\n")
    options = ("--labels", tmp_path / "labels", "--classes", tmp_path / "classes")
    error = error_of("images", flat, out, *options, code=2)
    assert error.what == f"--classes {tmp_path / 'classes'}" and error.got.endswith(" dog")
    assert numbers_in(error.expected) == [2]


@pytest.mark.parametrize(
    "text, names",
    [
        ("cat\ndog\n", ["yak"]),  # a class is missing
        ("cat\ndog\nyak\nzebu\n", ["zebu"]),  # no such class
        ("cat\ndog\nyack\n", ["yak", "yack"]),
        ("cat\ncat\ndog\nyak\n", ["cat"]),  # twice
    ],
)
def test_classes_files_that_do_not_fit_are_refused(tree, tmp_path, out, error_of, text, names):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    error = error_of("images", tree, out, "--classes", path, code=2)
    assert error.what == f"--classes {path}"
    assert re.findall(r"\b(?:cat|dog|yak|yack|zebu)\b", error.got) == names
    assert not out.exists()


def test_an_output_folder_with_other_files_is_refused(tree, tmp_path, error_of):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    error = error_of("images", tree, mine)
    assert error.what == f"OUT {mine}" and "(thesis.tex)" in error.got
    assert [p.name for p in mine.iterdir()] == ["thesis.tex"]
    error = error_of("images", tree, mine / "thesis.tex", code=2)
    assert error.what == f"OUT {mine / 'thesis.tex'}" and error.got == "a file"
    (mine / "thesis.tex").rename(mine / "index.json")
    error = error_of("images", tree, mine)
    assert error.what == f"OUT {mine}" and "index.json" in error.got
    assert (mine / "index.json").read_text() == "years of work"
    for out in (tree, tree / "cat" / "shards", tree.parent):
        error = error_of("images", tree, out, code=2)
        assert error.what == f"OUT {out}" and error.got.endswith(f"SRC {tree}")


@pytest.mark.parametrize("option, value", [("--samples-per-shard", 0), ("--workers", 0), ("--skip-bad", -1)])
def test_numbers_out_of_range_are_refused(tree, out, error_of, option, value):
    error = error_of("images", tree, out, option, value, code=2)
    assert error.what == option and error.got == str(value) and not out.exists()


def test_wrong_subset_options_are_refused(tree, tmp_path, out, error_of, run_shard):
    run_shard("images", tree, out, "--workers", 1)
    part = tmp_path / "part"
    error = error_of("subset", out, part, code=2)
    assert "--" not in error.got and all(name in error.expected for name in ("--list", "--fraction", "--corrupt"))
    error = error_of("subset", out, part, "--fraction", 0.5, "--corrupt", 0.5, code=2)
    assert error.what == "subset" and error.got == "--fraction and --corrupt"
    for value in (0, -1, 1.5):
        error = error_of("subset", out, part, "--fraction", value, code=2)
        assert error.what == "--fraction" and numbers_in(error.got) == [value]
    error = error_of("subset", out, part, "--fraction", 0.5, "--rest", "unlabel", code=2)
    assert (error.what, error.got) == ("--rest", "'unlabel'") and "'unlabeled'" in error.fix
    error = error_of("subset", out, part, "--corrupt", 0.5, "--rest", "unlabeled", code=2)
    assert error.what == "--rest" and "--corrupt" in error.got
    assert "--list" in error.expected and "--fraction" in error.expected
    error = error_of("subset", tmp_path / "none", part, "--fraction", 0.5)
    assert error.what == f"shard folder {tmp_path / 'none'}"
    assert not part.exists()


def test_a_folder_that_cannot_be_read_is_an_error(tree, out, error_of, monkeypatch):
    """The error is simulated, because permissions do not apply to root, as whom tests often run."""
    real = os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    error = error_of("images", tree, out)
    assert error.what == f"folder {tree / 'dog'}" and error.got == os.strerror(errno.EACCES) and not out.exists()


def test_a_cycle_of_links_is_refused(tree, out, error_of):
    (tree / "cat" / "again").symlink_to(tree, target_is_directory=True)
    assert error_of("images", tree, out).what == f"folder {tree / 'cat' / 'again'}"


def test_finished_shards_are_kept_after_a_full_disk(tree, out, error_of, monkeypatch, run_shard):
    real, calls = writer.pack_samples, []

    def pack(*args, **options):
        for chunk in real(*args, **options):
            calls.append(1)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            yield chunk

    monkeypatch.setattr(writer, "pack_samples", pack)
    command = ["images", tree, out, "--samples-per-shard", 4, "--workers", 1]
    error = error_of(*command)
    assert error.what == f"writing {out / 'shard-000002.tar'}" and error.got == os.strerror(errno.ENOSPC)
    assert sorted(p.name for p in out.iterdir()) == [".hpcssl-shard", "shard-000000.tar", "shard-000001.tar"]
    monkeypatch.undo()
    assert run_shard(*command) == 0


def test_an_image_that_grows_while_it_is_read_is_an_error(tree, out, error_of, monkeypatch, encode_image):
    real = source_reader.SourceReader.read_file

    def read_file(self, view, path):
        if path.endswith("cat-2.jpg"):
            with open(path, "ab") as file:
                file.write(b"more")
        return real(self, view, path)

    monkeypatch.setattr(source_reader.SourceReader, "read_file", read_file)
    assert error_of("images", tree, out, "--workers", 1).what == f"source {tree / 'cat' / 'cat-2.jpg'}"


def test_usage_errors_are_printed_in_one_line(capsys):
    for argv in (
        ["imgaes"],
        ["images"],
        ["images", "a", "b", "--sampels-per-shard", "3"],
        ["subset", "a", "b", "--seed", "x"],
    ):
        assert cli_runner.run(cli.app, argv, "hpcssl-shard") == 2
        err = capsys.readouterr().err
        assert err.startswith("hpcssl-shard: ") and err.count("\n") == 1
