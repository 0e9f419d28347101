"""Crop and resize against Pillow and torchvision, and the private kernel against the public one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image

from hpcssl import rng
from hpcssl.data.decode import Scratch
from hpcssl.views import crop as module
from hpcssl.views.augment import NAMED, ViewSpec, draw
from hpcssl.views.crop import cut

SHAPES = [(60, 80), (333, 500), (500, 281), (48, 48), (19, 200), (224, 224)]


def view(kind, size):
    return ViewSpec(name="v", augment=replace(NAMED["weak"], interpolation=kind), size=size)


def cut_one(image, spec, box):
    batch = torch.full((3, spec.size, spec.size, 3), 77, dtype=torch.uint8)
    cut(image, list(box), spec, batch[1:2].permute(0, 3, 1, 2), Scratch())
    assert (batch[0] == 77).all() and (batch[2] == 77).all()  # nothing but its own place
    return batch[1].numpy()


def boxes(shape, count=6):
    return [draw(NAMED["simclr"], rng.key(0, "box", i), *shape)["box"].tolist() for i in range(count)] + [
        (0, 0, *shape), (shape[0] - 1, 0, 1, shape[1]), (3, 5, 2, 1)]


def pictures(picture, shape):
    noise = np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), np.uint8)
    return picture(3, *shape), noise


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [32, 224])
def test_bilinear_is_within_one_level_of_pillow(picture, shape, size):
    """Both round after each of two passes, with weights of other precision: one value in 20 million is 2 off."""
    for image in pictures(picture, shape):
        for top, left, height, width in boxes(shape):
            theirs = Image.fromarray(image).crop((left, top, left + width, top + height)).resize(
                (size, size), Image.Resampling.BILINEAR)
            ours = cut_one(image, view("bilinear", size), (top, left, height, width))
            off = np.abs(ours.astype(int) - np.asarray(theirs))
            assert off.max() <= 2 and (off > 1).sum() <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_bicubic_is_within_one_level_in_999_of_1000(picture, shape):
    """On pictures; on white noise, the worst case for weights rounded to 16 bits, 995 of 1000."""
    for image, share in zip(pictures(picture, shape), (0.999, 0.995), strict=True):
        off = []
        for top, left, height, width in boxes(shape):
            theirs = Image.fromarray(image).crop((left, top, left + width, top + height)).resize(
                (96, 96), Image.Resampling.BICUBIC)
            ours = cut_one(image, view("bicubic", 96), (top, left, height, width))
            off.append(np.abs(ours.astype(int) - np.asarray(theirs)))
        assert (np.stack(off) <= 1).mean() >= share


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_public_fallback_gives_the_same_bits(picture, monkeypatch, kind, shape):
    cases = [(image, box, size) for image in pictures(picture, shape) for box in boxes(shape) for size in (17, 64)]
    fast = [cut_one(image, view(kind, size), box) for image, box, size in cases]
    monkeypatch.setattr(module, "private_kernel", lambda kind: None)
    for (image, box, size), wanted in zip(cases, fast, strict=True):
        np.testing.assert_array_equal(cut_one(image, view(kind, size), box), wanted)


def test_this_torch_has_the_private_kernel_and_a_changed_one_is_refused(monkeypatch):
    assert module.private_kernel("bilinear") is not None and module.private_kernel("bicubic") is not None
    module.private_kernel.cache_clear()
    monkeypatch.setattr(module, "resize_public", lambda source, out, kind: out.fill_(9))
    assert module.private_kernel("bilinear") is None  # it no longer agrees with the public one
    module.private_kernel.cache_clear()
    monkeypatch.undo()
    assert module.private_kernel("nothing of this name") is None
    module.private_kernel.cache_clear()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name, size", [("eval", 224), ("eval", 32), ("eval_whole", 48)])
def test_the_centre_crop_is_torchvisions_resize_and_center_crop(picture, shape, name, size):
    for image in pictures(picture, shape):
        ours = cut_one(image, ViewSpec(name="e", augment=NAMED[name], size=size), (0, 0, *shape))
        short = round(size * 256 / 224) if name == "eval" else size
        pil = F.resize(Image.fromarray(image), [short])
        theirs = np.asarray(F.center_crop(pil, [size, size]))
        assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name, steps", [("eval_squash", [256, (224, 224)]), ("eval_squash_once", [(224, 224)])])
def test_the_squashed_view_is_torchvisions_resizes(picture, shape, name, steps):
    """VISSL's and OpenSelfSup's Resize(256), Resize((224, 224))."""
    for image in pictures(picture, shape):
        ours = cut_one(image, ViewSpec(name="e", augment=NAMED[name], size=224), (0, 0, *shape))
        theirs = Image.fromarray(image)
        for step in steps:
            theirs = F.resize(theirs, step)
        assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= len(steps)


def test_images_of_the_views_size_are_copied(picture):
    image = picture(0, 48, 48)
    spec = ViewSpec(name="e", augment=NAMED["eval_whole"], size=48)
    np.testing.assert_array_equal(cut_one(image, spec, (0, 0, 48, 48)), image)
