"""``hpcssl-shard images`` on what people have: any layout of folders, any format, broken files, and what it prints."""

import csv
import io
import os
import shlex

import numpy as np
import pytest
from PIL import Image

from data_prep.next_commands import next_commands
from hpcssl import cli as training_cli
from hpcssl.config import read_yaml
from hpcssl.data.decode import decode
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from hpcssl.planning import dry_run as dry_runs
from tests.data_prep.conftest import encode

KINDS = (  # format, suffix, mode
    ("JPEG", "jpg", "RGB"),
    ("JPEG", "JPG", "CMYK"),
    ("PNG", "png", "RGBA"),
    ("PNG", "png", "P"),
    ("PNG", "png", "I;16"),
    ("PNG", "png", "1"),
    ("WEBP", "webp", "RGB"),
    ("TIFF", "tif", "CMYK"),
    ("GIF", "gif", "P"),
    ("BMP", "bmp", "RGB"),
    ("AVIF", "avif", "RGB"),
    ("HEIF", "heic", "RGB"),
    ("JPEG2000", "jp2", "RGB"),
    ("PPM", "ppm", "RGB"),
)


def encode_kind(number, kind, mode):
    """Encode a picture of its own in any format and mode."""
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    picture = Image.open(io.BytesIO(encode(number, "PNG", 24 + number % 9)))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        picture = picture.convert(mode)
    body = io.BytesIO()
    picture.save(body, kind)
    return body.getvalue()


@pytest.fixture
def album(tmp_path):
    """Pictures of all formats, nested by date, without classes. Returns the folder and {name: content}."""
    src = tmp_path / "album"
    files = {}
    for number in range(84):
        kind, suffix, mode = KINDS[number % len(KINDS)]
        # in pairs of one name and two suffixes, as cameras write them
        files[f"{2020 + number % 3}/{number % 12:02d}/IMG_{number // 2:04d}.{suffix}"] = encode_kind(number, kind, mode)
    write(src, files)
    return src, files


def write(folder, files):
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)


def read_sources(folder):
    """The bytes of every sample by its name in the source."""
    shards = ShardSet.open(folder)
    with Reader(shards) as reader:
        return {source: reader.read(n) for n, source in enumerate(sources_of(shards))}


def sources_of(shards):
    """Names in the source, in the order of the index."""
    from data_prep.shards.reader import iterate_samples, parse_sample_json

    names = []
    for number in range(len(shards.shards)):
        with open(shards.path(number), "rb") as file:
            for _, members in iterate_samples(file):
                json = members["json"]
                names.append(parse_sample_json(os.pread(file.fileno(), json.size, json.offset))["source"])
    return names


def left_out(folder):
    return {row["name"]: row for row in csv.DictReader((folder / "left_out.csv").read_text().splitlines())}


def test_every_format_is_kept_as_it_is_and_decodes(album, tmp_path, run_shard, capsys):
    src, files = album
    assert run_shard("images", src, tmp_path / "out", "--workers", 1) == 0
    assert "no classes" in capsys.readouterr().out
    shards = ShardSet.open(tmp_path / "out")
    assert shards.classes == [] and (shards.labels == -1).all()
    stored = read_sources(tmp_path / "out")
    assert stored == files
    assert all(decode(body).ndim == 3 for body in stored.values())
    assert run_shard("verify", tmp_path / "out", "--workers", 1) == 0
    assert not (tmp_path / "out" / "left_out.csv").exists()


def test_files_that_are_no_images_are_listed_and_broken_images_are_an_error(album, tmp_path, run_shard, error_of):
    src, files = album
    broken = {"2020/00/cut.jpg": encode(1)[:300], "2020/zero.png": b"", "2020/page.jpg": b"<html>", "f.tif": None}
    floats = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(floats, "TIFF")
    broken["f.tif"] = floats.getvalue()
    others = {"Thumbs.db": b"\0" * 50, "2020/.DS_Store": b"x", "2020/a.xmp": b"<x/>", "b.NEF": b"MM\0*" + bytes(60)}
    clip = {"2021/clip.mp4": b"\0\0\0\x18ftypmp42" + bytes(40), "@eaDir/thumb.jpg": encode(1)}
    unnamed = {"2021/no suffix": encode(3), "2021/photo.jpg-large": encode(4, "WEBP")}
    write(src, broken | others | clip | unnamed)
    error = error_of("images", src, tmp_path / "out", "--workers", 1)
    assert error.what == "images of the source" and all(name in error.got for name in broken)
    assert "--skip-bad 4" in error.fix and not (tmp_path / "out" / "index.json").exists()
    for _ in range(2):
        assert {name for name, row in left_out(tmp_path / "out").items() if row["broken"] == "yes"} == set(broken)
        assert run_shard("images", src, tmp_path / "out", "--workers", 1, "--skip-bad", 4) == 0
    assert {name for name, row in left_out(tmp_path / "out").items() if row["broken"] == "no"} == {
        *others,
        "2021/clip.mp4",
        "@eaDir/",
    }
    assert read_sources(tmp_path / "out") == files | unnamed


