"""Exceptions with a user-facing message, and the exit codes of the commands.

Every error that a user can cause carries four parts: what was checked, what value was got, what was expected, and how
to fix it. They are printed as one line: ``what: got (expected ...). Fix: ...``. Tests and callers read the parts as
attributes, so that the wording can change.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Callable, Iterable
from typing import Any

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 0, 1, 2, 75
"""Exit codes: 0 done; 1 failed; 2 wrong usage; 75 stopped early, and the same command resumes."""


class HpcsslError(Exception):
    """Base class of all errors that are shown to the user as one line.

    Args:
        what: The subject: a recipe key, an option, a file, a folder or a rank.
        got: The value or the condition that was found.
        expected: What would have been accepted.
        fix: What the user can do, without a final period; empty where there is nothing to do.

    Attributes:
        exit_code: Exit code of a command that ends with this error.
    """

    exit_code = EXIT_FAILED
    _classes: dict[str, type[HpcsslError]] = {}  # noqa: RUF012 - one registry for the whole hierarchy

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        HpcsslError._classes[f"{cls.__module__}.{cls.__qualname__}"] = cls

    def __init__(self, what: str, *, got: object, expected: object, fix: str = ""):
        self.what, self.got, self.expected, self.fix = what, str(got), str(expected), fix
        super().__init__(self.what, self.got, self.expected, self.fix)

    def __str__(self) -> str:
        fix = f" Fix: {self.fix}" if self.fix else ""
        return f"{self.what}: {self.got} (expected {self.expected}).{fix}"

    def __reduce__(self) -> tuple[Callable[..., HpcsslError], tuple[Any, ...]]:
        return _rebuild, (type(self), self.what, self.got, self.expected, self.fix)

    def to_json(self) -> list[str]:
        """The error as a JSON list: class name, what, got, expected, fix. ``from_json`` restores it."""
        return [f"{type(self).__module__}.{type(self).__qualname__}", self.what, self.got, self.expected, self.fix]

    @staticmethod
    def from_json(parts: list[str]) -> HpcsslError:
        """Restore an error from ``to_json``, in another process.

        A class that this process has not imported becomes a plain ``HpcsslError`` with the same parts.
        """
        name, what, got, expected, fix = parts
        return HpcsslError._classes.get(name, HpcsslError)(what, got=got, expected=expected, fix=fix)


class ConfigError(HpcsslError):
    """Invalid recipe, override or command line."""

    exit_code = EXIT_USAGE


class DataError(HpcsslError):
    """Missing, damaged or unsuitable images, shards or labels."""


class WorldError(HpcsslError):
    """Ranks, devices or a world size that cannot work, or ranks that disagree."""


class RankLost(WorldError):
    """This rank cannot go on because of another rank.

    Attributes:
        cause: How the other rank ended: ``killed`` if it died without a message, else the cause that it reported.
        is_consequence: Whether it is not known what happened there; then a record from there explains more.
    """

    cause = "error"
    is_consequence = True


class ResumeError(HpcsslError):
    """A run folder that cannot be continued."""


class Stopped(HpcsslError):
    """The command stopped early on request (preemption, time limit, keyboard). It can be resumed."""

    exit_code = EXIT_STOPPED


class TrainingStopped(Stopped):
    """A training has stopped early on request, after it had saved its state and logged so."""


class EvalError(HpcsslError):
    """Weights, features or labels that an evaluation cannot use."""


class SubmitError(HpcsslError):
    """SLURM, or the local scheduler that replaces it, refused or lost a job."""


_RERUN = "then run the same command again"
_CHECK_DISK = f"check that the file system works, {_RERUN}"
_FIXES = {
    errno.ENOSPC: f"free space there or choose another folder, {_RERUN}",
    errno.EDQUOT: f"free space in your quota or choose another folder, {_RERUN}",
    errno.EACCES: "get permission to read or write it, or choose another folder",
    errno.EPERM: "get permission to read or write it, or choose another folder",
    errno.EROFS: "choose a writable folder",
    errno.ENOENT: "check the path",
    errno.EISDIR: f"a folder exists where a file is expected: move it away, {_RERUN}",
    errno.ENOTDIR: f"a file or broken symlink exists where a folder is expected: move it away, {_RERUN}",
    errno.EEXIST: f"something exists at this path: move it away, {_RERUN}",
    errno.ELOOP: f"remove the cycle of symbolic links, {_RERUN}",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: f"raise the limit of open files (`ulimit -n`), {_RERUN}",
    errno.ENFILE: f"close files: this machine allows no more open ones, {_RERUN}",
    errno.EFBIG: f"raise the limit of a file's size (`ulimit -f`) or use another file system, {_RERUN}",
    errno.EAGAIN: f"raise the limit of processes (`ulimit -u`) or end some, {_RERUN}",
    errno.EIO: _CHECK_DISK,
    errno.ESTALE: f"check the file system, and leave a folder in its place while a process uses it; {_RERUN}",
    errno.ENXIO: _CHECK_DISK,
    errno.ETIMEDOUT: _CHECK_DISK,
    errno.ENOLCK: _CHECK_DISK,
}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NO_MEMORY_PHRASES = ("annot allocate memory", "out of memory", "can't allocate memory", "unable to mmap")
_NO_THREAD_PHRASES = ("can't start new thread", "Resource temporarily unavailable")


def os_error_parts(error: OSError) -> tuple[str, str, str, str]:
    """The parts (what, got, expected, fix) of an ``HpcsslError`` for an error of the operating system."""
    return (
        str(error.filename or "a file"),
        error.strerror or str(error),
        "enough free space" if error.errno in _NO_SPACE else "a usable path",
        _FIXES.get(error.errno or 0, f"read the message, {_RERUN}; --debug shows where it came from"),
    )


def describe_error(error: BaseException) -> str | None:
    """One line for an error of the operating system, or for a lack of memory or threads.

    Returns:
        The line in the format of ``HpcsslError``, or None for any other error.
    """
    text = " ".join(str(error).split())[:300]
    if isinstance(error, MemoryError) or any(phrase in text for phrase in _NO_MEMORY_PHRASES):
        return str(
            HpcsslError(
                "memory",
                got=text or "allocation failed",
                expected="enough memory for this recipe",
                fix=f"give the process more (`--mem`, `ulimit -v`, a larger GPU), use more processes, or raise "
                f"machine.accumulation_steps; {_RERUN}",
            )
        )
    if any(phrase in text for phrase in _NO_THREAD_PHRASES):
        return str(
            HpcsslError(
                "threads",
                got=text,
                expected="one more process or thread",
                fix=f"raise the limits of processes and memory (`ulimit -u`, `ulimit -v`), {_RERUN}",
            )
        )
    if isinstance(error, OSError):
        what, got, expected, fix = os_error_parts(error)
        return str(HpcsslError(what, got=got, expected=expected, fix=fix))
    return None


def format_bytes(count: float) -> str:
    """A number of bytes for a message: in GB, below 1 GB in MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def suggest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelled name: ``did you mean 'NAME'?``, or the list of known names if none is similar."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "choose one of " + ", ".join(known)


def require_choice(what: str, value: object, known: Iterable[str], expected: str | None = None) -> None:
    """Raise an error unless ``value`` is one of ``known``.

    Args:
        what: The recipe key or option, for the message.
        value: The value to check.
        known: The allowed values.
        expected: Text for the message; by default the list of allowed values.

    Raises:
        ConfigError: With a suggestion of the most similar allowed value.
    """
    known = list(known)
    if value not in known:
        raise ConfigError(
            what, got=repr(value), expected=expected or "one of " + ", ".join(known), fix=suggest(str(value), known)
        )


def _rebuild(kind: type[HpcsslError], what: str, got: str, expected: str, fix: str) -> HpcsslError:
    return kind(what, got=got, expected=expected, fix=fix)
