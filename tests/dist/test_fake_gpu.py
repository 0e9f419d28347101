"""The training step on a GPU that is not there: devices, waits of the host, operations and collectives of each recipe.

The step is taken with fake CUDA tensors and a fake process group (``benchmarks/fake_gpu.py``), at the real size of a
recipe. Its budget is in ``benchmarks/results/launches.json``, which ``python -m benchmarks launches --out`` writes.
"""

import contextlib
import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import launches
from benchmarks.fake_gpu import DEVICE, BucketedGradients, fake_gpu
from benchmarks.fake_step import measure
from hpcssl.distributed.devices import to_device
from hpcssl.distributed.launch import LaunchInfo
from hpcssl.distributed.world import World
from hpcssl.nets.pair import EncoderPair
from hpcssl.train import recipe as recipes
from hpcssl.train import world_sizes

BUDGET = launches.stored()
REASONS = {
    "event at distributed/collectives.py result": "the ranks agree whether the step is taken, and the host acts on it",
}
"""Every reason for which the host may wait for the GPU within a step. Remove those that are gone; add none."""
LIMIT = 1.25
"""Operations of a step on 1 and 8 GPUs, in those of the plain encoders."""
SEARCHES = "exact searches and reads of the bank, beside a small network"
ABOVE_LIMIT = {
    "cifar10_cmsf_2q": SEARCHES,
    "cifar10_cmsf_cross": SEARCHES,
    "cifar10_cmsf_km": SEARCHES,
    "cifar10_cmsf_semi": SEARCHES,
    "cifar10_cmsf_sup": SEARCHES,
    "cifar10_nnclr": SEARCHES,
    "cifar10_swav": "iterations of the codes, LARC and prototypes, beside a small network",
}
"""Recipes whose steps need more than ``LIMIT`` besides the augmentations, and why. Remove those that are gone."""
QUICK = [("msf_r50_ep200_128k", 8), ("cifar10_cmsf_2q", 8)]
IN_TABLE = [(name, int(ranks)) for name in BUDGET for ranks in BUDGET[name]]
OTHERS = sorted({name for name in recipes.names() if not name.startswith("digits_")} - set(BUDGET))


def is_of_this_torch(budget):
    """Whether the row was counted with this torch: another one may take an operation apart in another way."""
    versions = (version.split("+")[0].rsplit(".", 1)[0] for version in (budget["torch"], torch.__version__))
    return len(set(versions)) == 1


def check_budget(name, ranks):
    row, budget = launches.row_of(measure(name, ranks)), BUDGET[name][str(ranks)]
    slack = 1.0 if is_of_this_torch(budget) else 1.1
    assert row["operations"] <= budget["operations"] * slack
    assert row["ratio"] <= budget["ratio"] * slack
    assert row["ratio_without_views"] <= budget["ratio_without_views"] * slack
    assert all(count <= budget["waits"].get(reason, 0) for reason, count in row["waits"].items()), row["waits"]
    assert row["copied_bytes"].get("blocking", 0) <= budget["copied_bytes"].get("blocking", 0)
    assert row["collectives"] == budget["collectives"]


@pytest.mark.parametrize(("name", "ranks"), QUICK)
def test_a_step_keeps_its_budget(name, ranks):
    check_budget(name, ranks)


@pytest.mark.full
@pytest.mark.parametrize(("name", "ranks"), [case for case in IN_TABLE if case not in QUICK])
def test_every_step_keeps_its_budget(name, ranks):
    check_budget(name, ranks)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("name", OTHERS)
def test_every_recipe_takes_a_step_on_a_gpu(name, ranks):
    if world_sizes.explain_unfit(recipes.compose(name, []), ranks):
        pytest.skip("the recipe does not run on this number of processes")
    step = measure(name, ranks, plain=False).step
    assert set(step.waits) <= set(REASONS)


def test_steps_need_few_operations_beyond_those_of_the_plain_encoders():
    ratios = {name: max(BUDGET[name][ranks]["ratio_without_views"] for ranks in ("1", "8")) for name in BUDGET}
    assert {name for name, ratio in ratios.items() if ratio > LIMIT} == set(ABOVE_LIMIT), ratios
    for row in (row for by_ranks in BUDGET.values() for row in by_ranks.values()):
        assert sum(row["parts"].values()) == row["operations"]


def test_every_wait_of_the_host_has_a_reason():
    waits = {reason for by_ranks in BUDGET.values() for row in by_ranks.values() for reason in row["waits"]}
    assert waits == set(REASONS)


