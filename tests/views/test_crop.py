"""Crop and resize, compared with Pillow and torchvision, and torch's private kernel with its public function."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image

from hpcssl import rng
from hpcssl.data import crop
from hpcssl.data.crop import crop_view
from hpcssl.data.decode import ScratchBuffer
from hpcssl.views.augment import AUGMENTATIONS, ViewSpec, draw_params

SHAPES = [(60, 80), (333, 500), (500, 281), (48, 48), (19, 200), (224, 224)]


def view(kind, size):
    return ViewSpec(name="v", augment=replace(AUGMENTATIONS["weak"], interpolation=kind), size=size)


def crop_image(image, spec, box):
    batch = torch.full((3, spec.size, spec.size, 3), 77, dtype=torch.uint8)
    crop_view(image, list(box), spec, batch[1:2].permute(0, 3, 1, 2), ScratchBuffer())
    assert (batch[0] == 77).all() and (batch[2] == 77).all()  # no neighbor is written to
    return batch[1].numpy()


def boxes(shape, count=6):
    return [
        draw_params(AUGMENTATIONS["simclr"], rng.key(0, "box", i), *shape)["box"].tolist() for i in range(count)
    ] + [(0, 0, *shape), (shape[0] - 1, 0, 1, shape[1]), (3, 5, 2, 1)]


def make_images(picture, shape):
    noise = np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), np.uint8)
    return picture(3, *shape), noise


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [32, 224])
def test_bilinear_is_within_one_level_of_pillow(picture, shape, size):
    """Both round after each of two passes, with weights of other precision: one value in 20 million differs by 2."""
    for image in make_images(picture, shape):
        for top, left, height, width in boxes(shape):
            theirs = (
                Image.fromarray(image)
                .crop((left, top, left + width, top + height))
                .resize((size, size), Image.Resampling.BILINEAR)
            )
            ours = crop_image(image, view("bilinear", size), (top, left, height, width))
            difference = np.abs(ours.astype(int) - np.asarray(theirs))
            assert difference.max() <= 2 and (difference > 1).sum() <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_bicubic_is_within_one_level_of_pillow_for_999_of_1000_pixels(picture, shape):
    """For smooth images. White noise is the worst case for weights rounded to 16 bits: 995 of 1000."""
    for image, share in zip(make_images(picture, shape), (0.999, 0.995), strict=True):
        difference = []
        for top, left, height, width in boxes(shape):
            theirs = (
                Image.fromarray(image)
                .crop((left, top, left + width, top + height))
                .resize((96, 96), Image.Resampling.BICUBIC)
            )
            ours = crop_image(image, view("bicubic", 96), (top, left, height, width))
            difference.append(np.abs(ours.astype(int) - np.asarray(theirs)))
        assert (np.stack(difference) <= 1).mean() >= share


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_public_function_gives_the_same_bits_as_the_private_kernel(picture, monkeypatch, kind, shape):
    cases = [(image, box, size) for image in make_images(picture, shape) for box in boxes(shape) for size in (17, 64)]
    fast = [crop_image(image, view(kind, size), box) for image, box, size in cases]
    monkeypatch.setattr(crop, "private_kernel", lambda kind: None)
    for (image, box, size), wanted in zip(cases, fast, strict=True):
        np.testing.assert_array_equal(crop_image(image, view(kind, size), box), wanted)


def test_the_private_kernel_exists_and_is_not_used_where_it_gives_other_values(monkeypatch):
    assert crop.private_kernel("bilinear") is not None and crop.private_kernel("bicubic") is not None
    crop.private_kernel.cache_clear()
    monkeypatch.setattr(crop, "resize_public", lambda source, out, kind: out.fill_(9))
    assert crop.private_kernel("bilinear") is None  # it no longer agrees with the public one
    crop.private_kernel.cache_clear()
    monkeypatch.undo()
    assert crop.private_kernel("no such kernel") is None
    crop.private_kernel.cache_clear()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name, size", [("eval", 224), ("eval", 32), ("eval_whole", 48)])
def test_the_center_crop_equals_resize_and_center_crop_of_torchvision(picture, shape, name, size):
    for image in make_images(picture, shape):
        ours = crop_image(image, ViewSpec(name="e", augment=AUGMENTATIONS[name], size=size), (0, 0, *shape))
        short = round(size * 256 / 224) if name == "eval" else size
        pil = F.resize(Image.fromarray(image), [short])
        theirs = np.asarray(F.center_crop(pil, [size, size]))
        assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name, steps", [("eval_squash", [256, (224, 224)]), ("eval_squash_once", [(224, 224)])])
def test_the_squashed_view_equals_resizes_of_torchvision(picture, shape, name, steps):
    """VISSL and OpenSelfSup use Resize(256), then Resize((224, 224))."""
    for image in make_images(picture, shape):
        ours = crop_image(image, ViewSpec(name="e", augment=AUGMENTATIONS[name], size=224), (0, 0, *shape))
        theirs = Image.fromarray(image)
        for step in steps:
            theirs = F.resize(theirs, step)
        assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= len(steps)


def test_images_of_the_size_of_the_view_are_copied(picture):
    image = picture(0, 48, 48)
    spec = ViewSpec(name="e", augment=AUGMENTATIONS["eval_whole"], size=48)
    np.testing.assert_array_equal(crop_image(image, spec, (0, 0, 48, 48)), image)


def keys_cubic(d):
    """The kernel of Keys with a = -1/2."""
    d = abs(d)
    if d <= 1:
        return 1.5 * d**3 - 2.5 * d**2 + 1
    return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0


@pytest.mark.parametrize("shape, size", [((33, 50), 12), ((9, 7), 16), ((12, 12), 12), ((2, 1), 8)])
def test_the_resize_of_tensorflow_is_not_antialiased(shape, size):
    """A literal loop over pixels: four taps per axis at half-pixel centers, scaled to a sum of 1 at the edges."""
    image = np.random.default_rng(size).integers(0, 256, (*shape, 3)).astype(float)
    wanted = np.zeros((size, size, 3))
    for row, column in np.ndindex(size, size):
        y, x = (row + 0.5) * shape[0] / size - 0.5, (column + 0.5) * shape[1] / size - 0.5
        total = 0.0
        for i in range(shape[0]):
            for j in range(shape[1]):
                weight = keys_cubic(y - i) * keys_cubic(x - j)
                total += weight
                wanted[row, column] += weight * image[i, j]
        wanted[row, column] /= total
    augment = replace(AUGMENTATIONS["crop_only"], scale=(1.0, 1.0))
    spec = ViewSpec(name="v", augment=augment, size=size)
    ours = crop_image(image.astype(np.uint8), spec, (0, 0, *shape))
    assert np.abs(ours - wanted.clip(0, 255)).max() < 0.51  # rounded to 8 bits
    if shape == (12, 12):
        assert np.array_equal(ours, image)
    if shape[0] > 2 * size:
        antialiased = crop_image(image.astype(np.uint8), view("bicubic", size), (0, 0, *shape))
        assert antialiased.std() < 0.7 * ours.std()
