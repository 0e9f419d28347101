"""The computed second modality: its values, its size, and how the commands treat it."""

import errno
import io
import math
import os

import numpy as np
import pytest
from PIL import Image

from data_prep.shards import edges
from hpcssl.data.decode import decode
from hpcssl.data.reader import Reader
from hpcssl.data.shards import ShardSet
from tests.printed import numbers_in


def literal_edges(gray):
    """A quarter of the Sobel magnitude, rounded, at most 255, by loops over the pixels; border pixels are repeated."""
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


def test_edges_equal_a_literal_sobel_magnitude(encode_image):
    noise = np.random.Generator(np.random.Philox(key=1)).integers(0, 256, (19, 23), np.uint8)
    step = np.zeros((6, 8), np.uint8)
    step[:, 4:] = 255
    for gray in (noise, step, np.full((1, 1), 7, np.uint8)):
        body = io.BytesIO()
        Image.fromarray(gray).save(body, "PNG")
        image = Image.open(io.BytesIO(edges.compute_edges(body.getvalue())))
        assert image.mode == "L" and np.array_equal(np.asarray(image), literal_edges(gray))
    luma = np.asarray(Image.open(io.BytesIO(encode_image(3))).convert("L"))
    assert np.array_equal(decode(edges.compute_edges(encode_image(3)))[:, :, 0], literal_edges(luma))
    assert literal_edges(step).max() == 255 and literal_edges(step)[:, [0, 7]].max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_edges_have_the_orientation_of_the_decoded_image(orientation):
    """For a JPEG with an EXIF orientation, the reader gives both in one size, and the edges of the image it gives."""
    picture = Image.fromarray(np.add.outer(np.arange(16) * 4, np.arange(24) ** 2 // 4).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = io.BytesIO()
    picture.save(body, "JPEG", exif=exif)
    image, other = decode(body.getvalue()), decode(edges.compute_edges(body.getvalue()))
    assert image.shape == other.shape == ((24, 16, 3) if orientation > 4 else (16, 24, 3))
    assert np.array_equal(other[:, :, 0], literal_edges(image[:, :, 0]))


def read_both(folder):
    """key -> (image, second modality), both encoded."""
    with Reader(ShardSet.open(folder)) as reader:
        return {reader.shards.key(i): (reader.read(i), reader.read_second(i)) for i in range(len(reader))}


def test_images_with_edges_through_all_commands(tree, tmp_path, run_shard, run_command, content, error_of, capsys):
    out, options = tmp_path / "out", ["--second-modality", "edges", "--samples-per-shard", 6]
    assert run_shard("images", tree, out, *options, "--workers", 1) == 0
    done = run_command("images", tree, tmp_path / "two", *options, "--workers", 2)
    assert done.returncode == 0 and content(out) == content(tmp_path / "two")
    shards = ShardSet.open(out)
    assert shards.has_second and shards.second_name == "edges (surrogate)"
    assert all(b == edges.compute_edges(a) for a, b in read_both(out).values())

    shards.path(1).unlink()  # the same command repairs it; one with another --second-modality is refused
    capsys.readouterr()
    assert run_shard("images", tree, out, *options, "--workers", 1) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{out}: "))
    assert numbers_in(line)[-3:-1] == [4, 3]  # shards, and those that were kept
    assert content(out) == content(tmp_path / "two")
    error = error_of("images", tree, out, "--samples-per-shard", 6, "--second-modality", "none")
    assert error.what == f"OUT {out}" and "edges (surrogate)" in error.got

    assert run_shard("verify", out, "--workers", 1) == 0
    assert run_shard("subset", out, tmp_path / "half", "--fraction", 0.5, "--workers", 1) == 0
    half, every = read_both(tmp_path / "half"), read_both(out)
    assert 0 < len(half) < len(every) and all(every[key] == both for key, both in half.items())
    capsys.readouterr()
    assert run_shard("show", tmp_path / "half") == 0
    records = capsys.readouterr().out
    assert "second modality\tedges (surrogate)\n" in records
    assert "provenance\tsecond\tedges (surrogate)\n" in records


def test_verify_decodes_the_second_modality(tree, tmp_path, run_shard, capsys):
    run_shard("images", tree, tmp_path / "out", "--second-modality", "edges", "--workers", 1)
    shards = ShardSet.open(tmp_path / "out")
    row, path = shards.rows[4], shards.path(0)
    body = bytearray(path.read_bytes())
    start = int(row["offset_b"])
    body[start : start + int(row["size_b"])] = b"\xff" * int(row["size_b"])
    path.write_bytes(body)
    (tmp_path / "out" / "sums.npy").unlink()  # only decoding can find it then
    capsys.readouterr()
    assert run_shard("verify", tmp_path / "out", "--workers", 1) == 1
    assert f"sample 4\t{shards.key(4)}\tits second modality: " in capsys.readouterr().out


def test_a_damaged_image_is_listed_once_although_it_has_no_edges_either(
    tree, tmp_path, error_of, encode_image, run_shard
):
    (tree / "cat" / "cut.jpg").write_bytes(encode_image(1, side=96)[:700])
    (tree / "cat" / "empty.jpg").write_bytes(b"")
    (tree / "cat" / "gone.jpg").symlink_to(tree / "nowhere.jpg")
    error = error_of("images", tree, tmp_path / "out", "--second-modality", "edges", "--workers", 1)
    assert numbers_in(error.got)[0] == 3
    assert all(error.got.count(f"cat/{name}.jpg: ") == 1 for name in ("cut", "empty", "gone"))
    assert f"cat/gone.jpg: cannot be read ({os.strerror(errno.ENOENT)})" in error.got
    assert (
        run_shard("images", tree, tmp_path / "out", "--second-modality", "edges", "--workers", 1, "--skip-bad", 3) == 0
    )
    assert len(ShardSet.open(tmp_path / "out")) == 21 and ShardSet.open(tmp_path / "out").has_second


def test_digits_have_edges_unless_the_option_says_none(tmp_path, run_shard, error_of):
    assert run_shard("digits", tmp_path / "a") == 0
    assert run_shard("digits", tmp_path / "b", "--second-modality", "none") == 0
    with_, without = (ShardSet.open(tmp_path / name / "val") for name in "ab")
    assert with_.second_name == "edges (surrogate)" and with_.has_second
    assert without.second_name == "" and not without.has_second
    assert np.array_equal(with_.labels, without.labels)
    error = error_of("digits", tmp_path / "c", "--second-modality", "egdes", code=2)
    assert (error.what, error.got) == ("--second-modality", "'egdes'") and "'edges'" in error.fix
    assert not (tmp_path / "c").exists()
