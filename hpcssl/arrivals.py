"""Whether the ranks that meet at a store are those of one attempt, and who is missing."""

from __future__ import annotations

import json
import time

from hpcssl import pulse
from hpcssl.errors import WorldError
from hpcssl.launch import Place
from hpcssl.pulse import Board

TOKEN = "hpcssl/token"
"""Where the store of an attempt says whose it is, under no prefix: a rank of another attempt finds it too."""
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


def wait_for_all(board: Board, place: Place, began: float, timeout_s: float) -> None:
    """Write this rank's first beat and wait for those of the others until ``timeout_s`` after ``began`` (monotonic).
    Raises the same ``WorldError`` on all that came, with the ranks that did not."""
    deadline, pause = began + timeout_s, 0.01
    board.set(pulse.key(place.rank), pulse.arrival(place.rank))
    while not board.has([pulse.key(rank) for rank in range(place.size)]):
        end = board.first("end", _missing(board, place, timeout_s) if time.monotonic() > deadline else "")
        if end:
            time.sleep(READ_S if place.rank == 0 else 0)
            raise WorldError(f"rank {place.rank} at {_at(place)}", got=json.loads(end)["why"],
                             expected="all ranks to meet there", mend="see the logs of these ranks and their nodes; "
                             "machine.timeout_minutes lets them take longer")
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)


def _missing(board: Board, place: Place, timeout_s: float) -> str:
    missing = [str(rank) for rank in range(place.size) if not board.has([pulse.key(rank)])]
    return json.dumps({"cause": "error", "rank": place.rank, "why": f"rank{'s' * (len(missing) > 1)} "
                       f"{', '.join(missing)} of {place.size} never came within {timeout_s / 60:.3g} minutes"})


def _at(place: Place) -> str:
    return f"{place.address}:{place.port}"
