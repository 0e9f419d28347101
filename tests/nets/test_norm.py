"""Batch norms on a GPU and over many ranks, as far as a machine without a GPU shows them."""

import json
import logging
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fake_gpu import SYNC_NORM_SHAPES
from hpcssl.distributed.collectives import Collectives
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError
from hpcssl.nets import norm, resnet
from hpcssl.nets.kernels import selection, spanning
from tests import triton_interpreter
from tests.nets import norm_kernel_models
from tests.tolerances import rounding

EPS, C = 1e-5, 3
CUDA, NO_DRIVER = torch.device("cuda", 0), torch.device("meta", 7)


class Counted(TorchDispatchMode):
    """Counts operations that do work, by name, and the bytes that collectives deliver to this rank.

    The autograd engine asks for the driver of a tensor's device; of a fake CUDA tensor it gets one without a driver.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.received = Counter(), 0

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        name, kwargs = func.name(), kwargs or {}
        if name == "prim::device":
            device = func(*args)
            return NO_DRIVER if device.type == "cuda" else device
        if kwargs.get("device") == NO_DRIVER:
            kwargs = kwargs | {"device": CUDA}
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and not name.removeprefix("aten::").startswith(("empty", "new_empty")):
            self.operations[name] += 1
        if name.startswith("c10d::"):
            gathered = args[0] if isinstance(args[0][0], torch.Tensor) else args[0][0]
            self.received += sum(t.numel() * t.element_size() for t in gathered)
        return func(*args, **kwargs)


# -- groups within a rank ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [8, 11])
def test_each_group_is_normalized_by_itself_and_the_last_one_may_be_smaller(rows):
    layer = norm.BatchNorm(C, group=4, world=World.single_process())
    x = torch.randn(rows, C, 5, 5, generator=torch.Generator().manual_seed(0))
    parts = [torch.nn.BatchNorm2d(C, momentum=1.0) for _ in range(-(-rows // 4))]
    expected = torch.cat([part(group) for part, group in zip(parts, x.split(4), strict=True)])
    assert torch.equal(layer(x), expected)
    norm.commit_pending([layer], World.single_process())
    mean = torch.stack([part.running_mean for part in parts]).mean(0)
    assert torch.equal(layer.running_mean, torch.zeros(C).lerp(mean, layer.momentum))


# -- groups that span ranks -------------------------------------------------------------------------------------


class ThreadPeers(Collectives):
    """Ranks as threads of this process."""

    def __init__(self, rank, size, shared):
        super().__init__(rank, size, torch.device("cpu"))
        self.slots, self.barrier = shared

    def all_gather(self, x):
        self.slots[self.rank] = x.detach()
        self.barrier.wait(30)
        gathered = torch.cat(self.slots)
        self.barrier.wait(30)
        return gathered

    def all_reduce_sum(self, x, in_place=False):
        return self.all_gather(x[None]).sum(0)


def run_ranks(function, x, grad, weight, bias, size):
    """Output, statistics and gradients of a spanning norm; those of parameters summed over ranks."""
    shared = [None] * size, threading.Barrier(size)

    def run(rank):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x.chunk(size)[rank], weight, bias)]
        y, statistics = function.apply(*leaves, EPS, ThreadPeers(rank, size, shared))
        y.backward(grad.chunk(size)[rank])
        return y.detach(), statistics, *(leaf.grad for leaf in leaves if leaf is not None)

    with ThreadPoolExecutor(size) as pool:
        y, statistics, grad_x, *grads = zip(*pool.map(run, range(size)), strict=True)
    assert all(torch.equal(statistics[0], of_rank) for of_rank in statistics)
    return torch.cat(y), statistics[0], torch.cat(grad_x), *(torch.stack(of_ranks).sum(0) for of_ranks in grads)


@pytest.mark.parametrize("reduced_from", [64, 2], ids=["gathered", "reduced"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("function", [spanning.PlainSpanningNorm, spanning.CudaSpanningNorm])
def test_a_group_over_ranks_equals_the_norm_of_torch_over_all_rows(function, affine, reduced_from, monkeypatch):
    monkeypatch.setattr(spanning, "REDUCED_FROM", reduced_from)
    for name, model in norm_kernel_models.ON_CPU.items():
        monkeypatch.setattr(torch, name, model)
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(8, C, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x * 3 + 10 + torch.arange(8)[:, None, None, None]  # the means of the ranks are far apart
    weight, bias = torch.randn(2, C, generator=generator, dtype=torch.float64) if affine else (None, None)
    ours = run_ranks(function, x, grad, weight, bias, size=4)

    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    statistics = torch.zeros(2 * C, dtype=torch.float64)
    y = torch.nn.functional.batch_norm(leaves[0], *statistics.chunk(2), *leaves[1:], True, 1.0, EPS)
    y.backward(grad)
    theirs = y.detach(), statistics, *(leaf.grad for leaf in leaves if leaf is not None)
    # two sums over 48 values each way, of values whose mean is up to ten times their deviation
    tolerance = rounding(torch.float64, 4 * 48, amplification=10.0)
    for own, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


@contextmanager
def fake_world(size, rank=5, device="cpu"):
    """A world of ``size`` ranks of which only this one exists: its collectives deliver nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield World(rank, size, 0, torch.device(device))
    finally:
        dist.destroy_process_group()


