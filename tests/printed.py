"""What a command printed, as parts that tests can compare: wording may improve without breaking a test."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PARTS = r"(?P<what>.+?): (?P<got>.+) \(expected (?P<expected>.+)\)\.(?: Fix: (?P<fix>.+))?$"
_LINE = re.compile(rf"^(?P<program>hpcssl(?:-shard|-submit)?): {_PARTS}", re.M)
_RAISED = re.compile(rf"^hpcssl\.errors\.(?P<program>\w+): {_PARTS}", re.M)


@dataclass(frozen=True)
class PrintedError:
    """The one line that a command prints for an error.

    Attributes:
        program: the command, such as ``hpcssl-submit``; for ``raised_errors``, the class of the error.
        what: the key, file or thing that is wrong.
        got: what was found.
        expected: what would be right.
        fix: what to do; empty where nothing needs to be done.
    """

    program: str
    what: str
    got: str
    expected: str
    fix: str


def printed_error(text: str) -> PrintedError:
    """Read the error line in the output of a command.

    Args:
        text: standard error, or a log that contains it.

    Returns:
        The parts of the line.

    Raises:
        AssertionError: The text has no such line, or more than one.
    """
    lines = list(_LINE.finditer(text))
    assert len(lines) == 1, f"{len(lines)} error lines instead of one in:\n{text}"
    return PrintedError(**{name: value or "" for name, value in lines[0].groupdict().items()})


def raised_errors(text: str) -> list[PrintedError]:
    """Read the errors of this project at the ends of the tracebacks in a log, in their order.

    Args:
        text: A log, such as that of several ranks.
    """
    return [
        PrintedError(**{name: value or "" for name, value in line.groupdict().items()})
        for line in _RAISED.finditer(text)
    ]


def numbers_in(text: str) -> list[float]:
    """The numbers in a message, in their order: a test can compare them without pinning the words between them.

    Digits in absolute paths and inside of words do not count.
    """
    text = re.sub(r"(?<!\S)/\S*", "", text)
    return [float(number) for number in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w])", text)]
