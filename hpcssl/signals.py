"""A flag that USR1, USR2 and TERM set, and nothing else: what to do about it is decided between two steps.

A signal may come at any instruction, to one rank or to all, and more than once. Work inside a handler (a save, a
collective) would meet the main thread half-way through its own, so the handler only remembers.
"""

from __future__ import annotations

import signal
from types import FrameType

STOPPING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class StopFlag:
    """Set once by the first stopping signal; later ones change nothing."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[int, object] = {}

    def install(self, *, keyboard: bool = False) -> StopFlag:
        """Take over the stopping signals of this process. Only the main thread may call it.

        ``keyboard``: the first Ctrl-C sets the flag as well; the second interrupts as it always did.
        """
        for number in (*STOPPING, *([signal.SIGINT] if keyboard else [])):
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
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.set(signal.Signals(number).name)
