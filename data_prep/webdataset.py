"""WebDataset tars that others wrote: read in place, sample by sample, to be written again as shards with an index.

They differ in what a reader must take on trust: members of a sample that do not lie side by side (a reader in sequence
makes two halves of them, in silence), names that repeat from tar to tar, numbers as class names. Here a sample is what
has one key in one tar, wherever its members lie.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from data_prep import tars
from data_prep.catalogue import Catalogue, Sample, read_names, refuse_clashes, some
from data_prep.sources import members
from hpcssl.data.shards import IMAGE_SUFFIXES, INDEX
from hpcssl.errors import DataError

log = logging.getLogger("hpcssl")


def read(src: Path, classes_file: Path | None) -> Catalogue:
    """The samples of the tars in folder ``src`` (KEY.jpg|jpeg|png with KEY.cls, a number from 0, where there is one),
    named TAR/KEY. Class names come from ``--classes``, in the order of the numbers. Raises DataError, ConfigError."""
    if not src.is_dir():
        raise DataError(f"source {src}", got="a file" if src.exists() else "no such folder",
                        expected="a folder of WebDataset tars", mend="check the path")
    if (src / INDEX).exists():
        raise DataError(f"source {src}", got=f"a folder with an {INDEX}, which hpcssl-shard wrote",
                        expected="tars that others wrote", mend="use it as it is: data.train takes this folder")
    paths = sorted(src.glob("*.tar"))
    if not paths:
        found = sorted(p.name for p in src.iterdir())
        raise DataError(f"source {src}", got=f"no *.tar ({some(found) or 'nothing'})", expected="WebDataset tars in it",
                        mend="expand compressed ones first; a folder of images goes through `hpcssl-shard images`")
    samples = sorted(sample for path in paths for sample in _tar(path))
    refuse_clashes([sample.source for sample in samples], src)
    most = max((sample.label for sample in samples), default=-1)
    names = [str(n) for n in range(most + 1)] if classes_file is None else read_names(classes_file, "--classes")
    if most >= len(names):
        raise DataError(f"--classes {classes_file}", got=f"{len(names)} names, and a label {most} in the tars",
                        expected="a name for every label, counted from 0", mend="add the missing lines")
    return Catalogue(names, samples)


def _tar(path: Path) -> list[Sample]:
    found: dict[str, dict[str, tuple[int, int]]] = {}
    last, apart = None, []
    for name, offset, size in members(path, path, 0, path.stat().st_size):
        key, suffix = tars.split(name)
        kind = suffix.lower()
        parts = found.setdefault(key, {})
        if parts and key != last:
            apart.append(key)
        if kind in parts:
            raise DataError(f"tar {path}", got=f"{name} twice", expected="each member of a sample once",
                            mend="remove one of them: which one is meant cannot be known")
        parts[kind] = offset, size
        last = key
    if apart:
        log.warning("%s: %d samples have members that do not lie side by side (%s); they are joined", path, len(apart),
                    some(apart))
    stamp = path.stat().st_mtime_ns
    with open(path, "rb") as file:
        return [_sample(path, key, parts, file.fileno(), stamp) for key, parts in found.items()]


def _sample(path: Path, key: str, parts: dict[str, tuple[int, int]], fd: int, stamp: int) -> Sample:
    kinds = [suffix for suffix in parts if f".{suffix}" in IMAGE_SUFFIXES]
    if len(kinds) != 1:
        raise DataError(f"tar {path}", got=f"sample {key} with {', '.join(sorted(parts))}",
                        expected="one image (.jpg, .jpeg or .png) in every sample", mend="remove this sample, or what "
                        "is too much in it; `tar tf` lists the members")
    label = -1
    if "cls" in parts:
        offset, size = parts["cls"]
        text = os.pread(fd, size, offset).strip()
        if not text.isdigit():
            raise DataError(f"tar {path}", got=f"{key}.cls, which says {text[:20]!r}", expected="a number from 0",
                            mend="write the tars again with class numbers")
        label = int(text)
    return Sample(f"{path.stem}/{key}.{kinds[0]}", label, os.fspath(path.absolute()), *parts[kinds[0]], stamp)
