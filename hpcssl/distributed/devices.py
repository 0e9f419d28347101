"""The device on which a process computes, and copies to it."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpcssl.distributed.key_value_store import KeyValueStore
from hpcssl.distributed.launch import LaunchInfo
from hpcssl.errors import WorldError

LOG = logging.getLogger("hpcssl")
DEVICES = ("auto", "cpu", "gpu")


def choose_device(devices: str, local_rank: int) -> torch.device:
    """The device of one process of its node.

    Args:
        devices: ``machine.devices``: ``cpu``, ``gpu``, or ``auto`` for GPUs where there are any.
        local_rank: Index of this process among those of its node.

    Raises:
        WorldError: For an unknown value, or if there is no GPU under ``gpu``. Processes that would share one find out
            in ``agree_on_device``.
    """
    if devices not in DEVICES:
        raise WorldError(
            "machine.devices", got=repr(devices), expected="cpu, gpu or auto", fix="set machine.devices=auto"
        )
    count = torch.cuda.device_count() if devices != "cpu" and torch.cuda.is_available() else 0
    if count == 0:
        if devices == "gpu":
            raise WorldError(
                "machine.devices=gpu",
                got="no usable CUDA device",
                expected="one GPU per process",
                fix="request GPUs (--gpus-per-node), or set machine.devices=cpu (--devices cpu without a recipe)",
            )
        return torch.device("cpu")
    # a cluster that binds one GPU to each task shows each task a single device, number 0
    return torch.device("cuda", local_rank % count)


def identify_gpu(device: torch.device) -> str:
    """The UUID of a GPU; empty for the CPU. Raises ``WorldError`` if the GPU cannot be used."""
    if device.type != "cuda":
        return ""
    try:
        return str(torch.cuda.get_device_properties(device).uuid)
    except RuntimeError as error:
        raise _unusable_gpu(device, error) from error


def select_gpu(device: torch.device) -> None:
    """Make a GPU the current one of this thread; nothing for the CPU. Raises ``WorldError`` if it cannot be used."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.set_device(device)
    except RuntimeError as error:
        raise _unusable_gpu(device, error) from error


def _unusable_gpu(device: torch.device, error: RuntimeError) -> WorldError:
    return WorldError(
        f"GPU {device.index} of {socket.gethostname()}",
        got=" ".join(str(error).split())[:200],
        expected="a GPU that this process can use",
        fix="check it with nvidia-smi: another process may hold it, or its driver may have failed",
    )


def agree_on_device(
    devices: str, device: torch.device, gpu: str, info: LaunchInfo, store: KeyValueStore
) -> torch.device:
    """The device of one process among those that train together, once all know the GPUs of all. A collective.

    NCCL refuses two processes on one GPU, with a message about the network. A process that sees a single GPU cannot
    tell by itself whether others have the same one.

    Args:
        devices: ``machine.devices``.
        device: What ``choose_device`` returned.
        gpu: What ``identify_gpu`` returned.
        info: This process among all.
        store: Where the processes exchange texts. Its keys belong to this attempt.

    Returns:
        ``device``; or the CPU, on all processes, if ``devices`` is ``auto`` and some of them share a GPU.

    Raises:
        WorldError: On all processes, if ``devices`` is ``gpu`` and some share a GPU, or if some have one and others
            none.
    """
    store.set(f"device/{info.rank}", json.dumps([socket.gethostname(), gpu]))
    gpus = [tuple(json.loads(text)) for text in store.get(f"device/{rank}" for rank in range(info.size))]
    without = [rank for rank, (_, uuid) in enumerate(gpus) if not uuid]
    if len(without) == info.size:
        return device
    if without:
        raise WorldError(
            f"machine.devices={devices}",
            got=f"no usable GPU on {_count_ranks(without)} at {gpus[without[0]][0]}, but one on the others",
            expected="a GPU for every process, or for none",
            fix="check the driver of that node (nvidia-smi), or set machine.devices=cpu",
        )
    owners: dict[tuple[str, ...], list[int]] = {}
    for rank, host_and_gpu in enumerate(gpus):
        owners.setdefault(host_and_gpu, []).append(rank)
    (host, _), sharing = max(owners.items(), key=lambda item: len(item[1]))
    if len(sharing) == 1:
        return device
    if devices == "gpu":
        raise WorldError(
            "machine.devices=gpu",
            got=f"one GPU for {_count_ranks(sharing)} at {host}",
            expected="one GPU per process",
            fix="start one process per GPU (--ntasks-per-node, --gpus-per-node), or set machine.devices=cpu",
        )
    if info.rank == 0:
        LOG.warning(
            "%s at %s would share one GPU, which is not supported: all processes compute on the CPU. "
            "Start one process per GPU to use it.",
            _count_ranks(sharing),
            host,
        )
    return torch.device("cpu")


def _count_ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def to_device(numbers: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device without waiting for the work that is queued there.

    A copy from pageable memory would wait, so that the array goes through page-locked memory on the way to a GPU.
    """
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def stack_scalars(rows: Sequence[Mapping[str, Tensor | float]], device: torch.device) -> Tensor:
    """Put numbers of the host and of the device into one tensor, with one transfer and without waiting.

    Args:
        rows: Numbers, or tensors with one element on ``device`` or on the CPU.
        device: The device of the result.

    Returns:
        float64 [scalars], in the order of the rows and of their entries.
    """
    values = [value for row in rows for value in row.values()]
    tensors: list[Tensor] = []
    host, order = np.zeros(len(values)), np.arange(len(values))
    for place, value in enumerate(values):
        if isinstance(value, Tensor) and value.device == device:
            order[place] = len(values) + len(tensors)
            tensors.append(value.detach().reshape(()).double())
        else:
            host[place] = float(value.detach() if isinstance(value, Tensor) else value)
    if not tensors:
        return to_device(host, device)
    return torch.cat([to_device(host, device), torch.stack(tensors)])[to_device(order, device)]


_copy_streams: dict[torch.device, torch.cuda.Stream] = {}


def copy_images(images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy the images of a batch to a device.

    A GPU copies them from page-locked memory on a stream of its own, while it still computes the step before: the host
    is one step ahead where it reads verdicts late. The current stream waits for the copies.

    Args:
        images: Tensors on the CPU, in page-locked memory for a GPU. Whoever writes to them again must wait for what is
            queued on the current stream until then.
        device: The device.
    """
    if device.type != "cuda":
        return [image.to(device) for image in images]
    if device not in _copy_streams:
        _copy_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no annotation
    stream = _copy_streams[device]
    current = torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        copies = [image.to(device, non_blocking=True) for image in images]
    current.wait_stream(stream)
    for copy in copies:
        copy.record_stream(current)  # its memory was allocated for the other stream
    return copies
