"""The part ``store`` of ``benchmarks/size.py``: what the heartbeats of many ranks send through rank 0's store.

Ranks are forked from one process that imported torch, join as in a training, and then only exchange heartbeats. Each
asks the kernel how many bytes its sockets have sent and received (``TCP_INFO``), twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import time
import traceback
from pathlib import Path
from typing import Any

from hpcssl.distributed.launch import LaunchInfo
from hpcssl.distributed.liveness.heartbeat import INTERVAL_S, Heartbeat
from hpcssl.distributed.liveness.limits import PhaseLimits
from hpcssl.distributed.world import World

SECONDS, PHASE = 8.0, "data"
_BYTES_ACKED = 120  # offset in the kernel's struct tcp_info; bytes_received follows
WORLDS = (64, 512, 4096)


def count_socket_bytes() -> tuple[int, int]:
    """Bytes that all TCP sockets of this process have sent (and the other side acknowledged), and received."""
    sent = received = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 16)
                acked, arrived = struct.unpack_from("QQ", info, _BYTES_ACKED)
                sent, received = sent + acked, received + arrived
    return sent, received


def _run_rank(rank: int, size: int, port: int, out: Path) -> None:
    token = f"size-{port}"
    launch = LaunchInfo(rank=rank, local_rank=rank, size=size, address="127.0.0.1", port=port, token=token)
    os.environ |= launch.environment()
    world = World.start("cpu", timeout_s=600)
    store, beats = world.key_value_store(), []
    assert store is not None
    write = store.set
    store.set = lambda key, text: beats.append(key) or write(key, text)  # type: ignore[method-assign, func-returns-value]
    heartbeat = Heartbeat(store, rank, size, limits=PhaseLimits(600.0), leave=lambda *_: None)
    heartbeat.set_phase(PHASE, 100_000)
    heartbeat.start()
    world.barrier()
    time.sleep(2.0)
    before, first = count_socket_bytes(), len(beats)
    time.sleep(SECONDS)
    after, count = count_socket_bytes(), len(beats) - first  # on a busy machine they come less often
    (out / f"{rank}.json").write_text(json.dumps([(b - a) / count for a, b in zip(before, after, strict=True)]))
    heartbeat.close()
    world.barrier()  # rank 0 ends last: the others still ask its store
    world.close()


def measure_rates(size: int, out: Path) -> list[list[float]]:
    """Bytes per heartbeat that each rank sends and receives; those of rank 0 are those of the store that it hosts."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _run_rank(rank, size, port, out)
                code = 0
            except BaseException:  # noqa: BLE001 - the process ends with code 1
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    try:
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    except BaseException:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise
    if any(codes):
        raise SystemExit("benchmarks.size: a rank of the part `store` failed")
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(size)]


def measure_store(folder: Path, quick: bool) -> dict[str, Any]:
    """Traffic of the store with few and with many ranks, and the same formula for more."""
    result, per_rank = {}, []
    for size in (2, 8) if quick else (8, 64):
        out = folder / str(size)
        out.mkdir()
        rates = measure_rates(size, out)
        others = rates[1:]
        sent, received = (sum(rate[n] for rate in others) / len(others) for n in (0, 1))
        hosted = sum(rates[0])
        per_rank.append(sent + received)
        result[f"{size} ranks, measured"] = (
            f"a rank sends {sent:.0f} and receives {received:.0f} bytes per heartbeat; rank 0, which hosts the store, "
            f"moves {hosted / size:.0f} bytes per heartbeat and rank"
        )
    rate = per_rank[-1]
    result["formula"] = f"{rate:.0f} bytes x ranks / {INTERVAL_S:g} s, sent and received by rank 0"
    for world in WORLDS:
        result[f"{world} ranks, computed"] = f"{rate * world / INTERVAL_S / 1e6:.2f} MB/s"
    return result
