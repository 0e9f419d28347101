"""The set of processes that train together: how they find each other, and what they do in common.

Unless a docstring says "not a collective", all ranks must call a method, in the same order. The collectives over
tensors are in ``collectives.py``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hpcssl.distributed import launch, rendezvous
from hpcssl.distributed.collectives import Collectives
from hpcssl.distributed.devices import agree_on_device, choose_device, identify_gpu, select_gpu
from hpcssl.distributed.key_value_store import KeyValueStore
from hpcssl.errors import HpcsslError, RankLost, WorldError, os_error_parts
from hpcssl.storage import open_files


class World(Collectives):
    """Rank, size and device of this process, and the collectives over all ranks.

    One value of this class is passed to everything that depends on other processes; there is no global state.

    Build one with ``single_process`` or ``start``.

    Args:
        rank: Index of this process among all, from 0.
        size: Number of processes, W.
        local_rank: Index of this process among those of its node.
        device: Device on which this process computes.
        info: How the ranks found each other; None without a process group.
        timeout_s: Seconds that a collective may take.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        local_rank: int,
        device: torch.device,
        info: launch.LaunchInfo | None = None,
        timeout_s: float = 1800.0,
    ):
        super().__init__(rank, size, device, timeout_s=timeout_s)
        self.local_rank = local_rank
        self._info = info

    @classmethod
    def single_process(cls, device: str | torch.device = "cpu") -> World:
        """A world of this process only, without a process group."""
        return cls(0, 1, 0, torch.device(device))

    @classmethod
    def start(
        cls,
        devices: str = "auto",
        timeout_s: float = 1800.0,
        stop: Callable[[], bool] = lambda: False,
        failure: Callable[[], str] = lambda: "",
    ) -> World:
        """Join the processes that the launcher started, or return a world of one process if there is no launcher.

        The keys of the rendezvous carry a token of this attempt, so that a rank left over from an earlier attempt
        cannot join.

        Args:
            devices: ``cpu`` (gloo backend), ``gpu`` (NCCL) or ``auto`` (GPUs if there is one for each process).
            timeout_s: Seconds for all ranks to arrive, and for each collective.
            stop: Polled while this rank waits for others.
            failure: Polled while this rank waits for rank 0: why another rank has failed, or an empty string.

        Raises:
            WorldError: If not all ranks arrive in time, one of them has failed, or no usable device is found.
            Stopped: If ``stop()`` becomes true on a rank that waits.
        """
        open_files.raise_limit()  # for the sockets of all ranks, and the files of large shard sets
        info = launch.detect_launcher()
        device = choose_device(devices, info.local_rank if info else 0)
        gpu = identify_gpu(device)  # outside of the block below: a failure of CUDA is not one of the network
        if info is None:
            select_gpu(device)
            return cls.single_process(device)
        try:
            store, info = rendezvous.join(info, timeout_s, stop, failure)
            prefixed = dist.PrefixStore(info.token, store)  # type: ignore[attr-defined]  # see key_value_store.py
            device = agree_on_device(devices, device, gpu, info, KeyValueStore(prefixed))
        except (RuntimeError, dist.DistError) as error:
            raise _connection_error(info, error) from error
        select_gpu(device)
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                timeout=timedelta(seconds=timeout_s),
                store=prefixed,
                rank=info.rank,
                world_size=info.size,
                device_id=device if device.type == "cuda" else None,
            )
        except (RuntimeError, dist.DistError) as error:
            raise _connection_error(info, error) from error
        return cls(info.rank, info.size, info.local_rank, device, info, timeout_s)

    def close(self) -> None:
        """Destroy the process group. Other ranks may have to wait for it, so call it only after a good end."""
        if self._info is not None:
            dist.destroy_process_group()  # and with it those of ``neighbors``
            self._info, self._neighbors = None, {}

    def __deepcopy__(self, _memo: dict[int, Any]) -> World:
        return self  # a network that is copied stays in the same world

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files that are written once. Not a collective."""
        return self.rank == 0

    # -- progress reports -----------------------------------------------------------------------------------

    def key_value_store(self) -> KeyValueStore | None:
        """A store of texts that all ranks share, over a new connection; None for one process. Not a collective."""
        return rendezvous.open_store(self._info) if self._info else None

    def set_phase(self, phase: str, step: int | None = None, *, patient: bool = False, computing: bool = False) -> None:
        """Report what this rank's main thread does now (``Heartbeat.set_phase``). Not a collective."""
        if self.heartbeat is not None:
            self.heartbeat.set_phase(phase, step, patient=patient, computing=computing)

    def report_progress(self, phase: str) -> None:
        """Report progress within ``phase`` (``Heartbeat.report_progress``). Not a collective."""
        if self.heartbeat is not None:
            self.heartbeat.report_progress(phase)

    @staticmethod
    def is_collective_error(error: BaseException) -> bool:
        """Whether an error comes from a collective, which fails on every rank when one of them is gone."""
        return isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))
        )

    # -- texts and errors -----------------------------------------------------------------------------------

    def broadcast_text(self, text: str | None, source: int = 0) -> str:
        """The text of rank ``source``, on every rank, which waits for all others. Other ranks may pass None."""
        if self.size == 1:
            return text or ""
        body = torch.tensor(list((text or "").encode()), dtype=torch.uint8, device=self.device)
        sizes = self.all_gather(torch.tensor([len(body)], device=self.device)).tolist()
        sent = body if self.rank == source else body.new_zeros(sizes[source])
        return bytes(self.broadcast(sent, source).tolist()).decode() if sizes[source] else ""

    def all_gather_text(self, text: str) -> list[str]:
        """Every rank's text, in rank order."""
        if self.size == 1:
            return [text]
        body = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        sizes = self.all_gather(torch.tensor([len(body)], device=self.device)).tolist()
        padded = body.new_zeros(1, max(1, *sizes))
        padded[0, : len(body)] = body
        rows = self.all_gather(padded).cpu()
        return [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes, strict=True)]

    def run_on_main(self, work: Callable[[], None]) -> None:
        """Run ``work`` on rank 0 only; an ``HpcsslError`` or ``OSError`` there is raised on every rank.

        Raises:
            HpcsslError: Of the same class and with the same parts as on rank 0; ``WorldError`` for an ``OSError``.
        """
        error: HpcsslError | None = None
        if self.is_main:
            try:
                work()
            except HpcsslError as caught:
                error = caught
            except OSError as caught:
                what, got, expected, fix = os_error_parts(caught)
                error = WorldError(what, got=got, expected=expected, fix=fix)
        message = self.broadcast_text(json.dumps(error.to_json()) if error else "")
        if error is not None:
            raise error
        if message:
            raise HpcsslError.from_json(json.loads(message))

    # -- networks -------------------------------------------------------------------------------------------

    def wrap_in_ddp(self, network: nn.Module) -> nn.Module:
        """Wrap a network so that gradients are averaged over ranks; with one process, return the network itself.

        Buffers are not broadcast: ``nets/norm.py`` keeps them equal. ``find_unused_parameters`` is set although no
        parameter is unused: without it DDP rebuilds its buckets after the first step of each process, which changes
        the order of summation on three and more ranks, and with it the bits of a resumed run.
        """
        if self._info is None:
            return network
        ddp = nn.parallel.DistributedDataParallel
        buffers = "forward_sync_buffers"  # torch 2.15 warns of the old name, broadcast_buffers
        if buffers not in inspect.signature(ddp).parameters:
            buffers = "broadcast_buffers"
        options: dict[str, Any] = {buffers: False}
        return ddp(
            network,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
            **options,
        )


def _connection_error(info: launch.LaunchInfo, error: Exception) -> RankLost:
    return RankLost(
        f"rank {info.rank} of {info.size} at {info.address}:{info.port}",
        got=" ".join(str(error).split())[:200],
        expected="all ranks to connect",
        fix="check that every rank started, and that every node can reach this address over the right network "
        "interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)",
    )
