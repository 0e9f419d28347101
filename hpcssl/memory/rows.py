"""What a bank's rows are made of, and how parts saved by some ranks are read by others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hpcssl.errors import ConfigError, ResumeError


@dataclass(frozen=True)
class ColumnSpec:
    """``dim`` entries per row, or None: one integer. ``dtype`` None: the bank's, or int64 for integers."""

    dim: int | None = None
    dtype: torch.dtype | None = None

    def typed(self, name: str, dtype: torch.dtype) -> ColumnSpec:
        """With the dtype filled in. Raises ``ConfigError`` for what cannot be a column."""
        made = ColumnSpec(self.dim, self.dtype or (torch.int64 if self.dim is None else dtype))
        fits = made.dtype == torch.int64 if made.dim is None else (
            made.dim >= 1 and made.dtype in (torch.float32, torch.float64))
        if not fits:
            raise ConfigError(f"the bank's column {name!r}", got=f"{made.dim} entries of {made.dtype}",
                              expected="vectors of float32 or float64, or one int64 per row",
                              mend="give vectors their width and a float dtype, and integers neither")
        return made


class Part(NamedTuple):
    """Rows ``first_row`` … of a column of ``total_rows``: what one rank saves of it. ``total_rows`` None: every rank
    holds the whole tensor, with equal bits."""

    tensor: Tensor
    first_row: int
    total_rows: int | None


class Memory(Protocol):
    """State beside the networks that outlives a step, in tensors whose rows may be split over ranks."""

    def state(self) -> tuple[dict[str, Part], dict[str, int]]:
        """(this rank's part of each tensor, small numbers that are equal on all ranks). No collective."""

    def replicas(self) -> dict[str, Tensor]:
        """Of the tensors that ``state`` splits, those of which every rank holds all rows, with equal bits; whole."""

    def load(self, numbers: Mapping[str, int], read: Callable[[str, int, int], Tensor]) -> None:
        """Become what any number of ranks saved: ``read(name, start, stop)`` gives rows of a tensor."""


def rows_of(parts: Mapping[str, Sequence[Part]]) -> Callable[[str, int, int], Tensor]:
    """The ``read`` that ``Bank.load`` asks for, from the parts of all ranks in any order."""

    def read(column: str, start: int, stop: int) -> Tensor:
        pieces = sorted((part for part in parts.get(column, ()) if len(part.tensor)), key=lambda part: part[1])
        expected = 0
        for part in pieces:
            if part.first_row != expected:
                break
            expected += len(part.tensor)
        if not pieces or {part.total_rows for part in pieces} != {expected}:
            raise ResumeError(f"the saved bank's column {column!r}", got=f"{len(pieces)} parts with a gap",
                              expected="every rank's part", mend="resume from a complete checkpoint")
        near = [p for p in pieces if p.first_row < stop and p.first_row + len(p.tensor) > start]
        return torch.cat([p.tensor[max(0, start - p.first_row):stop - p.first_row] for p in near])

    return read
