"""The errors a person sees: one sentence that says what, what was got, what was expected, and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 0, 1, 2, 75
"""0 done; 1 what was asked for failed; 2 wrong usage; 75 stopped before its end and resumable."""


class HpcsslError(Exception):
    """Base of the family. ``str()`` gives one line, and the four parts stay readable as attributes."""

    exit_code = EXIT_FAILED

    def __init__(self, what: str, *, got: object, expected: object, mend: str):
        self.what, self.got, self.expected, self.mend = what, str(got), str(expected), mend
        super().__init__(self.what, self.got, self.expected, self.mend)

    def __str__(self) -> str:
        return f"{self.what}: got {self.got}; expected {self.expected}; to mend: {self.mend}"

    def __reduce__(self):
        return _rebuild, (type(self), self.what, self.got, self.expected, self.mend)


class ConfigError(HpcsslError):
    """A recipe, an override or a command line that cannot be meant."""

    exit_code = EXIT_USAGE


class DataError(HpcsslError):
    """Images, shards or labels that are missing, damaged or of the wrong kind."""


class WorldError(HpcsslError):
    """Ranks, devices or a world size that cannot work, or that disagree."""


class ResumeError(HpcsslError):
    """A run folder that cannot be continued as asked."""


class Stopped(HpcsslError):
    """What was asked to stop (a preemption, the end of the time) and did; it can be resumed."""

    exit_code = EXIT_STOPPED


class EvalError(HpcsslError):
    """Weights, features or labels that an evaluation cannot use."""


class SubmitError(HpcsslError):
    """SLURM, or its local twin, refused or lost something."""


def _rebuild(kind, what, got, expected, mend):
    return kind(what, got=got, expected=expected, mend=mend)


def nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean 'k'`` for a word that is close to a known one, else the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}" if close else "choose one of " + ", ".join(known)
