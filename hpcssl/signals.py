"""The stop flag: signals set it, and the program looks at it between two steps.

A signal can arrive at any instruction, at one rank or at all of them, and more than once. A handler that saved or
called a collective could interrupt the main thread in the middle of its own. So the handler only sets a flag.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

STOPPING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""Signals by which a scheduler asks a process to stop."""
INTERACTIVE = (signal.SIGHUP, signal.SIGXCPU)
"""Signals that end a command a person has typed: the terminal was closed, the limit of CPU time is reached."""


@contextlib.contextmanager
def hold_signals() -> Iterator[None]:
    """Let no signal end this process, or a program that it starts, in the middle of the block.

    Signals that arrive meanwhile are delivered after the block. For short blocks only: what takes long should look at a
    ``StopFlag``.
    """
    held = (*STOPPING, *INTERACTIVE, signal.SIGINT, signal.SIGQUIT)
    arrived: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)  # a program that is started inherits the blocked signals
    # another thread, such as one of a numerical library, can still take a signal for this process
    previous = {number: signal.signal(number, lambda n, _: arrived.append(n)) for number in held} if is_main else {}
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        for n in dict.fromkeys(arrived):
            signal.raise_signal(n)


class Requeue(NamedTuple):
    """Result of a request for another attempt after a stop.

    Attributes:
        cause: Why the stop came, as far as the scheduler knows (README, "When a job ends early").
        refused: None if the attempt was granted, else the reason.
    """

    cause: str
    refused: str | None = None


class StopFlag:
    """Set by the first stopping signal; later signals change nothing.

    Attributes:
        reason: Name of the signal, or the reason given to ``set``; None while the flag is not set.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._keyboard = False

    def install(self, *more: signal.Signals, keyboard: bool = False) -> StopFlag:
        """Handle the stopping signals of this process. Only the main thread may call it.

        Args:
            more: Further signals that set the flag.
            keyboard: Also handle what stops a command that a person has typed: the first Ctrl-C (the second one
                interrupts as usual), a closed terminal (unless ``nohup`` ignores it), and the limit of CPU time.
        """
        self._keyboard = keyboard
        typed: list[signal.Signals] = []
        if keyboard:
            typed = [signal.SIGINT, *(n for n in INTERACTIVE if signal.getsignal(n) is not signal.SIG_IGN)]
        for number in (*STOPPING, *more, *typed):
            previous = signal.signal(number, self._set_from_signal)
            self._previous.setdefault(number, previous)
        return self

    def restore(self) -> None:
        """Restore the handlers from before ``install``."""
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    def set(self, reason: str) -> None:
        """Set the flag. The first reason is kept."""
        self.reason = self.reason or reason

    def is_set(self) -> bool:
        """Whether a stop was requested."""
        return self.reason is not None

    def _set_from_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._keyboard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.set(signal.Signals(number).name)
