"""Files of features: Parquet, or NumPy's .npy with the names in NAME.npy.csv and the record in NAME.npy.json.

Both hold one row per image, in the order of the source: the name (``key``), the class number (``label``) where the
source has labels, the image's number in the source (``index``), and the features, fp32 [D]. The record (``metadata``)
says which weights, images and options they come from. Nothing in it depends on the time or the machine, so that the
same command writes the same bytes.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hpcssl import files
from hpcssl.errors import ConfigError, DataError
from hpcssl.inference.compute import Part
from hpcssl.storage.npy import mapped_array

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".parquet", ".npy")
"""Suffixes of the files that are written, which decide the format."""
COMPANIONS = (".csv", ".json")
"""Suffixes of the files beside a .npy, after its full name."""
_FORMAT = "hpcssl-embeddings-2"
_METADATA = b"hpcssl"  # the key of the record in the metadata of a Parquet schema


@dataclass(frozen=True)
class Embeddings:
    """Features of images.

    Attributes:
        keys: Name of each image: its path below the folder, or its key in the shards.
        labels: Class number of each image, int64 [N], -1 without one; None if the source has no labels.
        index: Number of each image in the source, int64 [N]; it skips the damaged ones.
        metadata: Weights, images and options that the features come from, and the number of damaged images.
        load_parts: Gives the features, fp32, as consecutive arrays [n, D].
        damaged: Names of the images that could not be decoded, with reasons; empty for features read from a file.
    """

    keys: list[str]
    labels: npt.NDArray[np.int64] | None
    index: npt.NDArray[np.int64]
    metadata: dict[str, Any]
    load_parts: Callable[[], list[npt.NDArray[np.float32]]] = field(repr=False)
    damaged: list[tuple[str, str]] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def features(self) -> npt.NDArray[np.float32]:
        """The features of all images, fp32 [N, D]; those of a file are read now, or mapped from a .npy."""
        parts = self.load_parts()
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @property
    def classes(self) -> list[str]:
        """Names of the classes; a label is a position in this list."""
        names: list[str] = self.metadata["classes"]
        return names


def collect(parts: Sequence[Part], labels: npt.NDArray[np.int64] | None, metadata: dict[str, Any]) -> Embeddings:
    """Put parts together.

    Args:
        parts: The parts, in order.
        labels: Class number of every image of the source.
        metadata: The record.
    """
    index = np.concatenate([part.index for part in parts])
    damaged = [image for part in parts for image in part.damaged]
    return Embeddings(
        [key for part in parts for key in part.keys],
        None if labels is None else labels[index],
        index,
        {"format": _FORMAT, **metadata, "damaged": len(damaged)},
        lambda: [part.features.numpy() for part in parts if len(part.keys)],
        damaged,
    )


def companion(path: Path, suffix: str) -> Path:
    """Return the name of a file beside a file of features: its full name and a suffix, so that no other file has it."""
    return path.with_name(f"{path.name}{suffix}")


def default_suffix() -> str:
    """Return .parquet where pyarrow is installed, else .npy, which needs nothing more."""
    return ".npy" if importlib.util.find_spec("pyarrow") is None else ".parquet"


def check_target(path: Path) -> None:
    """Raise ``ConfigError`` unless ``write`` can write a file of this name here."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"--to {path}",
            got=f"the suffix {path.suffix!r}",
            expected=" or ".join(SUFFIXES),
            fix=f"--to {path.with_suffix(default_suffix())}",
        )
    if path.suffix == ".parquet":
        _require_pyarrow(path)


def write(embeddings: Embeddings, path: Path) -> None:
    """Write a file. The name appears when everything is written; of a .npy, the files beside it come first.

    Raises:
        OSError: It cannot be written.
    """
    if path.suffix == ".npy":
        labels = {} if embeddings.labels is None else {"label": embeddings.labels.tolist()}
        columns = {"key": embeddings.keys, **labels, "index": embeddings.index.tolist()}
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))
        files.atomic_write(companion(path, ".csv"), text.getvalue())
        files.atomic_write(companion(path, ".json"), json.dumps(embeddings.metadata, indent=2) + "\n")
    with files.atomic_file(path) as file:
        (_write_npy if path.suffix == ".npy" else _write_parquet)(embeddings, file)


def _write_npy(embeddings: Embeddings, file: BinaryIO) -> None:
    parts = embeddings.load_parts()
    shape = len(embeddings), parts[0].shape[1]
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for part in parts:  # one after the other: together they may not fit into memory
        file.write(np.ascontiguousarray(part, "<f4").data)


