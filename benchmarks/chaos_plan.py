"""Which faults come, in which order and to whom: drawn by address, so that a seed names one sequence whatever the
timing.

Faults come in bouts: most alone, some in a row that only together is an attack (a checkpoint is damaged and *then* a
rank is killed; a job is requeued and *then* killed while it starts). Every cycle is a permutation of all bouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpcssl import rng

RANKS, NODES = 4, ("n1", "n2")
MOST_STEPS = 6
"""A bout waits until the training has gone on by 1 to so many steps."""


@dataclass(frozen=True)
class Fault:
    """One fault as drawn. ``steps`` and ``delay_s``: how far the training goes on first. ``share``: a number in [0, 1)
    that says where in a file, when in a start, or for how long. ``ranks``: all ranks, the victim first."""

    number: int
    kind: str
    ranks: tuple[int, ...]
    node: str
    steps: int
    delay_s: float
    share: float

    @property
    def rank(self) -> int:
        return self.ranks[0]


def sequence(seed: int, bouts: Sequence[tuple[str, ...]]) -> Iterator[list[Fault]]:
    """Bouts without an end, each a list of faults that are numbered on from 1."""
    number, cycle = 0, 0
    while True:
        for index in rng.permutation(rng.key(seed, "cycle", cycle), len(bouts)):
            faults = []
            for kind in bouts[index]:
                number += 1
                faults.append(drawn(seed, number, kind))
            yield faults
        cycle += 1


def drawn(seed: int, number: int, kind: str) -> Fault:
    at = rng.key(seed, "fault", number)
    order = tuple(int(r) for r in rng.permutation(rng.key(seed, "ranks", number), RANKS))
    node, steps, delay, share = rng.uniform(at, 4)
    return Fault(number, kind, order, NODES[int(node * len(NODES))], 1 + int(steps * MOST_STEPS), 0.2 * float(delay),
                 float(share))