def test_accumulation_reduces_gradients_once_per_step(monkeypatch):
    """All micro-batches but the last keep their gradients on the rank."""

    def gradients(*overrides):
        collectives = measure("digits_byol", 8, "model.norm=local", "optim.batch=64", *overrides, plain=False).step
        return [c for c in collectives.collectives if c.gradients], len(collectives.collectives)

    whole, micro = gradients(), gradients("machine.accumulation_steps=4")
    assert whole == micro and whole[0]
    monkeypatch.setattr(EncoderPair, "no_sync", lambda _: contextlib.nullcontext())
    assert len(gradients("machine.accumulation_steps=4")[0]) == 4 * len(whole[0])  # the count sees it


# -- that the recorder sees what it is there for ------------------------------------------------------------------


def on_gpu(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=DEVICE)


WAITS = {
    "item": lambda: on_gpu().item(),
    "bool": lambda: bool(on_gpu(1).isfinite()),
    "tolist": lambda: on_gpu(3).tolist(),
    "nonzero": lambda: on_gpu(3).nonzero(),
    "mask": lambda: on_gpu(3)[on_gpu(3, dtype=torch.bool)],
    "assignment by a mask": lambda: on_gpu(3, 2).__setitem__(on_gpu(3, dtype=torch.bool), on_gpu(2)),
    "unique": lambda: torch.unique(on_gpu(3, dtype=torch.int64)),
    "copy to the host": lambda: on_gpu(3).cpu(),
    "copy to the GPU": lambda: torch.empty(3).to(DEVICE),
    "tensor": lambda: torch.tensor([1.0, 2.0], device=DEVICE),
    "event": lambda: torch.cuda.Event().synchronize(),
    "device": lambda: torch.cuda.synchronize(),
}
NO_WAITS = {
    "asynchronous copy": lambda: to_device(np.arange(3), DEVICE),
    "index": lambda: on_gpu(3)[on_gpu(2, dtype=torch.int64)],
    "where": lambda: torch.where(on_gpu(3) > 0, on_gpu(3), 0.0),
    "backward": lambda: (on_gpu(3).requires_grad_() * 2).sum().backward(),
}


def test_waits_of_the_host_are_seen():
    for name, action in (WAITS | NO_WAITS).items():
        with fake_gpu() as recorder:
            action()
        assert sum(recorder.trace.waits.values()) == (name in WAITS), (name, recorder.trace.waits)


def test_tensors_of_two_devices_are_refused():
    with fake_gpu(), pytest.raises(Exception, match="device"):
        on_gpu(3) + torch.empty(3)


def test_a_collective_of_a_cpu_tensor_is_refused():
    with fake_gpu(2), pytest.raises(RuntimeError, match="cpu"):
        dist.all_reduce(torch.empty(3))


def test_operations_are_counted():
    with fake_gpu() as recorder:
        x = on_gpu(4, 4)
        (x @ x.T).view(16).relu_()
        torch.empty(3) * 2  # on the CPU
    assert recorder.trace.operations == {"mm": 1, "relu_": 1}
    assert recorder.trace.parts == {"outside of the package": 2}


def test_the_group_of_a_collective_is_counted():
    with fake_gpu(8) as recorder:
        dist.all_reduce(on_gpu(3))
        dist.all_reduce(on_gpu(3), group=dist.new_group([0, 1]))
    assert [c.ranks for c in recorder.trace.collectives] == [8, 2]


class Collectives(TorchDispatchMode):
    """The bytes of each collective, of real tensors."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and "allreduce" in str(func):
            self.sizes.append(sum(x.numel() * x.element_size() for x in args[0]))
        return func(*args, **(kwargs or {}))


def test_gradients_are_sent_as_by_data_parallel():
    """The model of DDP against DDP itself, which sends its buckets in a process group of one rank, too."""
    build = functools.partial(nn.Sequential, *[nn.Linear(700, 900), nn.Linear(900, 1100), nn.Linear(1100, 20)])
    info = LaunchInfo(rank=0, local_rank=0, size=1, address="", port=0, token="")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        network = World(0, 1, 0, torch.device("cpu"), info).wrap_in_ddp(build())
        with Collectives() as real:
            network(torch.ones(2, 700)).sum().backward()
    finally:
        dist.destroy_process_group()
    with fake_gpu(2) as recorder:
        network = World(0, 2, 0, DEVICE, info).wrap_in_ddp(build().to(DEVICE))
        assert isinstance(network, BucketedGradients)
        network(on_gpu(2, 700)).sum().backward()
    assert sorted(c.sent for c in recorder.trace.collectives) == sorted(real.sizes)
    assert len(real.sizes) > 2
