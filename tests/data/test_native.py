"""The native decoder gives the bits of the plain one, or leaves the image to it; and nothing fails where it is missing.

The library is built from the sources, whatever was built at installation.
"""

import io
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from hpcssl.data.crop import crop_view
from hpcssl.data.decode import DamagedImageError, ScratchBuffer, decode, peek_size
from hpcssl.data.loader import Loader
from hpcssl.data.native import library as native
from hpcssl.data.native import selection, trial
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.errors import ConfigError
from hpcssl.views.augment import AUGMENTATIONS, Augmentation, ViewSpec

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(60, 80), (33, 17), (1, 1), (1, 9), (8, 1), (16, 16), (131, 203), (203, 131)]


def build(folder, **env):
    """Build the library into a folder, as an installation does, and return its file."""
    words = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "t"),
    ]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / native.FILE.relative_to(ROOT)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    probe = "#include <stdio.h>\n#include <jpeglib.h>\n"
    compiler = shutil.which("cc")
    if not compiler or subprocess.run([compiler, "-E", "-"], input=probe.encode(), capture_output=True).returncode:
        pytest.skip("no C compiler with the headers of libjpeg")
    built = build(tmp_path_factory.mktemp("built"))
    assert built.exists()
    return built


@pytest.fixture(scope="module")
def decoder(file):
    return native.ViewDecoder(native.open_library(file))


@pytest.fixture
def installed(file, monkeypatch):
    """As if the library had been built at installation."""
    monkeypatch.setattr(native, "FILE", file)
    selection.find_fault.cache_clear()
    yield
    selection.find_fault.cache_clear()


def cut_natively(decoder, data, size, boxes, kind="bilinear", side=24):
    """The views, uint8 [views, S, S, 3]; None where the library does not take the file. Nothing behind them changes."""
    out = np.full((len(boxes) + 1, side, side, 3), 77, np.uint8)
    taken = decoder.decode(data, size, [(box, side, kind, out[i].ctypes.data) for i, box in enumerate(boxes)])
    assert (out[-1] == 77).all()
    return out[:-1] if taken else None


def cut_plainly(image, boxes, kind="bilinear", side=24):
    view = ViewSpec(name="v", augment=Augmentation(interpolation=kind), size=side)
    out = torch.zeros(len(boxes), side, side, 3, dtype=torch.uint8)
    for row, box in enumerate(boxes):
        crop_view(image, box, view, out[row : row + 1].permute(0, 3, 1, 2), ScratchBuffer())
    return out.numpy()


def boxes_in(height, width, count=4, seed=0):
    """Some boxes, among them the whole image, its last pixel and its last column."""
    draw = np.random.default_rng((seed, height, width))
    boxes = [(0, 0, height, width), (height - 1, width - 1, 1, 1), (0, width - 1, height, 1)]
    for _ in range(count):
        top, left = int(draw.integers(height)), int(draw.integers(width))
        boxes.append((top, left, int(draw.integers(1, height - top + 1)), int(draw.integers(1, width - left + 1))))
    return boxes


@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411", "Gray"])
def test_views_have_the_bits_of_the_plain_decoder(decoder, picture, sampling):
    for number, shape in enumerate(SHAPES):
        image = picture(number, *shape)
        if sampling == "Gray":
            data = simplejpeg.encode_jpeg(
                np.ascontiguousarray(image[..., :1]), colorspace="Gray", colorsubsampling="Gray"
            )
        else:
            data = simplejpeg.encode_jpeg(image, colorsubsampling=sampling)
        plain = decode(data)
        for kind in ("bilinear", "bicubic"):
            for side in (1, 7, 64, 101):
                for box in boxes_in(*shape):  # one by one: each alone is the part that is decoded
                    views = cut_natively(decoder, data, shape, [box], kind, side)
                    np.testing.assert_array_equal(views, cut_plainly(plain, [box], kind, side))
        together = cut_natively(decoder, data, shape, boxes_in(*shape))
        np.testing.assert_array_equal(together, cut_plainly(plain, boxes_in(*shape)))


