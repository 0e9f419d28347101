"""Whether a loader decodes with the native decoder, which is tried against the plain one before."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence

from hpcssl.data.native import library
from hpcssl.data.native.library import NOT_BUILT, NativeError, open_library
from hpcssl.data.native.trial import run_trial
from hpcssl.errors import ConfigError
from hpcssl.views.augment import ViewSpec

LOG = logging.getLogger("hpcssl")
SETTINGS = ("auto", "plain", "native")
"""Values of the recipe key ``machine.decoder``."""


def can_cut(view: ViewSpec) -> bool:
    """Whether the library can make this view: a random crop with an antialiased resize, of the first modality."""
    return view.augment.crop == "random" and view.augment.library == "torchvision" and not view.second


@functools.cache
def find_fault() -> str:
    """Load and try the library.

    Returns:
        Why it cannot be used, as a clause; empty if it can.
    """
    try:
        run_trial(open_library(library.FILE))
    except NativeError as error:
        level = logging.DEBUG if str(error) == NOT_BUILT else logging.WARNING
        LOG.log(level, "JPEGs are decoded without the native decoder, more slowly: %s.", error)
        return str(error)
    return ""


def select_library(setting: str, views: Sequence[ViewSpec]) -> ctypes.CDLL | None:
    """Choose the decoder of a loader.

    Args:
        setting: One of ``SETTINGS``.
        views: The views that the loader cuts.

    Returns:
        The library; None where all images are decoded without it: with ``plain``, where some view needs the whole
        image, and with ``auto`` where the library cannot be used.

    Raises:
        ConfigError: For ``native``, where the library cannot be used.
    """
    if setting == "plain" or not all(map(can_cut, views)):
        return None
    fault = find_fault()
    if not fault:
        return open_library(library.FILE)
    if setting == "native":
        raise ConfigError(
            "machine.decoder=native",
            got=f"the native decoder: {fault}",
            expected="a native decoder that works",
            fix="install a C compiler and the headers of libjpeg-turbo (libjpeg-turbo8-dev, libjpeg62-turbo-dev or "
            "libjpeg-turbo-devel) and then hpcssl again, or set machine.decoder=auto",
        )
    return None
