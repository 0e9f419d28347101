"""Shards of a remote set on this node's disk: downloaded before they are needed, and removed when they were read.

The order (``data/order.py``) determines which shards a step reads. A thread downloads them in that order, up to a
limit of bytes, and removes those that training has passed. Training reads files as it does for any other set: the same
batches, and a start at any step.

The processes of a node share the folder. Each shard has a lock file, which the kernel frees when its holder ends: while
one process downloads a shard, the others take the next ones. A shard has its name once it is complete and verified.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from hpcssl.data import node_folder
from hpcssl.data.address import check_stage_dir, is_remote
from hpcssl.data.order import Order
from hpcssl.data.shards import ShardSet, index_digest
from hpcssl.data.stage import stage_index
from hpcssl.data.stream import Remote
from hpcssl.errors import DataError

LOG = logging.getLogger("hpcssl")
_RETRY_S = 10.0  # seconds before the thread tries again after a download that failed for good
_SLACK = 4  # steps that the loader and the other ranks may be apart from this rank's step


def open_shard_set(
    address: str | Path, *, stage: str = "", key: str, stall_s: float = 60.0, tries: int = 5
) -> ShardSet:
    """Open a shard folder, or the index of one at an address.

    Args:
        address: The folder or the address.
        stage: Folder on this node's disk to which ``to_local`` of a remote set downloads the shards.
        key: Recipe key or option to name in errors.
        stall_s: Seconds without a byte after which a transfer is cut.
        tries: Attempts per file before the error.

    Returns:
        The set. Of a remote set, only the index is here until its ``to_local`` is called.

    Raises:
        ConfigError: If the address may not be opened, or there is no folder for the shards.
        DataError: If the set cannot be read.
    """
    if isinstance(address, Path) or not is_remote(address):
        return ShardSet.open(address)
    remote = Remote(address, stall_s=stall_s, tries=tries, key=key)
    check_stage_dir(stage, key)
    text = remote.read_index()
    shards = remote.open(text)
    shards.to_local = lambda: Cache(remote, text, stage).fetch_all()
    return shards


class Cache:
    """The files of a remote set below a folder of this node.

    Args:
        remote: The remote folder.
        text: Its ``index.json``.
        folder: A folder on this node's disk.
        limit: Largest number of bytes to keep, 0 for all. A cache without a limit is shared by everybody who uses this
            set on this node, and never shrinks.
        owner: Name of the only user of a cache with a limit. It cannot be shared, because others would remove the
            shards that this user needs.
        progress: Called, from any thread, each time ``path`` returns.

    Attributes:
        shards: The set, with its files in ``folder``.

    Raises:
        DataError: If the index cannot be read or written.
    """

    def __init__(
        self,
        remote: Remote,
        text: str,
        folder: Path | str,
        *,
        limit: int = 0,
        owner: str = "",
        progress: Callable[[], None] = lambda: None,
    ):
        self.remote, self.limit, self.progress = remote, limit, progress
        owner_suffix = f"-{hashlib.sha256(owner.encode()).hexdigest()[:8]}" if limit else ""
        try:
            name = index_digest(json.loads(text))
        except (KeyError, TypeError):
            name = remote.open(text).digest  # raises the error that says what is wrong with the index
        self.folder = node_folder.make_private_folder(folder, f"{name[:16]}-remote{owner_suffix}")
        self._locks = self.folder / "locks"
        self.shards = stage_index(remote, text, self.folder)
        if self.shards.pages is not None:
            self.shards.pages.locate = self._page_path
        self._condition = threading.Condition()
        self._passed_step = self._opened_step = 0  # earlier steps need no shard; the loader has begun with those before
        self._thread: threading.Thread | None = None
        self._remove_passed: Callable[[], set[int]] = set  # nothing is passed before ``start_prefetch``
        self._extra: list[int] = []  # a shard that is needed in this step, out of the order
        self._downloading = threading.Lock()  # held by the thread while it downloads
        self._closed = False
        remote.stopped = lambda: self._closed

    def has(self, number: int) -> bool:
        """Whether shard ``number`` is here, unchanged since its download. Its content is not read."""
        return node_folder.is_verified(self.shards.path(number), self.shards.shards[number])

    def kept(self) -> Sequence[int]:
        """Numbers of the shards that this node keeps from this step on. Some may not be here yet."""
        return sorted(self._remove_passed()) if self.limit else range(len(self.shards.shards))

    def path(self, number: int) -> Path:
        """Path of shard ``number``, which is downloaded first if it is not here. Raises ``DataError``."""
        # The limit holds for this download too. The shard of a replacement takes the place of those that come last.
        if not self.has(number) and number not in self._remove_passed() and self._thread and self.limit:
            with self._downloading:
                self._extra = [number]
                self._remove_passed()
                self._fetch(number)
        while not self.has(number):
            if not self._fetch(number):
                self._check_open()
                time.sleep(0.05)  # another process is downloading it
        self.progress()
        return self.shards.path(number)

    def _page_path(self, number: int) -> Path:
        """Path of the page of shard ``number``, which is downloaded with its shard."""
        path = self.path(number)
        page = path.with_name(self.shards.shards[number].page)
        if not page.exists():  # a cleaner of /tmp may have removed it
            self.remote.fetch_page(self.shards, number, self.folder)
        return page

    def refetch(self, number: int) -> None:
        """Download a shard again after its file has changed on this disk. Raises ``DataError``."""
        self.shards.path(number).unlink(missing_ok=True)
        self.path(number)

    def _fetch(self, number: int) -> bool:
        """Download a shard; False where another process is doing so. Raises ``DataError``."""
        shard, target = self.shards.shards[number], self.shards.path(number)
        try:
            self._locks.mkdir(exist_ok=True)  # a cleaner of /tmp may have removed the folder
            with node_folder.try_lock(self._locks / shard.name) as is_held:
                if not is_held:
                    return False
                if self.has(number):
                    return True
                for temporary in self.folder.glob(f".{shard.name}.*.tmp"):  # of a process that was killed
                    temporary.unlink(missing_ok=True)
                free = shutil.disk_usage(self.folder).free
                if free < shard.bytes:
                    raise node_folder.no_space_error(self.folder, shard.bytes, free)
                self.remote.fetch_page(self.shards, number, self.folder)  # first: where a shard is, its page is too
                self.remote.fetch(shard, target)
                return True
        except OSError as error:
            raise node_folder.copy_error(self.folder, shard.bytes, error) from error

    def _check_open(self) -> None:
        if self._closed:
            raise DataError(
                f"shards of {self.remote.address}",
                got="the end of the attempt",
                expected="a shard that another process is downloading",
                fix="run the same command again",
            )

    def fetch_all(self) -> ShardSet:
        """Download every shard, and return the complete set. The processes of a node share the work.

        Raises:
            DataError: If a shard cannot be downloaded, or the disk is too small.
        """
        numbers = range(len(self.shards.shards))
        self._check_space(numbers)
        for number in (number for number in numbers if not self.has(number)):
            self._fetch(number)
        for number in numbers:  # wait for those that other processes are downloading
            self.path(number)
        return self.shards

    def start_prefetch(
        self, order: Order, start: int, stop: int, *, lookahead: int, release: Callable[[set[int]], None]
    ) -> None:
        """Start a thread that downloads what steps ``start`` .. ``stop`` - 1 will read, until ``close``.

        Args:
            order: The training order.
            start: First step.
            stop: One past the last step.
            lookahead: Steps that the loader reads ahead.
            release: Called as ``release(keep)`` before shards outside of ``keep`` are removed, so that the caller can
                close their files.

        Raises:
            ConfigError: If the limit cannot hold what the lookahead reads.
            DataError: If the disk is too small.
        """
        sizes = np.sort(self.shards.bytes_per_shard)[::-1]
        least = int(sizes[: order.max_shards_read(lookahead + _SLACK)].sum())
        if self.limit and self.limit < least:
            raise node_folder.small_limit_error(self.limit, least, order.window)
        self._check_space(self._upcoming_shards(order, start, stop))
        self._passed_step = self._opened_step = start
        self._remove_passed = lambda: self._keep_upcoming(order, self._passed_step, stop, release)
        self._thread = threading.Thread(target=self._work, args=(order, stop, release), name="shards", daemon=True)
        self._thread.start()

    def set_position(self, step: int, opened: int) -> None:
        """Tell the thread that training takes ``step``, and the loader has begun with all steps before ``opened``."""
        with self._condition:
            self._passed_step, self._opened_step, self._extra = max(0, step - _SLACK // 2), opened, []
            self._condition.notify_all()

    def close(self) -> None:
        """End the thread and every transfer. Downloaded shards stay for the next attempt."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _check_space(self, numbers: Iterable[int]) -> None:
        """Raise ``DataError`` where the disk cannot hold these shards, or as many of them as the limit allows."""
        needed = sum(self.shards.shards[n].bytes for n in numbers if not self.has(n))
        if self.limit:
            needed = min(needed, self.limit - node_folder.bytes_of_shards(self.folder))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise node_folder.no_space_error(self.folder, needed, free)

    def _upcoming_shards(self, order: Order, step: int, stop: int) -> list[int]:
        """The shards that will be read from ``step`` on, soonest first, as many as the limit holds."""
        numbers: dict[int, None] = {}
        room = self.limit - sum(self.shards.shards[number].bytes for number in self._extra)
        for window in order.upcoming_windows(step, stop):
            for number in window.tolist():
                size = self.shards.shards[number].bytes
                if number in numbers:
                    continue
                if self.limit and room < size:
                    return list(numbers)
                numbers[number] = None
                room -= size
            if len(numbers) == len(self.shards.shards):
                break
        return list(numbers)

    def _work(self, order: Order, stop: int, release: Callable[[set[int]], None]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the main thread handles signals
        while not self._closed:
            passed, opened = self._passed_step, self._opened_step
            with self._downloading:
                keep = self._keep_upcoming(order, passed, stop, release)
                missing = [n for n in self._upcoming_shards(order, opened, stop) if n in keep and not self.has(n)]
                if not missing and not self.limit:
                    return
                pause = self._fetch_one(missing)
            with self._condition:
                if pause and not self._closed and (self._passed_step, self._opened_step) == (passed, opened):
                    self._condition.wait(pause)

    def _fetch_one(self, missing: list[int]) -> float:
        """Download the first of these shards that no other process is downloading. Returns seconds to wait then."""
        try:
            if any(self._fetch(number) for number in missing):
                return 0.0
            return 0.2 if missing else 5.0
        except DataError as error:
            if not self._closed:
                LOG.warning("A download failed and is tried again; it is an error once training needs it: %s", error)
            return _RETRY_S

    def _keep_upcoming(self, order: Order, step: int, stop: int, release: Callable[[set[int]], None]) -> set[int]:
        """Choose the shards to keep from ``step`` on; a cache with a limit removes the others."""
        keep = {*self._upcoming_shards(order, step, stop), *self._extra}
        if self.limit:
            kept = {self.shards.shards[number].name for number in keep}
            others = [path for path in self.folder.glob("*.tar") if path.name not in kept]
            release(keep)
            for path in others:
                path.unlink(missing_ok=True)
                if self.shards.pages:
                    path.with_suffix(".npy").unlink(missing_ok=True)
        return keep
