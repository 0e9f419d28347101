"""Collectives over tensors, as methods of the group of processes that call them.

With one process every collective is the identity, so callers never check how many processes there are.

Letters in shapes: W ranks, b rows per rank. Unless a docstring says "not a collective", all ranks must call a method,
in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpcssl.distributed.batch_layout import BatchLayout
from hpcssl.distributed.liveness.heartbeat import Heartbeat


class Collectives:
    """Collectives over tensors among the ranks of a process group. ``World`` adds how the default one is set up.

    Args:
        rank: Index of this process among those of the group, from 0.
        size: Number of processes in the group, W.
        device: Device on which this process computes.
        group: The process group; None for the default one, of all processes.
        timeout_s: Seconds that a collective of a group made by ``neighbors`` may take.

    Attributes:
        heartbeat: Receives this rank's phases and collectives while a watchdog runs; else None.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        timeout_s: float = 1800.0,
    ):
        self.rank, self.size, self.device, self.timeout_s = rank, size, device, timeout_s
        self.heartbeat: Heartbeat | None = None
        self._group = group
        self._neighbors: dict[int, Collectives] = {}

    def neighbors(self, span: int) -> Collectives:
        """The collectives among this rank's ``span`` neighbors: ranks 0 to span - 1, span to 2·span - 1, and so on.

        The first call with a span creates the group, and is a collective; later ones return it. Only the members of a
        group talk to each other, so that what travels does not grow with the number of all ranks. On a GPU even all
        ranks get a communicator of their own: in the default one, a small collective of a backward pass would wait for
        the gradients that DDP sends.

        Args:
            span: Ranks per group, a divisor of the number of ranks.
        """
        if span == self.size and (span == 1 or self.device.type == "cpu"):
            return self
        if span not in self._neighbors:
            first = self.rank // span * span
            # with local synchronization a rank creates its own group only, and not the W / span groups of all ranks
            with self._collective("new_group", torch.empty(0)):
                group = dist.new_group(
                    list(range(first, first + span)),
                    timeout=timedelta(seconds=self.timeout_s),
                    use_local_synchronization=True,
                    group_desc=f"{span} neighbors",
                )
            assert not isinstance(group, int)  # what torch returns to ranks that are no members
            self._neighbors[span] = Collectives(self.rank - first, span, self.device, group, self.timeout_s)
        found = self._neighbors[span]
        found.heartbeat = self.heartbeat
        return found

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
                dist.all_gather_into_tensor(gathered, sent, group=self._group)
            else:
                dist.all_gather(list(gathered.chunk(self.size)), sent, group=self._group)
        return gathered.to(x.dtype)

    def all_to_all(
        self, x: Tensor, to_send: Sequence[int] | None = None, to_receive: Sequence[int] | None = None
    ) -> Tensor:
        """Send different rows to every rank, without gradient. Bits are copied.

        gloo and NCCL both have this collective in this form; gloo lacks only the one over lists of tensors.

        Args:
            x: The rows to send [n, …], those for rank 0 first.
            to_send: Number of rows for each rank; None sends every rank equally many.
            to_receive: Number of rows from each rank; None with ``to_send``.

        Returns:
            The rows that this rank received, those of rank 0 first.
        """
        x = x.detach().contiguous()
        if self.size == 1:
            return x
        received = x.new_empty((len(x) if to_receive is None else sum(to_receive), *x.shape[1:]))
        # the number of rows may differ between ranks, which is no mismatch
        with self._collective("all_to_all", x if to_send is None else x.new_empty((0, *x.shape[1:]))):
            dist.all_to_all_single(
                received,
                x,
                None if to_receive is None else list(to_receive),
                None if to_send is None else list(to_send),
                group=self._group,
            )
        return received

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """The tensor of rank ``source``, on every rank. Other ranks pass one of the same shape and dtype."""
        x = x.detach().clone(memory_format=torch.contiguous_format)
        if self.size > 1:
            with self._collective("broadcast", x):
                dist.broadcast(x, group=self._group, group_src=source)
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

    def all_reduce_sum(self, x: Tensor, in_place: bool = False) -> Tensor:
        """Elementwise sum over ranks; the same bits on every rank. ``in_place`` for a contiguous x that may change."""
        if self.size == 1:
            return x.detach()
        x = x.detach() if in_place else x.detach().clone(memory_format=torch.contiguous_format)
        with self._collective("all_reduce_sum", x):
            dist.all_reduce(x, group=self._group)
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
            work = dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
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
