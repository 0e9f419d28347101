"""SGD and LARS against literal scalar loops over twenty steps."""

import math
import re

import pytest
import torch
from torch import nn

from hpcssl import config, rng
from hpcssl.errors import ConfigError, ResumeError
from hpcssl.nets import resnet
from hpcssl.optim import build, groups
from hpcssl.optim.lars import LARS
from hpcssl.optim.schedule import ScheduleOptions, learning_rate
from tests.tolerances import rounding

STEPS = 20
# A norm adds up to 108 squares, and about 12 operations apply it. A relative error of the weights grows at most like
# the weights that LARS pushes all in one direction: by 1 + 2 lr * trust_coefficient / (1 - momentum) per step.
GROWTH = (1 + 2 * 0.3 * 0.02 / (1 - 0.9)) ** STEPS
TOLERANCE = rounding(torch.float64, 120, steps=STEPS, amplification=GROWTH)
"""Relative to the largest weight of a tensor."""


def network():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)).double()
    for name, p in model.named_parameters():
        nn.init.normal_(p, generator=rng.generator(rng.key(0, "init", name)))
    model.register_parameter("frozen", nn.Parameter(torch.ones(2), requires_grad=False))
    nn.init.zeros_(model[3].weight)  # a layer of norm 0: its trust ratio is 1
    return model.to(memory_format=torch.channels_last)


