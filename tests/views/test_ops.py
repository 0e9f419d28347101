"""Every operation against torchvision's function or Pillow on the same parameters, and rows apart from one another."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageFilter, ImageOps

from hpcssl import rng
from hpcssl.views import ops
from hpcssl.views.augment import IMAGENET_MEAN, IMAGENET_STD, NAMED, PARAMS, apply, draw

LEVEL = 1 / 255


@pytest.fixture(scope="module")
def images(picture):
    """uint8 [12, 48, 48, 3]: pictures, noise, flat gray, pure colours, black and white."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), np.uint8)
    corners = np.array(list(itertools.product((0, 255), repeat=3)), np.uint8).repeat(6, 0).repeat(48, 0)
    flat = [np.full((48, 48, 3), v, np.uint8) for v in (0, 127, 128, 255)]
    return torch.from_numpy(np.stack([picture(i, 48, 48) for i in range(4)] + list(noise) + flat
                                     + [corners.reshape(48, 48, 3)]))


def planes(images):
    return images.permute(0, 3, 1, 2).float() / 255


def none(count):
    """Rows that change nothing."""
    rows = np.zeros(count, PARAMS)
    rows["order"], rows["factors"] = (0, 1, 2, 3), (1, 1, 1, 0)
    return rows


def plain(images, rows, augment=NAMED["strong"]):
    """apply without the normalisation."""
    return apply(images, rows, augment, mean=(0, 0, 0), std=(1, 1, 1))


REFERENCE = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


@pytest.mark.parametrize("op, value", [(op, v) for op in range(3) for v in (0.0, 0.2, 0.6, 1.0, 1.4, 1.8)]
                         + [(3, v) for v in (-0.5, -0.34, -0.1, 0.0, 0.07, 0.2, 0.4, 0.5)])
def test_jitter_operations_are_torchvisions(images, op, value):
    ours = planes(images).contiguous()
    ops._JITTER[op](ours, value)
    torch.testing.assert_close(ours, REFERENCE[op](planes(images), value), rtol=0, atol=1e-5)


@pytest.mark.parametrize("op", range(3))
def test_against_pillow_through_torchvision(images, op):
    """Pillow rounds the gray image and its mean to 8 bits and cuts off the result: within 1.5 levels in all."""
    ours = planes(images).contiguous()
    ops._JITTER[op](ours, 1.3)
    for mine, image in zip(ours, images, strict=True):
        theirs = np.array(REFERENCE[op](Image.fromarray(image.numpy()), 1.3), np.float32)
        assert (mine.permute(1, 2, 0) * 255 - torch.from_numpy(theirs)).abs().max() <= 1.5


def test_each_row_has_its_own_order_and_factors(images):
    """All 24 orders in one batch, each against torchvision's functions called one after the other."""
    many = images[:6].repeat(4, 1, 1, 1)
    rows = none(24)
    rows["jitter"] = True
    rows["order"] = list(itertools.permutations(range(4)))
    rows["factors"] = np.random.default_rng(1).uniform([0.6, 0.6, 0.6, -0.1], [1.4, 1.4, 1.4, 0.1], (24, 4))
    ours = plain(many, rows)
    for mine, image, row in zip(ours, planes(many), rows, strict=True):
        for op in row["order"]:
            image = REFERENCE[op](image, float(row["factors"][op]))
        assert (mine - image).abs().max() < 0.05 * LEVEL
    rows["jitter"] = False
    assert torch.equal(plain(many, rows), plain(many, none(24)))


def test_gray_flip_and_normalisation(images):
    rows = none(12)
    rows["flip"][::2] = True
    rows["gray"][::3] = True
    ours = apply(images, rows, NAMED["strong"])
    wanted = planes(images)
    wanted[::2] = F.horizontal_flip(wanted[::2])
    wanted[::3] = F.rgb_to_grayscale(wanted[::3], num_output_channels=3)
    wanted = F.normalize(wanted, list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-6)
    for image in images[:4]:  # and Pillow's own gray, rounded to 8 bits
        gray = np.asarray(Image.fromarray(image.numpy()).convert("L"), np.float32)
        some = none(1)
        some["gray"] = True
        assert (plain(image[None], some)[0, 1] * 255 - torch.from_numpy(gray)).abs().max() <= 1.01


def test_solarize_is_pillows_at_128(images):
    rows = none(12)
    rows["solarize"] = True
    for mine, image in zip(plain(images, rows), images, strict=True):
        theirs = np.array(ImageOps.solarize(Image.fromarray(image.numpy())))
        assert (mine.permute(1, 2, 0) * 255 - torch.from_numpy(theirs)).abs().max() < 1e-4


def slow_blur(image, sigma, kernel):
    """Own definition, by numpy.pad and explicit sums in float64. image: [H, W, 3]."""
    size = image.shape[0]
    radius = min(size // 20 if kernel == "tenth" else int(np.ceil(4 * sigma)), size - 1)
    weight = np.exp(-np.arange(-radius, radius + 1) ** 2 / (2 * sigma**2))
    weight /= weight.sum()
    mode = "reflect" if kernel == "tenth" else "edge"
    for axis in (0, 1):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        wide = np.pad(image, pad, mode=mode)
        image = sum(w * np.take(wide, range(o, o + size), axis) for o, w in enumerate(weight))
    return image


@pytest.mark.parametrize("kernel, name", [("pil", "strong"), ("tenth", "simclr")])
@pytest.mark.parametrize("size", [16, 48, 97])
def test_blur_is_its_definition(picture, kernel, name, size):
    images = torch.from_numpy(np.stack([picture(i, size, size) for i in range(5)]))
    images[4] = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (size, size, 3), np.uint8))
    rows = none(5)
    rows["sigma"] = [0.1, 0.5, 1.0, 0.0, 2.0]
    for mine, image, row in zip(plain(images, rows, NAMED[name]), images, rows, strict=True):
        wanted = image.double().numpy() / 255
        if row["sigma"] > 0:
            wanted = slow_blur(wanted, float(row["sigma"]), kernel)
        assert np.abs(mine.permute(1, 2, 0).numpy() - wanted).max() < 0.01 * LEVEL


