"""YAML plus ``key=value`` overrides into frozen dataclasses that refuse what they do not know.

OmegaConf reads, merges and types; this file adds the two things it lacks: an unknown key names its nearest
neighbour, and ``${oc.env:…}`` is refused, since the resolved recipe is written into the run folder and an
environment variable may hold a secret. It knows no option class: ``load`` takes the schema.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import typing
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpcssl.errors import ConfigError, nearest


def read_yaml(path: Path | str) -> dict:
    """A YAML file as plain nested dicts. Raises ``ConfigError``."""
    path = Path(path)
    try:
        loaded = OmegaConf.load(path)
    except (OSError, OmegaConfBaseException, ValueError, AssertionError) as error:
        raise ConfigError(f"recipe file {path}", got=_line(error), expected="a readable YAML file",
                          mend="mend the line that the message names") from error
    except Exception as error:  # PyYAML's own errors share no base with OmegaConf's
        if type(error).__module__.split(".")[0] != "yaml":
            raise
        raise ConfigError(f"recipe file {path}", got=_line(error), expected="valid YAML",
                          mend="mend the line that the message names") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"recipe file {path}", got="a list or nothing", expected="a mapping of sections",
                          mend="start from `hpcssl show msf_r50_ep200_128k`")
    return OmegaConf.to_container(loaded, resolve=False)


def read_overrides(overrides: list[str]) -> dict:
    """``["optim.lr=0.1"]`` as nested dicts; values are parsed as YAML. Raises ``ConfigError``."""
    for item in overrides:
        head, sign, _ = item.partition("=")
        if not sign or not head.strip() or head != head.strip() or any(c.isspace() for c in head):
            raise ConfigError(f"override {item!r}", got="no key=value", expected="a key, '=', a value, no spaces",
                              mend=f"write it as {head.strip() or 'key'}=VALUE")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)), resolve=False)
    except Exception as error:
        raise ConfigError("overrides", got=_line(error), expected="values that YAML can read",
                          mend="quote the value that the message names") from error


def merge(*layers: dict) -> dict:
    """Later layers win, key by key."""
    return OmegaConf.to_container(OmegaConf.merge(*[OmegaConf.create(x) for x in layers]), resolve=False)


def load(schema: type, *layers: dict, where: str = "recipe") -> Any:
    """An instance of the dataclass ``schema`` from layers of nested dicts, the last one winning.

    Raises ``ConfigError`` for an unknown key (naming the nearest), a value of another type, and interpolations.
    """
    merged = merge(*layers)
    _refuse_interpolation(merged, where)
    _refuse_unknown(schema, merged, where)
    try:
        return OmegaConf.to_object(OmegaConf.merge(_writable(OmegaConf.structured(schema)), OmegaConf.create(merged)))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a value"
        got = str(error).splitlines()[0]  # the lines after it speak of OmegaConf's own types
        if "ListConfig" in got:
            value = functools.reduce(lambda section, part: section[part], key.split("."), merged)
            several = isinstance(value, list)
            raise ConfigError(f"{where}, key {key}", got=repr(value), expected="one value" if several else "a list",
                              mend=f"{key}={value[0] if value else 'VALUE'}" if several else f"{key}=[{value}]"
                              ) from error
        raise ConfigError(f"{where}, key {key}", got=got, expected=f"a value of the type of {key}",
                          mend="`hpcssl show RECIPE` prints every key with a value of its type") from error


def as_dict(options: Any) -> dict:
    """A dataclass instance as nested plain dicts, ready for YAML or JSON."""
    return dataclasses.asdict(options)


def to_yaml(options: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(as_dict(options)))


def fingerprint(values: dict) -> str:
    """sha256 of nested values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def differing(ours: dict, theirs: dict, path: str = "") -> list[str]:
    """Dotted names of the leaves in which two nested dicts differ."""
    names = []
    for key in sorted(ours.keys() | theirs.keys()):
        mine, other, name = ours.get(key), theirs.get(key), f"{path}{key}"
        if isinstance(mine, dict) and isinstance(other, dict):
            names += differing(mine, other, name + ".")
        elif mine != other:
            names.append(name)
    return names


def _refuse_unknown(schema: type, values: dict, where: str, path: str = "") -> None:
    hints = {f.name: f for f in dataclasses.fields(schema)}
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"{where}, key {path}{key}", got=f"unknown key {key!r}",
                              expected="a key of " + (f"section {path[:-1]!r}" if path else "the recipe"),
                              mend=nearest(str(key), hints))
        inner = _schema_of(schema, key)
        if dataclasses.is_dataclass(inner):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}, key {path}{key}", got=repr(value), expected="a section of keys",
                                  mend=f"name a key of it, such as {path}{key}.{dataclasses.fields(inner)[0].name}=…")
            _refuse_unknown(inner, value, where, f"{path}{key}.")


def _writable(node: DictConfig) -> DictConfig:
    """Frozen dataclasses make read-only nodes, which OmegaConf then refuses to merge into below the first level."""
    OmegaConf.set_readonly(node, False)
    for name in node:
        inner = node._get_node(name)
        if isinstance(inner, DictConfig) and not inner._is_none():
            _writable(inner)
    return node


def _schema_of(schema: type, name: str) -> Any:
    return typing.get_type_hints(schema)[name]


def _refuse_interpolation(values: Any, where: str, path: str = "") -> None:
    if isinstance(values, dict):
        for key, value in values.items():
            _refuse_interpolation(value, where, f"{path}.{key}".lstrip("."))
    elif isinstance(values, list):
        for value in values:
            _refuse_interpolation(value, where, path)
    elif isinstance(values, str) and "${" in values:
        raise ConfigError(f"{where}, key {path}", got=f"the interpolation {values!r}", expected="a plain value",
                          mend="write the value itself: a resolved recipe is stored in the run folder, "
                               "where an environment variable's secret must not land")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
