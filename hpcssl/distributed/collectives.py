"""Collectives over tensors, as methods of the group of processes that call them.

With one process every collective is the identity, so callers never check how many processes there are.

Letters in shapes: W ranks, b rows per rank. Unless a docstring says "not a collective", all ranks must call a method,
in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpcssl.distributed.batch_layout import BatchLayout
from hpcssl.distributed.liveness.heartbeat import Heartbeat


class Collectives:
    """Collectives over tensors among the ranks of the default process group. ``World`` adds how it is set up.

    Args:
        rank: Index of this process among all, from 0.
        size: Number of processes, W.
        device: Device on which this process computes.

    Attributes:
        heartbeat: Receives this rank's phases and collectives while a watchdog runs; else None.
    """

    def __init__(self, rank: int, size: int, device: torch.device):
        self.rank, self.size, self.device = rank, size, device
        self.heartbeat: Heartbeat | None = None

    @contextlib.contextmanager
    def _collective(self, kind: str, x: Tensor) -> Iterator[None]:
        if self.heartbeat is None:
            yield
            return
        self.heartbeat.enter_collective(kind, x.dtype, x.shape)
        yield
        self.heartbeat.leave_collective()

    # -- rows -----------------------------------------------------------------------------------------------

    def all_gather(self, x: Tensor) -> Tensor:
        """Gather [b, …] of every rank as [W·b, …], in rank order, without gradient. b is the same on all ranks."""
        x = x.detach()
        if self.size == 1:
            return x
        x = x.contiguous()
        sent = x.to(torch.uint8) if x.dtype == torch.bool else x
        gathered = sent.new_empty((self.size * len(sent), *sent.shape[1:]))
        with self._collective("all_gather", sent):
            if self.device.type == "cuda":
                dist.all_gather_into_tensor(gathered, sent)
            else:
                dist.all_gather(list(gathered.chunk(self.size)), sent)
        return gathered.to(x.dtype)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """The tensor of rank ``source``, on every rank. Other ranks pass one of the same shape and dtype."""
        x = x.detach().clone(memory_format=torch.contiguous_format)
        if self.size > 1:
            with self._collective("broadcast", x):
                dist.broadcast(x, source)
        return x

    def all_gather_with_grad(self, x: Tensor) -> Tensor:
        """``all_gather`` with gradient: the backward pass sums over ranks the gradient for this rank's rows."""
        return x if self.size == 1 else _AllGatherWithGrad.apply(x, self)

    def local_rows(self, x: Tensor) -> Tensor:
        """This rank's rows [b, …] of [W·b, …] in rank order. Not a collective."""
        rows = len(x) // self.size
        return x[self.rank * rows : (self.rank + 1) * rows]

    def all_gather_rows(self, x: Tensor, layout: BatchLayout | None = None) -> Tensor:
        """Gather this rank's rows [b, …] as [W·b, …] in the order of the global batch, without gradient.

        Args:
            x: Rows of this rank, in the order in which it holds them.
            layout: How the global batch is split; None for one micro-batch, where the order is the ranks'.
        """
        gathered = self.all_gather(x)
        if layout is None or layout.micro_batches == 1 or self.size == 1:
            return gathered
        by_rank: Tensor = gathered.unflatten(0, (self.size, layout.micro_batches, -1))  # type: ignore[no-untyped-call]
        return by_rank.transpose(0, 1).flatten(0, 2)

    def local_batch_rows(self, x: Tensor, layout: BatchLayout | None = None) -> Tensor:
        """This rank's rows [b, …] of [W·b, …] in the order of the global batch. Not a collective."""
        if layout is None or layout.micro_batches == 1 or self.size == 1:
            return self.local_rows(x)
        by_rank: Tensor = x.unflatten(0, (layout.micro_batches, self.size, -1))  # type: ignore[no-untyped-call]
        return by_rank[:, self.rank].flatten(0, 1)

    def shuffle(self, x: Tensor, order: Tensor, layout: BatchLayout | None = None) -> Tensor:
        """Permute the rows of the global batch over ranks, without gradient.

        Args:
            x: This rank's rows [b, …].
            order: Permutation of the global batch, int64 [W·b], equal on all ranks.
            layout: How the global batch is split.

        Returns:
            This rank's rows of ``all_gather_rows(x)[order]``, [b, …].
        """
        return self.all_gather_rows(x, layout)[self.local_batch_rows(order, layout)]

    def unshuffle(self, x: Tensor, order: Tensor, layout: BatchLayout | None = None) -> Tensor:
        """Inverse of ``shuffle``: every row returns to the rank and place that it came from."""
        return self.all_gather_rows(x, layout)[self.local_batch_rows(torch.argsort(order), layout)]

    # -- numbers --------------------------------------------------------------------------------------------

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over ranks; the same bits on every rank."""
        if self.size == 1:
            return x.detach()
        x = x.detach().clone(memory_format=torch.contiguous_format)
        with self._collective("all_reduce_sum", x):
            dist.all_reduce(x)
        return x

    def all_reduce_mean(self, x: Tensor) -> Tensor:
        """Elementwise mean over ranks; the same bits on every rank."""
        return self.all_reduce_sum(x) / self.size

    def all_reduce_max(self, x: Tensor) -> PendingReduction:
        """Start an elementwise maximum over ranks. The caller may launch other work before it asks for the result."""
        x = x.detach().clone()
        if self.size == 1:
            return PendingReduction(x, None)
        with self._collective("all_reduce_max", x):
            work = dist.all_reduce(x, op=dist.ReduceOp.MAX, async_op=True)
        return PendingReduction(x, work, self.heartbeat)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank."""
        return bool(self.all_reduce_max(torch.tensor([float(flag)], device=self.device)).result()[0])

    def barrier(self) -> None:
        """Wait until all ranks have arrived here."""
        self.any(False)


class PendingReduction:
    """A small reduction that is under way.

    ``result`` waits for this reduction only, not for work that was launched after it.

    Args:
        x: The tensor that the reduction writes to.
        work: Handle of the asynchronous collective; None if there is nothing to wait for.
        heartbeat: Informed while ``result`` waits.
    """

    def __init__(self, x: Tensor, work: dist.Work | None, heartbeat: Heartbeat | None = None):
        self._x, self._work, self._heartbeat = x, work, heartbeat
        self._event: torch.cuda.Event | None = None
        if x.device.type == "cuda":
            if work is not None:
                work.wait()  # orders streams; does not block the host
                self._work = None
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def on_device(self) -> Tensor:
        """Return the reduced values on the device. A GPU waits for them there, without the host."""
        if self._work is not None:  # on a CPU, where the host computes
            self.result()
        return self._x

    def result(self) -> Tensor:
        """Wait for the reduced values and return them, on the CPU."""
        if self._heartbeat is not None:
            self._heartbeat.set_waiting(True)
        if self._event is not None:
            self._event.synchronize()
        elif self._work is not None:
            self._work.wait()
            self._work = None
        if self._heartbeat is not None:
            self._heartbeat.set_waiting(False)
        return self._x if self._event is None else self._host


class _AllGatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: Collectives) -> Tensor:
        ctx.world = world
        return world.all_gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return ctx.world.local_rows(ctx.world.all_reduce_sum(grad)), None
