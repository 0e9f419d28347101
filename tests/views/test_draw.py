"""Augmentation parameters: torchvision's crop algorithm, ColorJitter's ranges, and the probabilities of the papers."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from hpcssl import rng
from hpcssl.errors import ConfigError
from hpcssl.views.augment import AUGMENTATIONS, PARAMS, Augmentation, draw_params
from hpcssl.views.boxes import clipped_box, random_box


def rows(augment, count, height=300, width=400):
    return np.array([draw_params(augment, rng.key(0, "view", 0, i, 0), height, width) for i in range(count)], PARAMS)


def test_parameters_depend_on_the_random_key_alone():
    one = draw_params(AUGMENTATIONS["strong"], rng.key(0, "view", 3, 17, 1), 300, 400)
    assert one.dtype == PARAMS
    draw_params(AUGMENTATIONS["byol_1"], rng.key(0, "view", 9, 9, 9), 30, 40)
    assert draw_params(AUGMENTATIONS["strong"], rng.key(0, "view", 3, 17, 1), 300, 400) == one
    others = [
        rng.key(1, "view", 3, 17, 1),
        rng.key(0, "view", 4, 17, 1),
        rng.key(0, "view", 3, 18, 1),
        rng.key(0, "view", 3, 17, 0),
    ]
    assert all(draw_params(AUGMENTATIONS["strong"], key, 300, 400) != one for key in others)


@pytest.mark.parametrize("height, width", [(300, 400), (32, 32), (16, 16), (500, 30), (30, 500), (1, 1), (2, 700)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0), (0.05, 0.14), (0.9, 1.0)])
def test_the_box_equals_that_of_torchvision_for_the_same_random_numbers(monkeypatch, height, width, scale):
    """torchvision's own ``get_params`` gets the same uniform numbers in the order in which it draws them."""
    ratio = (3 / 4, 4 / 3)
    for index in range(60):
        u = rng.uniform(rng.key(1, "box", index), 36).tolist()
        tries = iter(u[:20])
        corner = iter(u[20:22])

        def uniform_(tensor, low, high, tries=tries):
            return tensor.fill_(low + (high - low) * next(tries))

        def randint(low, high, size, corner=corner):
            return torch.tensor([low + int(next(corner) * (high - low))])

        monkeypatch.setattr(torch, "empty", lambda *a: torch.zeros(*a, dtype=torch.float64))
        monkeypatch.setattr(torch.Tensor, "uniform_", uniform_)
        monkeypatch.setattr(torch, "randint", randint)
        wanted = RandomResizedCrop.get_params(torch.zeros(3, height, width), list(scale), list(ratio))
        monkeypatch.undo()
        assert random_box(u, height, width, scale, ratio) == tuple(wanted)


def test_deepmind_clips_a_box_that_does_not_fit():
    """As ``_decode_and_random_crop`` of byol/utils/dataset.py, with the random numbers given."""
    clipped = 0
    for index in range(200):
        u = rng.uniform(rng.key(1, "box", index), 36).tolist()
        height, width = (300, 400) if index % 2 else (500, 30)
        target = (0.08 + 0.92 * u[0]) * (height * width)
        aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u[1])
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        clipped += w > width or h > height
        w, h = min(w, width), min(h, height)
        box = (math.floor(u[20] * (height - h + 1)), math.floor(u[21] * (width - w + 1)), h, w)
        assert clipped_box(u, height, width, (0.08, 1.0), (3 / 4, 4 / 3)) == box
    assert clipped > 50
    assert clipped_box([0.0] * 36, 1, 9, (0.08, 1.0), (3 / 4, 4 / 3)) == (0, 0, 1, 1)


