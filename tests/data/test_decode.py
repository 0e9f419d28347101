"""Decoding gives the same pixels as Pillow for every kind of file, and a truncated file is an error."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from hpcssl.data import decode as decode_module
from hpcssl.data.decode import DamagedImageError, ScratchBuffer, decode, peek_size


def decode_with_pillow(data):
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30, "optimize": True}])
def test_color_jpeg_equals_pillow(picture, encode, options):
    for shape in ((60, 80), (33, 17), (1, 9), (8, 1)):
        data = encode(picture(1, *shape), **options)
        np.testing.assert_array_equal(decode(data), decode_with_pillow(data))


def test_decoding_into_a_scratch_buffer_gives_the_same_pixels(picture, encode):
    scratch = ScratchBuffer()
    for index, shape in enumerate(
        [(60, 80), (90, 50), (20, 30)]
    ):  # larger, then smaller: no pixel of an earlier image may stay
        data = encode(picture(index, *shape))
        np.testing.assert_array_equal(decode(data, scratch), decode(data))


def test_gray_and_cmyk_jpeg_equal_pillow(picture, encode):
    gray = encode(Image.fromarray(picture(2)).convert("L"))
    assert decode(gray).shape == (60, 80, 3)
    np.testing.assert_array_equal(decode(gray), decode_with_pillow(gray))
    cmyk = encode(Image.fromarray(picture(3)).convert("CMYK"))
    np.testing.assert_array_equal(decode(cmyk), decode_with_pillow(cmyk))
    assert np.abs(decode(cmyk).astype(int) - picture(3)).mean() < 12  # the colors of the picture, not their inverse


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_equals_pillow(picture, encode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG"):
        data = encode(picture(4, 31, 45), kind, exif=exif)
        np.testing.assert_array_equal(decode(data), decode_with_pillow(data))
    assert decode(data).shape[:2] == ((31, 45) if orientation < 5 else (45, 31))


def test_a_broken_exif_block_is_ignored(picture, encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encode(picture(4, 31, 45), exif=exif))
    at = data.index(b"Exif\0\0") + 6
    data[at : at + 8] = b"garbage!"
    assert decode(bytes(data)).shape == (31, 45, 3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_png_modes_equal_pillow(picture, encode, mode):
    image = Image.fromarray(picture(5))
    image = image.convert("RGB").convert(mode) if mode != "LA" else image.convert("L").convert("LA")
    data = encode(image, "PNG")
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_palette_with_transparency_equals_pillow(picture, encode):
    image = Image.fromarray(picture(5)).convert("P")
    data = encode(image, "PNG", transparency=0)
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., :3]
    np.testing.assert_array_equal(decode(data), wanted)


def test_sixteen_bit_gray_keeps_the_upper_eight_bits(encode):
    wide = (np.arange(40 * 50, dtype=np.uint32).reshape(40, 50) * 32).astype(np.uint16)
    image = decode(encode(Image.fromarray(wide), "PNG"))
    np.testing.assert_array_equal(image, np.repeat((wide >> 8).astype(np.uint8)[..., None], 3, 2))


def test_bytes_after_the_end_of_the_image_are_ignored(picture, encode):
    data = encode(picture(6))
    np.testing.assert_array_equal(decode(data + b"\0" * 100), decode(data))


def truncated_versions(data):
    """The file cut at several places, with and without an end-of-image marker at the cut."""
    for share in (0.05, 0.3, 0.6, 0.95):
        part = data[: int(len(data) * share)]
        yield part
        yield part + b"\xff\xd9"


@pytest.mark.parametrize("kind", ["color", "gray", "cmyk", "progressive", "rotated"])
def test_a_truncated_jpeg_is_damaged_even_with_an_end_marker(picture, encode, kind):
    image = Image.fromarray(picture(7, 200, 200))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = {
        "color": lambda: encode(image),
        "gray": lambda: encode(image.convert("L")),
        "cmyk": lambda: encode(image.convert("CMYK")),
        "progressive": lambda: encode(image, progressive=True),
        "rotated": lambda: encode(image, exif=exif),
    }[kind]()
    decode(data)
    for part in truncated_versions(data):
        with pytest.raises(DamagedImageError):
            decode(part)


def test_files_that_are_not_complete_images_are_damaged(picture, encode):
    png = encode(picture(8), "PNG")
    for data in (b"", b"\xff\xd8", b"not an image", png[: len(png) // 2], png[:60] + bytes(20) + png[80:]):
        with pytest.raises(DamagedImageError):
            decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(picture, encode, monkeypatch, kind):
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 60 * 80 - 1)
    with pytest.raises(DamagedImageError, match="80 x 60 "):
        decode(encode(picture(9), kind))


def test_peek_size_gives_the_size_of_a_jpeg_and_zeros_for_other_files(picture, encode):
    data = encode(picture(1, 33, 17))
    assert peek_size(data) == (33, 17)
    for other in (encode(picture(1), "PNG"), b"", b"\xff\xd8\xff", data[:30]):
        assert peek_size(other) == (0, 0)


@pytest.mark.parametrize("kind, options", [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_an_animation_gives_its_first_frame(picture, kind, options):
    frames = [Image.fromarray(picture(i, 20, 24)).quantize(16).convert("RGB") for i in (1, 2, 3)]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(out.getvalue())).n_frames == 3
    np.testing.assert_array_equal(decode(out.getvalue()), np.asarray(frames[0]))
    with pytest.raises(DamagedImageError):
        decode(out.getvalue()[:60])


@pytest.mark.parametrize("kind, options", [("WEBP", {"lossless": True}), ("TIFF", {}), ("BMP", {}), ("PPM", {})])
def test_other_lossless_formats_give_the_pixels_that_were_saved(picture, encode, kind, options):
    np.testing.assert_array_equal(decode(encode(picture(1), kind, **options)), picture(1))


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_formats_of_phones_are_close_to_the_pixels_that_were_saved(picture, encode, kind):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    image = decode(encode(picture(1, 64, 48), kind, quality=95))
    assert image.shape == (64, 48, 3) and np.abs(image.astype(int) - picture(1, 64, 48)).mean() < 12


def test_a_heic_image_is_turned_upright_once(picture, encode):
    pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = encode(picture(2, 64, 48), "HEIF"), encode(picture(2, 64, 48), "HEIF", exif=exif)
    assert decode(plain).shape == (64, 48, 3)
    np.testing.assert_array_equal(decode(turned), np.asarray(Image.open(io.BytesIO(turned)).convert("RGB")))


def test_a_tiff_gives_its_first_page(picture):
    pages = [Image.fromarray(picture(i, 20, 24)) for i in (1, 2)]
    out = io.BytesIO()
    pages[0].save(out, "TIFF", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(decode(out.getvalue()), picture(1, 20, 24))


def test_floating_point_pixels_and_programs_are_refused(encode):
    with pytest.raises(DamagedImageError, match="floating-point"):
        decode(encode(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF"))
    eps = encode(Image.new("RGB", (8, 8)), "EPS")
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(DamagedImageError, match="known format"):
        decode(eps)
