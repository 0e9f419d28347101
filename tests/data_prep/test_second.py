"""The computed second modality: its values, its size beside the image as it is read, and its way through the verbs."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from data_prep import second
from hpcssl.data.decode import decode
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet


def literal(gray):
    """Sobel's magnitude by loops over the pixels: a quarter of it, rounded, at most 255; the border is repeated."""
    height, width = gray.shape
    out = np.zeros((height, width), np.uint8)

    def at(y, x):
        return int(gray[min(max(y, 0), height - 1), min(max(x, 0), width - 1)])

    for y in range(height):
        for x in range(width):
            across = sum(w * (at(y + d, x + 1) - at(y + d, x - 1)) for d, w in ((-1, 1), (0, 2), (1, 1)))
            down = sum(w * (at(y + 1, x + d) - at(y - 1, x + d)) for d, w in ((-1, 1), (0, 2), (1, 1)))
            out[y, x] = min(255, round(math.hypot(across, down) / 4))
    return out


def test_edges_are_sobels_magnitude(picture):
    noise = np.random.Generator(np.random.Philox(key=1)).integers(0, 256, (19, 23), np.uint8)
    step = np.zeros((6, 8), np.uint8)
    step[:, 4:] = 255
    for gray in (noise, step, np.full((1, 1), 7, np.uint8)):
        body = io.BytesIO()
        Image.fromarray(gray).save(body, "PNG")
        found = Image.open(io.BytesIO(second.edges(body.getvalue())))
        assert found.mode == "L" and np.array_equal(np.asarray(found), literal(gray))
    luma = np.asarray(Image.open(io.BytesIO(picture(3))).convert("L"))
    assert np.array_equal(decode(second.edges(picture(3)))[:, :, 0], literal(luma))
    assert literal(step).max() == 255 and literal(step)[:, [0, 7]].max() == 0


@pytest.mark.parametrize("turn", range(1, 9))
def test_edges_lie_on_the_image_as_it_is_read(turn):
    """A JPEG with an EXIF turn: the reader gives both in one size, and the edges are those of the image it gives."""
    picture = Image.fromarray(np.add.outer(np.arange(16) * 4, np.arange(24) ** 2 // 4).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = turn
    body = io.BytesIO()
    picture.save(body, "JPEG", exif=exif)
    image, other = decode(body.getvalue()), decode(second.edges(body.getvalue()))
    assert image.shape == other.shape == ((24, 16, 3) if turn > 4 else (16, 24, 3))
    assert np.array_equal(other[:, :, 0], literal(image[:, :, 0]))


def seconds(folder):
    """key -> (image, second modality), encoded, as the reader gives them."""
    with Reader(ShardSet.open(folder)) as reader:
        return {reader.shards.key(i): (reader.read(i), reader.read_second(i)) for i in range(len(reader))}


def test_images_with_edges_resume_verify_and_subset(tree, tmp_path, shard, command, content, refused, capsys):
    out, options = tmp_path / "out", ["--second", "edges", "--samples-per-shard", 6]
    assert shard("images", tree, out, *options, "--workers", 1) == 0
    done = command("images", tree, tmp_path / "two", *options, "--workers", 2)
    assert done.returncode == 0 and content(out) == content(tmp_path / "two")
    found = ShardSet.open(out)
    assert found.has_second and found.second == "edges (surrogate)"
    assert all(b == second.edges(a) for a, b in seconds(out).values())

    found.path(1).unlink()  # the same command mends it and keeps the rest; another --second is another command
    capsys.readouterr()
    assert shard("images", tree, out, *options, "--workers", 1) == 0
    assert "3 of them kept" in capsys.readouterr().out and content(out) == content(tmp_path / "two")
    assert "second was edges (surrogate) and is None" in refused(
        "images", tree, out, "--samples-per-shard", 6, "--second", "none")

    assert shard("verify", out, "--workers", 1) == 0
    assert shard("subset", out, tmp_path / "half", "--fraction", 0.5, "--workers", 1) == 0
    half, every = seconds(tmp_path / "half"), seconds(out)
    assert 0 < len(half) < len(every) and all(every[key] == both for key, both in half.items())
    capsys.readouterr()
    assert shard("show", tmp_path / "half") == 0
    said = capsys.readouterr().out
    assert "second modality\tedges (surrogate)\n" in said and "made\tsecond\tedges (surrogate)\n" in said


def test_verify_looks_at_the_second_modality(tree, tmp_path, shard, capsys):
    shard("images", tree, tmp_path / "out", "--second", "edges", "--workers", 1)
    found = ShardSet.open(tmp_path / "out")
    row, path = found.rows[4], found.path(0)
    body = bytearray(path.read_bytes())
    start = int(row["offset_b"])
    body[start : start + int(row["size_b"])] = b"\xff" * int(row["size_b"])
    path.write_bytes(body)
    (tmp_path / "out" / "sums.npy").unlink()  # decoding has to tell it alone
    capsys.readouterr()
    assert shard("verify", tmp_path / "out", "--workers", 1) == 1
    assert f"sample 4\t{found.key(4)}\tits second modality: no JPEG and no PNG inside" in capsys.readouterr().out


def test_an_image_without_edges_is_named_once(tree, tmp_path, refused, picture, shard):
    (tree / "cat" / "cut.jpg").write_bytes(picture(1, side=96)[:700])
    (tree / "cat" / "empty.jpg").write_bytes(b"")
    (tree / "cat" / "gone.jpg").symlink_to(tree / "nowhere.jpg")
    sentence = refused("images", tree, tmp_path / "out", "--second", "edges", "--workers", 1)
    assert "3 that cannot be used" in sentence and sentence.count("cat/cut.jpg: cannot be decoded") == 1
    assert "cat/empty.jpg: empty file" in sentence and "cat/gone.jpg: cannot be read" in sentence
    assert shard("images", tree, tmp_path / "out", "--second", "edges", "--workers", 1, "--skip-bad", 3) == 0
    assert len(ShardSet.open(tmp_path / "out")) == 21 and ShardSet.open(tmp_path / "out").has_second


def test_digits_come_with_edges_unless_told(tmp_path, shard, refused):
    assert shard("digits", tmp_path / "a") == 0
    assert shard("digits", tmp_path / "b", "--second", "none") == 0
    with_, without = (ShardSet.open(tmp_path / name / "val") for name in "ab")
    assert with_.second == "edges (surrogate)" and with_.has_second
    assert without.second == "" and not without.has_second
    assert np.array_equal(with_.labels, without.labels)
    assert "did you mean 'edges'" in refused("digits", tmp_path / "c", "--second", "egdes", code=2)
    assert not (tmp_path / "c").exists()
