"""``machine.fused=apex``: which optimizer is built, what it changes, and what is refused. See ``apex_model``."""

import sys

import pytest
import torch
from torch import nn

from hpcssl.errors import ConfigError
from hpcssl.optim import apex_sgd, build
from hpcssl.optim.masked import step_if
from tests.optim import apex_model
from tests.tolerances import rounding

STEPS = 8


def start(fused, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)).to(dtype)
    made = build.OptimOptions(lr=0.3, exclude_norm_and_bias=True, **options)
    return model, build.build_optimizer(made, model.named_parameters(), global_batch=64, fused=fused)


def go(model, optimizer, first, last, taken=lambda step: None):
    for step in range(first, last):
        for number, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + number))
        step_if(taken(step), optimizer)
        optimizer.zero_grad()


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "options", [{}, {"nesterov": True}, {"momentum": 0.0}], ids=["plain", "nesterov", "no momentum"]
)
def test_updates_equal_those_of_torch_and_resume_to_the_same_bits(monkeypatch, options):
    apex_model.install(monkeypatch)
    (model, optimizer), (reference, of_torch) = start("apex", **options), start("torch", **options)
    assert isinstance(optimizer, apex_model.FusedSGD) and isinstance(of_torch, torch.optim.SGD)
    go(model, optimizer, 0, 5)
    weights, moments = copies(model.state_dict()), copies(build.momentum_tensors(optimizer))
    go(model, optimizer, 5, STEPS)
    go(reference, of_torch, 0, STEPS)
    assert build.momentum_tensors(optimizer).keys() == build.momentum_tensors(of_torch).keys()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        # decay, two products and two sums for the momentum, as many for the update
        tolerance = rounding(torch.float32, 10, steps=STEPS, amplification=10.0)  # 1 / (1 - momentum)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, float(theirs.detach().abs().max())))
    again, resumed = start("apex", **options)
    again.load_state_dict(weights)
    build.load_momentum(resumed, moments)
    go(again, resumed, 5, STEPS)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))


def test_an_update_that_is_not_taken_changes_no_bit(monkeypatch):
    apex_model.install(monkeypatch)
    model, optimizer = start("apex")
    go(model, optimizer, 0, 2)
    weights, moments = copies(model.state_dict()), copies(build.momentum_tensors(optimizer))
    go(model, optimizer, 2, 4, taken=lambda _: torch.tensor(False))
    assert optimizer.updates == 4 and optimizer._dummy_overflow_buf.tolist() == [0]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, moments[name]) for name, tensor in build.momentum_tensors(optimizer).items())
    plain, of_plain = start("apex")
    go(plain, of_plain, 0, 2)
    go(plain, of_plain, 4, 6)
    go(model, optimizer, 4, 6, taken=lambda _: torch.tensor(True))  # as if steps 2 and 3 had not been
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), plain.parameters(), strict=True))


def refused(**options):
    with pytest.raises(ConfigError) as caught:
        start("apex", **options)
    assert caught.value.what == "machine.fused=apex"
    return caught.value


def test_apex_that_cannot_be_used_is_refused(monkeypatch):
    assert "device cpu" in refused().got
    apex_model.install(monkeypatch)
    assert "float64" in refused(dtype=torch.float64).got
    monkeypatch.setattr(
        apex_model.FusedSGD, "__init__", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no CUDA"))
    )
    assert "no CUDA" in refused().got
    monkeypatch.delattr(sys.modules["apex.optimizers"], "FusedSGD")  # the other package of this name on an index
    assert "AttributeError" in refused().got
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    error = refused()
    assert "ModuleNotFoundError" in error.got and "requirements-apex.txt" in error.fix
    assert apex_sgd.DEVICES == ("cpu", "cuda")
