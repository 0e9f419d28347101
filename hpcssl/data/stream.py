"""Download files of a shard folder from an address: http, an object store, or a shell command.

Bytes come through webdataset's ``gopen``, which starts curl, gsutil or a shell command. This module adds what gopen
does not do: it cuts a transfer that stalls, compares every file with the sha256 in the index, retries, and finally
raises an error that says how many attempts were made and what arrived.

curl itself retries up to thirty times, two seconds apart and without a message, where a server answers 408, 429 or
5xx. That waiting counts as a stall like any other silence.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import re
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hpcssl.data.address import TransferError, check_address, exit_error, probe_server
from hpcssl.data.node_folder import mark_verified
from hpcssl.data.shards import INDEX, TABLE, Shard, ShardSet, max_index_bytes, max_page_bytes
from hpcssl.errors import ConfigError, DataError
from hpcssl.files import atomic_file, atomic_write

LOG = logging.getLogger("hpcssl")
_Result = TypeVar("_Result")
_BLOCK, _INDEX_LIMIT = 1 << 20, 1 << 30  # bytes per read; the largest index.json that is accepted
_PAUSE_S, _MAX_PAUSE_S = 1.0, 30.0  # before the second attempt, doubled for each further one up to the maximum
_FIX = "check that the server works and holds the shards that its index describes, then run the same command again"


class Remote:
    """The shard folder at an address such as ``https://host/train`` or ``file:///archive/train``.

    Args:
        address: The folder's address, or ``pipe:COMMAND`` with ``{}`` in place of the file name.
        allow_pipe: Whether ``pipe:`` addresses are allowed.
        stall_s: Seconds without a byte after which a transfer is cut.
        tries: Attempts per file before the error.
        stopped: Polled while waiting; every transfer ends once it returns True.
        key: Recipe key or option to name in errors.

    Raises:
        ConfigError: If the address may not be opened (see ``check_address``).
    """

    def __init__(
        self,
        address: str,
        *,
        allow_pipe: bool = False,
        stall_s: float = 60.0,
        tries: int = 5,
        stopped: Callable[[], bool] = lambda: False,
        key: str = "data.train",
    ):
        check_address(address, allow_pipe=allow_pipe, key=key)
        self.address, self.allow_pipe, self.stall_s, self.tries = address, allow_pipe, stall_s, tries
        self.stopped, self._key = stopped, key

    def read_index(self) -> str:
        """Download ``index.json``.

        Returns:
            The text of the file as the server has it now.

        Raises:
            DataError: If the file cannot be downloaded or is not JSON.
        """

        def download() -> str:
            body = b"".join(self._index_blocks(INDEX, _INDEX_LIMIT))
            try:
                json.loads(body)
                return body.decode()
            except ValueError as error:
                raise TransferError(f"{len(body)} bytes that are not an index ({error})") from error

        return self._retry(
            INDEX,
            download,
            expected="an index.json written by hpcssl-shard",
            fix="check the address: it must name the folder that holds index.json",
        )

    def open(self, text: str | None = None) -> ShardSet:
        """Open the set that the remote index describes. Shards are not downloaded.

        Args:
            text: The content of ``index.json`` where the caller already has it.

        Raises:
            DataError: If the index files cannot be downloaded or do not agree with each other.
        """
        what, text = f"the index of {self.address}", self.read_index() if text is None else text
        return ShardSet.from_index(what, self.address, text, partial(self.read_file, text))

    def read_file(self, text: str, name: str, sha256: str) -> mmap.mmap:
        """Download an index file and verify its sha256.

        Args:
            text: The content of ``index.json``, which limits the size of the file.
            name: The file.
            sha256: Its sha256.

        Returns:
            The content, mapped from a temporary file without a name: it may be larger than the memory.

        Raises:
            DataError: If no attempt gives a file with this sha256.
            OSError: If the temporary file cannot be written.
        """
        return self._read_verified(name, sha256, INDEX, max_index_bytes(json.loads(text), name))

    def fetch_page(self, shards: ShardSet, number: int, folder: Path) -> None:
        """Download the page of a shard to a folder, where it appears only when its sha256 agrees.

        Args:
            shards: The set; nothing is downloaded if its index is not paged.
            number: Number of the shard.
            folder: The folder.

        Raises:
            DataError: If no attempt gives a file with this sha256.
            OSError: If the file cannot be written.
        """
        if shards.table is not None:
            shard = shards.shards[number]
            body = self._read_verified(shard.page, shards.table.page_sha256(number), TABLE, max_page_bytes(shard))
            atomic_write(folder / shard.page, body)

    def _read_verified(self, name: str, sha256: str, source: str, most: int) -> mmap.mmap:
        def download() -> mmap.mmap:
            digest = hashlib.sha256()
            with tempfile.TemporaryFile() as file:
                for block in self._index_blocks(name, most):
                    digest.update(block)
                    file.write(block)
                file.flush()
                if digest.hexdigest() != sha256:
                    raise TransferError(f"{file.tell()} bytes with another sha256")
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

        return self._retry(name, download, expected=f"sha256 {sha256[:12]}… as recorded in {source}", fix=_FIX)

    def fetch(self, shard: Shard, target: Path) -> None:
        """Download a shard to ``target``, which appears only when it is complete and its sha256 agrees.

        Raises:
            DataError: If no attempt gives the shard that the index describes.
            OSError: If the file cannot be written.
        """

        def download() -> None:
            digest, count = hashlib.sha256(), 0
            with atomic_file(target) as file:
                for block in self._blocks(shard.name):
                    digest.update(block)
                    count += len(block)
                    if count > shard.bytes:
                        raise TransferError(f"more than {shard.bytes} bytes")
                    file.write(block)
                if count != shard.bytes:
                    raise TransferError(f"only {count} bytes")
                if digest.hexdigest() != shard.sha256:
                    raise TransferError(f"other content (sha256 {digest.hexdigest()[:12]}…)")
                mark_verified(file, shard)

        expected = f"{shard.bytes} bytes with sha256 {shard.sha256[:12]}… as recorded in {INDEX}"
        self._retry(shard.name, download, expected=expected, fix=_FIX)

    def _index_blocks(self, name: str, most: int) -> Iterator[bytes]:
        count = 0
        for block in self._blocks(name):
            count += len(block)
            if count > most:
                raise TransferError(f"more than {most} bytes")
            yield block

    def _retry(self, name: str, download: Callable[[], _Result], *, expected: str, fix: str) -> _Result:
        pause = _PAUSE_S
        for attempt in range(1, self.tries + 1):
            try:
                return download()
            except TransferError as failure:
                if failure.final or attempt == self.tries or self.stopped():
                    raise DataError(
                        f"{name} of {self.address}",
                        got=f"{failure}, at attempt {attempt} of {self.tries}",
                        expected=expected,
                        fix=fix,
                    ) from failure
                LOG.warning(
                    "%s of %s: %s. Retrying in %.3g s (attempt %d of %d).",
                    name,
                    self.address,
                    failure,
                    pause,
                    attempt + 1,
                    self.tries,
                )
            end = time.monotonic() + pause
            while time.monotonic() < end and not self.stopped():
                time.sleep(min(0.2, pause))
            pause = min(2 * pause, _MAX_PAUSE_S)
        raise AssertionError("tries is 1 or more")

    def _file_address(self, name: str) -> str:
        """The address of one file. Refused if the environment variable GOPEN_REWRITE would turn it into a bad one."""
        from webdataset.gopen import rewrite_url

        is_pipe = self.address.startswith("pipe:")
        address = self.address.replace("{}", name) if is_pipe else f"{self.address.rstrip('/')}/{name}"
        try:
            rewritten = rewrite_url(address)
        except (ValueError, re.error) as error:
            raise ConfigError(
                "environment variable GOPEN_REWRITE", got=str(error), expected="PATTERN=TEXT;…", fix="unset it"
            ) from error
        if rewritten != address:
            check_address(rewritten, allow_pipe=self.allow_pipe, key=f"{self._key} after GOPEN_REWRITE")
        return address

    def _blocks(self, name: str) -> Iterator[bytes]:
        """Yield a file's bytes as they arrive. Raises ``TransferError``."""
        from webdataset.gopen import gopen  # imported late: it imports the whole library

        address = self._file_address(name)
        try:
            file: Any = gopen(address)
        except (OSError, ValueError) as error:  # the program is not installed, or a file: does not exist
            raise TransferError(f"{type(error).__name__}: {error}", final=True) from error
        process, stream = getattr(file, "proc", None), getattr(file, "stream", file)
        try:
            while block := self._next_block(stream, address):
                yield block
            if process is not None and (code := self._wait_for_exit(process)):
                raise exit_error(code, address)
        finally:
            if process is not None:
                process.kill()
            with contextlib.suppress(OSError):
                stream.close()
            if process is not None:
                process.wait()

    def _next_block(self, stream: Any, address: str) -> bytes:
        deadline = time.monotonic() + self.stall_s
        ready = select.poll()  # select() fails for descriptors above 1023, and a reader keeps every shard open
        ready.register(stream, select.POLLIN)
        while not ready.poll(min(200.0, 1e3 * self.stall_s)):
            if self.stopped():
                raise TransferError("stopped, because the attempt ends", final=True)
            if time.monotonic() > deadline:
                raise TransferError(f"no byte for {self.stall_s:g} s{probe_server(address)[0]}")
        try:
            block: bytes = stream.read1(_BLOCK)
        except OSError as error:
            raise TransferError(f"{type(error).__name__}: {error}") from error
        return block

    def _wait_for_exit(self, process: subprocess.Popen[bytes]) -> int:
        end = time.monotonic() + self.stall_s
        while time.monotonic() < end and not self.stopped():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(min(0.2, self.stall_s))
        message = f"a command that is still running {self.stall_s:g} s after its last byte"
        raise TransferError(message, final=self.stopped())