def _write_parquet(embeddings: Embeddings, file: BinaryIO) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = embeddings.load_parts()
    width, first = parts[0].shape[1], 0
    columns = [("key", pa.string())] + ([] if embeddings.labels is None else [("label", pa.int32())])
    schema = pa.schema(
        [*columns, ("index", pa.int64()), ("embedding", pa.list_(pa.float32(), width))],
        metadata={_METADATA: json.dumps(embeddings.metadata).encode()},
    )
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        for part in parts:
            rows = slice(first, first + len(part))
            values: list[pa.Array] = [pa.array(embeddings.keys[rows], pa.string())]
            if embeddings.labels is not None:
                values.append(pa.array(embeddings.labels[rows], pa.int32()))
            values.append(pa.array(embeddings.index[rows], pa.int64()))
            values.append(pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), width))
            writer.write_table(pa.table(values, schema=schema))
            first += len(part)


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Return the record of a file; None if there is no such file. Raises ``DataError`` for another program's."""
    if not path.exists():
        return None
    try:
        if path.suffix == ".npy":
            text = companion(path, ".json").read_text()
        else:
            _require_pyarrow(path)
            import pyarrow.parquet as pq

            text = (pq.read_schema(path).metadata or {})[_METADATA]
        metadata = json.loads(text)
        if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
            raise ValueError("another format")
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors
        raise _unreadable(path, error) from error
    return metadata


def read(path: Path | str) -> Embeddings:
    """Read a file that ``hpcssl embed`` wrote.

    Args:
        path: The .parquet or .npy file; the features of a .npy are mapped, not read.

    Raises:
        DataError: There is no such file, or it cannot be read.
        ConfigError: It has another suffix.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"features {path}",
            got="a folder" if path.is_dir() else f"the suffix {path.suffix!r}",
            expected=f"a file of `hpcssl embed`, {' or '.join(SUFFIXES)}",
            fix="name such a file, or write one with `hpcssl embed --run RUN IMAGES --to FILE`",
        )
    metadata = read_metadata(path)
    if metadata is None:
        raise DataError(
            f"features {path}",
            got="no such file",
            expected="a file of `hpcssl embed`",
            fix="check the path, or write it with `hpcssl embed --run RUN IMAGES --to " + f"{path}`",
        )
    try:
        if path.suffix == ".npy":
            return _read_npy(path, metadata)
        return _read_parquet(path, metadata)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise _unreadable(path, error) from error


def _read_npy(path: Path, metadata: dict[str, Any]) -> Embeddings:
    with open(companion(path, ".csv"), newline="") as file:
        head, *rows = csv.reader(file)
    columns = dict(zip(head, zip(*rows, strict=True), strict=True))
    labels = np.array(columns["label"], np.int64) if "label" in columns else None
    features = mapped_array(path)
    if len(features) != len(rows):
        raise ValueError(f"{len(features)} rows of features and {len(rows)} names")
    index = np.array(columns["index"], np.int64)
    return Embeddings(list(columns["key"]), labels, index, metadata, lambda: [features])


def _read_parquet(path: Path, metadata: dict[str, Any]) -> Embeddings:
    import pyarrow.parquet as pq

    def load() -> list[npt.NDArray[np.float32]]:
        column = pq.read_table(path, columns=["embedding"]).column("embedding").combine_chunks()
        return [column.flatten().to_numpy().reshape(len(column), -1)]

    names = pq.read_schema(path).names
    table = pq.read_table(path, columns=[name for name in ("key", "label", "index") if name in names])
    labels = table.column("label").to_numpy().astype(np.int64) if "label" in names else None
    index = table.column("index").to_numpy().astype(np.int64)
    return Embeddings(table.column("key").to_pylist(), labels, index, metadata, load)


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"features {path}",
        got=f"a file that cannot be read as features ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
        expected="a file of `hpcssl embed`, and for a .npy the .npy.csv and .npy.json beside it",
        fix="name another file for the features; this one is left as it is",
    )


def _require_pyarrow(path: Path) -> None:
    try:
        import pyarrow.parquet  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise ConfigError(
            f"features {path}",
            got="no pyarrow in this environment",
            expected="pyarrow, which reads and writes Parquet",
            fix="pip install 'hpcssl[images]', or use a name that ends in .npy",
        ) from error
