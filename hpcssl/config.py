"""YAML files and ``key=value`` overrides, merged into frozen dataclasses.

OmegaConf reads, merges and converts types. This module adds two checks: misspelled keys are rejected with a
suggestion, and so are interpolations such as ``${oc.env:…}``, since the resolved recipe is written into the run folder
and an environment variable may hold a secret. The module knows no option class: ``load`` takes the schema.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpcssl.errors import ConfigError, suggest
from hpcssl.storage import records

Values = dict[str, Any]
"""Nested plain values, as in a YAML file."""
Overrides = Sequence[str] | Mapping[str, Any]
"""Changes of values: items such as ``optim.lr=0.1``, or nested dicts of plain values."""


def read_yaml(path: Path | str) -> Values:
    """Read a YAML file as nested plain dicts.

    Raises:
        ConfigError: If it cannot be read, or is not a YAML mapping.
    """
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # PyYAML's own errors share no base with OmegaConf's
        is_yaml = type(error).__module__.split(".")[0] == "yaml"
        if not (is_yaml or isinstance(error, OSError | OmegaConfBaseException | ValueError | AssertionError)):
            raise
        raise ConfigError(
            f"recipe file {path}",
            got=_one_line(error),
            expected="valid YAML" if is_yaml else "a readable YAML file",
            fix="correct the line that the message names",
        ) from error
    if not isinstance(loaded, DictConfig) or not loaded:
        raise ConfigError(
            f"recipe file {path}",
            got="a list or a word" if loaded else "an empty file",
            expected="a mapping of sections",
            fix="start from `hpcssl show msf_r50_ep200_128k`",
        )
    return _plain(loaded)


def read_overrides(overrides: Overrides) -> Values:
    """Convert overrides such as ``["optim.lr=0.1"]`` to nested dicts. Values are parsed as YAML.

    Nested dicts are returned as a copy.

    Raises:
        ConfigError: If an item is not ``key=value``, or a value is not valid YAML.
    """
    if isinstance(overrides, Mapping):
        return merge(overrides)
    for item in overrides:
        head, sign, _ = item.partition("=")
        if not sign or not head.strip() or head != head.strip() or any(c.isspace() for c in head):
            raise ConfigError(
                f"override {item!r}",
                got="no key=value",
                expected="a key, '=' and a value, without spaces before the value",
                fix=f"write it as {head.strip() or 'key'}=VALUE",
            )
    try:
        return _plain(OmegaConf.from_dotlist(list(overrides)))
    except Exception as error:
        raise ConfigError(
            "overrides",
            got=_one_line(error),
            expected="valid YAML values",
            fix="quote the value that the message names",
        ) from error


def merge(*layers: Mapping[str, Any]) -> Values:
    """Merge nested dicts key by key into a copy; later layers win. Sequences are replaced as a whole."""
    merged: Values = {}
    for layer in layers:
        for key, value in layer.items():
            before = [merged[key]] if isinstance(merged.get(key), dict) else []
            merged[key] = merge(*before, value) if isinstance(value, Mapping) else copy.deepcopy(value)
    return merged


@dataclass(frozen=True)
class Renames:
    """Former names of keys and of values.

    Attributes:
        keys: Former dotted key (``section.name``) to its current dotted key.
        values: Current dotted key to its former values, each with its current name.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def check(self, values: Mapping[str, Any], where: str, path: str = "") -> None:
        """Refuse former names in nested values.

        Args:
            values: Nested values of a recipe or of overrides.
            where: Where they come from, for the message.
            path: Dotted path of ``values``, with a final dot.

        Raises:
            ConfigError: For the first former name, with the current one.
        """
        for name, value in values.items():
            key = f"{path}{name}"
            if key in self.keys:
                current = self.keys[key]
                shown = "VALUE" if isinstance(value, Mapping) else value
                raise ConfigError(
                    f"{where}, key {key}",
                    got="a retired name",
                    expected=current,
                    fix=f"write {current}={self.values.get(current, {}).get(str(value), shown)}",
                )
            if isinstance(value, Mapping):
                self.check(value, where, f"{key}.")
            elif str(value) in self.values.get(key, {}):
                current = self.values[key][str(value)]
                raise ConfigError(
                    f"{where}, key {key}",
                    got=f"{value!r}, a retired name",
                    expected=repr(current),
                    fix=f"write {key}={current}",
                )


def load(schema: type, *layers: Mapping[str, Any], where: str = "recipe", renames: Renames | None = None) -> Any:
    """Build an instance of a dataclass from layers of nested dicts.

    Args:
        schema: The dataclass; its fields may be dataclasses.
        layers: Nested dicts; later ones win.
        where: Where the values come from, for messages.
        renames: Former names of keys and values, which are refused with the current name.

    Raises:
        ConfigError: For a misspelled or retired key, a value of the wrong type, or an interpolation.
    """
    merged = merge(*layers)
    _refuse_replaced(merged, where)
    if renames is not None:
        renames.check(merged, where)
    _refuse_unknown(schema, merged, where)
    try:
        return OmegaConf.to_object(OmegaConf.merge(_structure(schema), OmegaConf.create(merged)))
    except OmegaConfBaseException as error:
        raise _type_error(error, merged, where) from error


