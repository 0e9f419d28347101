"""How many files this process may hold open."""

from __future__ import annotations

import contextlib
import resource

UNLIMITED = 65_536
"""Taken for the limit where there is none: more files than a run has any use for."""


def raise_limit() -> int:
    """Raise this process's limit of open files as far as it is allowed without privileges.

    Many systems have a soft limit of 1,024, for programs that use ``select``, below a much higher hard limit. Rank 0
    alone needs two sockets per rank.

    Returns:
        The limit that now holds.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses an unlimited number
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return limit()


def limit() -> int:
    """The number of files that this process may hold open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft
