"""The memory bank: a ring buffer of the last N rows of the whole world, and the nearest of them to a query.

    N slots, W ranks, b queries per rank and step, D entries per row, k neighbors

A row has named columns, for example ``key`` [D], ``index`` and ``label``. Either placement finds the same neighbors,
bit for bit, on any number of ranks; ``exact.py`` explains why.

Methods are collectives unless they say otherwise: all ranks call them, in the same order, with equally many rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpcssl.distributed.batch_layout import BatchLayout
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, require_choice
from hpcssl.memory import search
from hpcssl.memory.columns import ColumnSpec
from hpcssl.memory.ring_buffer import RingBuffer
from hpcssl.memory.shard_exchange import exchange_candidates, sum_local_rows


@dataclass(frozen=True)
class Neighbors:
    """The k neighbors of each of this rank's b queries, nearest first.

    Attributes:
        slot: [b, k] int64, slots of the bank; -1 where fewer than k rows were allowed.
        similarity: [b, k] in the dtype of the queries, inner products of query and row; 0 where not valid.
        valid: [b, k] bool, whether there is such a neighbor.
        rows: [b, k, D] in the dtype of the column; 0 where not valid.
    """

    slot: Tensor
    similarity: Tensor
    valid: Tensor
    rows: Tensor


class Bank(RingBuffer):
    """A ring buffer whose vector columns can be searched by inner product.

    Rows and queries must have unit length: the caller normalizes them.

    Args:
        size: number of slots, N.
        columns: name → width and dtype. Columns of vectors can be searched.
        world: the ranks that push and search together.
        layout: how pushed rows are split over micro-batches and ranks; None means one micro-batch.
        placement: ``replicated`` keeps all rows on every rank, ``sharded`` a part of them.
        key: RNG key of the initial rows.
        init: ``random`` or ``empty``; see ``RingBuffer``.
        dtype: dtype of vectors whose column states none.
        fill: whether to draw random rows at once; see ``RingBuffer``.
        prefilter: precision in which candidates are proposed; see ``search.nearest``.
        exact: whether the proposals are certified; see ``search.nearest``.

    Raises:
        ConfigError: for unknown values, no slots or no columns.
    """

    def __init__(
        self,
        size: int,
        columns: Mapping[str, ColumnSpec],
        world: World,
        *,
        layout: BatchLayout | None = None,
        placement: str = "replicated",
        key: int,
        init: str = "random",
        dtype: torch.dtype = torch.float32,
        fill: bool = True,
        prefilter: str = "fp32",
        exact: bool | None = None,
    ):
        require_choice("bank.prefilter", prefilter, search.PREFILTERS)
        rows: dict[str, Any] = {"key": key, "init": init, "dtype": dtype, "fill": fill}
        super().__init__(size, columns, world, layout=layout, placement=placement, **rows)
        self.prefilter, self.exact = prefilter, exact

    @torch.no_grad()
    def nearest(
        self, query: Tensor, k: int, *, column: str = "key", among: tuple[str, Tensor] | None = None
    ) -> Neighbors:
        """Find the k rows with the largest inner product with each query. Of equal rows, the lower slot comes first.

        Args:
            query: this rank's queries [b, D], unit length.
            k: number of neighbors, 1 or more.
            column: the column of vectors to search.
            among: ``(name, value [b] int64)`` allows query i only the rows whose integer column ``name`` equals
                value[i]. A value below 0 means "unknown" and allows no row.

        Raises:
            ConfigError: if there is no such column, or the queries do not fit it.
        """
        self._check_query(query, k, column)
        queries, value, filled = query.to(self._rows[column].dtype), None, self._filled_here()
        if among is not None:
            self._check_column(among[0])
            value = among[1].to(torch.int64)
        if self.sharded:
            queries = self.world.all_gather(queries)
            value = None if value is None else self.world.all_gather(value)
        allowed = None if among is None or value is None else (self._rows[among[0]][:filled], value)
        score, slot = search.nearest(
            queries, self._rows[column][:filled], k, among=allowed, prefilter=self.prefilter, exact=self.exact
        )
        slot = torch.where(slot < 0, slot, slot + self.first)
        if self.sharded:
            slot = search.merge(*exchange_candidates(self.world, score, slot), k)[1]
        return _neighbors(query, slot, self.get(column, slot))

    @torch.no_grad()
    def rerank(self, query: Tensor, slot: Tensor, k: int, *, column: str = "key") -> Neighbors:
        """Find the k nearest rows among each query's own candidates.

        Args:
            query: this rank's queries [b, D], unit length.
            slot: candidates [b, m] int64, k ≤ m; slots below 0 do not count.
            k: number of neighbors.
            column: the column of vectors to compare with.
        """
        self._check_query(query, k, column)
        slot, _ = slot.sort(dim=1)  # of equal rows, the lower slot comes first
        rows = self.get(column, slot)
        score = search.scores(query, rows).masked_fill_(slot < 0, -torch.inf)
        order = score.sort(dim=1, descending=True, stable=True).indices[:, :k]
        nearest = rows.gather(1, order[:, :, None].expand(-1, -1, rows.shape[2]))
        return _neighbors(query, slot.gather(1, order), nearest)

    @torch.no_grad()
    def mean(self, among: tuple[str, Tensor], *, column: str = "key") -> tuple[Tensor, Tensor]:
        """Average all rows that ``nearest`` would allow each query.

        The result has the same bits in either placement: rows are rounded to a grid on which their sum is exact.

        Args:
            among: ``(name, value [b] int64)``, as in ``nearest``.
            column: the column of vectors to average.

        Returns:
            (mean [b, D], number of rows [b]); both 0 where no row is allowed.
        """
        self._check_column(among[0])
        value, filled = among[1].to(torch.int64), self._filled_here()
        value = self.world.all_gather(value) if self.sharded else value
        allowed = (self._rows[among[0]][:filled], value)
        total, count = search.sums(self._rows[column][:filled], allowed, max_rows=self.size)
        if self.sharded:
            total, count = sum_local_rows(self.world, total), sum_local_rows(self.world, count)
        return (total / count.clamp(min=1).unsqueeze(1)).to(self._rows[column].dtype), count

    def _check_query(self, query: Tensor, k: int, column: str) -> None:
        width = self._check_column(column).dim
        if width is None or query.dim() != 2 or query.shape[1] != width or k < 1:
            raise ConfigError(
                f"the {k} nearest in the bank's column {column!r}",
                got=f"queries {tuple(query.shape)}",
                expected=f"[b, {width or 'D'}], a column of vectors, and k of 1 or more",
                fix="search a column that was declared with the width of the queries",
            )


def _neighbors(query: Tensor, slot: Tensor, rows: Tensor) -> Neighbors:
    valid = slot >= 0
    # computed from the rows, in float64: the same number whichever search found them
    similarity = rows.to(torch.float64, copy=True).mul_(query.double().unsqueeze(1)).sum(-1)
    return Neighbors(slot, similarity.masked_fill_(~valid, 0).to(query.dtype), valid, rows)
