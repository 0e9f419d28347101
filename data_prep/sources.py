"""Where images come from: folders, archives, archives of archives. Archives are read in place, never unpacked.

An uncompressed tar is as good as a folder once its headers are known: every image lies at an offset. A compressed
one has no offsets, so it is expanded once, next to the shards, and the copy is removed in the end.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import posixpath
import tarfile
import zlib
from pathlib import Path

from data_prep.catalogue import WHOLE, Catalogue, Found, by_labels, catalogue, refuse_case, some
from hpcssl.errors import ConfigError, DataError

_EXPANDERS = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open, b"BZh": bz2.open}


def find(src: Path, under: str, scratch: Path) -> Found:
    """The files of a folder or of an archive, below ``under``; ``scratch`` is where an archive may be expanded."""
    if not src.exists():
        raise DataError(f"source {src}", got="no such file or folder", expected="a folder of images or a tar of one",
                          mend="check the path")
    if src.is_dir():
        root = src / under
        if not root.is_dir():
            raise ConfigError(f"--under {under}", got=f"no such folder in {src}",
                              expected=f"one of {some(sorted(p.name for p in src.iterdir() if p.is_dir()), 9)}",
                              mend="check its spelling")
        return _scan_folder(root.absolute())
    found = Found(src, os.fspath(expanded(src, scratch)))
    stamp, prefix = src.stat().st_mtime_ns, posixpath.normpath(under) + "/" if under else ""
    tops = set()
    for name, offset, size in members(Path(found.path), src, 0, os.path.getsize(found.path), found.folders, prefix):
        tops.add(name.split("/", 1)[0])
        if name.startswith(prefix):
            found.take(name[len(prefix):], offset, size, stamp)
    if under and not found.members and not found.folders:
        raise ConfigError(f"--under {under}", got=f"no such folder in {src}",
                          expected=f"one of {some(sorted(tops), 9)}", mend="check its spelling")
    return found


def _scan_folder(root: Path) -> Found:
    """Walk a folder, links followed. Raises DataError for a folder that cannot be read, or a link to its own parent."""
    found = Found(root, os.fspath(root))

    def walk(folder: str, relative: str, above: frozenset) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            here = os.stat(folder)
        except OSError as error:
            raise DataError(f"folder {folder}", got=error.strerror, expected="a folder that can be read",
                            mend="ask for the right to read it, or move it out of the source") from error
        if (here.st_dev, here.st_ino) in above:
            raise DataError(f"folder {folder}", got="a link back to a folder that contains it",
                            expected="a tree without circles", mend="remove this link")
        for entry in entries:
            name = f"{relative}{entry.name}"
            if entry.is_dir() and not entry.name.startswith("."):
                found.folders.add(name.split("/", 1)[0])
                walk(entry.path, f"{name}/", above | {(here.st_dev, here.st_ino)})
            elif entry.is_file() or entry.is_symlink():
                found.take(name, WHOLE, *_stat(entry))

    walk(os.fspath(root), "", frozenset())
    return found


def _stat(entry: os.DirEntry) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError:  # a link into nothing: the writer will name it with its reason, as any file it cannot read
        return 0, 0
    return status.st_size, status.st_mtime_ns


def expanded(archive: Path, scratch: Path) -> Path:
    """The archive itself, or its expanded copy at ``scratch`` when it is compressed."""
    with _reading(archive), open(archive, "rb") as file:
        start = file.read(6)
    opener = next((opener for magic, opener in _EXPANDERS.items() if start.startswith(magic)), None)
    if opener is None:
        return archive.absolute()
    with _reading(archive):
        file = opener(archive, "rb")
    with open(scratch, "wb") as copy, file:
        while True:
            with _reading(archive):  # only the reads: an error of a write is the disk's, not the archive's
                chunk = file.read(1 << 22)
            if not chunk:
                return scratch
            copy.write(chunk)


class _reading:
    """Turn what can go wrong while reading an archive into one sentence."""

    def __init__(self, archive: Path, part: str = ""):
        self.what = f"archive {archive}" + (f", {part} in it" if part else "")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError | EOFError | tarfile.TarError | lzma.LZMAError | zlib.error):
            raise DataError(self.what, got=f"{error}", expected="a whole tar archive",
                            mend="download or copy it again and compare its size or checksum") from error


class _Window:
    """A part of a file as a file: an archive that lies, uncompressed, inside another one."""

    def __init__(self, file, start: int, size: int):
        self.file, self.start, self.size, self.at = file, start, size, 0

    def read(self, n: int = -1) -> bytes:
        left = max(self.size - self.at, 0)
        self.file.seek(self.start + self.at)
        data = self.file.read(left if n < 0 else min(n, left))
        self.at += len(data)
        return data

    def seek(self, to: int, whence: int = 0) -> int:
        self.at = to + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at


def members(path: Path, archive: Path, start: int, size: int, folders: set[str] | None = None, prefix: str = "",
            part: str = ""):
    """Yield (name, absolute offset, size) of the regular files of a tar at [start, start + size) of ``path``.

    Raises DataError, naming ``archive`` (and ``part``, the archive in it), for an end that is missing or a header
    that is damaged: ``tarfile`` itself stops there in silence, as if the archive had ended.
    """
    with open(path, "rb") as file:
        window = _Window(file, start, size)
        with _reading(archive, part), tarfile.open(fileobj=window, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # tarfile keeps every header it has seen: gigabytes for ImageNet
                name = posixpath.normpath(info.name).lstrip("/")
                if ".." in name.split("/"):
                    raise tarfile.TarError(f"a name that leads out of the archive ({info.name})")
                if info.isdir() and folders is not None and name.startswith(prefix) and name + "/" != prefix:
                    top = name[len(prefix):].split("/", 1)[0]
                    if top != "." and not top.startswith("."):
                        folders.add(top)
                if info.issparse():
                    raise tarfile.TarError(f"a sparse file ({name}), which cannot be read in place")
                if info.isreg():
                    yield name, start + info.offset_data, info.size
            window.seek(tar.offset)
            end = window.read(tarfile.BLOCKSIZE)
            if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
                problem = "a damaged header" if end else "no end mark: it was cut"
                raise tarfile.TarError(f"{problem} at byte {tar.offset} of {size}")


def imagenet_train(archive: Path, scratch: Path) -> Catalogue:
    """ILSVRC2012_img_train.tar: a tar of one tar per class, indexed in place. Sources are named as if unpacked."""
    if not archive.is_file():
        raise ConfigError(f"TRAIN_TAR {archive}", got="no such file", expected="ILSVRC2012_img_train.tar as downloaded",
                          mend="check the path")
    plain = expanded(archive, scratch)
    found = Found(archive, os.fspath(plain))
    stamp, total = archive.stat().st_mtime_ns, plain.stat().st_size
    inner = list(members(plain, archive, 0, total))
    wrong = [name for name, _, _ in inner if not name.endswith(".tar")]
    if wrong or not inner:
        raise DataError(f"TRAIN_TAR {archive}", got=some(wrong) or "no class archive",
                        expected="one tar per class, such as n01440764.tar",
                        mend="give the training archive first and the validation archive second")
    for name, start, size in inner:
        wnid = posixpath.basename(name).removesuffix(".tar")
        found.folders.add(wnid)
        for image, offset, length in members(plain, archive, start, size, part=name):
            found.take(f"{wnid}/{posixpath.basename(image)}", offset, length, stamp)
    empty = sorted(found.folders - {m[0].split("/", 1)[0] for m in found.members})
    if empty:
        raise DataError(f"TRAIN_TAR {archive}", got=f"class archives without an image: {some(empty)}",
                        expected="images in every class archive", mend="download it again")
    classes = sorted(found.folders)
    refuse_case(classes, f"class archives of {archive}")
    number = {name: i for i, name in enumerate(classes)}
    return catalogue(found, classes, [number[m[0].split("/", 1)[0]] for m in found.members])


def imagenet_val(archive: Path, scratch: Path, labels: dict[str, str], labels_from: str,
                 classes: list[str]) -> Catalogue:
    """ILSVRC2012_img_val.tar: a flat tar of photographs, labelled by name with the training set's classes."""
    if not archive.is_file():
        raise ConfigError(f"VAL_TAR {archive}", got="no such file", expected="ILSVRC2012_img_val.tar as downloaded",
                          mend="check the path")
    plain = expanded(archive, scratch)
    found = Found(archive, os.fspath(plain))
    for name, offset, size in members(plain, archive, 0, plain.stat().st_size):
        found.take(posixpath.basename(name), offset, size, archive.stat().st_mtime_ns)
    return by_labels(found, labels, labels_from, classes=classes)