def test_an_image_with_too_many_pixels_is_named_when_it_is_written(tmp_path, error_of, monkeypatch, encode_image):
    from hpcssl.data import decode as decoder

    monkeypatch.setattr(decoder, "MAX_PIXELS", 32 * 32 - 1)
    write(
        tmp_path / "src", {"a.jpg": encode_image(1), "b.png": encode_image(2, "PNG"), "c.jpg": encode_image(3, side=9)}
    )
    error = error_of("images", tmp_path / "src", tmp_path / "out", "--workers", 1)
    assert "a.jpg" in error.got and "b.png" in error.got and "1023" in error.got and "c.jpg" not in error.got


def test_images_below_a_size_are_left_out_on_request(tmp_path, run_shard, encode_image):
    write(
        tmp_path / "src",
        {f"{side}.{kind.lower()}": encode_image(1, kind, side) for side in (8, 9) for kind in ("JPEG", "PNG")},
    )
    assert run_shard("images", tmp_path / "src", tmp_path / "out", "--min-side", 9, "--workers", 1) == 0
    assert set(read_sources(tmp_path / "out")) == {"9.jpeg", "9.png"}
    assert {name: row["broken"] for name, row in left_out(tmp_path / "out").items()} == {"8.jpeg": "no", "8.png": "no"}


@pytest.mark.parametrize(
    "names, options, classes",
    [
        (["a.jpg", "b.jpg"], [], []),
        (["x/a.jpg", "x/b.jpg"], [], []),  # one folder tells nothing apart
        (["x/a.jpg", "y/b.jpg"], [], ["x", "y"]),
        (["x/a.jpg", "y/b.jpg"], ["--classes-from", "none"], []),
        (["x/a.jpg", "y/z/b.jpg"], [], []),
        (["x/a.jpg", "y/z/b.jpg"], ["--classes-from", "folders"], ["x", "y"]),
        (["x/a.jpg", "b.jpg"], [], []),
    ],
)
def test_folders_are_classes_only_where_every_image_lies_in_one(tmp_path, run_shard, names, options, classes):
    write(tmp_path / "src", {name: encode(n) for n, name in enumerate(names)})
    (tmp_path / "src" / "empty").mkdir() if "folders" not in options else None
    assert run_shard("images", tmp_path / "src", tmp_path / "out", *options, "--workers", 1) == 0
    shards = ShardSet.open(tmp_path / "out")
    assert shards.classes == classes
    labels = dict(zip(sources_of(shards), shards.labels.tolist(), strict=True))
    assert labels == {name: classes.index(name.split("/")[0]) if classes else -1 for name in names}


@pytest.mark.parametrize("pair", [("c/A.jpg", "c/a.jpg"), ("c/a.jpg", "c/a.png"), ("c/a.heic", "c/a.JPG")])
def test_names_that_differ_by_case_or_suffix_get_different_keys(tmp_path, run_shard, pair):
    write(tmp_path / "src", {name: encode(n) for n, name in enumerate(pair)})
    assert run_shard("images", tmp_path / "src", tmp_path / "out", "--workers", 1) == 0
    shards = ShardSet.open(tmp_path / "out")
    assert len({shards.key(n).casefold() for n in range(2)}) == 2
    assert run_shard("subset", tmp_path / "out", tmp_path / "part", "--fraction", 1, "--workers", 1) == 0
    part = ShardSet.open(tmp_path / "part")
    assert {part.key(n) for n in range(2)} == {shards.key(n) for n in range(2)}


