"""Images that a list names: a .csv or .tsv file of paths, with or without labels."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from data_prep.catalog import WHOLE_FILE, LeftOut, SourceFile, SourceListing
from data_prep.sources.classes import Labels
from data_prep.sources.labels import Columns, collect_labels, read_list_rows
from hpcssl.errors import DataError


def read_list(src: Path, columns: Columns) -> tuple[SourceListing, Labels | None]:
    """List the files that a list names. Their names in the shards are their paths below the folder that holds all.

    Args:
        src: The list. Relative paths start at its folder.
        columns: Its columns.

    Returns:
        The listing, in which files that are absent are left out as broken; and the labels, or None without any.

    Raises:
        ConfigError: The list cannot be read, or gives an image two labels.
        DataError: It names a file twice.
    """
    rows = read_list_rows(src, "list", columns)
    paths = [os.path.normpath(src.parent.absolute() / name) for name, _ in rows]
    root = os.fspath(src.parent.absolute())
    if any(os.path.commonpath([root, path]) != root for path in paths):
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
    listing = SourceListing(src, root)
    pairs = []
    for path, (_, label) in zip(paths, rows, strict=True):
        name = os.path.relpath(path, root)
        pairs.append((name, label or ""))
    labels = None if rows[0][1] is None else collect_labels(f"list {src}", pairs, columns.multi_label)
    names = [name for name, _ in pairs]
    unique = list(dict.fromkeys(names))
    if len(unique) < len(names) and not columns.multi_label:
        repeated = Counter(names).most_common(1)[0][0]
        raise DataError(
            f"list {src}",
            got=f"{repeated} twice",
            expected="each image once",
            fix="remove one of the rows, or give --multi-label if each row has another label of the image",
        )
    for name in unique:
        try:
            status = os.stat(os.path.join(root, name))
        except OSError as error:
            listing.left_out.append(LeftOut(name, f"cannot be read ({error.strerror})", broken=True))
            continue
        listing.images.append(SourceFile(name, WHOLE_FILE, status.st_size, status.st_mtime_ns))
    listing.folders = {file.folder for file in listing.images if "/" in file.name}
    return listing, labels
