"""JSON records: the checksum that each carries, and the types that its fields must have.

A file may be valid JSON and still be damaged: a flipped bit turns one digit into another. Records that a later step
relies on therefore hold a ``sha256`` of their other fields. ``hpcssl.files`` writes and reads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType, NoneType, UnionType
from typing import Any, get_args, get_origin

Fields = Mapping[str, Any]
"""Types of fields by name: ``int``, ``float`` (an int is one too), ``str``, ``bool``, ``dict``, ``list``, a union such
as ``str | None``, or ``list[X]`` and ``dict[str, X]`` of these."""
NO_FIELDS: Fields = MappingProxyType({})
CHECKSUM = "sha256"
"""Name of the field that holds the checksum."""
_INT_LIMIT = 2**63  # larger numbers fit no counter, and not every one of them can be converted to a float


class RecordError(ValueError):
    """A record that cannot be used; the text says what it has instead, such as ``no field 'step'``."""


def sha256_of(values: Mapping[str, Any]) -> str:
    """The sha256 of nested plain values; independent of the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Add the checksum to a record, which must be JSON. A checksum that it has already is replaced."""
    plain: dict[str, Any] = json.loads(json.dumps({key: value for key, value in record.items() if key != CHECKSUM}))
    return plain | {CHECKSUM: sha256_of(plain)}


def parse_record(text: str | bytes, required: Fields = NO_FIELDS, optional: Fields = NO_FIELDS) -> dict[str, Any]:
    """Read one JSON object.

    Args:
        text: The JSON text.
        required: Fields that it must have, with their types.
        optional: Types of fields that it may have.

    Returns:
        The object, without its checksum.

    Raises:
        RecordError: It is not a JSON object, its checksum is not that of its content, a field is missing, or a field
            has another type.
    """
    try:
        record = json.loads(text.decode(errors="replace") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise RecordError("text that is not JSON") from error
    if not isinstance(record, dict):
        raise RecordError(f"{_type_name(record)} instead of an object")
    expected = record.pop(CHECKSUM, None)  # records of other programs and of version 0.1.0 have none
    if expected is not None and expected != sha256_of(record):
        raise RecordError(f"other content than its {CHECKSUM}")
    for name in required:
        if name not in record:
            raise RecordError(f"no field {name!r}")
    for name, kind in {**optional, **required}.items():
        if name in record and not _has_type(record[name], kind):
            raise RecordError(f"{_type_name(record[name])} as field {name!r}")
    return record


def _has_type(value: object, kind: Any) -> bool:
    if kind is Any:
        return True
    if isinstance(kind, UnionType):
        return any(_has_type(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_has_type(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_has_type(item, get_args(kind)[1]) for item in value.values())
    if isinstance(value, int) and not isinstance(value, bool) and kind in (int, float):
        return abs(value) < _INT_LIMIT
    return type(value) is kind


def _type_name(value: object) -> str:
    names = {NoneType: "null", bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number out of range" if _is_huge(value) else "a number")


def _is_huge(value: object) -> bool:
    return isinstance(value, int) and abs(value) >= _INT_LIMIT
