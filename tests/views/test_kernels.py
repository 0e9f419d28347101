"""The kernels that augment views on a GPU: what they compute, and when they are used."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.fake_gpu import DEVICE, fake_gpu
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError
from hpcssl.views import blur, ops
from hpcssl.views.augment import AUGMENTATIONS, augment_batch
from hpcssl.views.kernels import augment, selection
from tests import triton_interpreter
from tests.tolerances import rounding

SIGMAS = np.array([0.1, 0.7, 1.3, 2.0])


def interpret(tmp_path, *arguments):
    """Results of the kernels in Triton's interpreter, by view."""
    out = tmp_path / "out.json"
    triton_interpreter.run_script(Path(__file__).with_name("interpreted_views.py"), out, *arguments, timeout=600)
    return json.loads(out.read_text())


def check(results):
    for case in results:
        rounded = torch.finfo(torch.bfloat16).eps if "bfloat16" in case["dtype"] else 0.0  # the interpreter cuts off
        assert case["difference"] <= 1 / 255 + rounded, case
    exact = [case["difference"] for case in results if "bfloat16" not in case["dtype"]]
    # far below a level: both are float32, and a mean and two blurs add up as many numbers as in test_ops.py
    assert max(exact) <= rounding(torch.float32, 90 + 2 * 20 + 5 * 20, amplification=2.5)


def test_kernels_equal_the_plain_operations_in_the_interpreter(tmp_path):
    results = interpret(tmp_path)
    check(results)
    for kind in ("contrast", "blurred", "solarized", "flipped"):  # there are views with each operation
        assert any(case[kind] for case in results)
    assert any(not case["contrast"] and not case["blurred"] for case in results)


@pytest.mark.full
def test_kernels_equal_the_plain_operations_for_every_packaged_view(tmp_path):
    check(interpret(tmp_path, "all"))


@pytest.mark.parametrize("kernel", blur.KERNELS)
@pytest.mark.parametrize("size", [8, 9, 16, 43, 64])
def test_taps_hold_the_blur_matrix(kernel, size):
    matrix, _ = blur.blur_matrix(SIGMAS, size, kernel, dtype=torch.float64)
    taps, edge, radius = blur.blur_taps(SIGMAS, size, kernel)
    read = np.zeros(matrix.shape)
    for i in range(size):
        for j in range(max(0, i - radius), min(size, i + radius + 1)):
            sign = -1 if i > size - 1 - i else 1
            read[:, i, j] = taps[:, min(i, size - 1 - i, edge), radius + sign * (j - i)]
    np.testing.assert_allclose(read, matrix.numpy(), rtol=0, atol=rounding(torch.float64, 40))


def test_a_view_is_one_operation_on_a_gpu():
    rows = np.zeros(4, np.dtype(selection.PARAMS))
    rows["sigma"], rows["jitter"], rows["order"] = 1.0, True, (0, 1, 2, 3)
    launched = {}
    for fast in (True, False):
        with fake_gpu() as recorder:
            images = torch.empty(4, 32, 32, 3, dtype=torch.uint8, device=DEVICE)
            view = augment_batch(images, rows, AUGMENTATIONS["strong"], dtype=torch.bfloat16, fast=fast)
        assert view.shape == (4, 3, 32, 32) and view.dtype == torch.bfloat16
        assert view.is_contiguous(memory_format=torch.channels_last)
        launched[fast] = recorder.trace
    operations = {name: count for name, count in launched[True].operations.items() if "copy" not in name}
    assert operations == {"augment_view": 1}
    assert launched[False].launches > 10 * launched[True].launches
    assert not launched[True].waits


def test_other_types_and_devices_use_the_plain_operations(monkeypatch):
    monkeypatch.setattr(augment, "run", lambda *_: pytest.fail("a kernel was called"))
    images, rows = torch.zeros(1, 16, 16, 3, dtype=torch.uint8), np.zeros(1, selection.PARAMS)
    for dtype in (torch.float32, torch.float64):
        assert augment_batch(images, rows, AUGMENTATIONS["weak"], dtype=dtype, fast=True).dtype == dtype
    with fake_gpu():
        assert augment_batch(images.to(DEVICE), rows, AUGMENTATIONS["weak"], dtype=torch.float64, fast=True).is_cuda


def test_kernels_that_fail_or_compute_something_else_are_found(monkeypatch):
    find_fault, cpu = selection.find_fault.__wrapped__, torch.device("cpu")
    monkeypatch.setattr(augment, "run", ops.run_pipeline)
    assert find_fault(cpu) == ""
    monkeypatch.setattr(augment, "run", lambda *arguments: ops.run_pipeline(*arguments) + 0.01)
    assert "differs from the plain operations by 0.01" in find_fault(cpu)
    monkeypatch.setattr(augment, "run", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in find_fault(cpu)


def test_a_fault_leads_to_the_plain_operations_with_its_reason(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(selection, "find_fault", lambda device: f"a compile error on {device.type}")
    world = World(0, 1, 0, DEVICE)
    with caplog.at_level(logging.WARNING, logger="hpcssl"):
        assert not selection.use_fast_views("auto", world)
    assert "Augmentations" in caplog.text and "a compile error on cuda, on rank 0" in caplog.text
    with pytest.raises(ConfigError) as caught:
        selection.use_fast_views("fast", world)
    assert "a compile error on cuda" in caught.value.got
    assert not selection.use_fast_views("auto", World.single_process())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_in_the_type_of_autocast_give_a_convolution_the_same_bits(dtype):
    torch.manual_seed(0)
    images, stem = torch.randn(4, 3, 32, 32), torch.nn.Conv2d(3, 8, 7, stride=2)
    with torch.autocast("cpu", dtype):
        whole, rounded = stem(images), stem(images.to(dtype))
    assert whole.dtype == dtype and torch.equal(whole, rounded)
    whole.square().sum().backward()
    of_whole, stem.weight.grad = stem.weight.grad, None
    rounded.square().sum().backward()
    assert torch.equal(of_whole, stem.weight.grad)


@pytest.mark.gpu
def test_kernels_on_a_gpu_equal_the_plain_operations():
    assert selection.find_fault(DEVICE) == ""