def bytes_of_a_step(size, group, rows=4, channels=8):
    """Bytes that a rank with ``rows`` samples receives for one norm, forward and backward."""
    with fake_world(size) as world:
        layer = norm.BatchNorm(channels, group=group, world=world)
        x = torch.zeros(rows, channels, 2, 2, requires_grad=True)
        with Counted() as counted:
            layer(x).sum().backward()
        norm.discard_pending([layer])
    return counted.received


def test_what_norms_send_does_not_grow_with_the_world():
    statistics = 2 * 8 * 4  # of 8 channels in float32, once forward and once backward
    assert [bytes_of_a_step(size, group=8) for size in (8, 64, 512)] == [2 * 2 * statistics] * 3  # groups of two ranks
    # the whole batch: gathered on a few ranks, reduced on many, in two steps forward and one backward
    assert [bytes_of_a_step(size, group=4 * size) for size in (8, 64, 512)] == [2 * 8 * statistics] + [
        2 * statistics
    ] * 2
    assert bytes_of_a_step(64, group=4) == 0


# -- the path of a GPU ------------------------------------------------------------------------------------------


def test_grouped_kernels_equal_float64_in_the_interpreter(tmp_path):
    triton_interpreter.run_script(Path(__file__).with_name("interpreted_norms.py"), tmp_path / "out.json")
    for case in json.loads((tmp_path / "out.json").read_text()):
        for name, (difference, largest) in case["differences"].items():
            # sums over the values of a group (over all groups for parameters), in float32 and about the mean
            terms = 2 * case["values"] * (case["groups"] if name in ("grad_weight", "grad_bias") else 1)
            tolerance = rounding(torch.float32, terms, amplification=1 + case["offset"], scale=max(1.0, largest))
            if name in ("y", "grad_x", "grad_residual"):  # stored in half precision, which the interpreter cuts off
                tolerance += case["eps"] * largest
            assert difference <= tolerance, (case, name)


def count_on_fake_gpu(world, make_norm, rows=8):
    """Operations of a ResNet-18, forward and backward, on fake CUDA tensors; and those of the commit after them."""
    with FakeTensorMode(), CUDA:
        network = resnet.build(resnet.Arch(arch="resnet18"), make_norm)
        x = torch.empty(rows, 3, 64, 64).contiguous(memory_format=torch.channels_last)
        with Counted() as counted:
            network(x).sum().backward()
        commit = Counter()
        if norms := norm.find_norms([network]):
            with Counted() as counted_commit:
                norm.commit_pending(norms, world)
            commit = counted_commit.operations
    return counted.operations, commit


@pytest.mark.parametrize("scope", ["local", "ghost"])
def test_norms_on_a_gpu_launch_about_as_many_operations_as_those_of_torch(scope):
    world = World(0, 1, 0, CUDA)
    group = {"local": 8, "ghost": 2}[scope]
    plain, _ = count_on_fake_gpu(world, torch.nn.BatchNorm2d)
    operations, commit = count_on_fake_gpu(world, lambda c: norm.BatchNorm(c, group=group, world=world, fast=True))
    assert sum(operations.values()) + sum(commit.values()) <= 1.25 * sum(plain.values())
    assert operations["aten::cat"] == 0  # activations are not put together from groups, nor are their gradients
    fused = {"ghost": 20, "local": 16}[scope]  # of local norms, those with a ReLU in a block
    assert operations["hpcssl::grouped_norm"] == operations["hpcssl::grouped_norm_backward"] == fused
    assert operations["aten::relu_"] == operations["aten::threshold_backward"] == 1  # of the stem
    # group by group instead: the count sees it
    grouped, _ = count_on_fake_gpu(world, lambda c: norm.BatchNorm(c, group=2, world=world))
    assert grouped["aten::cat"] == 40 and sum(grouped.values()) > 2 * sum(plain.values())