def test_every_width_is_resized_with_the_bits_of_torch(decoder):
    """The number of weights, and where they end, depends on the ratio of the sides."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 700, 3), np.uint8)
    data = simplejpeg.encode_jpeg(noise, colorsubsampling="444")
    plain = decode(data)
    for width in range(1, 700, 7):
        boxes = [(0, 700 - width, 9, width), (2, 0, 7, width)]
        for kind in ("bilinear", "bicubic"):
            views = cut_natively(decoder, data, (9, 700), boxes, kind, 96)
            np.testing.assert_array_equal(views, cut_plainly(plain, boxes, kind, 96))


@pytest.mark.full
def test_the_usual_sizes_of_crops_have_the_bits_of_torch(decoder):
    noise = np.random.default_rng(1).integers(0, 256, (1200, 600, 3), np.uint8)
    data = simplejpeg.encode_jpeg(noise, colorsubsampling="420")
    plain = decode(data)
    for side in (32, 96, 128, 160, 224):
        for length in range(1, 600):
            boxes = [(1200 - 2 * length, 0, 2 * length, length)]
            for kind in ("bilinear", "bicubic"):
                views = cut_natively(decoder, data, (1200, 600), boxes, kind, side)
                np.testing.assert_array_equal(views, cut_plainly(plain, boxes, kind, side))


def test_kinds_that_the_library_does_not_take(decoder, picture, encode):
    image = Image.fromarray(picture(1))
    exif = Image.Exif()
    exif[0x0112] = 3
    for data in (
        encode(image, progressive=True),
        encode(image.convert("CMYK")),
        encode(image, exif=exif),
        encode(image, "PNG"),
        encode(image)[:200],
        b"",
        b"\xff\xd8",
    ):
        assert cut_natively(decoder, data, (60, 80), [(0, 0, 30, 30)]) is None
    data = encode(image)
    for size, box in (
        ((61, 80), (0, 0, 9, 9)),
        ((60, 80), (55, 0, 9, 9)),
        ((60, 80), (-1, 0, 9, 9)),
        ((60, 80), (0, 0, 0, 9)),
    ):
        assert cut_natively(decoder, data, size, [box]) is None


def test_an_upright_orientation_restart_markers_and_trailing_bytes_are_taken(decoder, picture, encode):
    exif = Image.Exif()
    exif[0x0112] = 1
    image, box = Image.fromarray(picture(2)), (7, 9, 31, 40)
    for data in (encode(image, exif=exif), encode(image, restart_marker_blocks=3), encode(image) + bytes(100)):
        views = cut_natively(decoder, data, (60, 80), [box])
        np.testing.assert_array_equal(views, cut_plainly(decode(data), [box]))


@pytest.mark.parametrize("options", [{}, {"quality": 95, "subsampling": 0}, {"restart_marker_blocks": 5}])
def test_damage_is_found_wherever_it_is(decoder, picture, encode, options):
    """Whatever the plain decoder refuses is refused, also below the crop; what is taken has its pixels."""
    good, box = encode(picture(3, 120, 100), **options), (10, 10, 20, 20)
    assert cut_natively(decoder, good, (120, 100), [box]) is not None
    draw = np.random.default_rng(0)
    versions = [
        good[: int(len(good) * share)] + end for share in np.linspace(0.05, 0.99, 20) for end in (b"", b"\xff\xd9")
    ]
    for _ in range(150):
        broken = bytearray(good)
        for at in draw.integers(2, len(good), int(draw.integers(1, 4))):
            broken[at] = draw.integers(256)
        versions.append(bytes(broken))
    outcomes = {"refused by both": 0, "taken": 0}
    for data in versions:
        size = peek_size(data)
        views = cut_natively(decoder, data, size, [box]) if min(size) >= 30 else None
        if views is not None:
            np.testing.assert_array_equal(views, cut_plainly(decode(data), [box]))
            outcomes["taken"] += 1
        else:
            try:
                decode(data)
            except DamagedImageError:
                outcomes["refused by both"] += 1
    assert outcomes["refused by both"] > 50 and outcomes["taken"] > 5
    assert cut_natively(decoder, good, (120, 100), [box]) is not None  # it is fit for use after an error


def mixed_shards(folder, picture, encode, make_shards):
    """Images of every kind, two of them damaged."""
    exif = Image.Exif()
    samples = []
    for i in range(32):
        image, options = Image.fromarray(picture(i, 50 + i, 70)), {}
        if i % 8 == 1:
            image = image.convert("L")
        elif i % 8 == 2:
            image = image.convert("CMYK")
        elif i % 8 == 3:
            options = {"progressive": True}
        elif i % 8 == 4:
            exif[0x0112] = 1 + i // 8
            options = {"exif": exif}
        body = encode(image, "PNG" if i % 8 == 5 else "JPEG", **options)
        samples.append((f"{i:03d}", body[:-200] if i in (14, 27) else body, i % 3))
    return make_shards(folder, samples)


def test_batches_do_not_depend_on_the_decoder(installed, tmp_path, picture, encode, make_shards):
    shards = mixed_shards(tmp_path / "s", picture, encode, make_shards)
    views = [
        ViewSpec(name="query", augment=AUGMENTATIONS["strong"], size=32),
        ViewSpec(name="target", augment=AUGMENTATIONS["simclr"], size=24),
    ]
    batches, damaged = {}, {}
    for setting, threads in (("plain", 1), ("native", 2)):
        order = Order([s.samples for s in shards.shards], seed=1, global_batch=8, window=2)
        loader = Loader(Reader(shards, limit=2), order, views, seed=1, threads=threads, decoder=setting)
        with loader:
            batches[setting] = [
                (b.index.tolist(), b.label.tolist(), *(x.clone() for x in b.images), *(p.tobytes() for p in b.params))
                for b in loader.iterate(0, 8)
            ]
        damaged[setting] = loader.damaged
    assert len(damaged["plain"]) == 2 and damaged["native"] == damaged["plain"]
    for one, other in zip(batches["plain"], batches["native"], strict=True):
        assert torch.equal(one[2], other[2]) and torch.equal(one[3], other[3])
        assert one[:2] + one[4:] == other[:2] + other[4:]


def test_the_library_decodes_all_that_it_can(installed, shards, monkeypatch):
    """Otherwise the comparison of batches would compare the plain decoder with itself."""
    assert selection.find_fault() == ""
    calls = []
    monkeypatch.setattr(native.ViewDecoder, "decode", lambda self, *_: calls.append(1) or True)
    views = [ViewSpec(name="v", augment=AUGMENTATIONS["weak"], size=16)]
    order = Order([s.samples for s in shards.shards], seed=1, global_batch=8, window=2)
    with Loader(Reader(shards), order, views, seed=1) as loader:
        assert sum(len(batch.index) for batch in loader.iterate(0, 3)) == 24
    assert len(calls) >= 24


def test_views_that_need_the_whole_image_are_cut_plainly(installed):
    kinds = {"weak": True, "simclr": True, "byol_1": False, "eval": False}
    for name, wanted in kinds.items():
        view = ViewSpec(name="v", augment=AUGMENTATIONS[name], size=32)
        assert (selection.select_library("native", [view]) is not None) == wanted
    second = ViewSpec(name="v", augment=AUGMENTATIONS["weak"], size=32, second=True)
    assert selection.select_library("native", [second]) is None
    assert selection.select_library("plain", [ViewSpec(name="v", augment=AUGMENTATIONS["weak"], size=32)]) is None


WEAK = [ViewSpec(name="v", augment=AUGMENTATIONS["weak"], size=32)]


@pytest.mark.parametrize("content, level", [(None, logging.DEBUG), (b"not a library", logging.WARNING)])
def test_without_a_library_the_plain_decoder_is_used(tmp_path, monkeypatch, caplog, content, level):
    path = tmp_path / "_views.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(native, "FILE", path)
    selection.find_fault.cache_clear()
    with caplog.at_level(logging.DEBUG, "hpcssl"):
        assert selection.select_library("auto", WEAK) is selection.select_library("auto", WEAK) is None
    assert [record.levelno for record in caplog.records if record.name == "hpcssl"] == [level]
    with pytest.raises(ConfigError) as caught:
        selection.select_library("native", WEAK)
    assert caught.value.what == "machine.decoder=native"
    selection.find_fault.cache_clear()


def test_a_library_with_other_pixels_fails_its_trial(file, monkeypatch):
    library = native.open_library(file)
    trial.run_trial(library)
    with monkeypatch.context() as patch:
        patch.setattr(trial, "crop_view", lambda image, *rest: crop_view(image ^ 1, *rest))
        with pytest.raises(native.NativeError, match="differ"):
            trial.run_trial(library)
    with monkeypatch.context() as patch:
        patch.setattr(native.ViewDecoder, "decode", lambda *_: False)
        with pytest.raises(native.NativeError, match="refuses"):
            trial.run_trial(library)


def test_a_library_of_another_source_is_refused(file, monkeypatch):
    monkeypatch.setattr(native, "_INTERFACE", 0)
    with pytest.raises(native.NativeError, match="interface"):
        native.open_library(file)


def test_an_installation_without_a_compiler_succeeds(tmp_path):
    assert not build(tmp_path, CC=str(tmp_path / "missing"), CXX=str(tmp_path / "missing")).exists()


def test_orientations_are_read_like_pillow(encode, picture):
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(picture(1), exif=exif)
        stored = Image.open(io.BytesIO(data)).getexif().get(0x0112, 1)
        assert native.read_orientation(data) == (stored if 2 <= stored <= 8 else 1)
