"""The points of a sweep, from words such as ``optim.lr=0.03,0.1`` and ``seed=0..2``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hpcssl import config
from hpcssl.errors import ConfigError

MAX_POINTS = 1000
"""Most points of one sweep. More than that is a mistyped range."""
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(:log)?")
"""A range of numbers, of which only one of integers without ``:log`` is swept without a sampler."""
_INTEGERS = re.compile(r"(-?\d+)\.\.(-?\d+)")


@dataclass(frozen=True)
class Point:
    """One run of a sweep or a table.

    Attributes:
        name: Name of its run folder, which shows its values: ``lr=0.03_seed=0``.
        values: The recipe values that it does not share with the other points, as ``key=value``.
    """

    name: str
    values: tuple[str, ...]


def parse_grid(words: Sequence[str]) -> tuple[list[str], list[Point]]:
    """Split the values of a command line into those that all points share, and the points.

    A key with one value is shared. ``a,b`` are two values, and ``0..2`` is 0, 1, 2. Commas in brackets or quotes
    belong to a value. The last key varies fastest.

    Args:
        words: ``key=value``, ``key=value,value`` and ``key=FIRST..LAST``.

    Returns:
        The shared values, and the points.

    Raises:
        ConfigError: A range is empty, a key or value is given twice, no key has several values, or there are more than
            ``MAX_POINTS`` points.
    """
    shared: list[str] = []
    axes: dict[str, list[str]] = {}
    for word, (key, text) in split_words(words).items():
        # a word without '=' is refused where values are read
        values = _parse_values(key, text) if "=" in word else [word]
        if len(values) == 1:
            shared.append(f"{key}={values[0]}" if "=" in word else word)
        else:
            axes[key] = values
    count = 1
    for values in axes.values():
        count *= len(values)
    if not axes or count > MAX_POINTS:
        raise ConfigError(
            "sweep",
            got=f"{count:,} points" if axes else "no key with several values",
            expected=f"2 to {MAX_POINTS} points",
            fix="write KEY=VALUE,VALUE or KEY=FIRST..LAST, as in optim.lr=0.03,0.1 seed=0..2",
        )
    return shared, list(_make_points(axes))


def _make_points(axes: dict[str, list[str]]) -> list[Point]:
    labels = {key: _label_values(values) for key, values in axes.items()}
    short = shorten_keys(list(axes))
    points = []
    for choice in itertools.product(*(range(len(values)) for values in axes.values())):
        chosen = dict(zip(axes, choice, strict=True))
        name = "_".join(f"{short[key]}={labels[key][i]}" for key, i in chosen.items())
        points.append(Point(name, tuple(f"{key}={axes[key][i]}" for key, i in chosen.items())))
    return points


def split_words(words: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return key and value of each ``key=value``, by the whole word. The value of a word without ``=`` is empty.

    Raises:
        ConfigError: A key is given twice.
    """
    split: dict[str, tuple[str, str]] = {}
    seen: set[str] = set()
    for word in words:
        key, _, text = word.partition("=")
        if key in seen:
            raise ConfigError(
                f"sweep over {key}", got="the key twice", expected="each key once", fix=f"write {key}=VALUE,VALUE"
            )
        seen.add(key)
        split[word] = key, text
    return split


def is_like_range(text: str) -> bool:
    """Return whether a value begins like a range of numbers. A path such as ``../x`` does not."""
    return re.match(rf"{_NUMBER}\.\.(?!/)", text) is not None


def _parse_values(key: str, text: str) -> list[str]:
    if match := _INTEGERS.fullmatch(text):
        first, last = int(match[1]), int(match[2])
        if first > last:
            raise ConfigError(
                f"sweep over {key}",
                got=f"{text}, an empty range",
                expected="a range whose first number is not above its last",
                fix=f"write {key}={last}..{first}",
            )
        if last - first >= MAX_POINTS:
            raise ConfigError(
                f"sweep over {key}",
                got=f"{text}, {last - first + 1:,} values",
                expected=f"at most {MAX_POINTS} points",
                fix="write a shorter range",
            )
        return [str(number) for number in range(first, last + 1)]
    if RANGE.fullmatch(text):
        raise ConfigError(
            f"sweep over {key}",
            got=f"{text}, a range of real numbers or with :log",
            expected="whole numbers, or a sampler that chooses values",
            fix="write the values with commas, or add --sampler tpe --trials 20",
        )
    return split_values(key, text)


def split_values(key: str, text: str) -> list[str]:
    """Split ``value,value`` at the commas outside brackets and quotes.

    Raises:
        ConfigError: A value is empty, or two are the same.
    """
    values = _split_at_commas(text)
    if "" in values:
        raise ConfigError(
            f"sweep over {key}",
            got=f"{text!r}, with an empty value",
            expected="a value before and after each comma",
            fix=f"write {key}=VALUE,VALUE; for an empty value write {key}=''",
        )
    parsed = [config.read_overrides([f"{key}={value}"]) for value in values]
    for i, value in enumerate(parsed):
        if value in parsed[:i]:
            raise ConfigError(
                f"sweep over {key}",
                got=f"{values[parsed.index(value)]} and {values[i]}, which are the same value",
                expected="each value once",
                fix="leave out one of them",
            )
    return values


def _split_at_commas(text: str) -> list[str]:
    """Split at commas outside brackets and quotes. One that is left open is refused where values are read."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def shorten_keys(keys: list[str]) -> dict[str, str]:
    """Return the shortest ending of each dotted key that no other key has: ``lr`` for ``optim.lr``."""
    short = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        others = [other for other in keys if other != key]
        short[key] = next(e for e in endings if not any(f".{other}".endswith(f".{e}") for other in others) or e == key)
    return short


def label(value: str) -> str:
    """Return a value as a part of a folder name."""
    return re.sub(r"[^\w.+-]+", "-", value, flags=re.ASCII).strip("-") or "empty"


def _label_values(values: list[str]) -> list[str]:
    """The values of one key as parts of folder names, all different."""
    labels = [label(value) for value in values]
    if len(set(labels)) == len(labels):
        return labels
    return [f"{one}-{number}" for number, one in enumerate(labels, 1)]
