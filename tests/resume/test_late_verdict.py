"""Steps whose verdicts the host reads one step late, as on a GPU, end in the same bits as steps read at once."""

import numpy as np
import pytest
import torch

from hpcssl.data.loader import Loader
from hpcssl.data.order import Order
from hpcssl.data.reader import Reader
from hpcssl.distributed.world import World
from hpcssl.optim.lars import LARS
from hpcssl.optim.masked import step_if, unchanged_unless
from hpcssl.train import recipe
from hpcssl.train.step import launch_step
from hpcssl.train.train_state import TrainState
from hpcssl.train.verdict import StepFlags, StepQueue

STEPS = 7
RECIPES = {
    "push before the lookup": ("digits_msf", ["model.norm=ghost", "model.norm_group_size=8"]),
    "embedding table": ("digits_cmsf_2q", []),
    "push after the step, in two views": ("digits_nnclr", ["method.neighbors.both_views=true"]),
    "push into random rows": ("digits_nnclr", ["method.neighbors.replace=random", "bank.placement=sharded"]),
    "prototypes and queue": ("digits_swav", ["method.queue=true", "method.queue_start_epoch=0"]),
    "lars": ("digits_byol", ["optim.name=lars", "machine.accumulation_steps=2"]),
    "pseudo-labels": ("digits_cmsf_semi", []),
    "no bank": ("digits_simclr", []),
}

QUICK = ("embedding table", "push into random rows", "prototypes and queue", "lars")


def run(shards, name, overrides, *, late, bad=(), incomplete=(), stop_at=None):
    """Take ``STEPS`` steps.

    Returns:
        The tensors and numbers of the state, and (step, taken, abandoned) of each report.
    """
    base = ["views.size=16", "optim.batch=16", f"schedule.steps={STEPS}", "bank.size=32", "machine.devices=cpu"]
    composed = recipe.compose(name, [f"data.train={shards.root}", *base, *overrides])
    order = Order([s.samples for s in shards.shards], seed=0, global_batch=16, window="all")
    t = TrainState(
        composed,
        World.single_process(),
        steps_per_epoch=order.steps_per_epoch,
        labels=shards.labels,
        data_digest=shards.digest,
    )
    t.late_verdicts = late
    steps, reports = StepQueue(t, launch_step, lambda step: step == STEPS), []
    with Loader(Reader(shards), order, t.view_specs, seed=0) as loader:
        for batch in loader.iterate(0, STEPS):
            if batch.step in bad:
                t.pair.online.backbone.register_forward_pre_hook(poison(t, batch.step))
            batch.complete = batch.step not in incomplete
            for of_step, report in steps.take(batch, lambda at=batch.step: StepFlags(stop=at == stop_at)):
                assert report.abandoned or of_step.step == report.step - 1
                reports.append((report.step, report.taken, report.abandoned, report.flags.stop))
            if reports and (reports[-1][2] or (steps.is_settled and any(stop for *_, stop in reports))):
                break
    state = t.state()
    tensors = {name: shard.tensor.clone() for name, shard in state.tensors.items()}
    return tensors, {"step": state.step, **state.numbers}, reports


def poison(t, step):
    """A hook that makes the images of the step with this number NaN."""
    return lambda module, args: (torch.full_like(args[0], torch.nan),) if t.step == step else None


def assert_same(one, other):
    assert one[0].keys() == other[0].keys()
    assert [name for name in one[0] if not torch.equal(one[0][name], other[0][name])] == []
    assert one[1:] == other[1:]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in RECIPES]
)
def test_late_verdicts_end_in_the_same_bits(shards, name):
    bad = (2, 4, 5)  # one bad step, and two in a row
    at_once, late = (run(shards, *RECIPES[name], late=late, bad=bad) for late in (False, True))
    assert [taken for _, taken, *_ in at_once[2]] == [step not in bad for step in range(STEPS)]
    assert_same(at_once, late)
    good, _, _ = run(shards, *RECIPES[name], late=True)
    assert any(not torch.equal(good[tensor], late[0][tensor]) for tensor in good), "the bad steps were taken"


def test_a_step_that_follows_an_abandoned_one_does_not_count(shards):
    at_once, late = (run(shards, "digits_cmsf_2q", [], late=late, incomplete=(3,)) for late in (False, True))
    assert at_once[1]["step"] == 3 and at_once[2][-1] == (3, False, True, False)
    assert_same(at_once, late)


def test_all_launched_steps_are_reported_after_a_stop(shards):
    expected, _, _ = run(shards, "digits_msf", [], late=False, stop_at=4)
    tensors, numbers, reports = run(shards, "digits_msf", [], late=True, stop_at=3)
    assert numbers["step"] == 5 and reports[-1] == (5, True, False, False)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["sgd", "lars"])
def test_an_update_that_is_not_taken_changes_no_bit(kind):
    channels_last = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    weights = [torch.nn.Parameter(channels_last), torch.nn.Parameter(torch.tensor(-0.0))]
    optimizer = LARS(weights, lr=0.1) if kind == "lars" else torch.optim.SGD(weights, lr=0.1, momentum=0.9, fused=True)
    for weight in weights:
        optimizer.state[weight]["momentum_buffer"] = torch.full_like(weight, -0.0)
        weight.grad = torch.full_like(weight, torch.nan)
    before = [weight.detach().clone() for weight in weights]
    step_if(torch.tensor(False), optimizer)
    for weight, old in zip(weights, before, strict=True):
        assert torch.equal(weight.view(torch.int32), old.view(torch.int32))
        assert torch.equal(optimizer.state[weight]["momentum_buffer"].signbit(), torch.ones_like(old, dtype=torch.bool))
        weight.grad = torch.ones_like(weight)
    step_if(torch.tensor(True), optimizer)
    assert all(not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


def test_changes_that_are_taken_keep_their_bits():
    tensors = [torch.randn(5, 4).t(), torch.randn(3)]
    expected = [tensor * 3 for tensor in tensors]
    with unchanged_unless(torch.tensor(True), tensors):
        for tensor in tensors:
            tensor.mul_(3)
    assert all(torch.equal(tensor, wanted) for tensor, wanted in zip(tensors, expected, strict=True))
    with unchanged_unless(torch.tensor(False), tensors):
        for tensor in tensors:
            tensor.fill_(np.nan)
    assert all(torch.equal(tensor, wanted) for tensor, wanted in zip(tensors, expected, strict=True))
