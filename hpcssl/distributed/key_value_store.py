"""A small store of texts by key that all ranks of an attempt share."""

from __future__ import annotations

from collections.abc import Iterable

from torch.distributed import Store  # type: ignore[attr-defined]  # imported only where torch has collectives


class KeyValueStore:
    """Texts by key, over a connection to the rendezvous store that rank 0 (or torchrun's agent) hosts.

    Methods raise ``RuntimeError`` if the host is gone, and block while its process is suspended.

    Args:
        store: The connection; a prefix store separates the keys of one attempt from others.
    """

    def __init__(self, store: Store):
        self._store = store

    def set(self, key: str, text: str) -> None:
        """Write a text, over any earlier one."""
        self._store.set(key, text)

    def get(self, keys: Iterable[str]) -> list[str]:
        """The texts of keys, once all of them exist. Raises ``RuntimeError`` after the timeout of the connection."""
        return [text.decode() for text in self._store.multi_get(list(keys))]

    def contains(self, keys: Iterable[str]) -> bool:
        """Whether all of these keys exist."""
        return bool(self._store.check(list(keys)))

    def set_once(self, key: str, text: str) -> str:
        """Write a text unless the key holds a non-empty one already.

        Returns:
            What the key holds afterwards.
        """
        current: str = self._store.compare_set(key, "", text).decode()
        return current
