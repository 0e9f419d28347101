"""Each operation equals that of torchvision or Pillow for the same parameters, and rows are independent."""

import colorsys
import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageFilter, ImageOps

from hpcssl import rng
from hpcssl.views import ops
from hpcssl.views.augment import AUGMENTATIONS, IMAGENET_MEAN, IMAGENET_STD, PARAMS, augment_batch, draw_params
from tests.tolerances import rounding

# Roundings on the longest path through an operation, for values in [0, 1]. The mean of an image, for the contrast, adds
# up to 16 numbers on each of four levels, and then vector lanes (torch's SumKernel.cpp). A blur is two products with up
# to 17 weights, which are rounded themselves. All others are chains of up to 20 operations.
CONTRAST, BLUR, CHAIN = 90, 2 * (17 + 3), 20
PIPELINE = CONTRAST + BLUR + 5 * CHAIN  # jitter, gray, blur, solarization, normalization
GRAY_LEVELS = 255 * (0.299 - 0.2989)  # largest difference of the gray of Pillow from that of torchvision, in levels


def growth(augment):
    """The factor by which the jitter may enlarge the error of a pixel, and a normalization any error."""
    return float(np.prod([1 + strength for strength in augment.jitter[:3]])) / min(IMAGENET_STD)


@pytest.fixture(scope="module")
def images(picture):
    """uint8 [12, 48, 48, 3]: smooth images, noise, uniform gray, pure colors, black and white."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), np.uint8)
    corners = np.array(list(itertools.product((0, 255), repeat=3)), np.uint8).repeat(6, 0).repeat(48, 0)
    flat = [np.full((48, 48, 3), v, np.uint8) for v in (0, 127, 128, 255)]
    return torch.from_numpy(
        np.stack([picture(i, 48, 48) for i in range(4)] + list(noise) + flat + [corners.reshape(48, 48, 3)])
    )


def to_float(images):
    return images.permute(0, 3, 1, 2).float() / 255


def identity_rows(count):
    """Parameters that leave the images unchanged."""
    rows = np.zeros(count, PARAMS)
    rows["order"], rows["factors"] = (0, 1, 2, 3), (1, 1, 1, 0)
    return rows


def augment_unnormalized(images, rows, augment=AUGMENTATIONS["strong"]):
    """``augment_batch`` without the normalization."""
    return augment_batch(images, rows, augment, mean=(0, 0, 0), std=(1, 1, 1))


REFERENCE = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


@pytest.mark.parametrize(
    "op, value",
    [(op, v) for op in range(3) for v in (0.0, 0.2, 0.6, 1.0, 1.4, 1.8)]
    + [(3, v) for v in (-0.5, -0.34, -0.1, 0.0, 0.07, 0.2, 0.4, 0.5)],
)
def test_jitter_operations_equal_those_of_torchvision(images, op, value):
    ours = to_float(images).contiguous()
    ops._JITTER["torchvision"][op](ours, value)
    tolerance = rounding(torch.float32, CONTRAST if op == 1 else CHAIN)
    torch.testing.assert_close(ours, REFERENCE[op](to_float(images), value), rtol=0, atol=tolerance)


@pytest.mark.parametrize("op", range(3))
def test_jitter_operations_are_within_one_and_a_third_levels_of_pillow(images, op):
    """Pillow rounds the gray image and its mean to 8 bits, of which 0.3 are subtracted, and truncates the result."""
    limit = 1 + 0.3 * (0.5 + 0.5 + GRAY_LEVELS) + 255 * rounding(torch.float32, CONTRAST)
    ours = to_float(images).contiguous()
    ops._JITTER["torchvision"][op](ours, 1.3)
    for mine, image in zip(ours, images, strict=True):
        theirs = np.array(REFERENCE[op](Image.fromarray(image.numpy()), 1.3), np.float32)
        assert (mine.permute(1, 2, 0) * 255 - torch.from_numpy(theirs)).abs().max() <= limit


def test_every_row_uses_its_own_order_and_factors(images):
    """All 24 orders in one batch, compared with torchvision's functions in that order."""
    many = images[:6].repeat(4, 1, 1, 1)
    rows = identity_rows(24)
    rows["jitter"] = True
    rows["order"] = list(itertools.permutations(range(4)))
    rows["factors"] = np.random.default_rng(1).uniform([0.6, 0.6, 0.6, -0.1], [1.4, 1.4, 1.4, 0.1], (24, 4))
    ours = augment_unnormalized(many, rows)
    for mine, image, row in zip(ours, to_float(many), rows, strict=True):
        for op in row["order"]:
            image = REFERENCE[op](image, float(row["factors"][op]))
        # a factor of up to 1.4 of the brightness, the contrast and the saturation multiplies the error so far
        tolerance = rounding(torch.float32, CONTRAST + 3 * CHAIN, amplification=1.4**3)
        torch.testing.assert_close(mine, image, rtol=0, atol=tolerance)
    rows["jitter"] = False
    assert torch.equal(augment_unnormalized(many, rows), augment_unnormalized(many, identity_rows(24)))


