"""Labels that do not come from folder names: text files, and the devkit of ILSVRC 2012."""

from __future__ import annotations

import csv
import io
import posixpath
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from data_prep.catalog.names import format_examples
from data_prep.sources.classes import Labels, read_names
from hpcssl.errors import ConfigError, DataError

GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


LIST_SUFFIXES = (".csv", ".tsv")
"""Suffixes of lists with one image per row."""
_IMAGE_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "name")
_LABEL_COLUMNS = ("label", "labels", "class", "category")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a list or a table hold the images and their labels.

    Attributes:
        image: Name of the column of images; None to find it by its name or type.
        label: Name of the column of labels; None to find it by its name.
        multi_label: Whether an image may have several labels: separated by ``;`` or ``|``, or in several rows.
    """

    image: str | None = None
    label: str | None = None
    multi_label: bool = False


def read_labels(path: Path, columns: Columns | None = None) -> Labels:
    """Read a .csv or .tsv list, or lines ``name class``: the class is the last word, or what follows a tab.

    Args:
        path: The text file.
        columns: Where the names and labels are in a list, and whether an image may have several.

    Returns:
        Class name by image name.

    Raises:
        ConfigError: The file cannot be read, or a line is malformed or contradicts another one.
    """
    columns = columns or Columns()
    if path.suffix.lower() in LIST_SUFFIXES:
        rows = read_list_rows(path, "--labels", columns)
        if any(label is None for _, label in rows):
            raise _no_column("--labels", path, columns.label or "label", ["one column"])
        return collect_labels(f"--labels {path}", [(name, label or "") for name, label in rows], columns.multi_label)
    pairs = []
    for line in read_names(path, "--labels"):
        name, _, label = line.rpartition("\t") if "\t" in line else _split_last_word(line)
        name, label = name.strip().removeprefix("./"), label.strip()
        if not name or not label:
            raise ConfigError(
                f"--labels {path}",
                got=f"the line {line!r}",
                expected="lines `name class`",
                fix="give the name of each image and its class, separated by a blank or a tab",
            )
        pairs.append((name, label))
    return collect_labels(f"--labels {path}", pairs, columns.multi_label)


def collect_labels(what: str, pairs: list[tuple[str, str]], multi_label: bool) -> Labels:
    """Turn rows of names and labels into the labels of each image.

    Args:
        what: Where the rows come from, for the message.
        pairs: Name and label of each row; an empty label for none.
        multi_label: Whether an image may have several.

    Raises:
        ConfigError: An image has two labels, and ``multi_label`` is not set.
    """
    if multi_label:
        several: dict[str, tuple[str, ...]] = {}
        for name, text in pairs:
            several[name] = several.get(name, ()) + split_labels(text)
        return several
    single: dict[str, str] = {}
    for name, label in pairs:
        if single.setdefault(name, label) != label:
            raise ConfigError(
                what,
                got=f"{name} as {single[name]} and as {label}",
                expected="one class per image",
                fix="remove one of the lines, or give --multi-label",
            )
    return single


def split_labels(text: str) -> tuple[str, ...]:
    """Return the labels in a text that ``;`` or ``|`` separates, without blanks around them."""
    return tuple(label.strip() for label in re.split(r"[;|]", text) if label.strip())


def read_list_rows(path: Path, option: str, columns: Columns) -> list[tuple[str, str | None]]:
    """Read the names and labels in a .csv or .tsv list, which may begin with the names of its columns.

    Args:
        path: The list, in UTF-8.
        option: What the list is, for messages.
        columns: Names of the columns. Without a name the first column holds the images, and the second the labels.

    Returns:
        Name and label of each row; None as label where the list has no column of them.

    Raises:
        ConfigError: The list cannot be read, is empty, or has no such column.
    """
    lines = read_names(path, option, strip=False)  # a tab at the end of a line is an empty label
    rows = [row for row in csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",") if any(row)]
    titles = [title.strip() for title in rows[0]]
    lower = [title.lower() for title in titles]
    if columns.image in titles or columns.label in titles or set(lower) & set(_IMAGE_COLUMNS):
        image = _find_column(option, path, titles, columns.image, _IMAGE_COLUMNS)
        label = _find_column(option, path, titles, columns.label, _LABEL_COLUMNS)
        image = int(label == 0) if image is None else image
        rows = rows[1:]
    elif columns.image or columns.label:
        raise _no_column(option, path, str(columns.image or columns.label), titles)
    else:
        image, label = 0, 1 if len(titles) > 1 else None
    result: list[tuple[str, str | None]] = []
    for row in rows:
        if len(row) <= max(image, label or 0) or not row[image].strip():
            raise ConfigError(
                f"{option} {path}",
                got=f"the row {','.join(row)!r}",
                expected=f"{max(image, label or 0) + 1} columns or more, with the name of an image",
                fix="complete or remove this row",
            )
        result.append((row[image].strip().removeprefix("./"), None if label is None else row[label].strip()))
    return result


def _find_column(option: str, path: Path, titles: list[str], name: str | None, usual: tuple[str, ...]) -> int | None:
    """Return the position of a column by its name, or by one of the usual names; None without one."""
    if name is not None:
        if name not in titles:
            raise _no_column(option, path, name, titles)
        return titles.index(name)
    return next((n for n, title in enumerate(titles) if title.lower() in usual), None)


def _no_column(option: str, path: Path, name: str, titles: list[str]) -> ConfigError:
    return ConfigError(
        f"{option} {path}",
        got=f"no column {name} (it has {format_examples(titles, 9)})",
        expected="a list whose first row names its columns",
        fix="correct the name of the column, --image or --label",
    )


def _split_last_word(line: str) -> tuple[str, str, str]:
    name, *rest = line.rsplit(None, 1)
    return (name, " ", rest[0]) if rest else ("", "", name)


def read_devkit(path: Path) -> dict[str, str]:
    """Read the labels of the validation images from ILSVRC2012_devkit_t12.tar.gz.

    Line n of the ground truth (from 1) is the ILSVRC2012_ID of ILSVRC2012_val_%08d; meta.mat maps ids to WordNet ids.

    Args:
        path: The archive.

    Returns:
        WordNet id by file name.

    Raises:
        ConfigError: It is not the devkit, or cannot be read.
        DataError: Its ids cannot be resolved.
    """
    from scipy.io import loadmat, matlab  # a dependency of scikit-learn, which only this command needs

    what = f"--devkit {path}"
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info) if info.isreg() else None
                if file is not None and posixpath.basename(info.name) in (GROUND_TRUTH, META):
                    contents[posixpath.basename(info.name)] = file.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ConfigError(
            what,
            got=f"{error}",
            expected="ILSVRC2012_devkit_t12.tar.gz as downloaded",
            fix="check the path, or download it again",
        ) from error
    missing = [name for name in (GROUND_TRUTH, META) if name not in contents]
    if missing:
        raise ConfigError(
            what,
            got=f"no {' and no '.join(missing)} in it",
            expected=f"data/{GROUND_TRUTH} and data/{META}",
            fix="give the devkit of tasks 1 and 2 (ILSVRC2012_devkit_t12.tar.gz)",
        )
    try:
        synsets = loadmat(io.BytesIO(contents[META]), squeeze_me=True, struct_as_record=False)["synsets"]
        wnid = {int(s.ILSVRC2012_ID): str(s.WNID) for s in synsets.ravel()}
        classes = [wnid[int(line)] for line in contents[GROUND_TRUTH].split()]
    except (ValueError, KeyError, AttributeError, TypeError, NotImplementedError, matlab.MatReadError) as error:
        raise DataError(
            what,
            got=f"ids that cannot be resolved ({type(error).__name__}: {error})",
            expected=f"numbers in {GROUND_TRUTH} that {META} maps to WordNet ids",
            fix="download the devkit again",
        ) from error
    return {f"ILSVRC2012_val_{n:08d}.JPEG": name for n, name in enumerate(classes, 1)}
