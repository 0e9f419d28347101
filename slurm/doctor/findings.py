"""What the doctor has found: one line per check, with the fix where something is broken."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

OK, NOTE, WARNING, BROKEN, SKIPPED = "ok", "note", "warning", "broken", "skipped"
"""Levels of a finding: as needed; worth knowing; works, but less well; does not work; could not be checked."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: What was checked, such as ``clock``.
        level: ``ok``, ``note``, ``warning``, ``broken`` or ``skipped``.
        got: What was found.
        expected: What is needed; empty where nothing is.
        fix: What to do about it; empty where there is nothing to do.
    """

    check: str
    level: str
    got: str
    expected: str = ""
    fix: str = ""

    def line(self) -> str:
        """Return the finding as text: one line, and another one for the fix of what is not as needed."""
        text = f"{self.level:8} {self.check}: {self.got}"
        if self.level in (WARNING, BROKEN):
            text += f" (expected {self.expected})" if self.expected else ""
        return text + (f"\n{'':8} Fix: {self.fix}" if self.fix else "")


def is_broken(findings: Iterable[Finding]) -> bool:
    """Return whether one of the checks found something broken."""
    return any(finding.level == BROKEN for finding in findings)


def to_json(findings: Iterable[Finding]) -> list[dict[str, str]]:
    """Return the findings as JSON objects."""
    return [asdict(finding) for finding in findings]
