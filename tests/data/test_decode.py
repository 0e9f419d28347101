"""Decoding equals Pillow's on every kind of file, and half a file is an error and never half an image."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from hpcssl.data import decode as module
from hpcssl.data.decode import Damaged, Scratch, decode, peek


def by_pillow(data):
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30, "optimize": True}])
def test_colour_jpeg_equals_pillow(picture, encode, options):
    for shape in ((60, 80), (33, 17), (1, 9), (8, 1)):
        data = encode(picture(1, *shape), **options)
        np.testing.assert_array_equal(decode(data), by_pillow(data))


def test_the_scratch_is_only_another_place(picture, encode):
    scratch = Scratch()
    for index, shape in enumerate([(60, 80), (90, 50), (20, 30)]):  # larger, then smaller: nothing may be left over
        data = encode(picture(index, *shape))
        np.testing.assert_array_equal(decode(data, scratch), decode(data))


def test_gray_and_cmyk_jpeg(picture, encode):
    gray = encode(Image.fromarray(picture(2)).convert("L"))
    assert decode(gray).shape == (60, 80, 3)
    np.testing.assert_array_equal(decode(gray), by_pillow(gray))
    cmyk = encode(Image.fromarray(picture(3)).convert("CMYK"))
    np.testing.assert_array_equal(decode(cmyk), by_pillow(cmyk))
    assert np.abs(decode(cmyk).astype(int) - picture(3)).mean() < 12  # the colours of the picture, not their inverse


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation(picture, encode, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    for kind in ("JPEG", "PNG"):
        data = encode(picture(4, 31, 45), kind, exif=exif)
        np.testing.assert_array_equal(decode(data), by_pillow(data))
    assert decode(data).shape[:2] == ((31, 45) if turn < 5 else (45, 31))


def test_a_broken_exif_block_does_not_lose_the_image(picture, encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encode(picture(4, 31, 45), exif=exif))
    at = data.index(b"Exif\0\0") + 6
    data[at:at + 8] = b"garbage!"
    assert decode(bytes(data)).shape == (31, 45, 3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_png_modes_equal_pillow(picture, encode, mode):
    image = Image.fromarray(picture(5))
    image = image.convert("RGB").convert(mode) if mode != "LA" else image.convert("L").convert("LA")
    data = encode(image, "PNG")
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_palette_with_transparency(picture, encode):
    image = Image.fromarray(picture(5)).convert("P")
    data = encode(image, "PNG", transparency=0)
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., :3]
    np.testing.assert_array_equal(decode(data), wanted)


def test_sixteen_bit_gray_keeps_the_upper_eight(encode):
    wide = (np.arange(40 * 50, dtype=np.uint32).reshape(40, 50) * 32).astype(np.uint16)
    image = decode(encode(Image.fromarray(wide), "PNG"))
    np.testing.assert_array_equal(image, np.repeat((wide >> 8).astype(np.uint8)[..., None], 3, 2))


def test_bytes_after_the_end_are_harmless(picture, encode):
    data = encode(picture(6))
    np.testing.assert_array_equal(decode(data + b"\0" * 100), decode(data))


def _ends_early(data):
    """The same file cut at several places, bare and closed with an end-of-image marker."""
    for share in (0.05, 0.3, 0.6, 0.95):
        part = data[:int(len(data) * share)]
        yield part
        yield part + b"\xff\xd9"


@pytest.mark.parametrize("kind", ["colour", "gray", "cmyk", "progressive", "turned"])
def test_a_truncated_jpeg_is_damaged_even_when_closed(picture, encode, kind):
    image = Image.fromarray(picture(7, 200, 200))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = {"colour": lambda: encode(image), "gray": lambda: encode(image.convert("L")),
            "cmyk": lambda: encode(image.convert("CMYK")), "progressive": lambda: encode(image, progressive=True),
            "turned": lambda: encode(image, exif=exif)}[kind]()
    decode(data)
    for part in _ends_early(data):
        with pytest.raises(Damaged):
            decode(part)


def test_other_damage(picture, encode):
    png = encode(picture(8), "PNG")
    for data in (b"", b"\xff\xd8", b"not an image", png[:len(png) // 2], png[:60] + bytes(20) + png[80:]):
        with pytest.raises(Damaged):
            decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_bomb_is_refused_before_it_is_decoded(picture, encode, monkeypatch, kind):
    monkeypatch.setattr(module, "MAX_PIXELS", 60 * 80 - 1)
    with pytest.raises(Damaged, match="80 x 60 pixels, more than the limit"):
        decode(encode(picture(9), kind))


def test_peek_knows_the_size_of_a_jpeg_and_says_when_it_does_not(picture, encode):
    data = encode(picture(1, 33, 17))
    assert peek(data) == (33, 17)
    for other in (encode(picture(1), "PNG"), b"", b"\xff\xd8\xff", data[:30]):
        assert peek(other) == (0, 0)


@pytest.mark.parametrize("kind, options", [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_what_moves_gives_its_first_picture(picture, kind, options):
    frames = [Image.fromarray(picture(i, 20, 24)).quantize(16).convert("RGB") for i in (1, 2, 3)]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(out.getvalue())).n_frames == 3
    np.testing.assert_array_equal(decode(out.getvalue()), np.asarray(frames[0]))
    with pytest.raises(Damaged):
        decode(out.getvalue()[:60])
