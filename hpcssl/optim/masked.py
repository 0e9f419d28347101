"""Updates that the device makes or leaves out, without telling the host.

A step that must not change anything is known to be one only on the device, when the host has queued its updates long
ago. ``unchanged_unless`` undoes what was done to tensors where the step is not taken. Bits are selected and not
computed: a tensor that was updated has exactly the bits of a plain update, and one that was not has its old ones,
whatever was computed in between.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hpcssl.optim.apex_sgd import SKIP_FLAG
from hpcssl.optim.lars import LARS

_SKIP = "found_inf"  # the attribute by which a gradient scaler tells torch's fused kernels to change nothing


def are_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether every entry of all tensors is finite, bool []. On a GPU this takes three launches.

    Args:
        tensors: Floating-point tensors on one device, at least one, none of them empty.
    """
    with torch.no_grad():
        if tensors[0].device.type == "cpu":  # where torch's maximum norm takes eight times as long
            extremes = [extreme for tensor in tensors for extreme in (tensor.amin(), tensor.amax())]
            return torch.stack(extremes).isfinite().all()
        largest = torch._foreach_norm(list(tensors), math.inf)  # passes NaN on, which is not less than inf
        return (torch.stack(list(largest)) < math.inf).all()


@contextlib.contextmanager
def unchanged_unless(taken: Tensor | None, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Give tensors back the values that they had before the body, where ``taken`` is false.

    It takes a few operations however many tensors there are, and memory for three copies of them.

    Args:
        taken: bool [], on the device of the tensors. None means that the body's changes stay.
        tensors: Tensors of one dtype that the body changes in place, dense in memory and without overlaps.
    """
    if taken is None or not tensors:
        yield
        return
    with torch.no_grad():
        # in the order of memory: to flatten weights that are channels-last would copy each of them
        flat = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]
        before = torch.cat(flat)
    yield
    with torch.no_grad():
        chosen = torch.where(taken, torch.cat(flat), before)
        torch._foreach_copy_(flat, list(torch.split(chosen, [len(part) for part in flat])))


def step_if(taken: Tensor | None, optimizer: torch.optim.Optimizer) -> None:
    """Make an update, which changes parameters and momentum only where ``taken`` is true.

    Args:
        taken: bool []; None means True.
        optimizer: What ``build.build_optimizer`` returned.
    """
    if taken is None:
        optimizer.step()
    elif isinstance(flag := getattr(optimizer, SKIP_FLAG, None), Tensor):
        flag.copy_(~taken)
        try:
            optimizer.step()
        finally:
            flag.zero_()
    elif isinstance(optimizer, LARS):
        weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        moments = [state for p in weights for state in optimizer.state[p].values()]
        with unchanged_unless(taken, [*weights, *moments]):
            optimizer.step()
    else:
        setattr(optimizer, _SKIP, (~taken).float())
        try:
            optimizer.step()
        finally:
            delattr(optimizer, _SKIP)
