"""The thread that ends an attempt whose ranks make no progress."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

from hpcssl.distributed.liveness import cpu_time, hang_report
from hpcssl.distributed.liveness.activity import Activity
from hpcssl.distributed.liveness.exchange import RecordExchange
from hpcssl.distributed.liveness.limits import PhaseLimits
from hpcssl.errors import EXIT_FAILED

LOG = logging.getLogger("hpcssl")
FAILURE_GRACE_S = 5.0
"""Seconds that the main thread has to fail by itself once another rank has failed."""
EXIT_TIMEOUT_S = 60.0
"""Seconds that leaving may take: the run folder and the logs may lie on the file system that all ranks wait for."""
PEER_WAIT_S = 30.0
"""Seconds without progress after which the rank that hosts the store looks whether the other ranks live."""
DEAD_S = 60.0
"""Seconds without a new record after which a rank is dead, as long as this rank makes no progress either."""
MIN_CPU_SHARE = 0.1
"""A process computes if it and its children use this share of one processor or more."""
FIX = (
    "Fix: read the stacks in the logs and check the node; the same command resumes from the last checkpoint, and "
    "machine.hang_minutes and machine.hang_factor allow longer pauses"
)


class HangMonitor:
    """Watches the main thread of this rank; with other ranks, it finds out which rank is to blame for a hang.

    This is a thread apart from the one that talks to the store, since the store does not answer while rank 0, which
    hosts it, is suspended: that silence is what identifies rank 0.

    Args:
        activity: The main thread's activity.
        exchange: Records of all ranks; None for one process, where only the own main thread is watched.
        limits: Seconds without progress after which the attempt ends.
        silent_s: Seconds without a new record after which a rank counts as silent.
        leave: Called once with the cause (``hang``, ``killed`` or ``error``) and a sentence; it ends the process.
        closed: Set when the heartbeat ends.
        cpu_s: Seconds of processor time that this process and its children have used.
    """

    def __init__(
        self,
        activity: Activity,
        exchange: RecordExchange | None,
        *,
        limits: PhaseLimits,
        silent_s: float,
        leave: Callable[[str, str], None],
        closed: threading.Event,
        cpu_s: Callable[[], float] = cpu_time.process_and_children_s,
    ):
        self.activity, self.exchange, self.limits, self.silent_s = activity, exchange, limits, silent_s
        self._cpu_s, self._used_s, self._looked_at = cpu_s, cpu_s(), time.monotonic()
        self._leave_process, self._closed = leave, closed
        self._rank, self._interval_s = activity.record.rank, activity.interval_s

    def run(self) -> None:
        """Watch until the heartbeat ends."""
        before = time.monotonic()
        failed_at: float | None = None
        while not self._closed.wait(self._interval_s):
            now = time.monotonic()
            if now - before > self.silent_s:
                self._restart(now)  # this process was suspended, perhaps with all the others
            before = now
            self._excuse(now)
            if self.exchange is not None and self.exchange.end:
                failed_at = failed_at or now
                self._follow(json.loads(self.exchange.end), now - failed_at)
            elif self.limits.hang_s and not (self.exchange is not None and self.exchange.failed):
                self._judge(now)

    def _restart(self, now: float) -> None:
        self.activity.last_progress = now
        if self.exchange is not None:
            self.exchange.restart(now)

    def _excuse(self, now: float) -> None:
        """Count as progress what cannot report it: a long call, and a pause in a debugger."""
        activity, is_busy = self.activity, False
        if activity.computing:
            used_s, elapsed = self._cpu_s(), now - self._looked_at
            is_busy = used_s - self._used_s >= MIN_CPU_SHARE * elapsed
            self._looked_at, self._used_s = now, used_s
        if activity.patient or is_busy or activity.in_debugger:
            activity.last_progress = now

    def _follow(self, end: dict[str, str], since: float) -> None:
        """End this rank after another one has ended the attempt.

        A hang concerns all ranks. After an error, the main thread has ``FAILURE_GRACE_S`` to fail by itself in its next
        collective, which it does not reach while it waits for something else.
        """
        if end["cause"] == "hang" or since > FAILURE_GRACE_S:
            self._leave(end["cause"], end["why"])

    def _judge(self, now: float) -> None:
        """End the attempt if this rank has made no progress for too long, and no other rank works either."""
        idle, limit = now - self.activity.last_progress, self.limits.limit(self.activity.phase)
        exchange = self.exchange
        if exchange is None:
            if idle > limit:
                self.activity.next_record()
                self._leave("hang", f"{hang_report.describe_hang({0: self.activity.record}, {}, idle)}. {FIX}")
            return
        look_s = self.silent_s + 2 * self._interval_s
        # rank 0 judges first: if all ranks did at the same time, they would overload the store
        own_limit = limit + (0 if self._rank == 0 else look_s)
        start = min(own_limit - look_s, PEER_WAIT_S) if self._rank == 0 else own_limit - look_s
        if exchange.lost and idle > PEER_WAIT_S and self._end_for_dead_ranks(exchange, now):
            return
        if idle <= start:
            exchange.reading_all_since = None
            return
        since = exchange.reading_all_since = exchange.reading_all_since or now
        mute = exchange.lost or now - exchange.last_answer > self.silent_s
        if not mute and self._end_for_dead_ranks(exchange, now):
            return
        if idle <= (limit if mute else own_limit):
            return
        if not mute and now - since <= self.silent_s + self._interval_s:
            return  # the records of all ranks have not been read for long enough
        silent, records = exchange.silent_ranks(now, self.silent_s), exchange.records()
        # ranks wait for the one with the longest phase
        limit = max(self.limits.limit(record.phase) for record in records.values())
        if idle <= limit:
            return
        if not silent and (len(records) < exchange.size or any(record.idle < limit / 2 for record in records.values())):
            return  # some rank works, and the others wait for it
        self._end_attempt(exchange, "hang", f"{hang_report.describe_hang(records, silent, idle)}. {FIX}")

    def _end_for_dead_ranks(self, exchange: RecordExchange, now: float) -> bool:
        """End the attempt if a rank is dead, of which NCCL does not inform the ranks that wait for it."""
        dead = exchange.silent_ranks(now, 0.0 if exchange.lost else DEAD_S)
        if dead:
            self._end_attempt(exchange, "killed", hang_report.describe_silent_ranks(dead, exchange.records()))
        return bool(dead)

    def _end_attempt(self, exchange: RecordExchange, cause: str, sentence: str) -> None:
        if not exchange.lost:
            exchange.post_end(cause, sentence)
        end = json.loads(exchange.end) if exchange.end else {"cause": cause, "why": sentence}
        self._leave(end["cause"], end["why"])

    def _leave(self, cause: str, sentence: str) -> None:
        if self._closed.is_set():
            return
        last_resort = threading.Timer(EXIT_TIMEOUT_S, os._exit, (EXIT_FAILED,))
        last_resort.daemon = True
        last_resort.start()
        LOG.error("%s; the stacks of rank %d follow", sentence, self._rank)
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        self._leave_process(cause, sentence)
        last_resort.cancel()
