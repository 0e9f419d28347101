"""A shard folder at an address (http, an object store, a command): its files, whole and verified, or an error.

Bytes come through webdataset's own ``gopen``, which starts curl, gsutil or a shell command. What that leaves silent is
caught here: a transfer without a byte for a while is cut, whatever is not what the index records is asked for again,
and who gives up says after how many tries and what came. curl asks again by itself where a server answers 408, 429 or
5xx (thirty times, every two seconds, without a word), and its wait counts as silence like any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import select
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from hpcssl.data.shards import INDEX, Shard, ShardSet
from hpcssl.errors import ConfigError, DataError
from hpcssl.files import atomic_file

log = logging.getLogger("hpcssl")
# The library starts these with a list of arguments. Its handler of pipe: gives the whole text to a shell.
SCHEMES = ("http", "https", "ftps", "sftp", "gs", "file")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
# What no address needs: blanks, what a shell would read, and what curl or gsutil would expand
_SHELL = re.compile(r"[\s\x00-\x1f\x7f\"'`<>|;\\^*{}\[\]]|\$\(")
_LOGIN = re.compile(r"://[^/\s]*@")
_BLOCK, _INDEX_LIMIT, _PAUSE_S, _PAUSES_S = 1 << 20, 1 << 30, 1.0, 30.0
_CURL = {6: "no such host", 7: "no connection", 18: "a transfer cut half-way", 22: "an HTTP error", 28: "a timeout",
         35: "no secure connection", 52: "no answer", 56: "a broken connection", 60: "a certificate that is not known"}


def is_remote(address: str) -> bool:
    """Whether this is an address and not a folder (one whose name has a colon is written ``./NAME:X``)."""
    return _SCHEME.match(address) is not None


def check_address(address: str, *, allow_pipe: bool, key: str = "data.train") -> None:
    """Raise ``ConfigError`` for an address that may not be opened. It is not repeated where it may hold a secret.

    ``pipe:COMMAND``, a shell command that prints the file whose name is put in place of ``{}``, needs ``allow_pipe``:
    a recipe must not bring commands of its own.
    """
    if _LOGIN.search(address):
        raise ConfigError(key, got="an address with a user name or a password in it", expected="an address without: it "
                          "is written into config.yaml and logs", mend="put `machine HOST login USER password WORD` "
                          "into ~/.netrc and `netrc` into ~/.curlrc, both readable by you alone")
    scheme = address.partition(":")[0].lower() if is_remote(address) else "no scheme"
    if scheme == "pipe":
        if not allow_pipe:
            mend = "give --allow-pipe if this shell command is your own"
            raise ConfigError(key, got=f"{address!r}, a shell command", expected="an address",
                              mend=mend if key.startswith("data.train") else "name a folder or another address")
        if "{}" not in address:
            raise ConfigError(key, got=repr(address), expected="{} where the name of a file belongs",
                              mend="such as pipe:cat /archive/train/{}")
        return
    if scheme not in SCHEMES:
        raise ConfigError(key, got=f"{address!r} ({scheme})", expected="one of " + ", ".join(f"{s}:" for s in SCHEMES),
                          mend="check its spelling; a folder on this machine is named by its path")
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise ConfigError(key, got=f"{address!r} ({error})", expected="the address of a folder",
                          mend="check its spelling") from error
    if parts.query or parts.fragment or "?" in address:
        raise ConfigError(key, got="an address with a query, which may hold a token", expected="the address of a "
                          "folder", mend="name the folder that holds index.json; ~/.netrc holds passwords")
    if found := _SHELL.search(re.sub(r"^\w+://\[[0-9A-Fa-f:.]+\]", "", address)):  # but an IPv6 address in brackets
        raise ConfigError(key, got=f"{address!r}, with {found.group()!r} in it", expected="an address without blanks, "
                          "brackets and shell text", mend="write such a letter as %XX; pipe:COMMAND with --allow-pipe "
                          "runs a command")


class Cut(Exception):
    """A transfer that came to nothing; the text says what came. ``final``: asking again would be in vain."""

    def __init__(self, what: str, *, final: bool = False):
        super().__init__(what)
        self.final = final


class Remote:
    """The shard folder at ``address``, such as ``https://host/train``, ``file:///archive/train`` or ``pipe:cat X/{}``.

    ``stall_s``: a transfer without a byte for so long is cut. ``tries``: how often a file is asked for before the
    error. ``over()``: asked while waiting; True ends every transfer. Raises ``ConfigError`` for the address.
    """

    def __init__(self, address: str, *, allow_pipe: bool = False, stall_s: float = 60.0, tries: int = 5,
                 over: Callable[[], bool] = lambda: False, key: str = "data.train"):
        check_address(address, allow_pipe=allow_pipe, key=key)
        self.address, self.allow_pipe, self.stall_s, self.tries, self.over = address, allow_pipe, stall_s, tries, over
        self._key = key

    def text(self) -> str:
        """``index.json`` as it stands there now. Raises ``DataError``."""
        def once() -> str:
            body = self._small(INDEX)
            try:
                json.loads(body)
                return body.decode()
            except ValueError as error:
                raise Cut(f"{len(body)} bytes that are no index ({error})") from error

        return self._tried(INDEX, once, "an index.json as hpcssl-shard wrote it", "check the address: it names the "
                           "folder that holds index.json, as hpcssl-shard wrote it")

    def open(self, text: str | None = None) -> ShardSet:
        """The set that the index there describes, without its shards. ``text``: its ``index.json``, where known."""
        what = f"the index of {self.address}"
        return ShardSet.described(what, self.address, self.text() if text is None else text, self.body)

    def body(self, name: str, sha256: str) -> bytes:
        """A file beside the index, with this sha256. Raises ``DataError``."""
        def once() -> bytes:
            body = self._small(name)
            if hashlib.sha256(body).hexdigest() != sha256:
                raise Cut(f"{len(body)} bytes with another sha256")
            return body

        return self._tried(name, once, f"sha256 {sha256[:12]}… as {INDEX} records", _MEND)

    def fetch(self, shard: Shard, target: Path) -> None:
        """Write a shard to ``target``, which appears when it is whole and its sha256 agrees.

        Raises ``DataError`` for what came, ``OSError`` of the disk that it is written to.
        """
        def once() -> None:
            digest, count = hashlib.sha256(), 0
            with atomic_file(target) as file:
                for block in self._blocks(shard.name):
                    digest.update(block)
                    count += len(block)
                    if count > shard.bytes:
                        raise Cut(f"more than {shard.bytes} bytes")
                    file.write(block)
                if count != shard.bytes:
                    raise Cut(f"{count} bytes, and then the end")
                if digest.hexdigest() != shard.sha256:
                    raise Cut(f"other bytes (sha256 {digest.hexdigest()[:12]}…)")

        self._tried(shard.name, once, f"{shard.bytes} bytes with sha256 {shard.sha256[:12]}… as {INDEX} records", _MEND)

    def _small(self, name: str) -> bytes:
        parts, count = [], 0
        for block in self._blocks(name):
            parts.append(block)
            count += len(block)
            if count > _INDEX_LIMIT:
                raise Cut(f"more than {_INDEX_LIMIT} bytes")
        return b"".join(parts)

    def _tried(self, name: str, once: Callable, expected: str, mend: str):
        pause = _PAUSE_S
        for number in range(1, self.tries + 1):
            try:
                return once()
            except Cut as cut:
                if cut.final or number == self.tries or self.over():
                    raise DataError(f"{name} of {self.address}", got=f"{cut}, at try {number} of {self.tries}",
                                    expected=expected, mend=mend) from cut
                log.warning("%s of %s: got %s; asked again in %.3g s (try %d of %d)", name, self.address, cut, pause,
                            number + 1, self.tries)
            end = time.monotonic() + pause
            while time.monotonic() < end and not self.over():
                time.sleep(min(0.2, pause))
            pause = min(2 * pause, _PAUSES_S)
        raise AssertionError("tries is 1 or more")

    def _address(self, name: str) -> str:
        """Where a file lies, refused if the environment variable GOPEN_REWRITE would make another kind of it."""
        from webdataset.gopen import rewrite_url

        address = self.address.replace("{}", name) if self.address.startswith("pipe:") else \
            f"{self.address.rstrip('/')}/{name}"
        try:
            meant = rewrite_url(address)
        except (ValueError, re.error) as error:
            raise ConfigError("environment variable GOPEN_REWRITE", got=str(error), expected="PATTERN=TEXT;…",
                              mend="unset it") from error
        if meant != address:
            check_address(meant, allow_pipe=self.allow_pipe, key=f"{self._key} after GOPEN_REWRITE")
        return address

    def _blocks(self, name: str) -> Iterator[bytes]:
        """A file's bytes as they come. Raises ``Cut``."""
        from webdataset.gopen import gopen  # the library imports all of itself

        address = self._address(name)
        try:
            file = gopen(address)
        except (OSError, ValueError) as error:  # a program that is not installed; a file: that is not there
            raise Cut(f"{type(error).__name__}: {error}", final=True) from error
        process, stream = getattr(file, "proc", None), getattr(file, "stream", file)
        try:
            while block := self._next(stream, address):
                yield block
            if process is not None and (code := self._exit(process)):
                raise self._failed(code, address)
        finally:
            if process is not None:
                process.kill()
            with contextlib.suppress(OSError):
                stream.close()
            if process is not None:
                process.wait()

    def _next(self, stream, address: str) -> bytes:
        waited = time.monotonic() + self.stall_s
        ready = select.poll()  # select() knows no file descriptor above 1023, and a reader keeps every shard open
        ready.register(stream, select.POLLIN)
        while not ready.poll(min(200.0, 1e3 * self.stall_s)):
            if self.over():
                raise Cut("the end of the attempt", final=True)
            if time.monotonic() > waited:
                raise Cut(f"no byte for {self.stall_s:g} s{_said(address)[0]}")
        try:
            return stream.read1(_BLOCK)
        except OSError as error:
            raise Cut(f"{type(error).__name__}: {error}") from error

    def _exit(self, process: subprocess.Popen) -> int:
        end = time.monotonic() + self.stall_s
        while time.monotonic() < end and not self.over():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(min(0.2, self.stall_s))
        raise Cut(f"a command that does not end {self.stall_s:g} s after its last byte", final=self.over())

    def _failed(self, code: int, address: str) -> Cut:
        program = {"pipe": "the command", "gs": "gsutil"}.get(address.partition(":")[0], "curl")
        known = f" ({_CURL[code]})" if program == "curl" and code in _CURL else ""
        said, final = _said(address)
        return Cut(f"exit code {code} of {program}{known}{said}", final=final and code == 22)


_MEND = "see whether the server is well and holds the shards that its index describes; then run the same command again"


def _said(address: str) -> tuple[str, bool]:
    """What an http server answers when it is asked for one byte of it, in words, and whether that is its last word:
    curl only says that it failed, and webdataset not even that."""
    from webdataset.gopen import rewrite_url

    address = rewrite_url(address)
    if not address.startswith(("http:", "https:")):
        return "", False
    try:
        asked = urllib.request.Request(address, headers={"Range": "bytes=0-0"})
        with urllib.request.urlopen(asked, timeout=5) as answer:
            code = answer.status
    except urllib.error.HTTPError as error:
        code = error.code
    except (OSError, ValueError, HTTPException):
        return "; asked again, the server does not answer", False
    if code < 400:
        return "", False
    return f"; asked again, the server answers HTTP {code}", code < 500 and code not in (408, 425, 429)
