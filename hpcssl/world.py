"""The processes that train together, as a value that is passed in. The one file that talks to torch.distributed.

Letters in shapes: W ranks, b rows per rank. Every method is a collective unless it says otherwise: all ranks call
it, in the same order. With one process each is the identity, so that no caller asks how many there are.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpcssl import arrivals, errors, launch
from hpcssl.devices import choose
from hpcssl.errors import HpcsslError, WorldError
from hpcssl.pulse import Pulse


class World:
    """Rank, size and device of this process, and the collectives. Build it with ``alone`` or ``start``."""

    def __init__(self, rank: int, size: int, local_rank: int, device: torch.device,
                 place: launch.Place | None = None):
        self.rank, self.size, self.local_rank, self.device = rank, size, local_rank, device
        self._place = place  # where the ranks have met; None without a group
        self.batch, self.micro_batches = 0, 1
        self.pulse: Pulse | None = None
        """Who is told of marks and collectives: a rank's signs of life."""

    @classmethod
    def alone(cls, device: str | torch.device = "cpu") -> World:
        return cls(0, 1, 0, torch.device(device))

    @classmethod
    def start(cls, devices: str = "auto", timeout_s: float = 1800.0,
              stop: Callable[[], bool] = lambda: False) -> World:
        """Join the processes that the launcher started (``hpcssl.launch``), or be alone.

        ``devices``: ``cpu`` (gloo), ``gpu`` (NCCL; an error without one), ``auto`` (GPUs where there are any). The
        rendezvous keys carry the attempt's token: a rank left over from an earlier attempt meets nobody. Raises
        ``WorldError`` where not all come in time, ``Stopped`` where ``stop()`` comes true on one that waits for others.
        """
        place = launch.find()
        device = choose(devices, place.local_rank if place else 0)
        if place is None:
            return cls.alone(device)
        try:
            store = _meet(place, timeout_s, stop)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s),
                                    store=dist.PrefixStore(place.token, store), rank=place.rank,
                                    world_size=place.size,
                                    device_id=device if device.type == "cuda" else None)
        except (RuntimeError, dist.DistError) as error:
            raise WorldError(f"rank {place.rank} of {place.size} at {place.address}:{place.port}",
                             got=" ".join(str(error).split())[:200], expected="all ranks to meet there",
                             mend="see whether every rank started, and whether the address and its interface "
                                  "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) reach every node") from error
        return cls(place.rank, place.size, place.local_rank, device, place)

    def close(self) -> None:
        if self._place is not None:
            dist.destroy_process_group()
            self._place = None

    def __deepcopy__(self, _memo) -> World:
        return self  # a network that is copied stays in the same world

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes what is written once. No collective."""
        return self.rank == 0

    # -- signs of life --------------------------------------------------------------------------------------

    def board(self) -> Board | None:
        """Texts that all ranks read and write, over a connection of its own; None for one process. No collective."""
        return Board(_prefixed(self._place, _client(self._place, 60.0))) if self._place else None

    def mark(self, phase: str, step: int | None = None, *, patient: bool = False) -> None:
        """This rank's main thread is now doing ``phase`` (``Pulse.mark``). No collective."""
        if self.pulse is not None:
            self.pulse.mark(phase, step, patient=patient)

    def nearer(self, phase: str) -> None:
        """What the main thread waits for in ``phase`` comes nearer (``Pulse.nearer``). No collective."""
        if self.pulse is not None:
            self.pulse.nearer(phase)

    @contextlib.contextmanager
    def _collective(self, kind: str, x: Tensor) -> Iterator[None]:
        if self.pulse is None:
            yield
            return
        self.pulse.enter(kind, x.dtype, x.shape)
        yield
        self.pulse.left()

    @staticmethod
    def failed(error: BaseException) -> bool:
        """Whether an error is that of a collective, which fails on every rank when one of them is gone."""
        return isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL")))

    # -- rows -----------------------------------------------------------------------------------------------

    def gather(self, x: Tensor) -> Tensor:
        """[b, …] of every rank as [W·b, …], in rank order, without gradient. b is the same on all ranks."""
        x = x.detach()
        if self.size == 1:
            return x
        x = x.contiguous()
        sent = x.to(torch.uint8) if x.dtype == torch.bool else x
        whole = sent.new_empty((self.size * len(sent), *sent.shape[1:]))
        with self._collective("gather", sent):
            if self.device.type == "cuda":
                dist.all_gather_into_tensor(whole, sent)
            else:
                dist.all_gather(list(whole.chunk(self.size)), sent)
        return whole.to(x.dtype)

    def gather_grad(self, x: Tensor) -> Tensor:
        """``gather`` whose backward sums what every rank asks of this rank's rows."""
        return x if self.size == 1 else _GatherGrad.apply(x, self)

    def part(self, x: Tensor) -> Tensor:
        """This rank's [b, …] of the world's [W·b, …]. No collective."""
        rows = len(x) // self.size
        return x[self.rank * rows:(self.rank + 1) * rows]

    def deal(self, batch: int, micro_batches: int) -> None:
        """How the global batch lies on the ranks: in ``micro_batches`` runs of its rows, of each of which every rank
        holds a slice (``Order`` deals samples out likewise). No collective."""
        self.batch, self.micro_batches = batch, micro_batches

    def whole_batch(self, x: Tensor) -> Tensor:
        """``gather``, in the order of the global batch."""
        whole = self.gather(x)
        if self.micro_batches == 1 or self.size == 1:
            return whole
        return whole.unflatten(0, (self.size, self.micro_batches, -1)).transpose(0, 1).flatten(0, 2)

    def part_of_batch(self, x: Tensor) -> Tensor:
        """This rank's rows of [W·b, …] in the order of the global batch. No collective."""
        if self.micro_batches == 1 or self.size == 1:
            return self.part(x)
        return x.unflatten(0, (self.micro_batches, self.size, -1))[:, self.rank].flatten(0, 1)

    def shuffle(self, x: Tensor, order: Tensor) -> Tensor:
        """Rows of the global batch dealt out anew: this rank's part of ``whole_batch(x)[order]``. order [W·b] int64."""
        return self.whole_batch(x)[self.part_of_batch(order)]

    def unshuffle(self, x: Tensor, order: Tensor) -> Tensor:
        """Undo ``shuffle``: every row back on the rank and the place that it came from."""
        return self.whole_batch(x)[self.part_of_batch(torch.argsort(order))]

    # -- numbers --------------------------------------------------------------------------------------------

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over ranks; the same bits on every rank."""
        if self.size == 1:
            return x.detach()
        x = x.detach().clone(memory_format=torch.contiguous_format)
        with self._collective("sum", x):
            dist.all_reduce(x)
        return x

    def mean(self, x: Tensor) -> Tensor:
        return self.sum(x) / self.size

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return bool(self.maximum(torch.tensor([float(flag)], device=self.device)).result()[0])

    def maximum(self, x: Tensor) -> Pending:
        """Elementwise maximum over ranks, not waited for: what follows may be launched meanwhile."""
        x = x.detach().clone()
        if self.size == 1:
            return Pending(x, None)
        with self._collective("maximum", x):
            work = dist.all_reduce(x, op=dist.ReduceOp.MAX, async_op=True)
        return Pending(x, work, self.pulse)

    def barrier(self) -> None:
        self.any(False)

    # -- words ----------------------------------------------------------------------------------------------

    def tell(self, text: str | None, source: int = 0) -> str:
        """The text of rank ``source``, on every rank."""
        return self.gather_text(text or "")[source]

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, in rank order."""
        if self.size == 1:
            return [text]
        body = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        sizes = self.gather(torch.tensor([len(body)], device=self.device)).tolist()
        padded = body.new_zeros(1, max(1, *sizes))
        padded[0, :len(body)] = body
        rows = self.gather(padded).cpu()
        return [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes, strict=True)]

    def on_main(self, work: Callable[[], None]) -> None:
        """Do ``work`` on rank 0 alone; an ``HpcsslError`` or ``OSError`` there is raised on every rank."""
        error = None
        if self.main:
            try:
                work()
            except HpcsslError as caught:
                error = caught
            except OSError as caught:
                what, got, expected, mend = errors.os_parts(caught)
                error = WorldError(what, got=got, expected=expected, mend=mend)
        told = self.tell(json.dumps([type(error).__name__, *error.args]) if error else "")
        if error is not None:
            raise error
        if told:
            kind, what, got, expected, mend = json.loads(told)
            raise getattr(errors, kind)(what, got=got, expected=expected, mend=mend)

    # -- networks -------------------------------------------------------------------------------------------

    def parallel(self, network: nn.Module) -> nn.Module:
        """Wrap the trained network so that gradients are averaged over ranks; alone, the network itself.

        Buffers are not sent (``nets/norm.py`` keeps them equal). ``find_unused_parameters`` is not about unused
        parameters: without it DDP rebuilds its buckets after the first step of each process, which changes the
        order of summation on three and more ranks, and with it the bits of a resumed run.
        """
        if self._place is None:
            return network
        ddp = nn.parallel.DistributedDataParallel
        renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # torch 2.15 warns of the old name
        return ddp(network, device_ids=[self.device.index] if self.device.type == "cuda" else None,
                   find_unused_parameters=True, gradient_as_bucket_view=True,
                   **{"forward_sync_buffers" if renamed else "broadcast_buffers": False})