def test_a_long_name_has_room_for_a_long_suffix(tmp_path, run_shard):
    """A name of 96 letters with .jpg fits into one header block; the same with .webp does not."""
    names = [f"{'n' * (96 - len(str(n)))}{n}" for n in range(3)]
    bodies = {name: encode(n, kind) for n, (name, kind) in enumerate(zip(names, ("WEBP", "JPEG", "WEBP"), strict=True))}
    write(tmp_path / "src", bodies)
    assert run_shard("images", tmp_path / "src", tmp_path / "out", "--workers", 1) == 0
    assert read_sources(tmp_path / "out") == bodies and run_shard("verify", tmp_path / "out", "--workers", 1) == 0


def test_heic_without_its_plugin_is_named_with_the_package(tmp_path, error_of, monkeypatch):
    from hpcssl.data import decode as decoder

    body = encode_kind(0, "HEIF", "RGB")
    monkeypatch.setattr(decoder, "_register_heic", lambda: ())
    write(tmp_path / "src", {"a.heic": body})
    assert "hpcssl[images]" in error_of("images", tmp_path / "src", tmp_path / "out", "--workers", 1).got


@pytest.mark.parametrize(
    "text, options, labels",
    [
        ("path,label\nx/0.jpg,cat\nx/1.jpg,dog\n2.jpg,cat\n", [], ["cat", "dog", "cat"]),
        ("x/0.jpg,cat\nx/1.jpg,dog\n2.jpg,\n", [], ["cat", "dog", None]),
        ("x/0.jpg\nx/1.jpg\n2.jpg\n", [], [None] * 3),
        ("id,animal,file\n9,cat,x/0.jpg\n8,dog,x/1.jpg\n7,dog,2.jpg\n", ["--label", "animal"], ["cat", "dog", "dog"]),
    ],
)
def test_a_list_names_images_and_labels(tmp_path, run_shard, text, options, labels):
    names = ["x/0.jpg", "x/1.jpg", "2.jpg"]
    write(tmp_path / "src", {name: encode(n) for n, name in enumerate([*names, "not listed.jpg"])})
    (tmp_path / "src" / "list.csv").write_text(text)
    assert run_shard("images", tmp_path / "src" / "list.csv", tmp_path / "out", *options, "--workers", 1) == 0
    shards = ShardSet.open(tmp_path / "out")
    found = dict(zip(sources_of(shards), shards.labels.tolist(), strict=True))
    assert {name: shards.classes[n] if n >= 0 else None for name, n in found.items()} == dict(
        zip(names, labels, strict=True)
    )
    # the same list as --labels for a folder
    if labels[2] == "cat":
        (tmp_path / "src" / "not listed.jpg").unlink()
        (tmp_path / "src" / "list.csv").rename(tmp_path / "list.csv")
        assert (
            run_shard("images", tmp_path / "src", tmp_path / "two", "--labels", tmp_path / "list.csv", "--workers", 1)
            == 0
        )
        assert ShardSet.open(tmp_path / "two").digest == shards.digest


def test_a_list_of_several_labels_gives_targets(tmp_path, run_shard, error_of):
    write(tmp_path / "src", {f"{n}.jpg": encode(n) for n in range(3)})
    (tmp_path / "src" / "list.csv").write_text("path,label\n0.jpg,cat;dog\n1.jpg,dog\n1.jpg,emu\n2.jpg,\n")
    error = error_of("images", tmp_path / "src" / "list.csv", tmp_path / "out", code=2)
    assert "1.jpg" in error.got and "--multi-label" in error.fix
    assert run_shard("images", tmp_path / "src" / "list.csv", tmp_path / "out", "--multi-label", "--workers", 1) == 0
    shards = ShardSet.open(tmp_path / "out")
    targets = dict(zip(sources_of(shards), shards.targets.tolist(), strict=True))
    assert shards.classes == ["cat", "dog", "emu"]
    assert targets == {"0.jpg": [1, 1, -1], "1.jpg": [-1, 1, 1], "2.jpg": [-1, -1, -1]}
    assert run_shard("verify", tmp_path / "out", "--workers", 1) == 0


