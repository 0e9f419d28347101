"""How long the ranks may be without progress in each phase, as far as the run has shown what is normal.

A limit is a multiple of the longest time without progress that a phase has had. Until a phase was completed
``MIN_COMPLETED`` times, and once in this attempt, the limit is ``hang_s``: the first step compiles, the first save and
the first evaluation meet a cold file system. The start-up, which an attempt has once, is learned from earlier attempts.
"""

from __future__ import annotations

from collections.abc import Mapping

MIN_COMPLETED = 10
"""How often a phase must have been completed before its limit is learned."""
START_UP = "start-up"
PHASES = {
    START_UP: ("start", "lock", "verify", "resume"),
    "data": ("data",),
    "step": ("step", "backward", "cluster"),
    "save": ("save", "export", "finish", "requeue"),
    "evaluation": ("evaluate",),
}
"""Names of ``Heartbeat.set_phase`` by phase. Others, such as ``stage``, depend on what is copied: none is learned."""
_PHASE_OF = {name: phase for phase, names in PHASES.items() for name in names}


class PhaseLimits:
    """Limits of the time without progress, in seconds.

    Args:
        hang_s: Upper limit, and the limit of a phase that is not known well enough; 0 for none at all.
        factor: Multiple of the longest time without progress so far; 0 to learn nothing.
        floor_s: No learned limit is lower, unless ``hang_s`` is.
        history: Number of completions and longest time without progress in earlier attempts, by phase.
    """

    def __init__(
        self,
        hang_s: float,
        *,
        factor: float = 0.0,
        floor_s: float = 0.0,
        history: Mapping[str, tuple[int, float]] | None = None,
    ):
        self.hang_s, self.factor, self.floor_s = hang_s, factor, floor_s
        self._history = dict(history or {})
        self._completed = dict.fromkeys(PHASES, 0)
        self._longest = dict.fromkeys(PHASES, 0.0)
        self._phase = START_UP

    def enter(self, name: str) -> None:
        """The main thread begins with ``name``; the phase before it is completed if that is another one."""
        phase = _PHASE_OF.get(name)
        if phase is not None and phase != self._phase:
            self._completed[self._phase] += 1
            self._phase = phase

    def observe(self, name: str, seconds: float) -> None:
        """There was progress in ``name`` after ``seconds`` without."""
        phase = _PHASE_OF.get(name)
        if phase is not None:
            self._longest[phase] = max(self._longest[phase], seconds)

    def limit(self, name: str) -> float:
        """Seconds without progress in ``name`` after which the ranks hang."""
        phase = _PHASE_OF.get(name)
        if phase is None or not self.factor:
            return self.hang_s
        count, longest = self._history.get(phase, (0, 0.0))
        completed = self._completed[phase]
        if count + completed < MIN_COMPLETED or not (completed or phase == START_UP):
            return self.hang_s
        return min(self.hang_s, max(self.floor_s, self.factor * max(longest, self._longest[phase])))

    def summary(self) -> dict[str, tuple[int, float]]:
        """Completions and longest time without progress in this attempt, by phase that was completed."""
        return {p: (n, round(self._longest[p], 1)) for p, n in self._completed.items() if n}
