"""``machine.compile``: blocks compute the same, norms record the same, and a block that does not compile runs plainly.

Backend ``aot_eager`` traces and replays all operations without a compiler; the full suite uses inductor.
"""

import logging
import shutil

import pytest
import torch

from hpcssl.data.loader import Loader
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError
from hpcssl.nets.kernels import compiled
from hpcssl.train import builders, recipe
from hpcssl.train.step import launch_step
from hpcssl.train.train_state import TrainState
from hpcssl.train.verdict import StepFlags, StepQueue
from tests.tolerances import of_step

STEPS = 3
BASE = ["views.size=16", "optim.batch=16", f"schedule.steps={STEPS}", "bank.size=32", "machine.devices=cpu"]
GHOST = ["model.norm=ghost", "model.norm_group_size=4", "machine.accumulation_steps=2"]


def train(shards, *overrides, saved=None, until=STEPS, late=False, bad=()):
    """The state after some steps, from the start or from the tensors and the step of ``saved``."""
    t = TrainState(
        recipe.compose("digits_msf", [f"data.train={shards.root}", *BASE, *GHOST, *overrides]),
        World.single_process(),
        steps_per_epoch=100,
        labels=shards.labels,
        data_digest=shards.digest,
    )
    t.late_verdicts = late
    if saved is not None:
        t.step, t.bank.pointer, t.bank.filled = saved.step, saved.bank.pointer, saved.bank.filled
        for name, shard in t.state().tensors.items():
            shard.tensor.copy_(saved.state().tensors[name].tensor)
    order = Order([s.samples for s in shards.shards], seed=0, global_batch=16, window="all")
    steps, taken = StepQueue(t, launch_step, lambda step: step == until), []
    with Loader(Reader(shards), order, t.view_specs, seed=0) as loader:
        for batch in loader.iterate(t.step, until):
            if batch.step in bad:
                t.pair.online.backbone.register_forward_pre_hook(
                    lambda _, args, at=batch.step: (torch.full_like(args[0], torch.nan),) if t.step == at else None
                )
            taken += [report.taken for _, report in steps.take(batch, StepFlags)]
    return t, taken


def different(one, other):
    tensors = other.state().tensors
    return [name for name, shard in one.state().tensors.items() if not torch.equal(shard.tensor, tensors[name].tensor)]


def test_blocks_keep_bits_statistics_and_skipped_steps(shards, monkeypatch):
    monkeypatch.setattr(compiled, "_BACKEND", "aot_eager")
    (plain, _), (ours, taken) = (
        train(shards, f"machine.compile={flag}", late=True, bad=(1,)) for flag in ("false", "true")
    )
    assert ours.is_compiled and not plain.is_compiled and taken == [True, False, True]
    assert different(plain, ours) == []
    assert all(not layer.pending for layer in ours.norms)


def test_a_block_that_cannot_be_compiled_runs_plainly(shards, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "_measure_difference", lambda _: 1 / 0)
    with caplog.at_level(logging.WARNING, logger="hpcssl"):
        t, _ = train(shards, "machine.compile=true", until=0)
    assert not t.is_compiled and "ZeroDivisionError" in caplog.text and "on rank 0" in caplog.text
    monkeypatch.setattr(compiled, "_measure_difference", lambda _: float("nan"))
    with caplog.at_level(logging.WARNING, logger="hpcssl"):
        assert not compiled.compile_blocks([], World.single_process())
    assert "a compiled block differs" in caplog.text


def test_groups_over_processes_are_refused(shards):
    composed = recipe.compose("digits_msf", [f"data.train={shards.root}", *BASE, "machine.compile=true"])
    with pytest.raises(ConfigError) as caught:
        builders.compile_encoders(composed, None, World(0, 4, 0, torch.device("cpu")), 8)
    assert caught.value.what == "machine.compile" and "4" in caught.value.got


@pytest.mark.full
@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C++ compiler")
def test_inductor_agrees_with_eager_and_resumes_to_the_same_bits(shards):
    whole, _ = train(shards, "machine.compile=true")
    assert whole.is_compiled
    half, _ = train(shards, "machine.compile=true", until=2)
    resumed, _ = train(shards, "machine.compile=true", saved=half)
    assert different(whole, resumed) == []
    plain, compiled_too = (
        dict(train(shards, *more, "optim.precision=fp64")[0].pair.online.named_parameters())
        for more in ([], ["machine.compile=true"])
    )
    for name, parameter in plain.items():
        # all parameters perturbed by a relative 1e-11: the states of six steps changed by up to 12 times as much
        tolerance = of_step(STEPS, amplification=15) * max(1.0, float(parameter.detach().abs().max()))
        assert (compiled_too[name] - parameter).abs().max() <= tolerance, name
