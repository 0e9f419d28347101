"""The heartbeat for the time of one attempt, and an error that names the rank where a collective fails."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import torch

from hpcssl.distributed.liveness.heartbeat import Heartbeat
from hpcssl.distributed.liveness.limits import PhaseLimits
from hpcssl.distributed.world import World
from hpcssl.errors import EXIT_FAILED, RankLost, Stopped
from hpcssl.timing.phase_clock import PhaseClock


@contextlib.contextmanager
def watchdog(
    world: World,
    limits: PhaseLimits,
    record_end: Callable[[str, str, int | None], None],
    leave: Callable[[str], None] | None = None,
    phases: PhaseClock | None = None,
) -> Iterator[None]:
    """Run a heartbeat of this rank, which other ranks read, while the block runs.

    Args:
        world: The processes; its ``heartbeat`` is set for the time of the block.
        limits: Seconds without progress after which the attempt ends.
        record_end: Called as ``record_end(cause, sentence, steps)`` before the process ends because of a hang, in
            another thread than the block's. ``steps`` is the number of finished steps, or None before the first.
        leave: Called as ``leave(sentence)`` afterwards to end the process, by default with exit code 1.
        phases: Adds up the time of the main thread in each phase.

    Raises:
        RankLost: A collective in the block failed, and a rank was found that is to blame.
    """

    def end(cause: str, sentence: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not keep the process alive
            record_end(cause, sentence, heartbeat.completed_steps)
        (leave or _leave)(sentence)

    heartbeat = world.heartbeat = Heartbeat(
        world.key_value_store(),
        world.rank,
        world.size,
        limits=limits,
        leave=end,
        event=_timing_event if world.device.type == "cuda" else None,
        phases=phases,
    ).start()
    try:
        yield
    except Stopped:  # raised on all ranks
        raise
    except BaseException as error:
        cause, culprit = heartbeat.explain_collective_error() if world.is_collective_error(error) else ("", "")
        message = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        reported = culprit or f"rank {world.rank} on {heartbeat.record.host}: {message}"
        heartbeat.report_failure(reported, cause or "error")
        if not culprit:
            raise
        lost = RankLost(
            f"a collective in {heartbeat.position}",
            got=culprit,
            expected="the same call on all ranks",
            fix="see the log and the node of that rank; the same command resumes from the last checkpoint",
        )
        lost.cause, lost.is_consequence = cause, False
        raise lost from error
    finally:
        heartbeat.close()
        world.heartbeat = None


def _timing_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch has no annotation
    event.record()
    return event


def _leave(_sentence: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(EXIT_FAILED)
