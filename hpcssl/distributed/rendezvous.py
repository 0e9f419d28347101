"""How the ranks of one attempt find each other, and which ranks are missing if they do not.

Every rank connects to a key-value store that rank 0 hosts (under torchrun, its agent hosts it), and waits there until
all ranks have arrived. Only then is the process group built. Where the store is, and of which attempt, rank 0 announces
at a port that the others know (``announcement``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from torch.distributed import DistNetworkError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from hpcssl.distributed import announcement
from hpcssl.distributed.announcement import Announcement
from hpcssl.distributed.key_value_store import KeyValueStore
from hpcssl.distributed.launch import LaunchInfo, ports_for
from hpcssl.distributed.liveness import record
from hpcssl.errors import Stopped, WorldError

HOST_S = 10.0
"""Seconds for rank 0 to connect to the store that it hosts."""
OTHER_ATTEMPT_S = 60.0
"""Seconds for which a rank that finds only the store of another attempt looks for its own rank 0."""
FAILURE_POLL_S = 5.0
"""Seconds between two looks whether another rank has failed: at a file that all ranks read."""
READ_S = 2.0
"""Seconds for which rank 0 stays after a failed rendezvous, so that others can read why from the store it hosts."""
_ALL_ARRIVED = "all"


class Interruption:
    """What ends the wait of a rank for others.

    Args:
        stop: Whether this process was asked to stop.
        failure: Why the attempt has failed on another rank, which may never come; empty while it has not.
    """

    def __init__(self, stop: Callable[[], bool], failure: Callable[[], str] = lambda: ""):
        self._stop, self._failure = stop, failure
        self._looked_at = float("-inf")

    def check(self, info: LaunchInfo, why: str) -> None:
        """Raise ``Stopped`` or ``WorldError`` if the wait is over. ``why``: what is waited for, as a clause."""
        if self._stop():
            raise _stopped(info, why)
        now = time.monotonic()
        if now - self._looked_at < FAILURE_POLL_S:
            return
        self._looked_at = now
        if sentence := self._failure():
            raise WorldError(
                f"rank {info.rank} of {info.size}",
                got=f"a failure of another rank ({sentence})",
                expected="all ranks to arrive",
                fix="see the log of that rank",
            )


def join(
    info: LaunchInfo, timeout_s: float, stop: Callable[[], bool], failure: Callable[[], str] = lambda: ""
) -> tuple[Store, LaunchInfo]:
    """Connect to the store of this attempt and wait until all of its ranks have.

    Args:
        info: Rank, size, address and token of this process.
        timeout_s: Seconds for all ranks to arrive.
        stop: Polled while waiting.
        failure: Polled while waiting for rank 0: why another rank has failed, or an empty string.

    Returns:
        The store, to build the process group with, and ``info`` with the port at which the store is.

    Raises:
        WorldError: If a rank is missing after ``timeout_s`` or has failed, the only store belongs to another attempt,
            or rank 0 finds no free port.
        Stopped: If ``stop()`` becomes true on a rank that waits.
    """
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        if not _is_hosted():
            store: Store = _connect(info, timeout_s)
        elif info.rank == 0:
            store, info = stack.enter_context(_host(info))
        else:
            store, info = _find_host(info, began, timeout_s, Interruption(stop, failure))
        store.set_timeout(timedelta(seconds=timeout_s))
        wait_for_all(_prefixed(info, store), info, began, timeout_s, stop)
    return store, info


@contextlib.contextmanager
def _host(info: LaunchInfo) -> Iterator[tuple[Store, LaunchInfo]]:
    """Host the store at a port that the kernel chooses, and announce it while the block runs."""
    try:
        store = TCPStore(info.address, 0, is_master=True, timeout=timedelta(seconds=HOST_S), wait_for_workers=False)
    except RuntimeError as error:  # torch's store errors
        raise WorldError(
            f"rank 0 at {info.address}",
            got=" ".join(str(error).split())[:200],
            expected="an address of this node",
            fix="set MASTER_ADDR to the address of rank 0's node, or check the network interface that has it",
        ) from error
    announced = Announcement(info, store.port)
    try:
        yield store, dataclasses.replace(info, port=store.port)
    finally:
        announced.close()


def _find_host(
    info: LaunchInfo, began: float, timeout_s: float, interruption: Interruption
) -> tuple[Store, LaunchInfo]:
    """Look at all ports of the attempt until one of them announces its store."""
    pause, other = 0.05, ""
    while True:
        for port in ports_for(info):
            interruption.check(info, "rank 0 had not come yet")
            token, store_port = announcement.read(info.address, port) or ("", 0)
            if token == info.token:
                here = dataclasses.replace(info, port=store_port)
                with contextlib.suppress(DistNetworkError):  # rank 0 has just failed
                    return _connect(here, announcement.CONNECT_S), here
            elif token:
                other = f"attempt {token} at {info.address}:{port}"
        waited_s = time.monotonic() - began
        if other and waited_s > min(timeout_s, OTHER_ATTEMPT_S):
            raise WorldError(
                f"rank {info.rank} of attempt {info.token}",
                got=other,
                expected="ranks of the same attempt",
                fix="no action is needed if this process was left over by an earlier attempt; otherwise give each run "
                "its own MASTER_PORT",
            )
        if waited_s > timeout_s:
            raise WorldError(
                f"rank {info.rank} of {info.size}",
                got=f"no rank 0 at {_address(info)} within {timeout_s / 60:.3g} minutes",
                expected="rank 0 to accept connections there",
                fix="read the log of rank 0 and check its node, and that every node can reach this address",
            )
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)


def open_store(info: LaunchInfo, timeout_s: float = 60.0) -> KeyValueStore:
    """A new connection to the store of this attempt, for the heartbeat's thread.

    Args:
        info: Address and token of the attempt.
        timeout_s: Seconds for the connection, and for each operation.
    """
    return _prefixed(info, _connect(info, timeout_s))


def wait_for_all(
    store: KeyValueStore, info: LaunchInfo, began: float, timeout_s: float, stop: Callable[[], bool]
) -> None:
    """Write this rank's first heartbeat and wait for those of all other ranks.

    The first rank that sees an outcome (all arrived, time is up, a stop) writes it down, and it holds for all ranks:
    one that arrives later fails in the same way and does not start without the others.

    Args:
        store: Where the ranks write their heartbeats.
        info: This process.
        began: Start of the wait, seconds of the monotonic clock.
        timeout_s: Seconds from ``began`` for all ranks to arrive.
        stop: Polled while waiting.

    Raises:
        WorldError: On all ranks that arrived, naming those that did not.
        Stopped: On all ranks that arrived, if ``stop()`` became true on one of them.
    """
    deadline, pause = began + timeout_s, 0.01
    store.set(record.key(info.rank), record.first_record(info.rank))
    while True:
        # only rank 0 looks for all ranks: if each did, W ranks would ask for W² keys at every poll
        keys = [record.key(rank) for rank in range(info.size)] if info.rank == 0 else []
        outcome = _ALL_ARRIVED if keys and store.contains(keys) else ""
        stopping = not outcome and stop()
        if not outcome and (stopping or time.monotonic() > deadline):
            outcome = _find_missing(store, info, stopping, time.monotonic() - began if stopping else timeout_s)
        outcome = store.set_once("met", outcome)
        if outcome == _ALL_ARRIVED:
            return
        if outcome:
            break
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)
    time.sleep(READ_S if info.rank == 0 else 0)
    end = json.loads(outcome)
    if end["stop"]:
        raise _stopped(info, end["why"])
    raise WorldError(
        f"rank {info.rank} at {_address(info)}",
        got=end["why"],
        expected="all ranks to arrive",
        fix="read the logs of these ranks and check their nodes; machine.timeout_minutes sets how long to wait",
    )


def _find_missing(store: KeyValueStore, info: LaunchInfo, stop: bool, waited_s: float) -> str:
    """The outcome at the end of the wait: which ranks are missing; or that none is, if the last one has just come.

    A stop that comes when no rank is missing is left to the training, whose ranks agree on the step at which they end.
    """
    missing = [str(rank) for rank in range(info.size) if not store.contains([record.key(rank)])]
    if not missing:
        return _ALL_ARRIVED
    return json.dumps(
        {
            "stop": stop,
            "why": f"rank{'s' * (len(missing) > 1)} {', '.join(missing)} of {info.size} "
            f"{'had not come' if stop else 'never came'} within {waited_s / 60:.3g} minutes",
        }
    )


def _stopped(info: LaunchInfo, why: str) -> Stopped:
    return Stopped(
        f"rank {info.rank} at {_address(info)}",
        got=f"a request to stop, while {why}",
        expected="all ranks to arrive",
        fix="no action needed: the training had not started",
    )


def _is_hosted() -> bool:
    """Whether rank 0 hosts the store. Under torchrun its agent does, and keeps ranks of other attempts out itself."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _connect(info: LaunchInfo, timeout_s: float) -> TCPStore:
    return TCPStore(info.address, info.port, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def _prefixed(info: LaunchInfo, store: Store) -> KeyValueStore:
    return KeyValueStore(PrefixStore(f"{info.token}/heartbeat", store))


def _address(info: LaunchInfo) -> str:
    return f"{info.address}:{info.port}"
