"""SGD and LARS against literal scalar loops over twenty steps."""

import math

import pytest
import torch
from torch import nn

from hpcssl import config, rng
from hpcssl.errors import ConfigError, ResumeError
from hpcssl.optim import build, groups
from hpcssl.optim.lars import LARS
from hpcssl.optim.schedule import ScheduleOptions, learning_rate

STEPS = 20


def network():
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)).double()
    for name, p in made.named_parameters():
        nn.init.normal_(p, generator=rng.generator(rng.key(0, "init", name)))
    made.register_parameter("frozen", nn.Parameter(torch.ones(2), requires_grad=False))
    nn.init.zeros_(made[3].weight)  # a layer of norm 0: its trust ratio is 1
    return made.to(memory_format=torch.channels_last)


def gradients(model, step):
    """Drawn by address. Step 4 has a layer with gradient 0; the frozen parameter has none."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.grad = torch.empty_like(p).copy_(torch.randn(
                p.shape, generator=rng.generator(rng.key(0, name, step)), dtype=torch.float64))
            if step == 4 and name == "0.weight":
                p.grad.zero_()


def literal(options, model, lrs):
    """Lists of Python floats, one weight at a time."""
    weights = {n: p.detach().flatten().tolist() for n, p in model.named_parameters() if p.requires_grad}
    moments = {n: [0.0] * len(w) for n, w in weights.items()}
    for step, lr in enumerate(lrs):
        gradients(model, step)
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            plain = options.exclude_norm_and_bias and p.ndim == 1
            w, m, grad = weights[name], moments[name], p.grad.flatten().tolist()
            g = [a + (0.0 if plain else options.weight_decay) * b for a, b in zip(grad, w, strict=True)]
            w_norm, g_norm = math.sqrt(sum(a * a for a in w)), math.sqrt(sum(a * a for a in g))
            ratio = options.trust * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
            if options.name == "sgd" or plain:
                ratio = 1.0
            inside = options.name == "lars" and options.lr_place == "inside"
            for i in range(len(w)):
                pushed = (lr if inside else 1.0) * ratio * g[i]
                m[i] = options.momentum * m[i] + pushed
                update = options.momentum * m[i] + pushed if options.nesterov else m[i]
                w[i] -= update * (1.0 if inside else lr)
    return weights


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("more", [
    {"name": "sgd"}, {"name": "sgd", "nesterov": True}, {"name": "lars"}, {"name": "lars", "lr_place": "inside"},
    {"name": "lars", "nesterov": True}, {"name": "lars", "nesterov": True, "lr_place": "inside"},
    {"name": "lars", "momentum": 0.0}], ids=str)
def test_twenty_steps_agree_with_the_literal_loop(more, exclude):
    options = build.OptimOptions(**{"lr": 0.3, "weight_decay": 0.01, "trust": 0.02,
                                    "exclude_norm_and_bias": exclude, **more})
    schedule = ScheduleOptions(epochs=STEPS // 4, warmup_epochs=1, per="step")
    base = [learning_rate(schedule, t, peak=options.lr, steps_per_epoch=4) for t in range(STEPS)]
    model = network()
    optimizer = build.build(options, model.named_parameters(), global_batch=512)
    expected = literal(options, network(), [2 * lr for lr in base])
    for step in range(STEPS):
        gradients(model, step)
        kept = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        build.set_lr(optimizer, options, base[step], global_batch=512)
        optimizer.step()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.detach().flatten().tolist() == pytest.approx(expected[name], rel=1e-10, abs=1e-12), name
    assert torch.equal(model.frozen, torch.ones(2))


def test_where_the_rate_stands_matters_only_while_it_changes():
    ends = {}
    for falling in (False, True):
        for place in ("outside", "inside"):
            w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
            optimizer = LARS([w], lr=0.1, lr_place=place, adapt=False)
            for step in range(5):
                w.grad = torch.ones_like(w)
                optimizer.param_groups[0]["lr"] = 0.1 / (step + 1) if falling else 0.1
                optimizer.step()
            ends[falling, place] = w.detach()
    assert torch.allclose(ends[False, "outside"], ends[False, "inside"], rtol=1e-14)
    # outside: a_1 = 1, a_t = 0.9 a_{t-1} + 1, w -= 0.1/t a_t; inside: m_t = 0.9 m_{t-1} + 0.1/t, w -= m_t
    out = sum(0.1 / t * sum(0.9**j for j in range(t)) for t in range(1, 6))
    into = sum(sum(0.9 ** (t - s) * 0.1 / s for s in range(1, t + 1)) for t in range(1, 6))
    assert ends[True, "outside"].tolist() == pytest.approx([3 - out, 4 - out])
    assert ends[True, "inside"].tolist() == pytest.approx([3 - into, 4 - into])


def test_the_first_lars_step_has_the_length_that_trust_gives():
    """|Δw| = lr·trust·|w|, whatever the gradient's size."""
    for size in (1e-6, 1.0, 1e6):
        w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        w.grad = size * torch.tensor([1.0, 2.0], dtype=torch.float64)
        LARS([w], lr=2.0, trust=1e-3).step()
        assert (w.detach() - torch.tensor([3.0, 4.0])).norm().item() == pytest.approx(2.0 * 1e-3 * 5.0)


