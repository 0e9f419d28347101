"""New shards out of old ones: a list of images, a share of every class, or corrupted labels.

What a list or a share leaves out is dropped, or it stays without its label, for semi-supervised training.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep import tars
from data_prep.catalogue import Catalogue, Sample, drop_suffix, key_of, read_names, some, source_stem
from hpcssl.data.shards import ShardSet
from hpcssl.errors import ConfigError, DataError, nearest

RESTS = ("dropped", "unlabelled")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which samples: exactly one of the first three is given. ``rest``: what becomes of the others, one of RESTS."""

    list: Path | None = None
    fraction: float | None = None
    corrupt: float | None = None
    rest: str = RESTS[0]

    def __post_init__(self):
        given = [f"--{name}" for name in ("list", "fraction", "corrupt") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError("subset", got=" and ".join(given) or "none of them",
                              expected="exactly one of --list, --fraction and --corrupt",
                              mend="choose one; a subset of a subset gives the combination")
        for name in ("fraction", "corrupt"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"--{name}", got=share, expected="a share above 0 and up to 1",
                                  mend="0.01 means one in a hundred")
        if self.rest not in RESTS:
            raise ConfigError("--rest", got=self.rest, expected=f"one of {', '.join(RESTS)}",
                              mend=nearest(self.rest, RESTS))
        if self.rest != RESTS[0] and self.corrupt is not None:
            raise ConfigError("--rest", got="it with --corrupt, which leaves no sample out",
                              expected="--rest with --list or --fraction",
                              mend="corrupt first, then take the subset of what that wrote")


def choose(src: ShardSet, choice: Choice, seed: int) -> Catalogue:
    """The catalogue of the new folder. Classes keep their numbers, also those that lose every sample."""
    every = samples = _samples(src)
    inherited = {name: value for name, value in src.made.items() if name in ("dataset", "second")}
    made = {"verb": "subset", "of": src.digest, **inherited}
    if choice.list is not None:
        samples = _listed(samples, read_names(choice.list, "--list"), choice.list)
        made["list"] = len(samples)
    elif choice.fraction is not None:
        samples = _share(samples, choice.fraction, seed)
        made["fraction"] = choice.fraction
    else:
        samples = _corrupted(samples, choice.corrupt, len(src.classes), seed)
        made["corrupt"] = choice.corrupt
    if choice.rest == "unlabelled":
        made["rest"] = choice.rest
        samples = _unlabelled(every, {sample.source for sample in samples})
    return Catalogue(src.classes, samples, made)


def _samples(src: ShardSet) -> list[Sample]:
    """Every sample of the folder in the order of its names, located inside its shard."""
    samples = []
    for number in range(len(src.shards)):
        path = src.path(number)
        with open(path, "rb") as file:
            for key, members in tars.walk(file):
                row = tars.row_of(number, members, -1)
                label, note = -1, {}
                if "cls" in members:
                    label = int(os.pread(file.fileno(), members["cls"].size, members["cls"].offset))
                if "json" in members:
                    note = tars.note(os.pread(file.fileno(), members["json"].size, members["json"].offset))
                source = note.get("source", source_stem(key))
                second = (row[5], row[6]) if row[6] else None
                # shards never change once written, so their name, not their time, stands for the content
                samples.append(Sample(source, label, os.fspath(path), row[2], row[3], 0, second,
                                      note.get("original_label"), _more(note)))
    if not samples:
        raise DataError(f"shard folder {src.root}", got="no sample", expected="at least one", mend="check the path")
    return sorted(samples)


def _more(note: dict) -> str | None:
    """What KEY.json says beyond what the sample itself says (boxes, for detection): it travels with the image."""
    rest = {name: value for name, value in note.items() if name not in ("source", "original_label")}
    return json.dumps(rest, separators=(",", ":")) if rest else None


def _listed(samples: list[Sample], names: list[str], path: Path) -> list[Sample]:
    """The samples that a list names: by source name, by key, or by file name alone where that is unique."""
    exact: dict[str, int] = {}
    loose: dict[str, set[int]] = {}
    for i, sample in enumerate(samples):
        stem = drop_suffix(sample.source)
        for name in (sample.source, stem, key_of(sample.source)):
            exact[name] = i
        for name in (sample.source, stem):
            loose.setdefault(name.rpartition("/")[2], set()).add(i)
    chosen, unknown, unclear = set(), [], []
    for name in names:
        found = {exact[name]} if name in exact else loose.get(name, set())
        if len(found) == 1:
            chosen |= found
        else:
            (unclear if found else unknown).append(name)
    if unknown or unclear:
        parts = [f"{len(unknown)} names that are not in the shards ({some(unknown)})"] * bool(unknown)
        parts += [f"{len(unclear)} names that several samples have ({some(unclear)})"] * bool(unclear)
        raise DataError(f"--list {path}", got=" and ".join(parts),
                        expected="source names, keys, or file names that are unique in the shards",
                        mend="compare with the names that `tar tf` lists in a shard of SRC")
    return [samples[i] for i in sorted(chosen)]


def _share(samples: list[Sample], fraction: float, seed: int) -> list[Sample]:
    """``fraction`` of every class, rounded, and at least one sample of each."""
    from hpcssl import rng

    labels = np.array([sample.label for sample in samples])
    chosen: list[int] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = rng.permutation(rng.key(seed, "subset", "fraction", int(label)), len(members))
        chosen += members[order[: max(1, round(fraction * len(members)))]].tolist()
    return [samples[i] for i in sorted(chosen)]


def _unlabelled(samples: list[Sample], labelled: set[str]) -> list[Sample]:
    """All samples; those not named in ``labelled`` lose their label and every note of it. Targets become zeros."""
    def bare(sample: Sample) -> Sample:
        targets = json.loads(sample.more or "{}").get("targets")
        more = None if targets is None else json.dumps({"targets": [0] * len(targets)})
        return sample._replace(label=-1, original_label=None, more=more)

    return [sample if sample.source in labelled else bare(sample) for sample in samples]


def _corrupted(samples: list[Sample], share: float, classes: int, seed: int) -> list[Sample]:
    """All samples; ``share`` of the labels become another class, each other class being as likely."""
    from hpcssl import rng

    if classes < 2 or any(sample.label < 0 for sample in samples):
        raise DataError("--corrupt", got=f"{classes} classes" if classes < 2 else "samples without a label",
                        expected="two classes or more, and a label for every sample",
                        mend="choose shards with labels")
    hit = rng.permutation(rng.key(seed, "subset", "corrupt", "which"), len(samples))[: round(share * len(samples))]
    moves = 1 + (rng.uniform(rng.key(seed, "subset", "corrupt", "to"), len(samples)) * (classes - 1)).astype(int)
    out = list(samples)
    for i in hit:
        old = samples[i]
        first = old.label if old.original_label is None else old.original_label
        out[i] = old._replace(label=int((old.label + moves[i]) % classes), original_label=first)
    return out
