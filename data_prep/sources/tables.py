"""Images in tables: Parquet and Arrow files, and what Hugging Face's ``save_to_disk`` writes.

The files are read by pyarrow alone. The package ``datasets`` would add a dozen dependencies, and its files are plain
streams of Arrow. Images in a table have no place of their own in a file, since pages are compressed: they are copied,
one after the other, to a file beside the shards, which is removed in the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.catalog import FileTable, SourceFile, SourceListing
from data_prep.catalog.names import format_examples
from data_prep.shards.writer import write_error
from data_prep.sources.classes import Labels
from data_prep.sources.labels import Columns, split_labels
from hpcssl.data.image_files import formats
from hpcssl.errors import ConfigError, DataError

SUFFIXES = (".parquet", ".arrow")
_LABEL_COLUMNS = ("label", "labels", "class", "category")
_BATCH_ROWS = 64  # a batch of photographs of 10 MB stays below a gigabyte


class Table(NamedTuple):
    """The images of a table.

    Attributes:
        listing: The images, which lie in one file.
        labels: Their labels; None without a column of labels.
        classes: Class names in the order of their numbers, where the table has numbers as labels; otherwise None.
        column: Name of the column of labels; empty without one.
    """

    listing: SourceListing
    labels: Labels | None
    classes: list[str] | None
    column: str


def find_tables(src: Path, part: str) -> list[Path]:
    """Return the files of a table: ``src`` itself, or those in a folder; empty for a folder that holds no table.

    Args:
        src: A file, a folder of Parquet files, or a folder that ``save_to_disk`` wrote.
        part: Which part of it, such as ``train``; empty for all there is.

    Raises:
        ConfigError: There is no such part, or several and none was chosen.
    """
    if src.is_file():
        return [src] if src.suffix.lower() in SUFFIXES else []
    if (src / "dataset_dict.json").is_file():
        parts = sorted(path.parent.name for path in src.glob("*/state.json"))
        return find_tables(src / _choose_part(src, part, parts), "")
    if (src / "state.json").is_file():
        return sorted(src.glob("*.arrow"))
    files = sorted([*src.glob("*.parquet"), *src.glob("data/*.parquet"), *src.glob("*.arrow")])
    # train-00000-of-00002.parquet, cifar10-test.arrow, 0001.parquet
    names = {path: re.sub(r"-?\d+(-of-\d+)?$", "", path.stem) for path in files}
    chosen = _choose_part(src, part, sorted(set(names.values()))) if files else ""
    return [path for path in files if names[path] == chosen]


def _choose_part(src: Path, part: str, parts: list[str]) -> str:
    if part in parts or (len(parts) == 1 and not part):
        return part or parts[0]
    raise ConfigError(
        f"--part {part}" if part else f"source {src}",
        got="no such part" if part else f"a table of {len(parts)} parts",
        expected=f"one of {format_examples(parts, 9)}",
        fix="choose one with --part",
    )


def read_tables(src: Path, paths: list[Path], columns: Columns, scratch: Path) -> Table:
    """Copy the images of a table to a file, and list them with their labels.

    Args:
        src: What the user named, for messages.
        paths: The files of the table, with the same columns.
        columns: Names of its columns.
        scratch: File to write.

    Raises:
        ConfigError: pyarrow is missing, or there is no such column.
        DataError: A file is damaged, or ``scratch`` cannot be written.
    """
    try:
        import pyarrow  # noqa: F401 - the functions below import what they need of it
    except ImportError as error:
        raise ConfigError(
            f"source {src}", got="no pyarrow", expected="pyarrow to read it", fix="pip install 'hpcssl[images]'"
        ) from error
    listing = SourceListing(src, os.fspath(scratch))
    schema, image, label = _find_columns(paths[0], columns)
    values: list[Any] = []
    names: list[str] = []
    position = 0
    with open(scratch, "wb") as file:
        for path in paths:
            mtime_ns = path.stat().st_mtime_ns
            for cell, value in _iterate_rows(path, image, label):
                body, name = _read_cell(cell, path.parent)
                names.append(name)
                values.append(value)
                listing.images.append(SourceFile("", position, len(body), mtime_ns))
                try:
                    position += file.write(body)
                except OSError as error:
                    raise write_error(scratch, error) from error
    _name_images(listing, names, scratch)
    if columns.multi_label:
        values = [list(split_labels(value)) if isinstance(value, str) else value for value in values]
    return Table(listing, *_name_labels(f"column {label} of {src}", listing, values, schema, label), label)


@contextlib.contextmanager
def _table_errors(path: Path) -> Iterator[None]:
    """Turn the errors of reading a table into ``DataError``."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(
            f"table {path}",
            got=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            expected="a complete Parquet or Arrow file with the columns of the first one",
            fix="download or write it again",
        ) from error


def _iterate_rows(path: Path, image: str, label: str) -> Iterator[tuple[Any, Any]]:
    """Yield the cells of the two columns, row by row; None for the label without a column of labels."""
    with _table_errors(path):
        _, batches = _open_table(path, [image, *([label] if label else [])])
        for batch in batches:
            labels = batch.column(label).to_pylist() if label else [None] * batch.num_rows
            yield from zip(batch.column(image).to_pylist(), labels, strict=True)


def _open_table(path: Path, columns: list[str] | None = None) -> tuple[Any, Iterator[Any]]:
    """Return the schema and the batches of a Parquet file, an Arrow stream or an Arrow file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix.lower() == ".parquet":
        table = pq.ParquetFile(path)
        return table.schema_arrow, table.iter_batches(_BATCH_ROWS, columns=columns)
    with open(path, "rb") as file:
        is_stream = file.read(6) != b"ARROW1"
    source = pa.memory_map(os.fspath(path))
    if is_stream:
        stream = pa.ipc.open_stream(source)
        return stream.schema, (part for batch in stream for part in _slices(batch))
    reader = pa.ipc.open_file(source)
    return reader.schema, (part for n in range(reader.num_record_batches) for part in _slices(reader.get_batch(n)))


def _slices(batch: Any) -> Iterator[Any]:
    return (batch.slice(start, _BATCH_ROWS) for start in range(0, batch.num_rows, _BATCH_ROWS))


def _find_columns(path: Path, columns: Columns) -> tuple[Any, str, str]:
    """Return the schema and the names of the columns of images and of labels; the latter is empty without one."""
    import pyarrow.types as types

    def holds_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))

    def holds_images(kind: Any) -> bool:
        kind = getattr(kind, "storage_type", kind)
        if types.is_struct(kind):
            return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
        return holds_bytes(kind)

    with _table_errors(path):
        schema, _ = _open_table(path)
    image_columns = [field.name for field in schema if holds_images(field.type)]
    chosen = [columns.image] if columns.image else image_columns
    if len(chosen) != 1 or chosen[0] not in image_columns:
        raise ConfigError(
            f"table {path}" if columns.image is None else f"--image {columns.image}",
            got=f"columns of images: {format_examples(image_columns, 9) or 'none'}",
            expected="one column of encoded images, as bytes",
            fix="name it with --image" if len(image_columns) > 1 else "check that it is the right file",
        )
    names = [field.name for field in schema]
    if columns.label and columns.label not in names:
        raise ConfigError(
            f"--label {columns.label}",
            got="no such column",
            expected=f"one of {format_examples(names, 9)}",
            fix="correct its name",
        )
    label = columns.label or next((name for name in names if name in _LABEL_COLUMNS), "")
    return schema, chosen[0], label


def _read_cell(cell: Any, folder: Path) -> tuple[bytes, str]:
    """Return the bytes of an image, and its name if it has one. A cell without bytes may name a file."""
    if isinstance(cell, bytes) or cell is None:
        return cell or b"", ""
    name = cell.get("path") or ""
    body = cell["bytes"]
    if body is None and name:
        try:
            body = (folder / name).read_bytes()
        except OSError:  # the writer reports an empty file
            body = b""
    return body or b"", name


def _name_images(listing: SourceListing, names: list[str], scratch: Path) -> None:
    """Name the images by their paths where all have distinct ones, and by their rows otherwise."""
    safe = [posixpath.normpath(name) if name else "" for name in names]
    if len(set(safe)) < len(safe) or not all(safe) or any(n.startswith(("/", "..")) for n in safe):
        safe = []
        with open(scratch, "rb") as file:
            for number, image in enumerate(listing.images):
                start = os.pread(file.fileno(), min(image.size, formats.START_BYTES), image.offset)
                safe.append(f"{number:08d}.{formats.sniff_suffix(start) or 'bin'}")
    listing.images = FileTable(image._replace(name=name) for image, name in zip(listing.images, safe, strict=True))
    listing.folders = {image.folder for image in listing.images if "/" in image.name}


def _name_labels(
    what: str, listing: SourceListing, values: list[Any], schema: Any, label: str
) -> tuple[Labels | None, list[str] | None]:
    """Return the names of the labels, and all names in the order of their numbers if the labels are numbers."""
    if not label:
        return None, None
    several = any(isinstance(value, list) for value in values)
    rows = [value if isinstance(value, list) else [value] for value in values]
    flat = [value for row in rows for value in row if value is not None]
    classes = _feature_names(schema, label)
    if all(isinstance(value, int) for value in flat):
        classes = classes or [str(n) for n in range(max(flat, default=-1) + 1)]
    elif not all(isinstance(value, str) for value in flat):
        raise ConfigError(
            what, got=repr(flat[0]), expected="class numbers or names", fix="choose another column with --label"
        )
    if classes is not None and flat and not -1 <= min(flat) <= max(flat) < len(classes):
        raise DataError(
            what,
            got=f"labels from {min(flat)} to {max(flat)}",
            expected=f"numbers of the {len(classes)} classes, or -1 for none",
            fix="correct the labels",
        )

    def name_of(value: Any) -> str:
        if value is None or value == -1:
            return ""
        return classes[value] if classes is not None else str(value)

    named = [tuple(filter(None, map(name_of, row))) for row in rows]
    keys = [image.name for image in listing.images]
    if several:
        return dict(zip(keys, named, strict=True)), classes
    return {key: row[0] if row else "" for key, row in zip(keys, named, strict=True)}, classes


def _feature_names(schema: Any, label: str) -> list[str] | None:
    """Return the class names that Hugging Face's ``ClassLabel`` keeps in the metadata of a table; None without any."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]
    except (KeyError, TypeError, ValueError):
        return None
    feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)  # a list of labels
    return feature.get("names") if isinstance(feature, dict) else None