def test_labels_that_are_numbers_keep_their_order_and_a_tab_at_the_end_is_no_label(tmp_path, run_shard):
    write(tmp_path / "src", {f"{n}.jpg": encode(n) for n in range(4)})
    (tmp_path / "src" / "list.tsv").write_text("0.jpg\t10\n1.jpg\t2\n2.jpg\t\n3.jpg\t0\n")
    assert run_shard("images", tmp_path / "src" / "list.tsv", tmp_path / "out", "--workers", 1) == 0
    shards = ShardSet.open(tmp_path / "out")
    assert shards.classes == ["0", "2", "10"]
    labels = dict(zip(sources_of(shards), shards.labels.tolist(), strict=True))
    assert labels == {"0.jpg": 2, "1.jpg": 1, "2.jpg": -1, "3.jpg": 0}


@pytest.mark.parametrize(
    "text, options, what, in_got, code",
    [
        ("0.jpg,cat\n0.jpg,cat\n", [], "list", "0.jpg twice", 1),
        ("0.jpg,cat\n5.jpg,cat\n", [], "images of the source", "5.jpg", 1),
        ("path,label\n0.jpg,cat\n", ["--label", "kind"], "list", "kind", 2),
        ("0.jpg,cat\nonly\n", [], "list", "'only'", 2),
        ("", [], "list", "no line", 2),
        ("0.jpg\n", ["--subdir", "x"], "--subdir", "x", 2),
        ("0.jpg\n", ["--part", "train"], "--part", "train", 2),
        ("0.jpg\n", ["--multi-label"], "--multi-label", "set", 2),
        ("0.jpg\n", ["--classes-from", "folder"], "--classes-from", "'folder'", 2),
    ],
)
def test_lists_and_options_that_do_not_fit_are_refused(tmp_path, error_of, text, options, what, in_got, code):
    write(tmp_path / "src", {"0.jpg": encode(0)})
    (tmp_path / "src" / "list.csv").write_text(text)
    error = error_of("images", tmp_path / "src" / "list.csv", tmp_path / "out", *options, code=code)
    assert error.what.startswith(what) and in_got in error.got and not (tmp_path / "out").exists()


def test_a_folder_of_broken_images_only_is_refused(tmp_path, error_of):
    write(tmp_path / "src", {"0.jpg": b"", "1.jpg": b"<html>"})
    error = error_of("images", tmp_path / "src", tmp_path / "out", "--skip-bad", 2, "--workers", 1)
    assert error.what == f"OUT {tmp_path / 'out'}" and not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize("labeled", [False, True])
def test_the_printed_commands_run(album, tmp_path, run_shard, capsys, monkeypatch, labeled):
    """All commands run as they are printed, the training with a smaller network and one epoch, and k-NN after it."""
    monkeypatch.chdir(tmp_path)
    for name in ("WARM_UP_STEPS", "MEASURED_STEPS"):
        monkeypatch.setattr(dry_runs, name, 1)

    def run_hpcssl(*words):
        with pytest.raises(SystemExit) as ended:
            training_cli.main([*words])
        assert ended.value.code == 0
        return capsys.readouterr()

    classes = ("--classes-from", "folders") if labeled else ()
    assert run_shard("images", album[0], "data/mine", "--workers", 1, "--val", 0.2, *classes) == 0
    lines = capsys.readouterr().out.splitlines()
    show, init = [line.strip() for line in lines[lines.index("Next:") + 1 :]]
    assert [show, init] == next_commands([tmp_path / "data/mine/train", tmp_path / "data/mine/val"])
    program, *arguments = shlex.split(show)
    assert program == "hpcssl-shard" and run_shard(*arguments) == 0
    program, *arguments, redirection, file = shlex.split(init)
    assert (program, redirection) == ("hpcssl", ">")
    capsys.readouterr()
    printed = run_hpcssl(*arguments)
    (tmp_path / file).write_text(printed.out)
    lines = printed.err.splitlines()
    dry_run, train = [line.strip() for line in lines[-2:]]
    smaller = ["model.arch=resnet_tiny", "model.projector.hidden=[8]", "model.predictor.hidden=[8]"]
    smaller += ["machine.devices=cpu", "machine.threads=1", "schedule.epochs=1"]
    smaller += ["evals.knn_every_epochs=1"] * labeled
    for command in (dry_run, train):
        program, *arguments = shlex.split(command)
        assert program == "hpcssl" and not (tmp_path / "runs").exists()
        run_hpcssl(*arguments, *smaller)
    recipe = read_yaml(tmp_path / file)
    assert labeled == (recipe["evals"]["knn_every_epochs"] > 0)
    assert list((tmp_path / "runs" / "mine" / "weights").glob("*.safetensors"))
