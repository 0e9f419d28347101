"""What is drawn: torchvision's crop algorithm, ColorJitter's ranges, the probabilities of the papers, by address."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from hpcssl import rng
from hpcssl.errors import ConfigError
from hpcssl.views.augment import NAMED, PARAMS, Augment, draw, random_box


def rows(augment, count, height=300, width=400):
    return np.array([draw(augment, rng.key(0, "view", 0, i, 0), height, width) for i in range(count)], PARAMS)


def test_a_row_is_a_function_of_its_address():
    one = draw(NAMED["strong"], rng.key(0, "view", 3, 17, 1), 300, 400)
    assert one.dtype == PARAMS
    draw(NAMED["byol_1"], rng.key(0, "view", 9, 9, 9), 30, 40)
    assert draw(NAMED["strong"], rng.key(0, "view", 3, 17, 1), 300, 400) == one
    others = [rng.key(1, "view", 3, 17, 1), rng.key(0, "view", 4, 17, 1), rng.key(0, "view", 3, 18, 1),
              rng.key(0, "view", 3, 17, 0)]
    assert all(draw(NAMED["strong"], key, 300, 400) != one for key in others)


@pytest.mark.parametrize("height, width", [(300, 400), (32, 32), (16, 16), (500, 30), (30, 500), (1, 1), (2, 700)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0), (0.05, 0.14), (0.9, 1.0)])
def test_the_box_is_torchvisions_on_the_same_numbers(monkeypatch, height, width, scale):
    """torchvision's own get_params, fed our uniform numbers in the order in which it asks for them."""
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


def test_boxes_lie_inside_and_cover_the_areas():
    boxes = rows(NAMED["simclr"], 4000)["box"]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= 300).all() and (boxes[:, 1] + boxes[:, 3] <= 400).all()
    area = boxes[:, 2] * boxes[:, 3] / 120_000
    assert area.min() < 0.1 and area.max() > 0.95
    aspect = boxes[:, 3] / boxes[:, 2]
    assert 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.35


@pytest.mark.parametrize("name", NAMED)
def test_probabilities_and_ranges_are_the_recipes(name):
    """Shares of 5000 draws within 4 sigma; factors inside ColorJitter's ranges and near both ends."""
    augment, count = NAMED[name], 5000
    drawn = rows(augment, count)
    for field, p in (("flip", augment.flip), ("jitter", augment.jitter_p), ("gray", augment.gray),
                     ("solarize", augment.solarize)):
        assert abs(drawn[field].mean() - p) <= 4 * math.sqrt(p * (1 - p) / count), field
    blurred = drawn["sigma"][drawn["sigma"] > 0]
    assert abs(len(blurred) / count - augment.blur) <= 4 * math.sqrt(augment.blur * (1 - augment.blur) / count)
    if len(blurred):
        assert 0.1 <= blurred.min() < 0.12 and 1.95 < blurred.max() <= 2.0
    off = drawn[~drawn["jitter"]]["factors"]
    assert (off == np.float32([1, 1, 1, 0])).all()
    for op, strength in enumerate(augment.jitter if augment.jitter_p else ()):
        values = drawn[drawn["jitter"]]["factors"][:, op]
        low, high = (-strength, strength) if op == 3 else (max(0, 1 - strength), 1 + strength)
        slack = 0.02 * (high - low) + 1e-6
        assert low - 1e-6 <= values.min() <= low + slack and high - slack <= values.max() <= high + 1e-6


def test_all_orders_are_equally_likely():
    drawn = rows(replace(NAMED["strong"], jitter_p=1.0), 4800)["order"]
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 50  # chi-square of 23 degrees: 1 in 1000
    fixed = rows(replace(NAMED["strong"], jitter_p=1.0, order="fixed"), 20)["order"]
    assert (fixed == [0, 1, 2, 3]).all()


def test_the_named_numbers_are_the_papers():
    """Transcribed once more from the official codes, so that an edit of the table has to be meant."""
    strong, weak, simclr, first, second = (NAMED[n] for n in ("strong", "weak", "simclr", "byol_1", "byol_2"))
    assert (strong.scale, strong.jitter, strong.jitter_p, strong.gray, strong.blur, strong.flip) == (
        (0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5, 0.5)
    assert NAMED["moco_v2"] == strong
    assert (weak.scale, weak.flip, weak.jitter_p, weak.gray, weak.blur) == ((0.2, 1.0), 0.5, 0, 0, 0)
    assert (simclr.scale, simclr.interpolation, simclr.jitter, simclr.blur_kernel) == (
        (0.08, 1.0), "bicubic", (0.8, 0.8, 0.8, 0.2), "tenth")
    assert first.jitter == second.jitter == (0.4, 0.4, 0.2, 0.1)
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)


@pytest.mark.parametrize("wrong", [
    {"flip": 1.5}, {"scale": (0.5, 0.2)}, {"scale": (0.0, 1.0)}, {"ratio": (2.0, 1.0)}, {"crop": "middle"},
    {"interpolation": "area"}, {"jitter": (0.4, 0.4, 0.4, 0.6)}, {"jitter": (0.4, 0.4)}, {"blur_sigma": (0.0, 2.0)},
    {"zoom": 0.5}, {"order": "shuffled"}, {"blur_kernel": "box"}])
def test_mistakes(wrong):
    with pytest.raises(ConfigError, match=f"augmentation {next(iter(wrong))}"):
        Augment(**wrong)


def test_nothing_global_is_consumed():
    random.seed(0)
    torch.manual_seed(0)
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002 - the proof
    rows(NAMED["strong"], 10)
    after = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert before[0] == after[0] and torch.equal(before[1], after[1]) and before[2] == after[2]


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1, 2**64, 2**128 - 1, rng.key(3, "view", 1, 2, 3)])
def test_the_reused_generator_gives_philoxs_own_words(key):
    """In any order of lengths: nothing of an earlier draw may be left in the buffer."""
    for count in (1, 7, 4, 36, 2):
        np.testing.assert_array_equal(rng.raw(key, count), np.random.Philox(key=key).random_raw(count))
        rng.raw(key ^ 5, count + 1)
