"""A pulse for the time of one attempt, and better words where a collective fails because a rank is gone."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import torch

from hpcssl.errors import EXIT_FAILED, WorldError
from hpcssl.pulse import Pulse
from hpcssl.world import World


class RankLost(WorldError):
    """A collective failed because of another rank: one that died without a word (``cause`` killed), or that had words
    of its own (its cause)."""

    cause = "killed"


@contextlib.contextmanager
def watchdog(world: World, hang_minutes: float, end: Callable[[str, str, int | None], None],
             leave: Callable[[str], None] | None = None) -> Iterator[None]:
    """Watch this rank, and be watched by the others, while the block runs.

    Without progress for ``hang_minutes`` (0: for ever), ``end(cause, sentence, steps taken)`` writes the end of the
    attempt down and ``leave(sentence)`` ends the process, by default with exit code 1; both in another thread than the
    block's. A failed collective is raised as ``RankLost`` with the rank that is to blame, as far as one is found.
    """
    def fail(cause: str, sentence: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not keep the nodes
            end(cause, sentence, pulse.steps)
        (leave or _leave)(sentence)

    pulse = world.pulse = Pulse(world.board(), world.rank, world.size, hang_s=hang_minutes * 60, leave=fail,
                                event=_event if world.device.type == "cuda" else None).start()
    try:
        yield
    except BaseException as error:
        cause, blamed = pulse.who_is_gone() if world.failed(error) else ("", "")
        words = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        pulse.last_words(blamed or f"rank {world.rank} on {pulse.mine.host}: {words}")
        if not blamed:
            raise
        lost = RankLost(f"a collective in {pulse.where}", got=blamed, expected="the same call on all ranks",
                        mend="see the log and the node of that rank; the same command goes on from the last checkpoint")
        lost.cause = cause
        raise lost from error
    finally:
        pulse.close()
        world.pulse = None


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _leave(_sentence: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(EXIT_FAILED)
