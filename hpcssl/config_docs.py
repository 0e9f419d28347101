"""Documentation of option classes: the meaning of each field, from the ``Attributes:`` section of the docstring.

``hpcssl show RECIPE --comments`` and the reference of recipe keys print it, so that a key's meaning is written once,
beside the key.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf

_ENTRY = re.compile(r"(\w+): (.+)")
_COMMENT_WIDTH = 100


def field_docs(cls: type) -> dict[str, str]:
    """Return the meaning of every field of a dataclass, in the order of the fields.

    Args:
        cls: A dataclass whose docstring, or that of a base class, has an ``Attributes:`` section in Google style with
            one entry ``name: meaning`` per field. An entry continues in lines that are indented further.

    Raises:
        TypeError: ``cls`` is not a dataclass.
        ValueError: A field has no entry.
    """
    entries: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        entries |= _attributes(base.__dict__.get("__doc__") or "")
    names = [field.name for field in dataclasses.fields(cls)]
    missing = [name for name in names if name not in entries]
    if missing:
        raise ValueError(f"{cls.__module__}.{cls.__qualname__}: no Attributes entry for {', '.join(missing)}")
    return {name: entries[name] for name in names}


def _attributes(docstring: str) -> dict[str, str]:
    """Parse the ``Attributes:`` section of a docstring into names and meanings."""
    lines = inspect.cleandoc(docstring).splitlines()
    if "Attributes:" not in lines:
        return {}
    entries: dict[str, str] = {}
    name, indent = "", 0
    for line in lines[lines.index("Attributes:") + 1 :]:
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        if depth == 0:
            break  # the next section
        indent = indent or depth
        entry = _ENTRY.fullmatch(line.strip()) if depth == indent else None
        if entry:
            name = entry[1]
            entries[name] = entry[2]
        elif name:
            entries[name] += f" {line.strip()}"
    return entries


def commented_yaml(options: Any, schemas: Mapping[str, type] | None = None) -> str:
    """Convert an instance of an option class to YAML with the meaning of each key as a comment above it.

    Args:
        options: The instance. Fields that are option classes themselves become sections.
        schemas: Option classes of sections that the instance holds as plain dicts, by dotted key.

    Raises:
        ValueError: A field has no entry in its class's ``Attributes:`` section.
    """
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return "\n".join(_lines(values, field_docs(type(options)), schemas or {}, "", 0)) + "\n"


def _lines(
    values: Mapping[str, Any], docs: Mapping[str, str], schemas: Mapping[str, type], path: str, depth: int
) -> Iterator[str]:
    indent = "  " * depth
    for name, value in values.items():
        key = f"{path}{name}"
        if depth == 0 and name != next(iter(values)):
            yield ""
        if name in docs:
            yield from textwrap.wrap(
                docs[name].replace("``", "`"),
                _COMMENT_WIDTH,
                initial_indent=f"{indent}# ",
                subsequent_indent=f"{indent}# ",
            )
        section, schema = _as_section(value, schemas.get(key))
        if section:
            yield f"{indent}{name}:"
            inner = {} if schema is None else field_docs(schema)
            types = {} if schema is None else _option_classes(schema, f"{key}.")
            yield from _lines(section, inner, {**types, **schemas}, f"{key}.", depth + 1)
        else:
            plain = OmegaConf.to_yaml(OmegaConf.create({name: value}))
            yield textwrap.indent(plain.rstrip("\n"), indent)


def _as_section(value: Any, schema: type | None) -> tuple[Mapping[str, Any] | None, type | None]:
    """Return the keys of a value that is a section and its option class; (None, None) for a single value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, type(value)
    if schema is not None and isinstance(value, Mapping):
        return value, schema
    return None, None


def _option_classes(schema: type, path: str) -> dict[str, type]:
    """Return the fields of an option class that are option classes themselves, by dotted key."""
    hints = typing.get_type_hints(schema)
    return {f"{path}{name}": hint for name, hint in hints.items() if _is_option_class(hint)}


def _is_option_class(hint: Any) -> typing.TypeGuard[type]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)
