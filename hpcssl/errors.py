"""The errors a person sees: one sentence that says what, what was got, what was expected, and the mend."""

from __future__ import annotations

import difflib
import errno
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


_AGAIN = "then run the same command again"
_WELL = f"see whether that file system is well, {_AGAIN}"
_MENDS = {
    errno.ENOSPC: f"free room there or choose another folder, {_AGAIN}",
    errno.EDQUOT: f"free room in your quota or choose another folder, {_AGAIN}",
    errno.EACCES: "ask for the right to read or write it, or choose another folder",
    errno.EPERM: "ask for the right to read or write it, or choose another folder",
    errno.EROFS: "choose a folder that can be written",
    errno.ENOENT: "check the path",
    errno.EISDIR: f"move the folder of that name away, {_AGAIN}: a file belongs there",
    errno.ENOTDIR: f"look what lies there: a file, or a link that leads nowhere, is where a folder belongs; {_AGAIN}",
    errno.EEXIST: f"look what lies there, and move it away; {_AGAIN}",
    errno.ELOOP: f"mend the links there, which lead in a circle; {_AGAIN}",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: f"raise the limit of open files (`ulimit -n`), {_AGAIN}",
    errno.ENFILE: f"close files: this machine has no more, {_AGAIN}",
    errno.EFBIG: f"raise the limit of a file's size (`ulimit -f`), or take another file system; {_AGAIN}",
    errno.EAGAIN: f"raise the limit of processes (`ulimit -u`) or end some, {_AGAIN}",
    errno.EIO: _WELL, errno.ESTALE: _WELL, errno.ENXIO: _WELL, errno.ETIMEDOUT: _WELL, errno.ENOLCK: _WELL,
}
_ROOM = {errno.ENOSPC, errno.EDQUOT}
_WANT_OF_MEMORY = ("annot allocate memory", "out of memory", "can't allocate memory", "unable to mmap")
_WANT_OF_THREADS = ("can't start new thread", "Resource temporarily unavailable")


def os_parts(error: OSError) -> tuple[str, str, str, str]:
    """What, got, expected and mend of an error of the operating system."""
    return (str(error.filename or "a file"), error.strerror or str(error),
            "enough free space" if error.errno in _ROOM else "a path that can be used",
            _MENDS.get(error.errno, f"see the message, {_AGAIN}; --debug shows where it came from"))


def sentence(error: BaseException) -> str | None:
    """One sentence for an error of the operating system, or for want of memory or threads; None for any other."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, MemoryError) or any(words in text for words in _WANT_OF_MEMORY):
        return str(HpcsslError("memory", got=text or "no more of it", expected="room for what this recipe needs",
                               mend=f"give the process more (`--mem`, `ulimit -v`, a larger GPU), or take more "
                                    f"processes or a larger machine.accumulate; {_AGAIN}"))
    if any(words in text for words in _WANT_OF_THREADS):
        return str(HpcsslError("threads", got=text, expected="a process or thread more",
                               mend=f"raise the limits of processes and memory (`ulimit -u`, `ulimit -v`), {_AGAIN}"))
    if isinstance(error, OSError):
        what, got, expected, mend = os_parts(error)
        return str(HpcsslError(what, got=got, expected=expected, mend=mend))
    return None


def _rebuild(kind, what, got, expected, mend):
    return kind(what, got=got, expected=expected, mend=mend)


def nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean 'k'`` for a word that is close to a known one, else the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}" if close else "choose one of " + ", ".join(known)