def test_gray_flip_and_normalization_equal_torchvision(images):
    rows = identity_rows(12)
    rows["flip"][::2] = True
    rows["gray"][::3] = True
    ours = augment_batch(images, rows, AUGMENTATIONS["strong"])
    wanted = to_float(images)
    wanted[::2] = F.horizontal_flip(wanted[::2])
    wanted[::3] = F.rgb_to_grayscale(wanted[::3], num_output_channels=3)
    wanted = F.normalize(wanted, list(IMAGENET_MEAN), list(IMAGENET_STD))
    # scaling, three products and two sums for the gray, two constants and two operations for the normalization
    torch.testing.assert_close(ours, wanted, rtol=0, atol=rounding(torch.float32, 9, scale=1 / min(IMAGENET_STD)))
    for image in images[:4]:  # Pillow rounds its gray values to 8 bits
        gray = np.asarray(Image.fromarray(image.numpy()).convert("L"), np.float32)
        some = identity_rows(1)
        some["gray"] = True
        difference = augment_unnormalized(image[None], some)[0, 1] * 255 - torch.from_numpy(gray)
        assert difference.abs().max() <= 0.5 + GRAY_LEVELS + rounding(torch.float32, CHAIN, scale=255)


def test_solarize_equals_pillow_with_threshold_128(images):
    rows = identity_rows(12)
    rows["solarize"] = True
    for mine, image in zip(augment_unnormalized(images, rows), images, strict=True):
        theirs = np.array(ImageOps.solarize(Image.fromarray(image.numpy())))
        difference = mine.permute(1, 2, 0) * 255 - torch.from_numpy(theirs)
        assert difference.abs().max() <= rounding(torch.float32, 6, scale=255)


def pillow_box(sigma):
    """Weights of one box of Pillow's GaussianBlur, from its formulas (src/libImaging/BoxBlur.c)."""
    sigma2 = sigma * sigma / 3
    whole = int(np.floor((np.sqrt(12 * sigma2 + 1) - 1) / 2))
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * sigma2) / (6 * (sigma2 - (whole + 1) ** 2))
    inner = 1 / (2 * (whole + part) + 1)
    outer = (1 - (2 * whole + 1) * inner) / 2
    return np.array([outer, *[inner] * (2 * whole + 1), outer])


def literal_blur(image, sigma, kernel):
    """Blur by its definition, with numpy.pad and explicit sums in float64. image: [H, W, 3]."""
    size = image.shape[0]
    if kernel == "pil":
        weight, mode, passes = pillow_box(sigma), "edge", 3
    else:
        radius = size // 20
        weight = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
        weight, mode, passes = weight / weight.sum(), "reflect" if kernel == "tenth" else "constant", 1
    radius = len(weight) // 2
    for axis in (0, 1) * passes:
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        wide = np.pad(image, pad, mode=mode)
        image = sum(w * np.take(wide, range(o, o + size), axis) for o, w in enumerate(weight))
    return image