def test_groups_split_by_decay_and_by_schedule():
    model = network()
    whole, = groups.split(model.named_parameters(), weight_decay=0.1, exclude_norm_and_bias=False)
    assert whole["names"] == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    assert (whole["weight_decay"], whole["adapt"], whole["constant"]) == (0.1, True, False)
    parts = groups.split(model.named_parameters(), weight_decay=0.1, exclude_norm_and_bias=True,
                         constant_lr=["3."])
    assert {tuple(g["names"]): (g["weight_decay"], g["adapt"], g["constant"]) for g in parts} == {
        ("0.weight",): (0.1, True, False), ("0.bias", "1.weight", "1.bias"): (0.0, False, False),
        ("3.weight",): (0.1, True, True), ("3.bias",): (0.0, False, True)}


def test_rates_follow_the_batch_and_the_fixed_ones_do_not_follow_the_schedule():
    for per, factor in (("batch256", 16.0), ("sqrt_batch", 64.0), ("absolute", 1.0)):
        options = build.OptimOptions(lr=0.1, lr_per=per)
        optimizer = build.build(options, network().named_parameters(), global_batch=4096, constant_lr=["3."])
        build.set_lr(optimizer, options, 0.02, global_batch=4096)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.02 * factor, 0.1 * factor])


@pytest.mark.parametrize("name", build.NAMES)
def test_saved_momentum_carries_on_to_the_same_bits(name):
    options = build.OptimOptions(name=name, exclude_norm_and_bias=True)

    def start():
        model = network()
        return model, build.build(options, model.named_parameters(), global_batch=64)

    def go(model, optimizer, first, last):
        for step in range(first, last):
            gradients(model, step)
            optimizer.step()

    model, optimizer = start()
    assert all((x == 0).all() for x in build.tensors(optimizer).values())  # one form, before any step too
    go(model, optimizer, 0, 5)
    saved = {n: x.clone() for n, x in build.tensors(optimizer).items()}
    assert sorted(saved) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    weights = {n: x.clone() for n, x in model.state_dict().items()}
    go(model, optimizer, 5, 9)
    again, resumed = start()
    again.load_state_dict(weights)
    build.restore(resumed, saved)
    go(again, resumed, 5, 9)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))
    for wrong in ({}, {**saved, "more": torch.ones(1)}, {**saved, "3.bias": torch.ones(6)}):
        with pytest.raises(ResumeError, match="momentum"):
            build.restore(resumed, wrong)


def test_a_parameter_without_a_gradient_waits():
    """Prototypes that a method freezes for its first steps."""
    for name in build.NAMES:
        model = network()
        optimizer = build.build(build.OptimOptions(name=name), model.named_parameters(), global_batch=256)
        before = model[3].bias.detach().clone()
        for step in range(3):
            gradients(model, step)
            if step < 2:
                model[3].bias.grad = None
            optimizer.step()
            assert torch.equal(model[3].bias, before) == (step < 2)


@pytest.mark.parametrize(("wrong", "words"), [
    ({"name": "lasr"}, "did you mean 'lars'"), ({"lr": 0.0}, "above 0"), ({"lr": math.nan}, "above 0"),
    ({"momentum": 1.0}, "0 to below 1"), ({"weight_decay": -1e-4}, "0 or more"), ({"trust": 0.0}, "above 0"),
    ({"lr_per": "batch"}, "batch256"), ({"lr_place": "out"}, "outside"), ({"precision": "fp8"}, "did you mean"),
    ({"nesterov": True, "momentum": 0.0}, "without momentum")])
def test_what_cannot_be_meant_is_refused(wrong, words):
    with pytest.raises(ConfigError) as caught:
        config.load(build.OptimOptions, wrong)
    assert words in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", build.NAMES)
def test_a_gpu_agrees_with_the_cpu(name):
    ends = []
    for device in ("cpu", "cuda"):
        model = network().to(device)
        optimizer = build.build(build.OptimOptions(name=name), model.named_parameters(), global_batch=256)
        for step in range(STEPS):
            gradients(model, step)
            optimizer.step()
        ends.append([p.detach().cpu() for p in model.parameters()])
    for cpu, gpu in zip(*ends, strict=True):
        assert torch.allclose(cpu, gpu, rtol=1e-10, atol=1e-12)