def set_gradients(model, step):
    """Gradients drawn by key. In step 4 one layer has gradient 0; the frozen parameter has none."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.grad = torch.empty_like(p).copy_(
                torch.randn(p.shape, generator=rng.generator(rng.key(0, name, step)), dtype=torch.float64)
            )
            if step == 4 and name == "0.weight":
                p.grad.zero_()


def step_literally(options, model, lrs):
    """The weights after all steps, computed with lists of Python floats, one weight at a time."""
    weights = {n: p.detach().flatten().tolist() for n, p in model.named_parameters() if p.requires_grad}
    moments = {n: [0.0] * len(w) for n, w in weights.items()}
    for step, lr in enumerate(lrs):
        set_gradients(model, step)
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            excluded = options.exclude_norm_and_bias and p.ndim == 1
            w, m, grad = weights[name], moments[name], p.grad.flatten().tolist()
            g = [a + (0.0 if excluded else options.weight_decay) * b for a, b in zip(grad, w, strict=True)]
            w_norm, g_norm = math.sqrt(sum(a * a for a in w)), math.sqrt(sum(a * a for a in g))
            ratio = options.trust_coefficient * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
            if options.trust_denominator == "sum" and not excluded:  # openselfsup/utils/optimizers.py
                raw_norm = math.sqrt(sum(a * a for a in grad))
                ratio = options.trust_coefficient * w_norm / (raw_norm + options.weight_decay * w_norm)
            if options.name == "sgd" or excluded:
                ratio = 1.0
            inside = options.name == "lars" and options.lr_in_momentum
            for i in range(len(w)):
                pushed = (lr if inside else 1.0) * ratio * g[i]
                m[i] = options.momentum * m[i] + pushed
                update = options.momentum * m[i] + pushed if options.nesterov else m[i]
                w[i] -= update * (1.0 if inside else lr)
    return weights


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize(
    "more",
    [
        {"name": "sgd"},
        {"name": "sgd", "nesterov": True},
        {"name": "lars"},
        {"name": "lars", "lr_in_momentum": True},
        {"name": "lars", "nesterov": True},
        {"name": "lars", "nesterov": True, "lr_in_momentum": True},
        {"name": "lars", "momentum": 0.0},
        {"name": "lars", "trust_denominator": "sum", "lr_in_momentum": True},
    ],
    ids=str,
)
def test_twenty_steps_agree_with_the_literal_loop(more, exclude):
    options = build.OptimOptions(
        **{"lr": 0.3, "weight_decay": 0.01, "exclude_norm_and_bias": exclude, **more},
        **({} if more["name"] == "sgd" else {"trust_coefficient": 0.02}),
    )
    schedule = ScheduleOptions(epochs=STEPS // 4, warmup_epochs=1, interval="step")
    base = [learning_rate(schedule, t, peak=options.lr, steps_per_epoch=4) for t in range(STEPS)]
    model = network()
    optimizer = build.build_optimizer(options, model.named_parameters(), global_batch=512)
    expected = step_literally(options, network(), [2 * lr for lr in base])
    for step in range(STEPS):
        set_gradients(model, step)
        copies = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        build.set_lr(optimizer, options, base[step], global_batch=512)
        optimizer.step()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(torch.equal(a, b) for a, b in zip(grads, copies, strict=True))
    for name, p in model.named_parameters():
        if p.requires_grad:
            largest = max(map(abs, expected[name]))
            assert p.detach().flatten().tolist() == pytest.approx(expected[name], abs=TOLERANCE * largest), name
    assert torch.equal(model.frozen, torch.ones(2))


def test_lr_in_momentum_matters_only_while_the_rate_changes():
    ends = {}
    for falling in (False, True):
        for place in ("outside", "inside"):
            w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
            optimizer = LARS([w], lr=0.1, lr_in_momentum=place == "inside", adapt=False)
            for step in range(5):
                w.grad = torch.ones_like(w)
                optimizer.param_groups[0]["lr"] = 0.1 / (step + 1) if falling else 0.1
                optimizer.step()
            ends[falling, place] = w.detach()
    torch.testing.assert_close(
        ends[False, "outside"], ends[False, "inside"], rtol=0, atol=rounding(torch.float64, 5 * 4, scale=4)
    )
    # outside: a_1 = 1, a_t = 0.9 a_{t-1} + 1, w -= 0.1/t a_t; inside: m_t = 0.9 m_{t-1} + 0.1/t, w -= m_t
    out = sum(0.1 / t * sum(0.9**j for j in range(t)) for t in range(1, 6))
    into = sum(sum(0.9 ** (t - s) * 0.1 / s for s in range(1, t + 1)) for t in range(1, 6))
    assert ends[True, "outside"].tolist() == pytest.approx([3 - out, 4 - out])
    assert ends[True, "inside"].tolist() == pytest.approx([3 - into, 4 - into])


def test_the_length_of_the_first_lars_step():
    """|Δw| = lr · trust_coefficient · |w| for gradients of any size."""
    for size in (1e-6, 1.0, 1e6):
        w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        w.grad = size * torch.tensor([1.0, 2.0], dtype=torch.float64)
        LARS([w], lr=2.0, trust_coefficient=1e-3).step()
        assert (w.detach() - torch.tensor([3.0, 4.0])).norm().item() == pytest.approx(2.0 * 1e-3 * 5.0)


def test_groups_split_by_decay_and_by_schedule():
    model = network()
    (whole,) = groups.group_parameters(model.named_parameters(), weight_decay=0.1, exclude_norm_and_bias=False)
    assert whole["names"] == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    assert (whole["weight_decay"], whole["adapt"], whole["constant"]) == (0.1, True, False)
    parts = groups.group_parameters(
        model.named_parameters(), weight_decay=0.1, exclude_norm_and_bias=True, constant_lr=["3."]
    )
    assert {tuple(g["names"]): (g["weight_decay"], g["adapt"], g["constant"]) for g in parts} == {
        ("0.weight",): (0.1, True, False),
        ("0.bias", "1.weight", "1.bias"): (0.0, False, False),
        ("3.weight",): (0.1, True, True),
        ("3.bias",): (0.0, False, True),
    }


def test_the_exclusion_of_openselfsup_misses_the_norm_of_a_downsampling_path():
    """Its patterns, ``(bn|gn)(\\d+)?.(weight|bias)`` and ``bias``, searched in the names of torchvision's ResNet."""
    model = nn.Module()
    model.backbone = resnet.build(resnet.Arch(arch="resnet18"))
    patterns = (r"(bn|gn)(\d+)?.(weight|bias)", "bias")
    missed = {n for n, p in model.named_parameters() if p.ndim == 1 and not any(re.search(e, n) for e in patterns)}
    options = build.OptimOptions(name="lars", exclude_norm_and_bias=True, not_excluded=["downsample.1.weight"])
    optimizer = build.build_optimizer(options, model.named_parameters(), global_batch=256)
    adapted = {name for group in optimizer.param_groups if group["adapt"] for name in group["names"]}
    assert missed and missed == {n for n in adapted if dict(model.named_parameters())[n].ndim == 1}
    assert all(g["weight_decay"] == (options.weight_decay if g["adapt"] else 0) for g in optimizer.param_groups)
    with pytest.raises(ConfigError) as caught:
        build.build_optimizer(options, network().named_parameters(), global_batch=256)
    assert (caught.value.what, caught.value.got) == ("optim.not_excluded", "'downsample.1.weight'")


