"""How the ranks of an evaluation stop or fail as one: a rank that leaves alone would hang the others.

Used by every evaluation at its boundaries (a part of the features, a block of queries, a round of steps).
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable

from hpcssl.errors import EvalError, HpcsslError, Stopped
from hpcssl.world import World

Stop = Callable[[], bool]


def never() -> bool:
    return False


def agree(world: World, what: str, *, stop: bool = False, error: HpcsslError | None = None) -> None:
    """Raise on every rank what one of them met: its error as ``EvalError``, else ``Stopped``. A collective."""
    mine = {"stop": bool(stop), "error": error and [error.what, error.got, error.expected, error.mend]}
    every = [json.loads(text) for text in world.gather_text(json.dumps(mine))]
    for said in every:
        if said["error"]:
            told, got, expected, mend = said["error"]
            raise EvalError(told, got=got, expected=expected, mend=mend) from error
    if any(said["stop"] for said in every):
        raise Stopped(what, got="a request to stop", expected="more time",
                      mend="run the same command again: what is finished is kept")


def as_error(error: HpcsslError | OSError) -> HpcsslError:
    """An error of the operating system (a full disk, a folder without rights) in our four parts."""
    if isinstance(error, HpcsslError):
        return error
    mend = "free room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see to it that it can be used"
    return EvalError(str(error.filename or "a file of the evaluation"), got=error.strerror or error,
                     expected="a folder with room that can be written",
                     mend=f"{mend}, then run the same command again: what is finished is kept")