@pytest.mark.parametrize("group", [16, 64], ids=["two ranks", "all ranks"])
def test_a_group_over_gpus_reads_activations_in_kernels_of_torch_alone(group):
    plain, _ = count_on_fake_gpu(World(0, 1, 0, CUDA), torch.nn.BatchNorm2d)
    library = norm_kernel_models.register_shapes()
    with fake_world(8, device=CUDA) as world:
        operations, _ = count_on_fake_gpu(world, lambda c: norm.BatchNorm(c, group=group, world=world, fast=True))
    del library
    small = {"stack", "full", "zeros"}  # of statistics [C]
    added = {name.split("::")[1].split(".")[0]: count for name, count in (operations - plain).items()}
    assert set(added) - small == {*SYNC_NORM_SHAPES, "_allgather_base_", "allreduce_"}
    assert {added[name] for name in SYNC_NORM_SHAPES} == {20}
    assert sum(added.values()) <= 12 * 20


def test_fast_kernels_are_chosen_on_a_gpu_alone():
    cpu, gpu = World.single_process(), World(0, 1, 0, CUDA)
    assert not selection.use_fast_kernels("auto", cpu)
    assert not selection.use_fast_kernels("plain", gpu)
    with pytest.raises(ConfigError) as caught:
        selection.use_fast_kernels("fast", cpu)
    assert caught.value.what == "machine.kernels=fast" and "cpu" in caught.value.got


def norm_of_torch(error):
    """A stand-in for a fast kernel, whose output is wrong by this factor."""

    def apply(x, *arguments):
        groups = arguments[0] if isinstance(arguments[0], int) else 1
        weight, bias, *residual = (t for t in arguments if isinstance(t, torch.Tensor))
        y, statistics = selection._plain_norm(x, weight, bias, groups, fused=bool(residual))
        return y * (1 + error), statistics

    return apply


@pytest.mark.parametrize("broken", ["GroupedNorm", "CudaSpanningNorm"])
def test_kernels_that_fail_or_compute_something_else_are_found(broken, monkeypatch):
    find_fault, cpu = selection.find_fault.__wrapped__, torch.device("cpu")
    for name in ("GroupedNorm", "CudaSpanningNorm"):
        monkeypatch.setattr(getattr(selection, name), "apply", norm_of_torch(0.0))
    assert find_fault(cpu) == ""
    monkeypatch.setattr(getattr(selection, broken), "apply", norm_of_torch(0.01))
    assert "float32" in find_fault(cpu)
    monkeypatch.setattr(getattr(selection, broken), "apply", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in find_fault(cpu)


def test_a_fault_leads_to_the_plain_kernels_with_its_reason(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(selection, "find_fault", lambda device: f"a compile error on {device.type}")
    world = World(0, 1, 0, CUDA)
    with caplog.at_level(logging.WARNING, logger="hpcssl"):
        assert not selection.use_fast_kernels("auto", world)
    assert "a compile error on cuda, on rank 0" in caplog.text
    with pytest.raises(ConfigError) as caught:
        selection.use_fast_kernels("fast", world)
    assert "a compile error on cuda" in caught.value.got
    monkeypatch.setattr(selection, "find_fault", lambda _: "")
    assert selection.use_fast_kernels("auto", world) and selection.use_fast_kernels("fast", world)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ghost_groups_on_a_gpu_equal_one_group_after_the_other(dtype):
    assert selection.find_fault(CUDA) == ""
    world, results = World(0, 1, 0, CUDA), []
    generator = torch.Generator(CUDA).manual_seed(0)
    x, grad = (torch.randn(64, 256, 28, 28, device=CUDA, generator=generator).to(dtype) for _ in range(2))
    for fast in (True, False):
        layer = norm.BatchNorm(256, group=16, world=world, fast=fast).to(CUDA)
        leaf = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        y = layer(leaf)
        y.backward(grad)
        norm.commit_pending([layer], world)
        results.append([y, leaf.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
    tolerance = rounding(torch.float32, 2 * 16 * 28 * 28 * 4)
    for name, ours, theirs in zip(["y", "dx", "dw", "db", "mean", "var"], *results, strict=True):
        stored = torch.finfo(dtype).eps if name in ("y", "dx") else 0.0
        largest = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=(tolerance + stored) * max(1.0, largest))