def test_rates_scale_with_the_batch_and_constant_ones_do_not_follow_the_schedule():
    for per, factor in (("batch256", 16.0), ("sqrt_batch", 64.0), ("none", 1.0)):
        options = build.OptimOptions(lr=0.1, lr_scaling=per)
        optimizer = build.build_optimizer(options, network().named_parameters(), global_batch=4096, constant_lr=["3."])
        build.set_lr(optimizer, options, 0.02, global_batch=4096)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.02 * factor, 0.1 * factor])


@pytest.mark.parametrize("name", build.NAMES)
def test_saved_momentum_resumes_to_the_same_bits(name):
    options = build.OptimOptions(name=name, exclude_norm_and_bias=True)

    def start():
        model = network()
        return model, build.build_optimizer(options, model.named_parameters(), global_batch=64)

    def go(model, optimizer, first, last):
        for step in range(first, last):
            set_gradients(model, step)
            optimizer.step()

    model, optimizer = start()
    assert all(
        (x == 0).all() for x in build.momentum_tensors(optimizer).values()
    )  # they exist before the first step too
    go(model, optimizer, 0, 5)
    saved = {n: x.clone() for n, x in build.momentum_tensors(optimizer).items()}
    assert sorted(saved) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    weights = {n: x.clone() for n, x in model.state_dict().items()}
    go(model, optimizer, 5, 9)
    again, resumed = start()
    again.load_state_dict(weights)
    build.load_momentum(resumed, saved)
    go(again, resumed, 5, 9)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))
    for wrong, name in (
        ({}, "0.bias"),
        (saved | {"more": torch.ones(1)}, "more"),
        (saved | {"3.bias": torch.ones(6)}, "3.bias"),
    ):
        with pytest.raises(ResumeError) as caught:
            build.load_momentum(resumed, wrong)
        assert "momentum" in caught.value.expected and name in caught.value.got


def test_a_parameter_without_a_gradient_does_not_change():
    """As prototypes that a method freezes for its first steps."""
    for name in build.NAMES:
        model = network()
        optimizer = build.build_optimizer(build.OptimOptions(name=name), model.named_parameters(), global_batch=256)
        before = model[3].bias.detach().clone()
        for step in range(3):
            set_gradients(model, step)
            if step < 2:
                model[3].bias.grad = None
            optimizer.step()
            assert torch.equal(model[3].bias, before) == (step < 2)


@pytest.mark.parametrize(
    ("options", "key", "got", "help_text"),
    [
        ({"name": "lasr"}, "name", "'lasr'", "'lars'"),
        ({"lr": 0.0}, "lr", "0.0", "above 0"),
        ({"lr": math.nan}, "lr", "nan", "above 0"),
        ({"momentum": 1.0}, "momentum", "1.0", "below 1"),
        ({"weight_decay": -1e-4}, "weight_decay", "-0.0001", "0 or more"),
        ({"trust_coefficient": 0.0}, "trust_coefficient", "0.0", "above 0"),
        ({"lr_scaling": "batch"}, "lr_scaling", "'batch'", "'batch256'"),
        ({"precision": "fp8"}, "precision", "'fp8'", "'fp64'"),
        ({"trust_denominator": "sun", "name": "lars"}, "trust_denominator", "'sun'", "'sum'"),
        (
            {"trust_denominator": "sum"},
            "trust_denominator",
            "sum",
            "set optim.trust_denominator=decayed, or optim.name",
        ),
        ({"trust_coefficient": 0.02}, "trust_coefficient", "0.02", "without LARS"),
        ({"lr_in_momentum": True}, "lr_in_momentum", "True", "without LARS"),
        ({"not_excluded": ["1.weight"]}, "not_excluded", "['1.weight']", "exclude_norm_and_bias"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov", "True", "momentum"),
    ],
)
def test_invalid_options_are_refused(options, key, got, help_text):
    with pytest.raises(ConfigError) as caught:
        config.load(build.OptimOptions, options)
    assert (caught.value.what, str(caught.value.got)) == (f"optim.{key}", got)
    assert help_text in f"{caught.value.expected} {caught.value.fix}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", build.NAMES)
def test_a_gpu_agrees_with_the_cpu(name):
    ends = []
    for device in ("cpu", "cuda"):
        model = network().to(device)
        optimizer = build.build_optimizer(build.OptimOptions(name=name), model.named_parameters(), global_batch=256)
        for step in range(STEPS):
            set_gradients(model, step)
            optimizer.step()
        ends.append([p.detach().cpu() for p in model.parameters()])
    for cpu, gpu in zip(*ends, strict=True):
        torch.testing.assert_close(cpu, gpu, rtol=0, atol=TOLERANCE * float(cpu.abs().max()))
