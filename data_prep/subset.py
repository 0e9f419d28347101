"""Write new shards out of old ones: a list of images, a share of every class, or corrupted labels.

What a list or a share leaves out is dropped, or it stays without its label, for semi-supervised training.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.catalog import Catalog, Sample
from data_prep.catalog.names import drop_suffix, format_examples, sample_key, source_stem
from data_prep.shards import reader
from data_prep.sources.classes import read_names
from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError, DataError, require_choice

DROPPED, UNLABELED = "dropped", "unlabeled"


@dataclass(frozen=True, kw_only=True)
class SubsetOptions:
    """Which samples to take; exactly one of the first three is set.

    Attributes:
        list: A text file of source names, keys or file names, one per line.
        fraction: Share of every class, above 0 and up to 1.
        corrupt: All samples, with this share of the labels replaced by wrong ones; above 0 and up to 1.
        rest: What becomes of the samples that ``list`` or ``fraction`` leave out, ``dropped`` or ``unlabeled``.
    """

    list: Path | None = None
    fraction: float | None = None
    corrupt: float | None = None
    rest: str = DROPPED

    def __post_init__(self) -> None:
        options = [f"--{name}" for name in ("list", "fraction", "corrupt") if getattr(self, name) is not None]
        if len(options) != 1:
            raise ConfigError(
                "subset",
                got=" and ".join(options) or "none of them",
                expected="exactly one of --list, --fraction and --corrupt",
                fix="choose one; a subset of a subset gives the combination",
            )
        for name in ("fraction", "corrupt"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ConfigError(
                    f"--{name}",
                    got=share,
                    expected="a share above 0 and up to 1",
                    fix="write a share such as 0.01 for 1 %",
                )
        require_choice("--rest", self.rest, (DROPPED, UNLABELED))
        if self.rest != DROPPED and self.corrupt is not None:
            raise ConfigError(
                "--rest",
                got=f"{self.rest} together with --corrupt",
                expected="--rest only with --list or --fraction",
                fix="run --corrupt first, then take a subset of its output",
            )


def choose_samples(src: ShardSet, options: SubsetOptions, seed: int) -> Catalog:
    """Return the catalog of the new folder. Classes keep their numbers, even those that lose every sample.

    Args:
        src: The shards to choose from.
        options: Which samples to take.
        seed: Seed of the draws of ``fraction`` and ``corrupt``.

    Raises:
        ConfigError: The list cannot be read.
        DataError: The list names unknown samples, or the shards are empty or have no labels to corrupt.
    """
    every = _read_samples(src)
    inherited = {name: value for name, value in src.provenance.items() if name in ("dataset", "second")}
    provenance: dict[str, Any] = {"verb": "subset", "of": src.digest, **inherited}
    if options.list is not None:
        samples = _take_listed(every, read_names(options.list, "--list"), options.list)
        provenance["list"] = len(samples)
    elif options.fraction is not None:
        samples = _take_fraction(every, options.fraction, seed)
        provenance["fraction"] = options.fraction
    else:
        assert options.corrupt is not None  # SubsetOptions requires one of the three
        samples = _corrupt_labels(every, options.corrupt, len(src.classes), seed)
        provenance["corrupt"] = options.corrupt
    if options.rest == UNLABELED:
        provenance["rest"] = options.rest
        samples = _remove_labels(every, {sample.source for sample in samples})
    return Catalog(src.classes, samples, provenance)


def _read_samples(src: ShardSet) -> list[Sample]:
    """Return every sample of the folder in the order of its names, located inside its shard."""
    samples = []
    for number in range(len(src.shards)):
        path = src.path(number)
        with open(path, "rb") as file:
            for key, members in reader.iterate_samples(file):
                samples.append(_read_sample(file.fileno(), os.fspath(path), key, members))
    if not samples:
        raise DataError(f"shard folder {src.root}", got="no sample", expected="at least one", fix="check the path")
    return sorted(samples)


def _read_sample(descriptor: int, path: str, key: str, members: dict[str, reader.Member]) -> Sample:
    _, _, offset, size, _, second_offset, second_size = reader.index_row(0, members, -1)
    label, fields = -1, {}
    if "cls" in members:
        label = int(os.pread(descriptor, members["cls"].size, members["cls"].offset))
    if "json" in members:
        fields = reader.parse_sample_json(os.pread(descriptor, members["json"].size, members["json"].offset))
    extra = {name: value for name, value in fields.items() if name not in ("source", "original_label")}
    source = fields.get("source", source_stem(key))
    return Sample(
        source,
        label,
        path,
        offset,
        size,
        mtime_ns=0,  # shards never change once written, so their name identifies the content, not their time
        second=(second_offset, second_size) if second_size else None,
        original_label=fields.get("original_label"),
        extra_json=json.dumps(extra, separators=(",", ":")) if extra else None,
        key_suffix=key != sample_key(source),
    )


def _take_listed(samples: list[Sample], names: list[str], path: Path) -> list[Sample]:
    """Return the samples that a list names: by source, by key, by source without suffix, or by file name.

    The first of these that fits a name counts, and must fit one sample only.
    """
    by_name: list[dict[str, set[int]]] = [{}, {}, {}, {}]
    sources, keys, stems, file_names = by_name
    for i, sample in enumerate(samples):
        stem = drop_suffix(sample.source)
        sources.setdefault(sample.source, set()).add(i)
        keys.setdefault(sample_key(sample.source, keep_suffix=sample.key_suffix), set()).add(i)
        stems.setdefault(stem, set()).add(i)
        for name in (sample.source, stem):
            file_names.setdefault(name.rpartition("/")[2], set()).add(i)
    chosen: set[int] = set()
    unknown: list[str] = []
    ambiguous: list[str] = []
    for name in names:
        matches: set[int] = next((found[name] for found in by_name if name in found), set())
        if len(matches) == 1:
            chosen |= matches
        else:
            (ambiguous if matches else unknown).append(name)
    if unknown or ambiguous:
        problems = []
        if unknown:
            problems.append(f"{len(unknown)} names that are not in the shards ({format_examples(unknown)})")
        if ambiguous:
            problems.append(f"{len(ambiguous)} names that several samples have ({format_examples(ambiguous)})")
        raise DataError(
            f"--list {path}",
            got=" and ".join(problems),
            expected="source names, keys, or file names that are unique in the shards",
            fix="compare with the names that `tar tf` lists in a shard of SRC",
        )
    return [samples[i] for i in sorted(chosen)]


def _take_fraction(samples: list[Sample], fraction: float, seed: int) -> list[Sample]:
    """Draw a fraction of every class, rounded, and at least one sample of each."""
    from hpcssl import rng

    labels = np.array([sample.label for sample in samples])
    chosen: list[int] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = rng.permutation(rng.key(seed, "subset", "fraction", int(label)), len(members))
        chosen += members[order[: max(1, round(fraction * len(members)))]].tolist()
    return [samples[i] for i in sorted(chosen)]


def _remove_labels(samples: list[Sample], labeled: set[str]) -> list[Sample]:
    """Remove the label of every sample that is not in ``labeled``.

    KEY.json keeps nothing but the targets, which become zeros: any other field could tell the label.
    """

    def without_label(sample: Sample) -> Sample:
        targets = json.loads(sample.extra_json or "{}").get("targets")
        extra = None if targets is None else json.dumps({"targets": [0] * len(targets)})
        return sample._replace(label=-1, original_label=None, extra_json=extra)

    return [sample if sample.source in labeled else without_label(sample) for sample in samples]


def _corrupt_labels(samples: list[Sample], share: float, classes: int, seed: int) -> list[Sample]:
    """Replace a share of the labels by another class, each other class with the same probability."""
    from hpcssl import rng

    if classes < 2 or any(sample.label < 0 for sample in samples):
        raise DataError(
            "--corrupt",
            got=f"{classes} classes" if classes < 2 else "samples without a label",
            expected="two classes or more, and a label for every sample",
            fix="choose shards with labels",
        )
    drawn = rng.permutation(rng.key(seed, "subset", "corrupt", "which"), len(samples))[: round(share * len(samples))]
    shifts = 1 + (rng.uniform(rng.key(seed, "subset", "corrupt", "to"), len(samples)) * (classes - 1)).astype(int)
    corrupted = list(samples)
    for i in drawn:
        sample = samples[i]
        original = sample.label if sample.original_label is None else sample.original_label
        corrupted[i] = sample._replace(label=int((sample.label + shifts[i]) % classes), original_label=original)
    return corrupted
