"""Why ranks make no progress, in one sentence, from the beats that they left. No clock and no store here.

Collectives bind the ranks together, so all of them wait when one does not come. The one that is meant is found in
this order: who gives no sign of life; who has come less far than the others; who calls another collective.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LONGEST = 900
"""Characters of a sentence: it stands in one line of ``attempts.jsonl`` and of ``hpcssl-submit status``."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What one rank told of itself. ``idle``: seconds since its main thread's last mark or collective; ``count``: its
    collectives so far, ``last`` the newest of them in words, ``inside`` whether the thread waits in it; ``stack``: the
    main thread, innermost call first; ``others``: threads that it may wait for; ``number`` of this beat."""

    rank: int
    host: str
    pid: int
    phase: str = "start"
    step: int | None = None
    idle: float = 0.0
    count: int = 0
    last: str = "no collective"
    inside: bool = False
    stack: str = ""
    others: str = ""
    number: int = 0

    @property
    def where(self) -> str:
        """Step and phase; the step is the one that is being taken."""
        return ("" if self.step is None else f"step {self.step}, ") + f"phase {self.phase}"

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"


def gone(silent: Mapping[int, float], beats: Mapping[int, Beat]) -> str:
    """Ranks that give no sign of life, with the seconds for which they have not, and where they were last seen."""
    told = []
    for rank, seconds in sorted(silent.items()):
        beat, since = beats[rank], f" or stopped: no sign of life for {seconds:.0f} s" if seconds >= 1 else ""
        told.append(f"{beat.name} (process {beat.pid}) is gone{since}; last seen in {beat.where}{_at(beat)}")
    return _cut("; ".join(told))


def hang(beats: Mapping[int, Beat], silent: Mapping[int, float], limit_s: float) -> str:
    """The sentence on ranks none of which has made progress for ``limit_s`` seconds."""
    head = f"no progress for {limit_s:.0f} s: "
    if silent:
        return _cut(head + gone(silent, beats))
    every = sorted(beats.values(), key=lambda beat: beat.rank)
    behind = _behind(every)
    if behind:
        ahead = next(beat for beat in every if beat not in behind)
        return _cut(head + "; ".join(_stuck(beat) for beat in behind)
                    + f"; the others wait for it in {ahead.where}, after {ahead.count} collectives")
    if len(_sides(every)) > 1:
        return _cut(head + mismatch(beats))
    if len(every) == 1:
        return _cut(head + _stuck(every[0]))
    return _cut(f"{head}all {len(every)} ranks wait alike in {every[0].where}, collective {every[0].count} "
                f"({every[0].last}){_at(every[0])}: the network between their nodes may be down")


def mismatch(beats: Mapping[int, Beat]) -> str:
    """Which ranks call which collective, where they differ; else empty."""
    sides = _sides(sorted(beats.values(), key=lambda beat: beat.rank))
    if len(sides) < 2:
        return ""
    told = "; ".join(f"{_ranks(side)} in {call}{_at(side[0])}" for call, side in sides.items())
    return _cut(f"a mismatched collective in {next(iter(sides.values()))[0].where}: {told}")


def _behind(every: Sequence[Beat]) -> list[Beat]:
    """Those that the others wait for: of an earlier step, or not in a collective where others are in a later one."""
    steps = {beat.step if beat.step is not None else -1 for beat in every}
    if len(steps) > 1:
        return [beat for beat in every if (beat.step if beat.step is not None else -1) == min(steps)]
    least = min(beat.count for beat in every)
    late = [beat for beat in every if beat.count == least]
    if len(late) < len(every) and (len({beat.phase for beat in every}) > 1 or not any(beat.inside for beat in late)):
        return late
    outside = [beat for beat in every if not beat.inside]  # all of one collective, and not all of them wait there
    return outside if 0 < len(outside) < len(every) and len(_sides(every)) == 1 else []


def _sides(every: Sequence[Beat]) -> dict[str, list[Beat]]:
    sides: dict[str, list[Beat]] = {}
    for beat in every:
        sides.setdefault(f"collective {beat.count} ({beat.last})", []).append(beat)
    return sides


def _stuck(beat: Beat) -> str:
    threads = f"; its threads: {beat.others}" if beat.others else ""
    return f"{beat.name} (process {beat.pid}) is stuck in {beat.where} for {beat.idle:.0f} s{_at(beat)}{threads}"


def _at(beat: Beat) -> str:
    return f", at {beat.stack}" if beat.stack else ""


def _ranks(side: Sequence[Beat]) -> str:
    hosts = Counter(beat.host for beat in side)
    several = "s" if len(side) > 1 else ""
    return f"rank{several} {', '.join(str(beat.rank) for beat in side)} on {', '.join(hosts)}"


def _cut(sentence: str) -> str:
    return sentence if len(sentence) <= LONGEST else sentence[:LONGEST - 1] + "…"