def test_tenth_is_torchvisions_blur(images):
    """48 pixels: a tenth is 4, made odd 5. torchvision mirrors the edge too."""
    rows = none(12)
    rows["sigma"] = 1.3
    theirs = F.gaussian_blur(planes(images), [5, 5], [1.3, 1.3])
    assert (plain(images, rows, NAMED["byol_1"]) - theirs).abs().max() < 0.01 * LEVEL


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5, 2.0])
def test_pil_is_near_pillows_box_blurs(picture, sigma):
    """Pillow's GaussianBlur is three box blurs: within 3 levels of the true Gaussian inside, 6 near the edge."""
    image = picture(1, 64, 64)
    rows = none(1)
    rows["sigma"] = sigma
    mine = plain(torch.from_numpy(image)[None], rows)[0].permute(1, 2, 0).numpy() * 255
    off = np.abs(mine - np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)), np.float32))
    assert off[8:-8, 8:-8].max() <= 3 and off.max() <= 6 and off.mean() <= 1


@pytest.mark.parametrize("name", NAMED)
def test_the_whole_chain_is_the_operations_in_the_papers_order(images, name):
    """jitter, gray, blur, solarize, normalise, one row at a time through torchvision's functions."""
    augment = NAMED[name]
    rows = np.array([draw(augment, rng.key(0, "view", 0, i, 0), 48, 48) for i in range(12)], PARAMS)
    rows["sigma"][1:3], rows["solarize"][2:5] = 1.5, True  # so that every chain meets every operation
    ours = apply(images, rows, augment)
    for mine, image, row in zip(ours, planes(images), rows, strict=True):
        if row["flip"]:
            image = F.horizontal_flip(image)
        for op in row["order"]:
            image = REFERENCE[op](image, float(row["factors"][op])) if row["jitter"] else image
        if row["gray"]:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        if row["sigma"] > 0:
            blurred = slow_blur(image.permute(1, 2, 0).double().numpy(), float(row["sigma"]), augment.blur_kernel)
            image = torch.from_numpy(blurred).permute(2, 0, 1).float()
        if row["solarize"]:
            image = torch.where(image >= 0.5, 1 - image, image)
        image = F.normalize(image, list(IMAGENET_MEAN), list(IMAGENET_STD))
        assert (mine - image).abs().max() < 0.1 * LEVEL / min(IMAGENET_STD)


@pytest.mark.parametrize("size", [16, 48, 224])
def test_a_row_does_not_know_its_batch(picture, size):
    """In float64 a row alone equals the row in any batch to 1e-12: chunks and subsets are machinery."""
    images = torch.from_numpy(np.stack([picture(i, size, size) for i in range(5)]))
    augment = NAMED["byol_2"]
    rows = np.array([draw(augment, rng.key(0, "view", 0, i, 0), size, size) for i in range(5)], PARAMS)
    rows["sigma"][1:4], rows["gray"][0] = (0.3, 1.0, 1.9), True
    whole = apply(images, rows, augment, dtype=torch.float64)
    assert whole.dtype == torch.float64
    for i in range(5):
        alone = apply(images[i:i + 1], rows[i:i + 1], augment, dtype=torch.float64)
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-12)
    single = apply(images, rows, augment)
    torch.testing.assert_close(single, whole.float(), rtol=0, atol=1e-4)


def test_layout_types_and_inputs_left_alone(images):
    before = images.clone()
    rows = np.array([draw(NAMED["strong"], rng.key(0, "view", 0, i, 0), 48, 48) for i in range(12)], PARAMS)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = apply(images, rows, NAMED["strong"], dtype=dtype)
        assert out.shape == (12, 3, 48, 48) and out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out.float(), apply(images, rows, NAMED["strong"]), rtol=0.01, atol=0.02)
    assert torch.equal(images, before)
    assert apply(images[:0], rows[:0], NAMED["strong"]).shape == (0, 3, 48, 48)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(apply(images, rows, NAMED["strong"]), apply(images, rows, NAMED["strong"]))
    with pytest.raises(ValueError, match="12"):
        apply(images, rows[:3], NAMED["strong"])
    with pytest.raises(ValueError, match="uint8"):
        apply(images.float(), rows, NAMED["strong"])


def test_autocast_does_not_reach_the_blur(images):
    rows = none(12)
    rows["sigma"] = 1.5
    with torch.autocast("cpu", torch.bfloat16):
        inside = plain(images, rows)
    assert torch.equal(inside, plain(images, rows))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("size", [16, 48, 224])
def test_the_device_equals_the_cpu(picture, name, size):
    images = torch.from_numpy(np.stack([picture(i, size, size) for i in range(9)]))
    rows = np.array([draw(NAMED[name], rng.key(0, "view", 0, i, 0), size, size) for i in range(9)], PARAMS)
    rows["sigma"][1:3], rows["solarize"][2:5] = (0.4, 1.9), True
    cpu, gpu = plain(images, rows, NAMED[name]), plain(images.cuda(), rows, NAMED[name])
    assert gpu.is_cuda and gpu.is_contiguous(memory_format=torch.channels_last)
    assert (gpu.cpu() - cpu).abs().max() < LEVEL
