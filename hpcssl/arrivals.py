"""Whether the ranks that meet at a store are those of one attempt, and who is missing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from hpcssl import pulse
from hpcssl.errors import Stopped, WorldError
from hpcssl.launch import Place
from hpcssl.pulse import Board

TOKEN = "hpcssl/token"
"""Where the store of an attempt says whose it is, under no prefix: a rank of another attempt finds it too."""
_MET = "all"
READ_S = 2.0
"""How long the one who gives up leaves its sentence on the board, which may go with its process."""


def refuse_strangers(board: Board, place: Place) -> None:
    """Rank 0, whose process keeps the store, says whose it is; a rank of another attempt raises ``WorldError``."""
    if place.rank == 0:
        board.set(TOKEN, place.token)
        return
    (theirs,) = board.get([TOKEN])
    if theirs != place.token:
        raise WorldError(f"rank {place.rank} of attempt {place.token}", got=f"attempt {theirs} at {_at(place)}",
                         expected="its own attempt's ranks", mend="none is needed for a process that an earlier "
                         "attempt left over; otherwise give each run a MASTER_PORT of its own")


def wait_for_all(board: Board, place: Place, began: float, timeout_s: float, stop: Callable[[], bool]) -> None:
    """Write this rank's first beat and wait for those of the others until ``timeout_s`` after ``began`` (monotonic).

    Raises the same on all that came: ``WorldError`` with the ranks that did not, or ``Stopped`` where ``stop()`` came
    true on one of them. What a first rank finds holds for all: whoever comes later does not begin without it.
    """
    deadline, pause = began + timeout_s, 0.01
    board.set(pulse.key(place.rank), pulse.arrival(place.rank))
    while True:
        found = _MET if board.has([pulse.key(rank) for rank in range(place.size)]) else ""
        if not found and (stop() or time.monotonic() > deadline):
            found = _missing(board, place, stop(), time.monotonic() - began if stop() else timeout_s)
        found = board.first("met", found)
        if found == _MET:
            return
        if found:
            break
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)
    time.sleep(READ_S if place.rank == 0 else 0)
    end = json.loads(found)
    if end["stop"]:
        raise stopped(place, end["why"])
    raise WorldError(f"rank {place.rank} at {_at(place)}", got=end["why"], expected="all ranks to meet there",
                     mend="see the logs of these ranks and their nodes; machine.timeout_minutes lets them take longer")


def _missing(board: Board, place: Place, stop: bool, waited_s: float) -> str:
    missing = [str(rank) for rank in range(place.size) if not board.has([pulse.key(rank)])]
    return json.dumps({"stop": stop, "why": f"rank{'s' * (len(missing) > 1)} {', '.join(missing)} of {place.size} "
                       f"{'had not come' if stop else 'never came'} within {waited_s / 60:.3g} minutes"})


def stopped(place: Place, why: str) -> Stopped:
    """What a rank that waits for the others raises when it is asked to stop."""
    return Stopped(f"rank {place.rank} at {_at(place)}", got=f"a request to stop, while {why}",
                   expected="all ranks to meet there", mend="none is needed: nothing had begun")


def _at(place: Place) -> str:
    return f"{place.address}:{place.port}"
