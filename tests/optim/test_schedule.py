"""Schedules against closed forms, the official loops, and the numbers of the papers."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from hpcssl import config
from hpcssl.errors import ConfigError
from hpcssl.optim.schedule import (
    EmaOptions,
    ScheduleOptions,
    epoch_length,
    learning_rate,
    target_momentum,
    total_steps,
    warmup_steps,
)
from tests.tolerances import rounding

S = 7  # steps per epoch
# Two forms of 0.5 (1 + cos(pi x)): about ten roundings. One of x moves the cosine by up to pi times its size.
ROUNDING = rounding(torch.float64, 10, scale=math.pi / 2)


def rates(peak=0.5, **options):
    options = ScheduleOptions(**options)
    return [learning_rate(options, t, peak=peak, steps_per_epoch=S) for t in range(total_steps(options, S))]


def test_msf_decays_once_per_epoch():
    """As ``util.adjust_learning_rate`` of the official code, called at the start of epochs 1, 2, … E."""
    actual, expected = rates(epochs=20), []
    for epoch in range(1, 21):
        lr = 0.5
        lr *= 0.5 * (1.0 + math.cos(math.pi * (epoch - 1) / 20))
        expected += [lr] * S
    assert actual == pytest.approx(expected, abs=ROUNDING)
    assert actual[10 * S] == pytest.approx(0.25) and actual[-1] > 0


def test_byol_warms_up_and_decays_per_step():
    """As ``learning_schedule`` of byol/utils/schedules.py."""
    warm, total = 3 * S, 20 * S
    actual = rates(epochs=20, warmup_epochs=3, interval="step")
    for t in range(total):
        decay = 0.5 * (1 + math.cos(math.pi * (t - warm) / (total - warm)))
        assert actual[t] == pytest.approx(t / warm * 0.5 if t < warm else 0.5 * decay, abs=ROUNDING)
    assert actual[0] == 0 and actual[warm] == max(actual) == 0.5


def test_swav_starts_and_ends_above_zero():
    actual = rates(steps=71, warmup_epochs=1, warmup_lr=0.3, final_lr=0.05, interval="step")
    assert actual[0] == pytest.approx(0.3) and actual[S] == pytest.approx(0.5)
    assert actual[(71 + S) // 2] == pytest.approx((0.5 + 0.05) / 2)  # half-way down the cosine
    final = learning_rate(ScheduleOptions(steps=71, final_lr=0.05, interval="step"), 71, peak=0.5, steps_per_epoch=S)
    assert final == pytest.approx(0.05)


def test_swav_warms_up_to_the_peak_as_numpys_linspace():
    """As the schedule of main_swav.py: linspace over the warm-up, then a cosine over the other steps."""
    actual = rates(epochs=9, warmup="inclusive", warmup_epochs=2, warmup_lr=0.3, final_lr=0.05, interval="step")
    left = np.arange(7 * S)
    cosine = 0.05 + 0.5 * (0.5 - 0.05) * (1 + np.cos(np.pi * left / (7 * S)))
    assert actual == pytest.approx(np.concatenate((np.linspace(0.3, 0.5, 2 * S), cosine)), rel=1e-14)
    single = rates(steps=9, warmup="inclusive", warmup_epochs=1 / S, warmup_lr=0.3)
    assert single[0] == np.linspace(0.3, 0.5, 1)[0]


def test_mmcv_multiplies_a_cosine_from_epoch_0_by_the_warm_up():
    """As mmcv's CosineAnnealingLrUpdaterHook with by_epoch, warmup="linear" and warmup_by_epoch."""
    epochs, warm, ratio, expected = 20, 3, 1e-4, []
    for iteration in range(epochs * S):
        regular = 0.5 * 0.5 * (1 + math.cos(math.pi * (iteration // S) / epochs))
        k = (1 - iteration / (warm * S)) * (1 - ratio) if iteration < warm * S else 0
        expected.append(regular * (1 - k))
    actual = rates(epochs=epochs, warmup="factor", warmup_epochs=warm, warmup_lr=0.5 * ratio)
    assert actual == pytest.approx(expected, rel=1e-12)
    flat = rates(epochs=4, warmup="factor", warmup_epochs=2, shape="steps", milestones=[1], gamma=0.1)
    assert flat == pytest.approx([0.5 * t / (2 * S) * (1 if t < S else 0.1) for t in range(2 * S)] + [0.05] * 2 * S)


def test_a_decay_per_epoch_begins_where_the_warm_up_ends():
    actual = rates(epochs=6, warmup_epochs=1.5)
    warm = round(1.5 * S)
    assert actual[warm - 1] < 0.5 and actual[warm : 2 * S] == [0.5] * (2 * S - warm)
    left = 6 - warm / S
    for t in range(2 * S, 6 * S):
        assert actual[t] == pytest.approx(0.25 * (1 + math.cos(math.pi * (t // S - warm / S) / left)))


def test_shapes_steps_and_constant():
    assert rates(epochs=4, shape="constant") == [0.5] * 4 * S
    actual = rates(epochs=40, shape="steps", milestones=[15, 30])
    assert actual == pytest.approx([0.5] * 15 * S + [0.05] * 15 * S + [0.005] * 10 * S)


def test_the_rate_stays_the_same_after_the_end():
    for options in (ScheduleOptions(epochs=3), ScheduleOptions(epochs=3, interval="step", final_lr=0.1)):
        assert learning_rate(options, 10**6, peak=0.5, steps_per_epoch=S) == pytest.approx(options.final_lr)


def test_a_length_in_steps_may_end_within_an_epoch():
    assert total_steps(ScheduleOptions(steps=3 * S + 1), S) == 3 * S + 1
    assert rates(steps=3 * S + 1)[-1] == pytest.approx(0.25 * (1 + math.cos(math.pi * 3 / 4)))


def test_epochs_may_count_the_images_of_incomplete_batches():
    """As ``max_steps`` and ``warmup_steps`` of byol/configs/byol.py and schedules.py, for NNCLR's 1000 epochs."""
    options = ScheduleOptions(epochs=1000, warmup_epochs=10, interval="step", fractional_epochs=True)
    length = epoch_length(options, 312, images=1_281_167, batch=4096)
    assert total_steps(options, length) == 1000 * 1_281_167 // 4096 == 312_784
    warm = 10 * 1_281_167 // 4096
    assert warmup_steps(options, length) == warm == 3127
    actual = [learning_rate(options, t, peak=0.5, steps_per_epoch=length) for t in (0, 5, warm, 200_000)]
    decay = 0.25 * (1 + math.cos(math.pi * (200_000 - warm) / (312_784 - warm)))
    assert actual == pytest.approx([0, 0.5 * 5 / warm, 0.5, decay])
    whole = ScheduleOptions(epochs=1000)
    assert total_steps(whole, epoch_length(whole, 312, images=1_281_167, batch=4096)) == 312_000
    by_epoch = ScheduleOptions(epochs=4, fractional_epochs=True)  # epochs of 2.5 steps
    rates = [learning_rate(by_epoch, t, peak=1.0, steps_per_epoch=Fraction(5, 2)) for t in range(10)]
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * e / 4)) for e in (0, 0, 0, 1, 1, 2, 2, 2, 3, 3)])


def test_target_momentum():
    assert target_momentum(EmaOptions(momentum=0.99), 123, total=200) == 0.99
    momentum = [target_momentum(EmaOptions(momentum=0.996, shape="cosine"), k, total=100) for k in range(101)]
    byol = [1 - (1 - 0.996) * (math.cos(math.pi * k / 100) + 1) / 2 for k in range(101)]
    assert momentum == pytest.approx(byol, abs=ROUNDING)
    assert momentum[0] == pytest.approx(0.996) and momentum[50] == pytest.approx(0.998) and momentum[100] == 1


@pytest.mark.parametrize(
    ("options", "what", "got", "help_text"),
    [
        ({"shape": "cosin"}, "schedule.shape", "'cosin'", "'cosine'"),
        ({"interval": "steps"}, "schedule.interval", "'steps'", "'step'"),
        ({"warmup": "factr"}, "schedule.warmup", "'factr'", "'factor'"),
        ({"epochs": 0}, "schedule.epochs", "0", "1 or more"),
        ({"epochs": 3, "steps": 4}, "schedule.steps", "4 with 3 epochs", "schedule.epochs=null"),
        ({"epochs": 3, "final_lr": -1.0}, "schedule.final_lr", "-1.0", "0 or more"),
        ({"epochs": 3, "warmup_epochs": math.nan}, "schedule.warmup_epochs", "nan", "0 or more"),
        ({"epochs": 3, "gamma": 0.0}, "schedule.gamma", "0.0", "above 0"),
        ({"epochs": 3, "shape": "steps"}, "schedule.milestones", "[]", "schedule.shape=steps"),
        ({"epochs": 3, "milestones": [2]}, "schedule.milestones", "[2]", "schedule.shape=steps"),
        ({"epochs": 9, "shape": "steps", "milestones": [5, 5]}, "schedule.milestones", "[5, 5]", "increasing"),
        ({"epochs": 3, "shape": "constant", "final_lr": 0.1}, "schedule.final_lr", "0.1", "schedule.shape=cosine"),
        ({}, "schedule", "neither epochs nor steps", "schedule.steps"),
        ({"epochs": 3, "warmup_epochs": 3}, "schedule", "21 steps, with 3 warm-up epochs", "schedule.warmup_epochs"),
    ],
)
def test_invalid_options_are_refused(options, what, got, help_text):
    with pytest.raises(ConfigError) as caught:
        rates(**options)
    assert caught.value.what == what and got in str(caught.value.got)
    assert help_text in f"{caught.value.expected} {caught.value.fix}"


def test_options_are_read_from_a_recipe():
    options = config.load(ScheduleOptions, {"epochs": 3}, {"warmup_epochs": 1, "milestones": []})
    assert options == ScheduleOptions(epochs=3, warmup_epochs=1.0)
    with pytest.raises(ConfigError) as caught:
        config.load(ScheduleOptions, {"epochs": 3, "shape": "cosinus"})
    assert (caught.value.what, caught.value.got) == ("schedule.shape", "'cosinus'") and "'cosine'" in caught.value.fix
    with pytest.raises(ConfigError) as caught:
        EmaOptions(momentum=1.2)
    assert caught.value.what == "method.ema.momentum" and "1.2" in str(caught.value.got)
