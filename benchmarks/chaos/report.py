"""The report of a soak test: every fault, the steps that it cost, and every violated expectation."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos.commands import PERIOD
from benchmarks.chaos.kinds import KINDS
from benchmarks.chaos.plan import Fault
from hpcssl.files import atomic_write
from hpcssl.timing.uptime import Uptime, total

MEASURES = ("after_signal", "after_kill", "after_kill_in_a_save", "after_damage", "after_full_disk")
"""Groups in which lost steps are counted."""

Injection = tuple[Fault, float, str]
"""An injected fault: when, in seconds since the start of the soak test, and what was hit."""


@dataclass
class SoakReport:
    """What was done and found so far.

    Attributes:
        out: The file that ``write`` replaces; None for none.
        about: What the figures depend on, such as seed and versions.
        expected: Digest of the undisturbed training.
        start: When the soak test began (``time.monotonic``).
        log: One row per fault (``build_row``).
        digests: Digests of the finished trainings.
        violations: Violated expectations, one sentence each.
        undisturbed_s: Seconds of the undisturbed training.
        uptimes: Where the time of each finished training went.
    """

    out: Path | None
    about: dict[str, Any]
    expected: str = ""
    start: float = field(default_factory=time.monotonic)
    log: list[dict[str, Any]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    undisturbed_s: float = 0.0
    uptimes: list[Uptime] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """Return the report as plain values."""
        lost = {name: [row["lost"] for row in self.log if row["measure"] == name] for name in MEASURES}
        return self.about | {
            "hours": round((time.monotonic() - self.start) / 3600, 3),
            "faults": len(self.log),
            "digest_equal": bool(self.digests) and set(self.digests) == {self.expected},
            "trainings_finished": len(self.digests),
            "digest": self.expected,
            "undisturbed_s": self.undisturbed_s,
            "time": _describe_time(self.uptimes),
            "steps_lost": {
                name: {"max": max(steps, default=0), "total": sum(steps), "faults": len(steps)}
                for name, steps in lost.items()
            }
            | {"checkpoint_period": PERIOD},
            "by_kind": {
                kind: _summarize([row for row in self.log if row["kind"] == kind])
                for kind in KINDS
                if any(row["kind"] == kind for row in self.log)
            },
            "violations": self.violations,
            "log": self.log,
        }

    def write(self) -> None:
        """Write the report as JSON, with one line per fault."""
        if self.out is not None:
            head = json.dumps({k: v for k, v in self.body().items() if k != "log"}, indent=1)
            lines = ",\n  ".join(json.dumps(row) for row in self.log)
            atomic_write(self.out, f'{head[:-2]},\n "log": [\n  {lines}\n ]\n}}\n')

    def add_violation(self, sentence: str) -> None:
        """Record and print a violated expectation."""
        self.violations.append(sentence)
        print_line(f"  VIOLATION: {sentence}")


def build_row(
    injection: Injection,
    before: int,
    after: int | None,
    lost: int = 0,
    measure: str | None = None,
    causes: Sequence[str] = (),
) -> dict[str, Any]:
    """Build one row of the log.

    Args:
        injection: The fault.
        before: The last step before it.
        after: The first step after it; None if the training did not recover.
        lost: Steps that were lost.
        measure: Under which of ``MEASURES`` they count; None if they count under another fault.
        causes: Causes of the attempts that ended because of this fault.
    """
    fault, at, target = injection
    return {
        "fault": fault.number,
        "time": round(at, 1),
        "kind": fault.kind,
        "target": target,
        "step_before": before,
        "step_after": after,
        "lost": lost,
        "measure": measure,
        "causes": list(causes),
    }


def print_line(text: str) -> None:
    """Print one line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _describe_time(uptimes: list[Uptime]) -> dict[str, float]:
    """Effective training time of the finished trainings, and the seconds of each part."""
    summed = total(uptimes)
    return {"effective_share": round(summed.share, 4)} | {k: round(v, 1) for k, v in asdict(summed).items()}


def _summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all faults of one kind."""
    return {
        "count": len(rows),
        "steps_lost": sum(row["lost"] for row in rows),
        "attempts": sum(len(row["causes"]) for row in rows),
        "resubmissions": sum(len(row.get("resubmissions", [])) for row in rows),
        "causes": dict(Counter(cause for row in rows for cause in row["causes"])),
    }
