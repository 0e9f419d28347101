"""Stopping and failing on all ranks together.

A rank that left an evaluation alone would leave the others waiting in their next collective. Every evaluation
therefore calls ``raise_on_any_rank`` at its boundaries: after a part of the features, a block of queries, a round of
steps.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable

from hpcssl.distributed.world import World
from hpcssl.errors import EvalError, HpcsslError, Stopped

StopCheck = Callable[[], bool]
"""Returns whether this process has been asked to stop."""


def never_stop() -> bool:
    """The ``StopCheck`` of an evaluation that nothing interrupts."""
    return False


def raise_on_any_rank(world: World, what: str, *, stop: bool = False, error: HpcsslError | None = None) -> None:
    """Raise on every rank if one rank has an error or was asked to stop. A collective.

    Args:
        world: The processes of the evaluation.
        what: What is interrupted, for the message.
        stop: Whether this rank was asked to stop.
        error: The error of this rank, or None.

    Raises:
        EvalError: A rank has an error; the one of the lowest rank is raised.
        Stopped: No rank has an error, and one was asked to stop (exit code 75, resumable).
    """
    mine = {"stop": bool(stop), "error": error and [error.what, error.got, error.expected, error.fix]}
    reports = [json.loads(text) for text in world.all_gather_text(json.dumps(mine))]
    for report in reports:
        if report["error"]:
            subject, got, expected, fix = report["error"]
            raise EvalError(subject, got=got, expected=expected, fix=fix) from error
    if any(report["stop"] for report in reports):
        raise Stopped(
            what,
            got="stopped before its end by a request to stop",
            expected="enough time to finish",
            fix="run the same command again; finished parts are kept",
        )


def as_eval_error(error: HpcsslError | OSError) -> HpcsslError:
    """Turn an error of the operating system, such as a full disk, into an ``EvalError`` that says how to continue.

    Errors of this package are returned unchanged.
    """
    if isinstance(error, HpcsslError):
        return error
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "free space there" if full else "make that path readable and writable"
    return EvalError(
        str(error.filename or "a file of the evaluation"),
        got=error.strerror or error,
        expected="a writable folder with free space",
        fix=f"{fix}, then run the same command again; finished parts are kept",
    )
