"""The thread that publishes this rank's heartbeat records and reads those of the other ranks."""

from __future__ import annotations

import json
import logging
import threading
import time

from hpcssl.distributed.key_value_store import KeyValueStore
from hpcssl.distributed.liveness import record
from hpcssl.distributed.liveness.activity import Activity
from hpcssl.distributed.liveness.record import HeartbeatRecord

LOG = logging.getLogger("hpcssl")


class RecordExchange:
    """Records of all ranks, exchanged through the shared store.

    Args:
        store: The shared store, over a connection that only this thread uses.
        activity: Source of this rank's records.
        size: Number of ranks.
        closed: Set when the heartbeat ends.

    Attributes:
        last_answer: Time at which the store last answered, seconds of the monotonic clock.
        reading_all_since: Since when all ranks' records are read, not only rank 0's; None while they are not.
        failed: A collective of this rank has failed, so one of the ranks to which that happened reads all records.
        takeovers: How many ranks that were to read all records have not reported what they found.
        is_reader: This rank is the one that reads them.
        lost: The store is gone.
        end: How some rank ended the attempt, as JSON (``cause``, ``rank``, ``why``); empty while none has.
    """

    def __init__(self, store: KeyValueStore, activity: Activity, size: int, closed: threading.Event):
        self.activity, self.size = activity, size
        self.last_answer = time.monotonic()
        self.reading_all_since: float | None = None
        self.failed = self.lost = self.is_reader = False
        self.takeovers = 0
        self.end = ""
        self._store, self._closed = store, closed
        self._rank, self._interval_s = activity.record.rank, activity.interval_s
        self._newest: dict[int, tuple[HeartbeatRecord, float]] = {}  # by rank, and when this process first saw it
        self._own_end = ""
        self._wake, self._ended = threading.Event(), threading.Event()

    # -- this thread ----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Exchange records until the heartbeat ends or the store is gone."""
        while not self._closed.is_set():
            try:
                self._exchange()
            except RuntimeError as error:  # torch's store errors; their texts are the transport's
                if not self._closed.is_set():
                    LOG.debug("the store of rank 0 is gone: %s", error)
                self.lost = True
                return
            self._wake.wait(self._interval_s)
            self._wake.clear()

    def _exchange(self) -> None:
        self._store.set(record.key(self._rank), self.activity.next_record())
        if self.failed:  # the first rank to ask reads: if all W did, they would read W x W records from rank 0
            self.is_reader = self._store.set_once(f"reader/{self.takeovers}", str(self._rank)) == str(self._rank)
        reads_all = self.is_reader if self.failed else self.reading_all_since is not None
        ranks = range(self.size) if reads_all else (0,)
        now = time.monotonic()
        for text in self._store.get([record.key(rank) for rank in ranks]):
            newest = HeartbeatRecord(**json.loads(text))
            known = self._newest.get(newest.rank)
            if known is None or known[0].number != newest.number or known[0].pid != newest.pid:
                self._newest[newest.rank] = newest, now
        self.end = self._store.set_once("end", self._own_end)
        self.last_answer = time.monotonic()
        if self.end:
            self._ended.set()

    # -- other threads --------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Let the next exchange happen now."""
        self._wake.set()

    def post_end(self, cause: str, sentence: str) -> None:
        """Publish that this rank ends the attempt. Returns after at most a few intervals, whether it arrived or not."""
        self._own_end = json.dumps({"cause": cause, "rank": self._rank, "why": sentence})
        self._wake.set()
        self._ended.wait(2 * self._interval_s)
        if self._rank == 0:
            time.sleep(1.5 * self._interval_s)  # the store ends with this process: let the others read it

    def restart(self, now: float) -> None:
        """Forget all ages: this process was suspended, perhaps together with all others."""
        self.last_answer = now
        self.reading_all_since = None
        self._newest = {rank: (newest, now) for rank, (newest, _) in self._newest.items()}

    def silent_ranks(self, now: float, limit_s: float) -> dict[int, float]:
        """Ranks without a new record for ``limit_s``, with their age in seconds.

        If the store does not answer, that is rank 0, whose process hosts it.
        """
        if self.lost or now - self.last_answer > limit_s:
            return {0: now - self.last_answer} if self._rank and 0 in self._newest else {}
        ages = {rank: self.last_answer - at for rank, (_, at) in self._newest.items() if rank != self._rank}
        return {rank: age for rank, age in ages.items() if age > limit_s}

    def records(self) -> dict[int, HeartbeatRecord]:
        """The newest known record of each rank."""
        return {rank: newest for rank, (newest, _) in self._newest.items()} | {self._rank: self.activity.record}
