"""Schedules against closed forms, the official loops, and the numbers of the papers."""

import math

import pytest

from hpcssl import config
from hpcssl.errors import ConfigError
from hpcssl.optim.schedule import EmaOptions, ScheduleOptions, learning_rate, target_momentum, total_steps

S = 7  # steps per epoch


def rates(peak=0.5, **options):
    options = ScheduleOptions(**options)
    return [learning_rate(options, t, peak=peak, steps_per_epoch=S) for t in range(total_steps(options, S))]


def test_msf_falls_once_per_epoch():
    """util.adjust_learning_rate of the official code, called at the start of epoch 1, 2, … E."""
    ours, theirs = rates(epochs=20), []
    for epoch in range(1, 21):
        lr = 0.5
        lr *= 0.5 * (1.0 + math.cos(math.pi * (epoch - 1) / 20))
        theirs += [lr] * S
    assert ours == pytest.approx(theirs, rel=1e-14)
    assert ours[10 * S] == pytest.approx(0.25) and ours[-1] > 0


def test_byol_warms_up_and_falls_per_step():
    """learning_schedule of byol/utils/schedules.py."""
    warm, total = 3 * S, 20 * S
    ours = rates(epochs=20, warmup_epochs=3, per="step")
    for t in range(total):
        decay = 0.5 * (1 + math.cos(math.pi * (t - warm) / (total - warm)))
        assert ours[t] == pytest.approx(t / warm * 0.5 if t < warm else 0.5 * decay, rel=1e-12)
    assert ours[0] == 0 and ours[warm] == max(ours) == 0.5


def test_swav_starts_and_ends_above_zero():
    ours = rates(steps=71, warmup_epochs=1, warmup_lr=0.3, final_lr=0.05, per="step")
    assert ours[0] == pytest.approx(0.3) and ours[S] == pytest.approx(0.5)
    assert ours[(71 + S) // 2] == pytest.approx((0.5 + 0.05) / 2)  # half-way down the cosine
    done = learning_rate(ScheduleOptions(steps=71, final_lr=0.05, per="step"), 71, peak=0.5, steps_per_epoch=S)
    assert done == pytest.approx(0.05)


def test_a_decay_per_epoch_begins_where_the_warm_up_ends():
    ours = rates(epochs=6, warmup_epochs=1.5)
    warm = round(1.5 * S)
    assert ours[warm - 1] < 0.5 and ours[warm:2 * S] == [0.5] * (2 * S - warm)
    left = 6 - warm / S
    for t in range(2 * S, 6 * S):
        assert ours[t] == pytest.approx(0.25 * (1 + math.cos(math.pi * (t // S - warm / S) / left)))


def test_steps_and_constant():
    assert rates(epochs=4, shape="constant") == [0.5] * 4 * S
    ours = rates(epochs=40, shape="steps", milestones=[15, 30])
    assert ours == pytest.approx([0.5] * 15 * S + [0.05] * 15 * S + [0.005] * 10 * S)


def test_past_the_end_the_rate_stays():
    for options in (ScheduleOptions(epochs=3), ScheduleOptions(epochs=3, per="step", final_lr=0.1)):
        assert learning_rate(options, 10**6, peak=0.5, steps_per_epoch=S) == pytest.approx(options.final_lr)


def test_a_run_in_steps_counts_a_begun_epoch():
    assert total_steps(ScheduleOptions(steps=3 * S + 1), S) == 3 * S + 1
    assert rates(steps=3 * S + 1)[-1] == pytest.approx(0.25 * (1 + math.cos(math.pi * 3 / 4)))


def test_target_momentum():
    assert target_momentum(EmaOptions(momentum=0.99), 123, total=200) == 0.99
    grows = [target_momentum(EmaOptions(momentum=0.996, shape="cosine"), k, total=100) for k in range(101)]
    byol = [1 - (1 - 0.996) * (math.cos(math.pi * k / 100) + 1) / 2 for k in range(101)]
    assert grows == pytest.approx(byol, rel=1e-15)
    assert grows[0] == pytest.approx(0.996) and grows[50] == pytest.approx(0.998) and grows[100] == 1


@pytest.mark.parametrize(("wrong", "words"), [
    ({"shape": "cosin"}, "did you mean 'cosine'"), ({"per": "steps"}, "'step'"), ({"epochs": 0}, "1 or more"),
    ({"epochs": 3, "steps": 4}, "schedule.epochs=null"), ({"epochs": 3, "final_lr": -1.0}, "0 or more"),
    ({"epochs": 3, "warmup_epochs": math.nan}, "0 or more"), ({"epochs": 3, "gamma": 0.0}, "above 0"),
    ({"epochs": 3, "shape": "steps"}, "schedule.milestones"), ({"epochs": 3, "milestones": [2]}, "only then"),
    ({"epochs": 9, "shape": "steps", "milestones": [5, 5]}, "growing"),
    ({"epochs": 3, "shape": "constant", "final_lr": 0.1}, "only a cosine"),
    ({}, "neither epochs nor steps"), ({"epochs": 3, "warmup_epochs": 3}, "longer than its warm-up"),
])
def test_what_cannot_be_meant_is_refused(wrong, words):
    with pytest.raises(ConfigError) as caught:
        rates(**wrong)
    assert words in str(caught.value)


def test_options_are_read_from_a_recipe():
    made = config.load(ScheduleOptions, {"epochs": 3}, {"warmup_epochs": 1, "milestones": []})
    assert made == ScheduleOptions(epochs=3, warmup_epochs=1.0)
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        config.load(ScheduleOptions, {"epochs": 3, "shape": "cosinus"})
    with pytest.raises(ConfigError, match="0 to 1"):
        EmaOptions(momentum=1.2)
