"""Rows in typed columns: some tens of bytes for an image, where a tuple of Python objects takes half a kilobyte."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, overload

import numpy as np
import numpy.typing as npt

R = TypeVar("R", bound="tuple[Any, ...]")
_WORD_BYTES = 8
_MAX_INT = 2**63 - 1


class Column(Protocol):
    """The values of one field."""

    def append(self, value: Any, /) -> None:
        """Add the value of the next row."""

    def __getitem__(self, row: int, /) -> Any: ...


class IntColumn:
    """Integers of 64 bits. Larger ones become the largest: a damaged time of a file may lie beyond the year 2262."""

    def __init__(self) -> None:
        self._values = array("q")

    def append(self, value: int) -> None:
        """Add the number of the next row."""
        self._values.append(max(-_MAX_INT, min(value, _MAX_INT)))

    def __getitem__(self, row: int) -> int:
        return self._values[row]


class TextColumn:
    """Texts, one after the other in one buffer."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("Q")

    def append(self, text: str) -> None:
        """Add the text of the next row. Names that are no UTF-8, which Python keeps as surrogates, are allowed."""
        self._bytes += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))

    def __getitem__(self, row: int) -> str:
        start = self._ends[row - 1] if row else 0
        return self._bytes[start : self._ends[row]].decode("utf-8", "surrogatepass")

    def argsort(self) -> npt.NDArray[np.int64]:
        """Return the rows in the order of their texts, as ``sorted`` has it, int64 [N]; equal texts keep their order.

        Bytes of UTF-8 sort like code points. Words of eight bytes are compared, from the first on, of those rows whose
        words before are equal.
        """
        if not self._ends:
            return np.zeros(0, np.int64)
        order = np.arange(len(self._ends))
        tied = np.arange(len(order))  # places in the order that are not decided, and the group of equals of each
        group = np.zeros(len(order), np.int64)
        depth = 0
        while len(tied):
            rows = order[tied]
            word, used = self._read_words(rows, depth)
            by_word = np.lexsort((used, word, group))
            order[tied] = rows[by_word]
            word, used, group = word[by_word], used[by_word], group[by_word]
            is_new = np.zeros(len(rows), bool)
            for key in (word, used, group):
                is_new[1:] |= key[1:] != key[:-1]
            group = np.cumsum(is_new)
            undecided = (np.bincount(group) > 1)[group] & (used == _WORD_BYTES)
            tied, group = tied[undecided], group[undecided]
            depth += _WORD_BYTES
        return order

    def _read_words(
        self, rows: npt.NDArray[np.int64], depth: int
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
        """Return eight bytes of texts as numbers that sort like them, and how many of the eight are of the text.

        Args:
            rows: The texts, which have ``depth`` bytes or more.
            depth: How many bytes of each text come before.
        """
        buffer, ends = np.frombuffer(self._bytes, np.uint8), np.frombuffer(self._ends, np.int64)
        start = np.where(rows > 0, ends[rows - 1], 0) + depth
        used = np.minimum(ends[rows] - start, _WORD_BYTES).astype(np.uint8)
        word = np.zeros(len(rows), np.uint64)
        for n in range(_WORD_BYTES):
            word <<= np.uint64(8)
            inside = used > n
            word[inside] |= buffer[start[inside] + n]
        return word, used


class SharedColumn:
    """Values of which many are equal: each is kept once, and nothing per row while there is only one.

    Attributes:
        distinct: The values, in the order in which they came first.
    """

    def __init__(self) -> None:
        self.distinct: list[Any] = []
        self._numbers: dict[Hashable, int] = {}
        self._rows = array("I")
        self._length = 0

    def append(self, value: Hashable) -> None:
        """Add the value of the next row."""
        number = self._numbers.setdefault(value, len(self.distinct))
        if number == len(self.distinct):
            self.distinct.append(value)
            if number == 1:
                self._rows.frombytes(bytes(self._rows.itemsize * self._length))
        if len(self.distinct) > 1:
            self._rows.append(number)
        self._length += 1

    def __getitem__(self, row: int) -> Any:
        return self.distinct[self._rows[row] if self._rows else 0]


class CompactRows(Sequence[R]):
    """Named tuples that are taken apart when they are added, and put together when they are asked for."""

    def __init__(self, make_row: Callable[[Iterable[Any]], R], columns: Sequence[Column], rows: Iterable[R]) -> None:
        """Create the table.

        Args:
            make_row: Makes a row of the values of its fields, such as ``_make`` of a named tuple.
            columns: An empty column for each field.
            rows: The first rows.
        """
        self._make_row = make_row
        self._columns = columns
        self._length = 0
        for row in rows:
            self.append(row)

    def append(self, row: R) -> None:
        """Add a row."""
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)
        self._length += 1

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[R]:
        return (self._make_row([column[row] for column in self._columns]) for row in range(self._length))

    @overload
    def __getitem__(self, row: int) -> R: ...
    @overload
    def __getitem__(self, row: slice) -> list[R]: ...
    def __getitem__(self, row: int | slice) -> R | list[R]:
        if isinstance(row, slice):
            return [self[n] for n in range(*row.indices(self._length))]
        row = range(self._length)[row]  # from the end if it is negative, and IndexError beyond it
        return self._make_row([column[row] for column in self._columns])
