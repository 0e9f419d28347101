"""Which faults are injected, in which order and into which rank.

Every draw is a function of the seed and an index, so a seed gives one sequence whatever the timing. Faults come in
groups. Most groups have one fault; some have two in a row that only together are an attack (a checkpoint is damaged and
*then* a rank is killed; a job is requeued and *then* killed while it starts). Every cycle is a permutation of all
groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpcssl import rng

RANKS, NODES = 4, ("n1", "n2")
MAX_STEPS = 6
"""Before a group of faults, the training makes 1 to this many steps."""


@dataclass(frozen=True)
class Fault:
    """One fault as drawn.

    Attributes:
        number: Index of the fault, from 1.
        kind: Name of its kind, a key of ``kinds.KINDS``.
        ranks: All ranks in a random order; the first one is the target.
        node: The target node.
        steps: Steps that the training makes before the fault.
        delay_s: Seconds to wait after these steps.
        share: A number in [0, 1): a position in a file or in a start, or a duration.
    """

    number: int
    kind: str
    ranks: tuple[int, ...]
    node: str
    steps: int
    delay_s: float
    share: float

    @property
    def rank(self) -> int:
        """The target rank."""
        return self.ranks[0]


def generate_groups(seed: int, groups: Sequence[tuple[str, ...]]) -> Iterator[list[Fault]]:
    """Yield groups of faults without an end; the faults are numbered from 1.

    Args:
        seed: Decides the sequence.
        groups: Kinds of the faults of each group.
    """
    number, cycle = 0, 0
    while True:
        for index in rng.permutation(rng.key(seed, "cycle", cycle), len(groups)):
            faults = []
            for kind in groups[index]:
                number += 1
                faults.append(draw_fault(seed, number, kind))
            yield faults
        cycle += 1


def draw_fault(seed: int, number: int, kind: str) -> Fault:
    """Draw target, time and position of one fault."""
    ranks = tuple(int(rank) for rank in rng.permutation(rng.key(seed, "ranks", number), RANKS))
    node, steps, delay, share = rng.uniform(rng.key(seed, "fault", number), 4)
    return Fault(
        number,
        kind,
        ranks,
        NODES[int(node * len(NODES))],
        1 + int(steps * MAX_STEPS),
        0.2 * float(delay),
        float(share),
    )
