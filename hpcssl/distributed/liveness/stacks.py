"""Where the threads of this process are, on one line each."""

from __future__ import annotations

import sys
import threading
from types import FrameType

DEBUGGERS = ("pdb.py", "bdb.py", "pydevd.py")


def format_stack(frame: FrameType | None, calls: int = 5) -> str:
    """A thread's innermost calls, innermost first.

    Calls inside installed packages are left out, except for the innermost one; so are those of ``threading``.

    Args:
        frame: The thread's current frame.
        calls: Maximum number of calls.
    """
    lines: list[str] = []
    while frame is not None and len(lines) < calls:
        code = frame.f_code
        foreign = lines and "/site-packages/" in code.co_filename
        if not foreign and not code.co_filename.endswith("/threading.py"):
            lines.append(f"{'/'.join(code.co_filename.split('/')[-2:])}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return " < ".join(lines)


def main_stack(main: int | None) -> str:
    """The innermost calls of the main thread, whose identifier is ``main``."""
    return format_stack(_frames().get(main or 0))


def other_stacks(main: int | None, count: int = 4) -> str:
    """The innermost calls of the other Python threads, without those of the heartbeat.

    Args:
        main: Identifier of the main thread.
        count: Room for about as many threads, 120 characters each.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {names.get(ident, "?"): frame for ident, frame in _frames().items() if ident != main}
    return ", ".join(
        f"{name} at {format_stack(frame, 3)}"
        for name, frame in sorted(frames.items(), key=lambda item: item[0])
        if not name.startswith("heartbeat")
    )[: count * 120]


def in_debugger(main: int | None) -> bool:
    """Whether the main thread stands in a debugger, where a pause is not a hang."""
    frame = _frames().get(main or 0)
    while frame is not None:
        if frame.f_code.co_filename.endswith(DEBUGGERS):
            return True
        frame = frame.f_back
    return False


def _frames() -> dict[int, FrameType]:
    return sys._current_frames()
