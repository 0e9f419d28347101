"""WebDataset tars of other tools, read in place and written again as shards with an index.

Such tars may have members of a sample that do not lie side by side (a sequential reader then makes two samples of
them, without an error), names that repeat from tar to tar, and numbers as class names. Here a sample is everything
with one key in one tar, wherever its members lie.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.catalog import Catalog, Sample, SampleTable, sort_samples
from data_prep.catalog.compact import SharedColumn
from data_prep.catalog.names import check_distinct_classes, format_examples
from data_prep.shards import reader
from data_prep.sources import tars
from data_prep.sources.classes import encode_targets, order_classes, read_names
from hpcssl.data.image_files import formats
from hpcssl.data.shards import INDEX
from hpcssl.errors import ConfigError, DataError

LOG = logging.getLogger("hpcssl")
JSON = "json:"
"""Start of a ``--label`` that names a field of KEY.json."""


def read(src: Path, classes_file: Path | None, label: str = "cls") -> Catalog:
    """List the samples of the tars in a folder: an image each, with a label if there is one.

    Args:
        src: The folder.
        classes_file: Class names in the order of the numbers; None to take the numbers as names, or to sort the names.
        label: Where the labels are: ``cls`` for KEY.cls, a number from 0, or ``json:FIELD`` for a field of KEY.json: a
            number, a name, or a list of those for several classes at once. Dots lead into nested objects.

    Returns:
        The catalog; its samples are named TAR/KEY.

    Raises:
        DataError: No tars, a damaged tar, a malformed sample or label, or too few class names.
        ConfigError: The list of classes cannot be read, or ``label`` is malformed.
    """
    if label != "cls" and (not label.startswith(JSON) or label == JSON):
        raise ConfigError(
            "--label", got=repr(label), expected="cls or json:FIELD", fix="write for example --label json:label"
        )
    if not src.is_dir():
        raise DataError(
            f"source {src}",
            got="a file" if src.exists() else "no such folder",
            expected="a folder of WebDataset tars",
            fix="check the path",
        )
    if (src / INDEX).exists():
        raise DataError(
            f"source {src}",
            got=f"a folder with an {INDEX}, which hpcssl-shard wrote",
            expected="tars of other tools",
            fix="use it as it is: data.train takes this folder",
        )
    paths = sorted(src.glob("*.tar"))
    if not paths:
        names = sorted(p.name for p in src.iterdir())
        raise DataError(
            f"source {src}",
            got=f"no *.tar ({format_examples(names) or 'nothing'})",
            expected="WebDataset tars in it",
            fix="expand compressed ones first; for a folder of images use `hpcssl-shard images`",
        )
    samples, values = SampleTable(), SharedColumn()  # the labels as JSON: True is not 1 there, and lists have no hash
    for path in paths:
        for sample, value in _read_tar(path, label):
            samples.append(sample)
            values.append(json.dumps(value))
    is_unlabeled = values.distinct in ([], ["null"])
    if label == "cls":
        if is_unlabeled:
            _suggest_json(src, paths)
    elif samples and is_unlabeled:
        raise ConfigError(
            f"--label {label}",
            got="no sample with this field",
            expected=f"one of {format_examples(_json_fields(paths[0]), 9) or 'the fields of a KEY.json'}",
            fix="correct the field, or leave --label out",
        )
    return _make_catalog(src, samples, values, classes_file, label)


def _make_catalog(
    src: Path, samples: SampleTable, values: SharedColumn, classes_file: Path | None, label: str
) -> Catalog:
    """Number the classes of the labels."""
    parsed = {text: json.loads(text) for text in values.distinct}
    several = any(isinstance(value, list) for value in parsed.values())
    flat = [name for value in parsed.values() for name in _labels_in(value)]
    if all(type(value) is int and value >= 0 for value in flat):
        largest = max(flat, default=-1)
        names = [str(n) for n in range(largest + 1)] if classes_file is None else read_names(classes_file, "--classes")
        if largest >= len(names):
            raise DataError(
                f"--classes {classes_file}",
                got=f"{len(names)} names, and a label {largest} in the tars",
                expected="a name for every label, counted from 0",
                fix="add the missing lines",
            )
        number: dict[Any, int] = {n: n for n in range(len(names))}
    elif all(isinstance(value, str) for value in flat):
        present = sorted(set(flat))
        check_distinct_classes(present, f"classes of {src}")
        names = order_classes(present, classes_file)
        number = {name: n for n, name in enumerate(names)}
    else:
        examples = [
            repr(value) for value in {type(value): value for value in sorted(flat, key=str, reverse=True)}.values()
        ]
        raise DataError(
            f"--label {label}",
            got=f"labels such as {format_examples(examples)}",
            expected="numbers from 0 (-1 for none), or names",
            fix="take another field",
        )
    unlabeled = encode_targets([], len(names)).replace("-1", "0") if several else ""

    def with_label(sample: Sample, value: Any) -> Sample:
        numbers = [number[name] for name in _labels_in(value)]
        if not several:
            return sample._replace(label=numbers[0] if numbers else -1)
        return sample._replace(extra_json=unlabeled if value is None else encode_targets(numbers, len(names)))

    labeled = SampleTable(with_label(sample, parsed[values[row]]) for row, sample in enumerate(samples))
    return Catalog(names, sort_samples(labeled, src))


def _labels_in(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value in (None, -1) else [value]


def _json_fields(path: Path) -> list[str]:
    """Return the fields of the first KEY.json of a tar."""
    for name, offset, size in tars.iterate_members(path, path, 0, path.stat().st_size):
        if name.endswith(".json"):
            with open(path, "rb") as file:
                return sorted(reader.parse_sample_json(os.pread(file.fileno(), size, offset)))
    return []


def _suggest_json(src: Path, paths: list[Path]) -> None:
    """Say that labels may lie in KEY.json, for tars in which no sample has a KEY.cls."""
    if fields := _json_fields(paths[0]):
        LOG.warning(
            "%s: no sample has a .cls, so the images have no labels. If a field of the .json (%s) is the label, give "
            "--label json:FIELD.",
            src,
            format_examples(fields, 9),
        )


def _read_tar(path: Path, label: str) -> Iterator[tuple[Sample, Any]]:
    """Yield each sample without a label, and its label as the tar has it: a number, a name, a list of them, or None."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}  # key -> suffix -> offset and size
    last_key = None
    scattered = []
    for name, offset, size in tars.iterate_members(path, path, 0, path.stat().st_size):
        key, suffix = reader.split_member_name(name)
        members = samples.setdefault(key, {})
        if members and key != last_key:
            scattered.append(key)
        if suffix.lower() in members:
            raise DataError(
                f"tar {path}",
                got=f"{name} twice",
                expected="each member of a sample once",
                fix="remove the wrong one",
            )
        members[suffix.lower()] = offset, size
        last_key = key
    if scattered:
        LOG.warning(
            "%s: %d samples have members that do not lie side by side (%s); they are joined.",
            path,
            len(scattered),
            format_examples(scattered),
        )
    mtime_ns = path.stat().st_mtime_ns
    with open(path, "rb") as file:
        for key, members in samples.items():
            yield _make_sample(path, key, members, file.fileno(), mtime_ns, label)


