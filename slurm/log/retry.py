"""Whether a job gets another attempt after one has ended. This is the only place that decides it.

Only crashes count toward the retry limit; stops by signals, time limits, preemptions and lost nodes do not, however
many there are. Two crashes in a row at the same step end the job, since the next attempt would crash there too.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from hpcssl.run_dir import RunDir
from slurm.log.attempts import Attempt, find_attempt, in_order_of_end, read_attempts, record_end


@dataclass(frozen=True)
class RetryDecision:
    """The decision after an attempt.

    Attributes:
        retry: Whether to request another attempt.
        reason: Why, as one clause for the log.
    """

    retry: bool
    reason: str


def decide_after_exit(
    run: RunDir, what: str, attempt: dict[str, Any], explanation: str, was_killed: bool = False
) -> RetryDecision:
    """Record the end of an attempt that left none, and decide whether it is followed by another one.

    Args:
        run: The run folder.
        what: ``train``, or an evaluation.
        attempt: See ``attempts.record_start``. It ended by itself, without having finished.
        explanation: How it ended, as far as its parent process could see; recorded with the cause ``killed`` if the
            attempt recorded no end.
        was_killed: Whether the parent saw a task die by SIGKILL. Errors in the other ranks' collectives, and the signal
            that ended them, follow from that death: ``killed`` then replaces them. An error of a rank's own stands
            (``attempts``), and so does a stop after which the state was saved: whoever ended the others after it may
            have used SIGKILL, as SLURM does when a task takes too long to leave.
    """
    recorded = find_attempt(run, what, attempt)
    is_consequence = recorded is not None and recorded.cause in ("stopped", "error") and not recorded.was_saved
    if recorded is None or recorded.cause is None or (was_killed and is_consequence):
        with contextlib.suppress(OSError):  # a full disk must not cost the run its next attempt
            record_end(run, what, attempt, "killed", explanation)
        recorded = find_attempt(run, what, attempt)
    if recorded is None or recorded.cause is None:
        return RetryDecision(True, f"attempt {attempt['attempt']} could not record its end: {explanation}")
    history = in_order_of_end(read_attempts(run, what))
    end = next((k for k, other in enumerate(history, 1) if other.number == recorded.number), len(history))
    return decide_retry(history[:end])  # without those that have ended since then


def decide_retry(attempts: list[Attempt]) -> RetryDecision:
    """Decide whether another attempt follows the one of these that was the last to end."""
    if not attempts:
        return RetryDecision(True, "no attempt yet")
    attempts = in_order_of_end(attempts)
    last = attempts[-1]
    if last.cause in ("done", "cancelled"):
        return RetryDecision(False, last.cause)
    if not last.is_crash:
        return RetryDecision(True, f"attempt {last.number} was stopped ({last.cause})")
    step = _end_step(last)
    description = f"attempt {last.number} crashed at step {step}: {last.error or last.cause}"
    if len(attempts) > 1 and _is_same_crash(attempts[-2], last):
        return RetryDecision(False, f"two crashes in a row at the same step; {description}")
    return RetryDecision(True, description)


def describe_no_progress(attempts: list[Attempt], count: int = 3) -> str:
    """Return a warning if the last ``count`` attempts were stopped before their first step; else an empty string.

    Such a run is requeued for ever: for example with a time limit that is shorter than the start-up.
    """
    last = [a for a in attempts if a.cause is not None][-count:]
    if len(last) < count or any(_made_progress(a) for a in last):
        return ""
    fix = "raise --time" if last[-1].cause == "timeout" else "see the logs, and check that there is time to start"
    return f"the last {count} attempts ended before their first step ({last[-1].cause}): {fix}"


def _is_same_crash(earlier: Attempt, last: Attempt) -> bool:
    """Whether two attempts crashed at the same step, or both before they began.

    One that never began says nothing about a step: if it was refused, the last one in the journal is another job's.
    """
    if not earlier.is_crash or earlier.never_began != last.never_began:
        return False
    return last.never_began or _end_step(earlier) == _end_step(last)


def _end_step(attempt: Attempt) -> int:
    return attempt.first_step if attempt.last_step is None else attempt.last_step


def _made_progress(attempt: Attempt) -> bool:
    """Whether an attempt made a step, or ended for another reason than a stop."""
    if attempt.is_crash or attempt.cause in ("done", "cancelled") or attempt.last_step is None:
        return True
    return attempt.last_step > attempt.first_step
