"""Images of a source that have no features: the list of them, and how many may be damaged."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path

from hpcssl import files
from hpcssl.errors import DataError
from hpcssl.inference.embeddings import Embeddings, companion
from hpcssl.inference.images import ImageSource

LOG = logging.getLogger("hpcssl")
LEFT_OUT = ".left_out.csv"
"""Suffix of the list, after the full name of the file of features."""
_SHOWN = 8  # damaged images that a message names


def check_damaged(result: Embeddings, source: ImageSource, allowed: int, *, keeps_parts: bool = False) -> None:
    """Warn of images without features, and refuse more damaged ones than allowed.

    Args:
        result: The features.
        source: The images.
        allowed: Number of images that may be damaged.
        keeps_parts: Whether the features that are finished are kept for the next command.

    Raises:
        DataError: More images are damaged, or all of them.
    """
    damaged = result.damaged
    names = "; ".join(f"{key}: {reason}" for key, reason in damaged[:_SHOWN])
    names += f"; and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
    what = f"images of {source.root or 'the list'}"
    if len(damaged) > allowed:
        raise DataError(
            what,
            got=f"{len(damaged)} that cannot be decoded ({names})",
            expected=f"at most {allowed}" if allowed else "every image to decode",
            fix=f"leave them out with --skip-bad {len(damaged)} (in Python, skip_bad=)"
            + (
                ", which goes on from the features that are finished; or replace them, which computes all again"
                if keeps_parts
                else ", or replace them"
            ),
        )
    if len(result) == 0:
        raise DataError(what, got="no image that can be decoded", expected="at least one", fix="name another folder")
    if damaged:
        LOG.warning("%d images cannot be decoded and have no row: %s", len(damaged), names)
    if source.left_out:
        LOG.warning("%d files are no images and have no row: %s", len(source.left_out), _first_names(source.left_out))


def check_damaged_count(target: Path, damaged: int, allowed: int) -> None:
    """Refuse a stored file that lacks more damaged images than allowed. Raises ``DataError``."""
    if damaged > allowed:
        raise DataError(
            f"--to {target}",
            got=f"features without {damaged} images that could not be decoded, see {companion(target, LEFT_OUT)}",
            expected=f"at most {allowed}" if allowed else "every image to decode",
            fix=f"accept them with --skip-bad {damaged} (in Python, skip_bad=), or replace them and remove the file",
        )


def write_left_out(damaged: Sequence[tuple[str, str]], others: Sequence[tuple[str, str]], path: Path) -> None:
    """Write the list, as ``hpcssl-shard images`` does; without any entry, an older list is removed.

    Args:
        damaged: Names of images that cannot be decoded, with reasons.
        others: Names of files that are no images, with reasons.
        path: The file: columns name, reason, and whether it should have been an image.
    """
    if not damaged and not others:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("name", "reason", "broken"))
    rows.writerows(sorted([*((*file, "yes") for file in damaged), *((*file, "no") for file in others)]))
    files.atomic_write(path, text.getvalue())


def _first_names(left_out: Sequence[tuple[str, str]]) -> str:
    more = len(left_out) - 3
    return ", ".join(name for name, _ in left_out[:3]) + (f" and {more} more" if more > 0 else "")