class Pending:
    """A small reduction on its way. ``result`` waits for it alone, not for what was launched after it."""

    def __init__(self, x: Tensor, work, pulse: Pulse | None = None):
        self._x, self._work, self._pulse, self._event = x, work, pulse, None
        if x.device.type == "cuda":
            if work is not None:
                work.wait()  # orders streams; does not block the host
                self._work = None
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def result(self) -> Tensor:
        """The values, on the CPU."""
        if self._pulse is not None:
            self._pulse.wait(True)
        if self._event is not None:
            self._event.synchronize()
        elif self._work is not None:
            self._work.wait()
            self._work = None
        if self._pulse is not None:
            self._pulse.wait(False)
        return self._x if self._event is None else self._host


class Board:
    """``pulse.Board`` over a connection to the rendezvous store."""

    def __init__(self, store: dist.Store):
        self._store = store

    def set(self, key: str, text: str) -> None:
        self._store.set(key, text)

    def get(self, keys: Iterable[str]) -> list[str]:
        """The texts of keys that are there."""
        return [text.decode() for text in self._store.multi_get(list(keys))]

    def has(self, keys: Iterable[str]) -> bool:
        """Whether all of them are there."""
        return self._store.check(list(keys))

    def first(self, key: str, text: str) -> str:
        """Set a key unless it holds a text already; what it holds then."""
        return self._store.compare_set(key, "", text).decode()


class _GatherGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, world):
        ctx.world = world
        return world.gather(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.world.part(ctx.world.sum(grad)), None


KNOCK_S = 10.0
"""How long a rank knocks at rank 0's door before it looks whether it was asked to stop."""


def _hosted() -> bool:
    """Whether rank 0 keeps the store; under torchrun its agent does, which lets in nobody of another attempt."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _client(place: launch.Place, timeout_s: float, *, keeper: bool = False) -> dist.TCPStore:
    return dist.TCPStore(place.address, place.port, is_master=keeper, timeout=timedelta(seconds=timeout_s),
                         wait_for_workers=False, multi_tenant=keeper)


def _prefixed(place: launch.Place, store: dist.Store) -> dist.Store:
    return dist.PrefixStore(f"{place.token}/pulse", store)


def _meet(place: launch.Place, timeout_s: float, stop: Callable[[], bool]) -> dist.Store:
    """The store in which this attempt's ranks meet, once all of them have come. Raises ``WorldError``, ``Stopped``."""
    began, store = time.monotonic(), None
    while store is None:
        left = began + timeout_s - time.monotonic()
        try:
            store = _client(place, max(1.0, min(left, KNOCK_S)), keeper=place.rank == 0 and _hosted())
            store.set_timeout(timedelta(seconds=timeout_s))
        except dist.DistNetworkError as error:
            if place.rank == 0:
                raise
            if stop():
                raise arrivals.stopped(place, "rank 0 had not come yet") from error
            if left > KNOCK_S:
                continue
            raise WorldError(f"rank {place.rank} of {place.size}", got=f"no rank 0 at {place.address}:{place.port} "
                             f"within {timeout_s / 60:.3g} minutes", expected="rank 0, which all the others meet",
                             mend="see the log of rank 0 and its node, and whether the address reaches every node") \
                from error
    if _hosted():
        arrivals.refuse_strangers(Board(store), place)
    arrivals.wait_for_all(Board(_prefixed(place, store)), place, began, timeout_s, stop)
    return store
