"""Signs of life of every rank, beside the collectives, and the end of an attempt that makes no progress.

Each rank writes a beat to a board that all can read (``World.board``: a connection of its own to the rendezvous
store), about once a second, from a thread. A second thread of the rank watches the main thread: where it has
neither entered a phase nor called a collective for ``hang_s``, the beats of all ranks say who is to blame
(``diagnosis``), and the attempt ends. The threads are two because the board answers nobody while rank 0, whose process
keeps it, is stopped: that silence is the diagnosis of rank 0.

What counts as progress is ours alone: a rank that another one waits for may work as long as it says so (``mark``).
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from types import FrameType
from typing import Any, Protocol

from hpcssl import diagnosis
from hpcssl.diagnosis import Beat
from hpcssl.errors import EXIT_FAILED
from hpcssl.straggler import StepClock

LOG = logging.getLogger("hpcssl")
BEAT_S = 1.0
SILENT_BEATS, SILENT_S = 4, 20.0
"""A rank is silent after so many intervals without a new beat, and after a tenth of the limit or so many seconds."""
LEAST_S = 2.0
"""How long beats are looked at, at the least, when a collective has failed: a machine may be busy."""
LEAVE_S = 5.0
"""How long the main thread may take to fail by itself once another rank has failed."""
LAST_S = 60.0
"""How long leaving may take: the run folder and the logs may lie on the file system that all ranks wait for."""
MEND = ("to mend: see the stacks in the logs and the node; the same command goes on from the last checkpoint, and "
        "machine.hang_minutes allows longer pauses")
DEBUGGERS = ("pdb.py", "bdb.py", "pydevd.py")


class Board(Protocol):
    """Texts by key that all ranks read and write. ``first`` sets a key unless it has a text, and returns what stands
    there. Raises ``RuntimeError`` where the board is gone; may block while its keeper is stopped."""

    def set(self, key: str, text: str) -> None: ...

    def get(self, keys: Iterable[str]) -> list[str]: ...

    def has(self, keys: Iterable[str]) -> bool: ...

    def first(self, key: str, text: str) -> str: ...


class Pulse:
    """The two threads of one rank. ``board`` None: alone, where only the own main thread is watched.

    ``hang_s``: seconds without progress after which the attempt ends, 0 for never. ``leave(cause, sentence)`` writes
    the end down, once per rank at most, with cause ``hang``, or ``error`` where another rank has failed and the own
    main thread does not; it ends the process.
    """

    def __init__(self, board: Board | None, rank: int = 0, size: int = 1, *, hang_s: float,
                 leave: Callable[[str, str], None], beat_s: float = BEAT_S, event: Callable[[], Any] | None = None):
        self.board, self.rank, self.size, self.hang_s, self.leave = board, rank, size, hang_s, leave
        self.beat_s = min(beat_s, hang_s / 8) if hang_s else beat_s
        self.silent_s = max(SILENT_BEATS * self.beat_s, min(SILENT_S, hang_s / 10))
        self.mine = Beat(rank=rank, host=host(), pid=os.getpid())
        self._main = threading.main_thread().ident
        self._phase, self._step, self._patient = "start", None, False
        self._count, self._last, self._inside = 0, ("no collective",), False
        self.clock = StepClock(event)
        self._moved = self._answered = time.monotonic()
        self._looked = None  # since when the beats of all ranks are read
        self._seen: dict[int, tuple[Beat, float]] = {}  # the newest beat of a rank, and when we first saw it
        self._say, self._end = "", ""
        self._lost = self._failed = False
        self._over, self._wake, self._told = threading.Event(), threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    # -- the main thread ------------------------------------------------------------------------------------

    def start(self) -> Pulse:
        names = ("pulse", "pulse-board") if self.board is not None else ("pulse",)
        for name, work in zip(names, (self._watch, self._talk), strict=False):
            self._threads.append(threading.Thread(target=work, name=name, daemon=True))
            self._threads[-1].start()
        return self

    def close(self) -> None:
        """No more beats and no more judgement. The threads end, but for one that waits for a stopped rank 0: Python
        (before 3.14) aborts where it ends under a thread that comes back from torch's store."""
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(self.beat_s)

    def mark(self, phase: str, step: int | None = None, *, patient: bool = False) -> None:
        """The main thread now does ``phase``. ``patient``: one long call that cannot tell of its progress, which counts
        as progress as long as the process gives signs of life."""
        self._phase, self._patient, self._inside = phase, patient, False
        if step is not None:
            self._step = step
        self._moved = time.monotonic()
        if phase == "data":
            self.clock.wait_for_data()
        elif phase == "step":
            self.clock.begin_step()
        elif phase == "backward":
            self.clock.meet()

    def nearer(self, phase: str) -> None:
        """From any thread: what the main thread waits for in ``phase`` comes nearer."""
        if self._phase == phase:
            self._moved = time.monotonic()

    def enter(self, kind: str, dtype: object, shape: Sequence[int]) -> None:
        """The main thread calls a collective."""
        self._count += 1
        self._last, self._inside, self._patient = (kind, dtype, shape), True, False
        self._moved = time.monotonic()
        self.clock.enter()

    def left(self) -> None:
        """The collective is over, or launched."""
        self.clock.leave()
        self.wait(False)

    def wait(self, inside: bool) -> None:
        """The main thread begins or ends to wait for a collective that was launched before."""
        self._inside = inside
        self._moved = time.monotonic()

    @property
    def steps(self) -> int | None:
        """How many steps were taken, as far as the marks tell: the marked one is under way."""
        return None if self._step is None else self._step - 1

    @property
    def where(self) -> str:
        return dataclasses.replace(self.mine, phase=self._phase, step=self._step).where

    def last_words(self, sentence: str) -> None:
        """This rank fails with ``sentence``: tell the others, who may be waiting for it. Returns soon in any case."""
        if self.board is not None and not self._lost:
            self._post("error", sentence)

    def who_is_gone(self) -> tuple[str, str]:
        """After a collective has failed: the cause of its end (``error``, ``hang``, ``killed``) and which rank is to
        blame. It said so itself, or fell silent, or called another collective; empty if none of that is seen."""
        if self.board is None:
            return "", ""
        began, self._failed = time.monotonic(), True
        enough = max(2.5 * self.beat_s, LEAST_S)
        self._wake.set()
        while self._answered < began + enough and time.monotonic() < began + 2 * enough:
            if self._lost or self._end:
                break
            time.sleep(self.beat_s / 4)
        if self._end:
            end = json.loads(self._end)
            return end["cause"], end["why"]
        silent, beats = self._silent(time.monotonic(), 0.8 * enough), self._beats()
        return ("killed", diagnosis.gone(silent, beats)) if silent else ("error", diagnosis.mismatch(beats))

    # -- the thread that talks ------------------------------------------------------------------------------

    def _talk(self) -> None:
        while not self._over.is_set():
            try:
                self._exchange()
            except RuntimeError as error:  # torch's store errors; their texts are the transport's
                if not self._over.is_set():
                    LOG.debug("the board of rank 0 is gone: %s", error)
                self._lost = True
                return
            self._wake.wait(self.beat_s)
            self._wake.clear()

    def _exchange(self) -> None:
        self.board.set(key(self.rank), self._beat())
        asked = range(self.size) if self._failed or self._looked is not None else (0,)
        now = time.monotonic()
        for text in self.board.get([key(rank) for rank in asked]):
            beat = Beat(**json.loads(text))
            before = self._seen.get(beat.rank)
            if before is None or before[0].number != beat.number or before[0].pid != beat.pid:
                self._seen[beat.rank] = beat, now
        self._end = self.board.first("end", self._say)
        self._answered = time.monotonic()
        if self._end:
            self._told.set()

    def _beat(self) -> str:
        now = time.monotonic()
        idle = now - self._moved
        others = "" if self._inside or idle < 2 * self.beat_s else _other_stacks(self._main)
        self.mine = dataclasses.replace(
            self.mine, phase=self._phase, step=self._step, idle=0.0 if self._patient else round(idle, 1),
            count=self._count, last=_words(*self._last), inside=self._inside, others=others,
            number=self.mine.number + 1, stack=stack(sys._current_frames().get(self._main)))
        return json.dumps(asdict(self.mine))

    def _post(self, cause: str, sentence: str) -> None:
        self._say = json.dumps({"cause": cause, "rank": self.rank, "why": sentence})
        self._wake.set()
        self._told.wait(2 * self.beat_s)
        if self.rank == 0:
            time.sleep(1.5 * self.beat_s)  # the board goes with this process: let the others read it

    # -- the thread that watches ----------------------------------------------------------------------------

    def _watch(self) -> None:
        before = time.monotonic()
        failed_at = None
        while not self._over.wait(self.beat_s):
            now = time.monotonic()
            if now - before > self.silent_s:
                self._anew(now)  # this process was suspended, perhaps with all the others
            before = now
            if self._patient or _debugged(self._main):
                self._moved = now
            if self._end:
                failed_at = failed_at or now
                self._follow(now - failed_at)
            elif self.hang_s and not self._failed:
                self._judge(now)

    def _anew(self, now: float) -> None:
        self._moved = self._answered = now
        self._looked = None
        self._seen = {rank: (beat, now) for rank, (beat, _) in self._seen.items()}

    def _follow(self, since: float) -> None:
        """Another rank has ended the attempt: by a judgement, which is all of ours, or by an error, which will end the
        main thread as well, unless it waits where nothing tells it."""
        end = json.loads(self._end)
        if end["cause"] == "hang" or since > LEAVE_S:
            self._leave(end["cause"], end["why"])

    def _judge(self, now: float) -> None:
        idle = now - self._moved
        if self.board is None:
            if idle > self.hang_s:
                self._beat()
                self._leave("hang", f"{diagnosis.hang({0: self.mine}, {}, idle)}; {MEND}")
            return
        look_s = self.silent_s + 2 * self.beat_s
        limit = self.hang_s + (0 if self.rank == 0 else look_s)  # rank 0 judges first: all at once crowd the board
        if idle <= limit - look_s:
            self._looked = None
            return
        self._looked = self._looked or now
        mute = self._lost or now - self._answered > self.silent_s
        if idle <= (self.hang_s if mute else limit) or not (mute or now - self._looked > self.silent_s + self.beat_s):
            return
        silent, beats = self._silent(now, self.silent_s), self._beats()
        if not silent and (len(beats) < self.size or any(beat.idle < self.hang_s / 2 for beat in beats.values())):
            return  # somebody works, and the others wait for it
        self._end_by(f"{diagnosis.hang(beats, silent, idle)}; {MEND}")

    def _silent(self, now: float, limit_s: float) -> dict[int, float]:
        """Ranks without a new beat for ``limit_s``, and for how long; rank 0 where the board does not answer, since its
        process keeps it."""
        if self._lost or now - self._answered > limit_s:
            return {0: now - self._answered} if self.rank and 0 in self._seen else {}
        ages = {rank: self._answered - at for rank, (_, at) in self._seen.items() if rank != self.rank}
        return {rank: age for rank, age in ages.items() if age > limit_s}

    def _beats(self) -> dict[int, Beat]:
        return {rank: beat for rank, (beat, _) in self._seen.items()} | {self.rank: self.mine}

    def _end_by(self, sentence: str) -> None:
        if not self._lost:
            self._post("hang", sentence)
        end = json.loads(self._end) if self._end else {"cause": "hang", "why": sentence}
        self._leave(end["cause"], end["why"])

    def _leave(self, cause: str, sentence: str) -> None:
        if self._over.is_set():
            return
        last = threading.Timer(LAST_S, os._exit, (EXIT_FAILED,))
        last.daemon = True
        last.start()
        LOG.error("%s; the stacks of rank %d follow", sentence, self.rank)
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        self.leave(cause, sentence)
        last.cancel()


