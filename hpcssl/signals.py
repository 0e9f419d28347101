"""A flag that USR1, USR2 and TERM set, and nothing else: what to do about it is decided between two steps.

A signal may come at any instruction, to one rank or to all, and more than once. Work inside a handler (a save, a
collective) would meet the main thread half-way through its own, so the handler only remembers.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import NamedTuple

STOPPING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
BY_HAND = (signal.SIGHUP, signal.SIGXCPU)
"""What ends a command that a person has typed: the terminal is closed, the limit of CPU time is reached."""


class Requeue(NamedTuple):
    """What came of asking for another attempt after a stop. ``cause``: why the stop came, as far as whoever was asked
    knows (README, "When a job ends early"); ``refused``: None if the attempt was granted, else a sentence."""

    cause: str
    refused: str | None = None


class StopFlag:
    """Set once by the first stopping signal; later ones change nothing."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[int, object] = {}
        self._keyboard = False

    def install(self, *more: signal.Signals, keyboard: bool = False) -> StopFlag:
        """Take over the stopping signals of this process, and ``more``. Only the main thread may call it.

        ``keyboard``: the first Ctrl-C sets the flag as well; the second interrupts as it always did. So do a closed
        terminal, unless `nohup` has said that it is none of our business, and the limit of CPU time.
        """
        self._keyboard = keyboard
        typed = [signal.SIGINT, *(n for n in BY_HAND if signal.getsignal(n) is not signal.SIG_IGN)] if keyboard else []
        for number in (*STOPPING, *more, *typed):
            before = signal.signal(number, self._note)
            self._before.setdefault(number, before)
        return self

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def set(self, reason: str) -> None:
        self.reason = self.reason or reason

    def is_set(self) -> bool:
        return self.reason is not None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._keyboard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.set(signal.Signals(number).name)
