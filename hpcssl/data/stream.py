"""Shards read from elsewhere (http, object stores) through webdataset, for those who cannot copy them to a disk.

A stream can only be read from its front: there is no random access and no exact resume as ``data/reader.py`` gives.
What the library leaves silent is caught here: a shard that ends early, or differs from the index, is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from urllib.parse import urlparse

from webdataset.gopen import gopen, rewrite_url
from webdataset.tariterators import group_by_keys, tar_file_iterator

from hpcssl.data.shards import FORMAT, INDEX, Shard
from hpcssl.errors import DataError

# The library starts these with a list of arguments. Its handler of pipe: gives the whole text to a shell.
_SCHEMES = ("http", "https", "ftps", "sftp", "gs", "file")
_NAME = re.compile(r"[\w-][\w.-]*\.tar")
_IMAGES = ("jpg", "jpeg", "png")
_BLOCK = 1 << 20


class Stream:
    """The samples of a shard folder at ``url``, in order.

    ``url``: the folder, such as ``https://host/train``; its ``index.json`` says which shards there are. ``pipe:`` (a
    shell command that prints the file whose name is put in place of ``{}``) runs only with ``allow_pipe``, since a
    recipe must not bring commands of its own. Raises ``DataError``.
    """

    def __init__(self, url: str, *, allow_pipe: bool = False):
        self.url, self.allow_pipe = url, allow_pipe
        try:
            meta = json.loads(_Hashed(self._open(INDEX)).rest())
            self.shards = [Shard(**shard) for shard in meta["shards"]]
            self.classes: list[str] = meta["classes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"the index of {url}", got=f"{type(error).__name__}: {error}",
                            expected=f"{INDEX} as hpcssl-shard wrote it",
                            mend="check the address: it names the folder that holds index.json") from error
        if meta.get("format") != FORMAT:
            raise DataError(f"the index of {url}", got=f"format {meta.get('format')}", expected=f"format {FORMAT}",
                            mend="write the shards again with this version's hpcssl-shard")

    def __iter__(self) -> Iterator[tuple[str, bytes, int]]:
        return self.samples(range(len(self.shards)))

    def samples(self, shards: Iterable[int]) -> Iterator[tuple[str, bytes, int]]:
        """(key, encoded image, label or -1) of every sample of the shards with these numbers, in their order."""
        for number in shards:
            yield from self._shard(self.shards[number])

    def _shard(self, shard: Shard) -> Iterator[tuple[str, bytes, int]]:
        what, seen = f"shard {shard.name} of {self.url}", 0
        try:
            stream = _Hashed(self._open(shard.name))
            files = ({**file, "__url__": shard.name} for file in tar_file_iterator(stream))
            for sample in group_by_keys(files):
                image = next((sample[suffix] for suffix in _IMAGES if suffix in sample), None)
                if image is None:
                    raise ValueError(f"{sample['__key__']} without an image")
                seen += 1
                yield sample["__key__"], image, int(sample.get("cls", b"-1"))
            stream.rest()
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            raise DataError(what, got=f"{type(error).__name__} after {seen} samples: {error}",
                            expected=f"{shard.samples} samples",
                            mend="check the address and the connection, and run again") from error
        found = (stream.count, seen, stream.hash.hexdigest()[:12])
        wanted = (shard.bytes, shard.samples, shard.sha256[:12])
        if found != wanted:
            raise DataError(what, got="{} bytes, {} samples, sha256 {}…".format(*found),
                            expected="{} bytes, {} samples, sha256 {}…".format(*wanted),
                            mend="copy this shard there again: it is not the one that the index describes")

    def _open(self, name: str):
        if name != INDEX and not _NAME.fullmatch(name):
            raise DataError(f"the index of {self.url}", got=f"a shard named {name!r}", expected="plain names *.tar",
                            mend="do not use this index: a name must not lead elsewhere")
        if self.url.startswith("pipe:"):
            address = self.url.replace("{}", name)
        else:
            address = f"{self.url.rstrip('/')}/{name}"
        scheme = urlparse(rewrite_url(address)).scheme  # GOPEN_REWRITE may turn an address into another
        if scheme == "pipe" and self.allow_pipe:
            return gopen(address)
        if scheme not in _SCHEMES:
            raise DataError(f"the address {self.url}", got=f"{scheme or 'no scheme'}:",
                            expected=", ".join(f"{s}:" for s in _SCHEMES),
                            mend="give --allow-pipe if this shell command is your own" if scheme == "pipe" else
                            "name the folder with its scheme; a folder on this machine needs no stream")
        return gopen(address)


class _Hashed:
    """A file that counts and hashes what is read from it, so that a stream cut short cannot pass for a whole one."""

    def __init__(self, file):
        self.file, self.hash, self.count = file, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.hash.update(data)
        self.count += len(data)
        return data

    def rest(self) -> bytes:
        """Everything to the end, and the file is closed: where a transfer failed, this raises."""
        parts = []
        while part := self.read(_BLOCK):
            parts.append(part)
        self.file.close()
        return b"".join(parts)
