"""The values that a sampler chooses among, from words such as ``optim.lr=0.01..1.0:log`` and ``optim.batch=64,128``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hpcssl.errors import ConfigError
from slurm.sweep import grid

DIGITS = 4
"""Significant digits of a value of a range of real numbers: what is run can then be typed and compared."""
MAX_LISTED = 10_000
"""Most points of a space whose points are counted and listed. A larger one is treated as if it had no end."""


@dataclass(frozen=True)
class Axis:
    """One swept key.

    Attributes:
        key: The recipe key.
        text: Its values as they were typed.
        choices: The values of a list; empty for a range.
        low: Lower end of a range, included.
        high: Upper end of a range, included.
        is_int: Whether the values of a range are integers.
        log: Whether a range is sampled in its logarithm.
    """

    key: str
    text: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_int: bool = False
    log: bool = False

    @property
    def size(self) -> float:
        """Number of values; infinite for a range of real numbers."""
        if self.choices:
            return len(self.choices)
        return self.high - self.low + 1 if self.is_int else math.inf

    def ends(self) -> list[str]:
        """Return the values by which the axis is checked before a search: both ends of a range, or all of a list."""
        return list(self.choices) or [self.format(self.low), self.format(self.high)]

    def list_values(self) -> list[str]:
        """Return all values of an axis of a finite size."""
        return list(self.choices) or [str(number) for number in range(int(self.low), int(self.high) + 1)]

    def format(self, value: float | str) -> str:
        """Return a value as it is written in a recipe. Raises ``ValueError`` for one that is not in the list."""
        if self.choices:
            return self.choices[self.choices.index(str(value))]
        value = float(value)
        return str(int(value)) if self.is_int else repr(self.round(value))

    def round(self, value: float) -> float:
        """Return a real number with ``DIGITS`` significant digits, within the range."""
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)


def parse_space(
    words: Sequence[str], read_default: Callable[[Sequence[str], str], object]
) -> tuple[list[str], list[Axis]]:
    """Split the values of a command line into those that all trials share, and the axes of the search.

    Args:
        words: ``key=value``, ``key=value,value``, ``key=LOW..HIGH`` and ``key=LOW..HIGH:log``.
        read_default: From the shared values and a key to the recipe's own value, whose type says whether a range is one
            of integers; None for a key that has none.

    Returns:
        The shared values, and the axes.

    Raises:
        ConfigError: A range or list is malformed, a key is given twice, or no key has several values.
    """
    shared: list[str] = []
    chosen: dict[str, str] = {}
    for word, (key, text) in grid.split_words(words).items():
        is_single = "=" not in word or (not grid.is_like_range(text) and len(grid.split_values(key, text)) == 1)
        if is_single:
            shared.append(word)
        else:
            chosen[key] = text
    if not chosen:
        raise ConfigError(
            "sweep with --sampler",
            got="no key with several values",
            expected="at least one range or list",
            fix="write KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=VALUE,VALUE, as in optim.lr=0.01..1.0:log",
        )
    return shared, [_parse_axis(key, text, read_default(shared, key)) for key, text in chosen.items()]


def _parse_axis(key: str, text: str, default: object) -> Axis:
    if not grid.is_like_range(text):
        return Axis(key, text, tuple(grid.split_values(key, text)))
    what, match = f"sweep over {key}", grid.RANGE.fullmatch(text)
    if match is None:
        raise ConfigError(
            what, got=repr(text), expected="LOW..HIGH or LOW..HIGH:log, with two numbers", fix=f"write {key}=0.01..1.0"
        )
    low, high, log = float(match[1]), float(match[2]), bool(match[3])
    has_integers = all("." not in match[i] and "e" not in match[i].lower() for i in (1, 2))
    is_int = has_integers and not isinstance(default, float)
    if isinstance(default, int) and not isinstance(default, bool) and not has_integers:
        raise ConfigError(
            what, got=text, expected="whole numbers, since the key has one", fix="write both without a point"
        )
    if not math.isfinite(low) or not math.isfinite(high):
        raise ConfigError(what, got=text, expected="finite numbers", fix="write smaller numbers")
    if low >= high:
        got = f"{text}, an empty range" if low > high else f"{text}, a single value"
        fix = f"write {key}={match[2]}..{match[1]}{match[3] or ''}" if low > high else f"write {key}={match[1]}"
        raise ConfigError(what, got=got, expected="a range whose first number is below its last", fix=fix)
    if log and low <= 0:
        raise ConfigError(
            what,
            got=f"{text}, a logarithmic range from {match[1]}",
            expected="a range above 0",
            fix="raise its first number, or leave out :log",
        )
    return Axis(key, text, low=low, high=high, is_int=is_int, log=log)


def count_points(axes: Sequence[Axis]) -> float:
    """Return the number of points of a space; infinite if one axis is a range of real numbers."""
    return math.prod(axis.size for axis in axes)


def list_corners(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """Return the points by which a space is checked: each end with the first, and with the last, ends of all others.

    With up to three ranges these are all corners.
    """
    ends = {axis.key: axis.ends() for axis in axes}
    points: dict[tuple[str, ...], dict[str, str]] = {}
    for place in (0, -1):
        base = {key: values[place] for key, values in ends.items()}
        for key, values in ends.items():
            for value in values:
                point = base | {key: value}
                points[tuple(point.values())] = point
    return list(points.values())


def list_points(axes: Sequence[Axis]) -> Iterator[dict[str, str]]:
    """Yield all points of a finite space, the last key varying fastest."""
    for values in itertools.product(*(axis.list_values() for axis in axes)):
        yield dict(zip((axis.key for axis in axes), values, strict=True))


def name_trial(number: int, point: Mapping[str, str]) -> str:
    """Return the name of a trial's run folder, such as ``trial-0007_lr=0.03162``."""
    short = grid.shorten_keys(list(point))
    return "_".join([f"trial-{number:04d}", *(f"{short[key]}={grid.label(value)}" for key, value in point.items())])