@pytest.mark.parametrize("kernel, name", [("pil", "strong"), ("tenth", "simclr"), ("tenth_zeros", "byol_1")])
@pytest.mark.parametrize("size", [8, 16, 48, 97])
def test_blur_equals_its_definition(picture, kernel, name, size):
    images = torch.from_numpy(np.stack([picture(i, size, size) for i in range(5)]))
    images[4] = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (size, size, 3), np.uint8))
    rows = identity_rows(5)
    rows["sigma"] = [0.1, 0.5, 1.0, 0.0, 2.0]
    for mine, image, row in zip(augment_unnormalized(images, rows, AUGMENTATIONS[name]), images, rows, strict=True):
        wanted = image.double().numpy() / 255
        if row["sigma"] > 0:
            wanted = literal_blur(wanted, float(row["sigma"]), kernel)
        assert np.abs(mine.permute(1, 2, 0).numpy() - wanted).max() < rounding(torch.float32, BLUR)


def test_the_kernel_tenth_equals_gaussian_blur_of_torchvision(images):
    """A tenth of 48 pixels is 4, which is made odd: 5. torchvision also reflects the image at its edge."""
    rows = identity_rows(12)
    rows["sigma"] = 1.3
    theirs = F.gaussian_blur(to_float(images), [5, 5], [1.3, 1.3])
    # torchvision rounds 25 products of weights
    ours = augment_unnormalized(images, rows, AUGMENTATIONS["simclr"])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding(torch.float32, BLUR))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_the_kernel_pil_equals_pillow_but_for_its_rounding(picture, sigma):
    """Pillow rounds after each of six passes, by half a level; a mean of pixels does not add to an error: 3 levels."""
    noise = np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)
    rows = identity_rows(1)
    rows["sigma"] = sigma
    for image in (noise, picture(1, 64, 64)):
        mine = augment_unnormalized(torch.from_numpy(image)[None], rows)[0].permute(1, 2, 0).numpy() * 255
        theirs = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)), np.float32)
        assert np.abs(mine - theirs).max() <= 3


def deepmind(op, image, value):
    """The operations of byol/utils/augmentations.py pixel by pixel, on [3, S, S]: those of HSV with colorsys."""
    x = image.double().numpy()
    if op == 0:
        changed = x + value
    elif op == 1:
        changed = np.stack([value * (c - c.mean()) + c.mean() for c in x])
    else:
        changed = np.empty_like(x)
        for at in np.ndindex(x.shape[1:]):
            h, s, v = colorsys.rgb_to_hsv(*x[:, *at])
            if op == 2:
                s = min(max(s * value, 0.0), 1.0)
            else:
                h = (h + value) % 1.0
            changed[:, *at] = colorsys.hsv_to_rgb(h, s, v)
    return torch.from_numpy(changed.clip(0, 1)).float()


