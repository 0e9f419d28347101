"""Write the values of a recipe as YAML with comments."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SECTIONS = ("data", "views", "model", "mix", "method", "bank", "optim", "schedule", "evals", "machine")
"""The order of the sections."""
_WIDTH = 120  # of a line; a longer comment stands above its value


@dataclass(frozen=True)
class Value:
    """One value of a recipe.

    Attributes:
        key: Dotted key.
        value: A plain value; a dict for a section inside a section.
        reason: Why, in a few words; empty where the key says it.
    """

    key: str
    value: Any
    reason: str = ""


def write_yaml(head: Iterable[str], base: str, values: Iterable[Value]) -> str:
    """Return a recipe file.

    Args:
        head: Lines of the comment at the top.
        base: Packaged recipe that it is based on.
        values: The values that differ from it.
    """
    lines = [*(f"# {line}" for line in head), f"base: {base}"]
    by_section: dict[str, list[Value]] = {name: [] for name in SECTIONS}
    for value in values:
        by_section[value.key.partition(".")[0]].append(value)
    for section, members in by_section.items():
        if members and members[0].key == section:  # the whole section
            lines += _with_comment(f"{section}: {flow(members[0].value)}", members[0].reason)
        elif members:
            lines.append(f"{section}:")
            for value in members:
                name = value.key.partition(".")[2]
                lines += _with_comment(f"  {name}: {flow(value.value)}", value.reason)
    return "\n".join(lines) + "\n"


def _with_comment(text: str, reason: str) -> list[str]:
    if not reason:
        return [text]
    line = f"{text}  # {reason}"
    if len(line) <= _WIDTH:
        return [line]
    indent = " " * (len(text) - len(text.lstrip()))
    return [f"{indent}# {reason}", text]


def flow(value: Any) -> str:
    """Return a plain value as YAML in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str) and not value.replace("_", "").isalnum():
        return json.dumps(value, ensure_ascii=False)  # YAML reads JSON strings
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
