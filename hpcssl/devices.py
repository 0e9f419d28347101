"""Which device a process computes on."""

from __future__ import annotations

import torch

from hpcssl.errors import WorldError


def choose(devices: str, local_rank: int) -> torch.device:
    """``machine.devices`` as the device of one process of its node. Raises ``WorldError``."""
    if devices not in ("auto", "cpu", "gpu"):
        raise WorldError("machine.devices", got=repr(devices), expected="cpu, gpu or auto",
                         mend="set machine.devices=auto")
    seen = torch.cuda.device_count() if devices != "cpu" and torch.cuda.is_available() else 0
    if seen == 0:
        if devices == "gpu":
            raise WorldError("machine.devices=gpu", got="no usable CUDA device", expected="one GPU per process",
                             mend="ask for GPUs (--gpus-per-node), or set machine.devices=cpu")
        return torch.device("cpu")
    if seen > 1 and local_rank >= seen:
        raise WorldError(f"local rank {local_rank}", got=f"{seen} visible GPUs", expected="one GPU per process",
                         mend="ask for as many GPUs as processes per node, or set machine.devices=cpu")
    # a cluster that binds one GPU to each task shows each task a single device, number 0
    device = torch.device("cuda", local_rank if seen > 1 else 0)
    torch.cuda.set_device(device)
    return device