@pytest.mark.parametrize("op, value", [(0, -0.4), (0, 0.3), (1, 0.6), (1, 1.4), (2, 0.0), (2, 0.8), (2, 1.2), (2, 9.0)])
def test_jitter_operations_of_deepmind(images, op, value):
    small = to_float(images)[:, :, ::4, ::4].contiguous()
    ours = small.clone()
    ops._JITTER["deepmind"][op](ours, torch.full((12, 1, 1, 1), value))
    for mine, image in zip(ours, small, strict=True):
        torch.testing.assert_close(mine, deepmind(op, image, value), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_operations_are_applied_in_the_order_of_the_papers(images, name):
    """Flip, jitter, gray, blur, solarize, normalize: one row at a time with torchvision's or the literal functions."""
    augment = AUGMENTATIONS[name]
    jitter = (
        REFERENCE
        if augment.library == "torchvision"
        else [lambda x, value, op=op: deepmind(op, x, value) for op in range(4)]
    )
    rows = np.array([draw_params(augment, rng.key(0, "view", 0, i, 0), 48, 48) for i in range(12)], PARAMS)
    rows["sigma"][1:3], rows["solarize"][2:5] = 1.5, True  # so that every operation occurs
    ours = augment_batch(images, rows, augment)
    for mine, image, row in zip(ours, to_float(images), rows, strict=True):
        if row["flip"]:
            image = F.horizontal_flip(image)
        for op in row["order"]:
            image = jitter[op](image, float(row["factors"][op])) if row["jitter"] else image
        if row["gray"]:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        if row["sigma"] > 0:
            blurred = literal_blur(image.permute(1, 2, 0).double().numpy(), float(row["sigma"]), augment.blur_kernel)
            image = torch.from_numpy(blurred).permute(2, 0, 1).float()
        if row["solarize"]:
            image = torch.where(image >= 0.5, 1 - image, image)
        image = F.normalize(image, list(IMAGENET_MEAN), list(IMAGENET_STD))
        torch.testing.assert_close(
            mine, image, rtol=0, atol=rounding(torch.float32, PIPELINE, amplification=growth(augment))
        )


@pytest.mark.parametrize("size", [16, 48, 224])
def test_a_row_does_not_depend_on_its_batch(picture, size):
    """In float64, a row that is augmented alone equals the same row in a batch up to rounding."""
    images = torch.from_numpy(np.stack([picture(i, size, size) for i in range(5)]))
    augment = AUGMENTATIONS["byol_2"]
    rows = np.array([draw_params(augment, rng.key(0, "view", 0, i, 0), size, size) for i in range(5)], PARAMS)
    rows["sigma"][1:4], rows["gray"][0] = (0.3, 1.0, 1.9), True
    whole = augment_batch(images, rows, augment, dtype=torch.float64)
    assert whole.dtype == torch.float64
    for i in range(5):
        alone = augment_batch(images[i : i + 1], rows[i : i + 1], augment, dtype=torch.float64)
        tolerance = rounding(torch.float64, PIPELINE, amplification=growth(augment))
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=tolerance)
    single, tolerance = augment_batch(images, rows, augment), rounding(torch.float32, PIPELINE)
    torch.testing.assert_close(single.double(), whole, rtol=0, atol=tolerance * growth(augment))


def test_memory_layout_dtype_and_unchanged_inputs(images):
    before = images.clone()
    rows = np.array(
        [draw_params(AUGMENTATIONS["strong"], rng.key(0, "view", 0, i, 0), 48, 48) for i in range(12)], PARAMS
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = augment_batch(images, rows, AUGMENTATIONS["strong"], dtype=dtype)
        assert out.shape == (12, 3, 48, 48) and out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, augment_batch(images, rows, AUGMENTATIONS["strong"]).to(dtype))  # rounded at the end
    assert torch.equal(images, before)
    assert augment_batch(images[:0], rows[:0], AUGMENTATIONS["strong"]).shape == (0, 3, 48, 48)
    with torch.autocast("cpu", torch.bfloat16):
        inside = augment_batch(images, rows, AUGMENTATIONS["strong"])
    assert torch.equal(inside, augment_batch(images, rows, AUGMENTATIONS["strong"]))
    with pytest.raises(ValueError, match="12"):
        augment_batch(images, rows[:3], AUGMENTATIONS["strong"])
    with pytest.raises(ValueError, match="uint8"):
        augment_batch(images.float(), rows, AUGMENTATIONS["strong"])


def test_autocast_does_not_change_the_blur(images):
    rows = identity_rows(12)
    rows["sigma"] = 1.5
    with torch.autocast("cpu", torch.bfloat16):
        inside = augment_unnormalized(images, rows)
    assert torch.equal(inside, augment_unnormalized(images, rows))


@pytest.mark.gpu
@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [16, 48, 224])
def test_the_gpu_equals_the_cpu(picture, name, size):
    images = torch.from_numpy(np.stack([picture(i, size, size) for i in range(9)]))
    rows = np.array(
        [draw_params(AUGMENTATIONS[name], rng.key(0, "view", 0, i, 0), size, size) for i in range(9)], PARAMS
    )
    rows["sigma"][1:3], rows["solarize"][2:5] = (0.4, 1.9), True
    cpu, gpu = (
        augment_unnormalized(images, rows, AUGMENTATIONS[name]),
        augment_unnormalized(images.cuda(), rows, AUGMENTATIONS[name]),
    )
    assert gpu.is_cuda and gpu.is_contiguous(memory_format=torch.channels_last)
    tolerance = rounding(torch.float32, PIPELINE, amplification=growth(AUGMENTATIONS[name]))
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=0, atol=tolerance * min(IMAGENET_STD))  # not normalized
