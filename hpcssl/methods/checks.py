"""Checks that the options of several methods share."""

from __future__ import annotations

from hpcssl.errors import ConfigError


def check_positive(key: str, value: float, *, default: float) -> None:
    """Raise ``ConfigError`` unless the value of a recipe key is above 0. ``default`` is suggested."""
    if not value > 0:
        raise ConfigError(key, got=value, expected="a number above 0", fix=f"set {key}={default:g}")


def check_at_least(key: str, value: int, least: int) -> None:
    """Raise ``ConfigError`` unless the value of a recipe key is ``least`` or more."""
    if value < least:
        raise ConfigError(key, got=value, expected=f"{least} or more", fix=f"set {key}={least} or more")