def _type_error(error: OmegaConfBaseException, values: Values, where: str) -> ConfigError:
    """The error for a value of the wrong type."""
    key = str(getattr(error, "full_key", None) or "a value")
    message = str(error).splitlines()[0]  # later lines describe OmegaConf's own types
    if "ListConfig" not in message:
        return ConfigError(
            f"{where}, key {key}",
            got=message,
            expected=f"a value of the type of {key}",
            fix="`hpcssl show RECIPE` prints every key with a value of its type",
        )
    value = lookup(values, key)
    is_list, first = isinstance(value, list), value[0] if isinstance(value, list) and value else "VALUE"
    expected, fix = ("one value", f"{key}={first}") if is_list else ("a list", f"{key}=[{value}]")
    return ConfigError(f"{where}, key {key}", got=repr(value), expected=expected, fix=fix)


def lookup(values: Any, key: str) -> Any:
    """The value of a dotted key in nested dicts or dataclass instances; None if it does not exist."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else getattr(values, name, None)
    return values


def nest(key: str, value: Any) -> Values:
    """Nested dicts in which a dotted key has this value."""
    nested: Any = value
    for name in reversed(key.split(".")):
        nested = {name: nested}
    return cast("Values", nested)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Values:
    """Nested values under dotted keys; lists and empty dicts stay whole."""
    flat: Values = {}
    for key, value in values.items():
        inside = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if inside else {prefix + key: value}
    return flat


def as_dict(options: Any) -> Values:
    """Convert a dataclass instance to nested plain dicts, for YAML or JSON."""
    return dataclasses.asdict(options)


def to_yaml(options: Any) -> str:
    """Convert a dataclass instance, or nested plain values, to YAML."""
    values = dict(options) if isinstance(options, Mapping) else as_dict(options)
    return OmegaConf.to_yaml(OmegaConf.create(values))


def fingerprint(values: Mapping[str, Any]) -> str:
    """The sha256 of nested values; independent of the order of keys."""
    return records.sha256_of(values)


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str = "") -> list[str]:
    """Dotted keys in which two nested dicts differ."""
    names = []
    for key in sorted(ours.keys() | theirs.keys()):
        mine, other, name = ours.get(key), theirs.get(key), f"{path}{key}"
        if isinstance(mine, dict) and isinstance(other, dict):
            names += differing(mine, other, name + ".")
        elif mine != other:
            names.append(name)
    return names


def _refuse_unknown(schema: type, values: Mapping[str, Any], where: str, path: str = "") -> None:
    known = {f.name: f for f in dataclasses.fields(schema)}
    types = typing.get_type_hints(schema)
    for key, value in values.items():
        if key not in known:
            raise ConfigError(
                f"{where}, key {path}{key}",
                got=f"unknown key {key!r}",
                expected=f"a key of section {path[:-1]!r}" if path else "a known key",
                fix=suggest(str(key), known),
            )
        section = types[key]
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{where}, key {path}{key}",
                    got=repr(value),
                    expected="a section of keys",
                    fix=f"set a key of the section, such as {path}{key}.{dataclasses.fields(section)[0].name}=…",
                )
            _refuse_unknown(section, value, where, f"{path}{key}.")


@functools.cache
def _structure(schema: type) -> DictConfig:
    """The defaults and types of a dataclass as OmegaConf has them, which takes it tens of milliseconds. Not changed."""
    return _writable(OmegaConf.structured(schema))


def _writable(node: DictConfig) -> DictConfig:
    """Make a node and its sections writable. Those of frozen dataclasses are not, and could not be merged into."""
    OmegaConf.set_readonly(node, False)
    for name in node:
        inner = node._get_node(name)
        if isinstance(inner, DictConfig) and not inner._is_none():
            _writable(inner)
    return node


def _refuse_replaced(values: Any, where: str, path: str = "") -> None:
    """Refuse values that OmegaConf replaces by others."""
    if isinstance(values, dict):
        for key, value in values.items():
            _refuse_replaced(value, where, f"{path}.{key}".lstrip("."))
    elif isinstance(values, list):
        for value in values:
            _refuse_replaced(value, where, path)
    elif values == MISSING or (isinstance(values, str) and "${" in values):
        raise ConfigError(
            f"{where}, key {path}",
            got=f"{values!r}, which OmegaConf would replace",
            expected="a plain value",
            fix="write the value itself, or leave out the key for its default; the recipe is stored in the run folder, "
            "where the secrets of environment variables must not be",
        )


def _plain(config: Any) -> Values:
    return typing.cast(Values, OmegaConf.to_container(config, resolve=False))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