def _make_sample(
    path: Path, key: str, members: dict[str, tuple[int, int]], descriptor: int, mtime_ns: int, label: str
) -> tuple[Sample, Any]:
    suffixes = [suffix for suffix in members if f".{suffix}" in formats.image_suffixes()]
    if len(suffixes) != 1:
        raise DataError(
            f"tar {path}",
            got=f"sample {key} with {', '.join(sorted(members))}",
            expected="one image (.jpg, .png, .webp, ...) in every sample",
            fix="remove this sample, or its surplus members; `tar tf` lists them",
        )
    suffix, _, field = label.partition(":")
    value = None
    if suffix in members:
        offset, size = members[suffix]
        text = os.pread(descriptor, size, offset).strip()
        value = _read_field(path, key, text, field) if field else _read_number(path, key, text)
    name, location = f"{path.stem}/{key}.{suffixes[0]}", members[suffixes[0]]
    return Sample(name, -1, os.fspath(path.absolute()), *location, mtime_ns), value


def _read_number(path: Path, key: str, text: bytes) -> int:
    if not text.isdigit():
        raise DataError(
            f"tar {path}",
            got=f"{key}.cls, which holds {text[:20]!r}",
            expected="a number from 0",
            fix="write the tars again with class numbers",
        )
    return int(text)


def _read_field(path: Path, key: str, text: bytes, field: str) -> Any:
    """Return a field of KEY.json; None where it is absent."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"tar {path}",
            got=f"{key}.json, which cannot be read ({error})",
            expected="a JSON object",
            fix="remove this sample, or write the tars again",
        ) from error
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