def key(rank: int) -> str:
    """Where the beats of a rank stand on the board. Its first is written as it arrives at the rendezvous."""
    return f"beat/{rank}"


def host() -> str:
    """This node as the cluster calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def arrival(rank: int) -> str:
    """The first beat of a rank, before it has a pulse."""
    return json.dumps(asdict(Beat(rank=rank, host=host(), pid=os.getpid())))


def _words(kind: str, dtype: object = None, shape: Sequence[int] = ()) -> str:
    return kind if dtype is None else f"{kind} of {str(dtype).removeprefix('torch.')} {list(shape)}"


def stack(frame: FrameType | None, calls: int = 5) -> str:
    """A thread's innermost calls on one line: where it stands, and who of us called it there."""
    found: list[str] = []
    while frame is not None and len(found) < calls:
        code = frame.f_code
        foreign = found and "/site-packages/" in code.co_filename
        if not foreign and not code.co_filename.endswith("/threading.py"):
            found.append(f"{'/'.join(code.co_filename.split('/')[-2:])}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return " < ".join(found)


def _other_stacks(main: int, most: int = 4) -> str:
    """The innermost calls of the other threads of Python, but for the pulse's own."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {names.get(ident, "?"): frame for ident, frame in sys._current_frames().items() if ident != main}
    return ", ".join(f"{name} at {stack(frame, 3)}" for name, frame in sorted(frames.items())
                     if not name.startswith("pulse"))[:most * 120]


def _debugged(main: int) -> bool:
    frame = sys._current_frames().get(main)
    while frame is not None:
        if frame.f_code.co_filename.endswith(DEBUGGERS):
            return True
        frame = frame.f_back
    return False