def test_boxes_lie_inside_the_image_and_cover_the_range_of_areas():
    boxes = rows(AUGMENTATIONS["simclr"], 4000)["box"]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= 300).all() and (boxes[:, 1] + boxes[:, 3] <= 400).all()
    area = boxes[:, 2] * boxes[:, 3] / 120_000
    assert area.min() < 0.1 and area.max() > 0.95
    aspect = boxes[:, 3] / boxes[:, 2]
    assert 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.35


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_probabilities_and_ranges_are_those_of_the_augmentation(name):
    """Frequencies in 5000 draws are within 4 sigma; factors lie inside ColorJitter's ranges and reach both ends.

    The draws are integers by key: they are the same on every CPU. A correct frequency exceeds 4 sigma with a
    probability of 6e-5, and 4,000 uniform numbers all stay out of the last 2 % of a range with one of 1e-35.
    """
    augment, count = AUGMENTATIONS[name], 5000
    drawn = rows(augment, count)
    for field, p in (
        ("flip", augment.flip),
        ("jitter", augment.jitter_p),
        ("gray", augment.gray),
        ("solarize", augment.solarize),
    ):
        assert abs(drawn[field].mean() - p) <= 4 * math.sqrt(p * (1 - p) / count), field
    blurred = drawn["sigma"][drawn["sigma"] > 0]
    assert abs(len(blurred) / count - augment.blur) <= 4 * math.sqrt(augment.blur * (1 - augment.blur) / count)
    if len(blurred):
        assert 0.1 <= blurred.min() < 0.12 and 1.95 < blurred.max() <= 2.0
    off = drawn[~drawn["jitter"]]["factors"]
    assert (off == np.float32([1, 1, 1, 0])).all()
    for op, strength in enumerate(augment.jitter if augment.jitter_p else ()):
        values = drawn[drawn["jitter"]]["factors"][:, op]
        is_sum = op == 3 or (op == 0 and augment.library == "deepmind")
        low, high = (-strength, strength) if is_sum else (max(0, 1 - strength), 1 + strength)
        slack, rounded = 0.02 * (high - low), np.finfo(np.float32).eps  # of numbers below 2
        assert low - rounded <= values.min() <= low + slack and high - slack <= values.max() <= high + rounded


def test_all_orders_of_color_operations_are_equally_likely():
    drawn = rows(replace(AUGMENTATIONS["strong"], jitter_p=1.0), 4800)["order"]
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 24
    # chi-square with 23 degrees of freedom: exceeded with a probability of 0.001; the draws do not depend on the CPU
    assert ((counts - 200) ** 2 / 200).sum() < 50
    fixed = rows(replace(AUGMENTATIONS["strong"], jitter_p=1.0, order="fixed"), 20)["order"]
    assert (fixed == [0, 1, 2, 3]).all()


def test_the_named_augmentations_have_the_numbers_of_the_papers():
    """Transcribed a second time from the official code, so that the table is not changed by mistake."""
    strong, weak, simclr, first, second = (AUGMENTATIONS[n] for n in ("strong", "weak", "simclr", "byol_1", "byol_2"))
    assert (strong.scale, strong.jitter, strong.jitter_p, strong.gray, strong.blur, strong.flip) == (
        (0.2, 1.0),
        (0.4, 0.4, 0.4, 0.1),
        0.8,
        0.2,
        0.5,
        0.5,
    )
    assert AUGMENTATIONS["moco_v2"] == strong
    assert (weak.scale, weak.flip, weak.jitter_p, weak.gray, weak.blur) == ((0.2, 1.0), 0.5, 0, 0, 0)
    assert (simclr.scale, simclr.interpolation, simclr.jitter, simclr.blur_kernel) == (
        (0.08, 1.0),
        "bicubic",
        (0.8, 0.8, 0.8, 0.2),
        "tenth",
    )
    assert first.jitter == second.jitter == (0.4, 0.4, 0.2, 0.1)
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    for numbers, oss in ((first, AUGMENTATIONS["byol_oss_1"]), (second, AUGMENTATIONS["byol_oss_2"])):
        assert (numbers.library, numbers.blur_kernel) == ("deepmind", "tenth_zeros")
        assert oss == replace(numbers, library="torchvision", blur_kernel="pil")


@pytest.mark.parametrize(
    "wrong",
    [
        {"flip": 1.5},
        {"scale": (0.5, 0.2)},
        {"scale": (0.0, 1.0)},
        {"ratio": (2.0, 1.0)},
        {"crop": "middle"},
        {"interpolation": "area"},
        {"jitter": (0.4, 0.4, 0.4, 0.6)},
        {"jitter": (0.4, 0.4)},
        {"blur_sigma": (0.0, 2.0)},
        {"zoom": 0.5},
        {"order": "shuffled"},
        {"blur_kernel": "box"},
        {"library": "tensorflow"},
        {"library": "deepmind"},  # its resize is bicubic
    ],
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ConfigError) as caught:
        Augmentation(**wrong)
    ((name, value),) = wrong.items()
    assert caught.value.what == f"augmentation {name}"
    assert caught.value.got in (repr(value), str(value))


def test_global_random_states_are_not_used():
    random.seed(0)
    torch.manual_seed(0)
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002 - the proof
    rows(AUGMENTATIONS["strong"], 10)
    after = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert before[0] == after[0] and torch.equal(before[1], after[1]) and before[2] == after[2]


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1, 2**64, 2**128 - 1, rng.key(3, "view", 1, 2, 3)])
def test_the_reused_generator_gives_the_same_words_as_a_new_philox(key):
    """For any sequence of lengths: no word of an earlier draw may stay in the buffer."""
    for count in (1, 7, 4, 36, 2):
        np.testing.assert_array_equal(rng.raw(key, count), np.random.Philox(key=key).random_raw(count))
        rng.raw(key ^ 5, count + 1)
