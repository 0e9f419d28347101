"""The memory bank: a ring of the last N rows that the whole world has pushed, and the nearest of them.

    N slots, W ranks, b rows per rank and step, D entries per row, k neighbours

A row has named columns, say ``key [D]``, ``twin [D]``, ``index`` and ``label``. Each push gathers the rows of
all ranks in rank order and writes them at the pointer, over the oldest. ``replicated`` keeps all N slots on every
rank; ``sharded`` gives rank r the slots from r·⌈N/W⌉ up to (r+1)·⌈N/W⌉. Both hold the same rows and find the
same neighbours, bit for bit, on any number of ranks (``search.py`` says why), and what one saved the other loads.

Methods are collectives unless they say otherwise: all ranks call them, in one order, with as many rows each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hpcssl import rng
from hpcssl.errors import ConfigError, ResumeError, WorldError
from hpcssl.errors import nearest as nearest_name
from hpcssl.memory import search
from hpcssl.memory.rows import ColumnSpec, Part, rows_of
from hpcssl.world import World

__all__ = ["Bank", "ColumnSpec", "Hits", "Part", "Ticket", "rows_of"]

PLACEMENTS = ("replicated", "sharded")
STARTS = ("random", "empty")
_BLOCK = 4096  # slots whose initial rows share an address: changing it changes every run
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.int64: torch.int64}


@dataclass(frozen=True)
class Hits:
    """k neighbours for each of this rank's b queries, nearest first.

    Where ``valid`` is False fewer than k rows were allowed: slot is -1, similarity and rows are 0.
    """

    slot: Tensor  # [b, k] int64
    similarity: Tensor  # [b, k], the query's dtype: inner product of query and row
    valid: Tensor  # [b, k] bool
    rows: Tensor  # [b, k, D], the column's dtype


@dataclass(frozen=True)
class Ticket:
    """What one push has overwritten on this rank, and where. ``Bank.take_back`` restores it."""

    serial: int
    pointer: int
    filled: int
    places: list[slice] | list[Tensor]
    replaced: dict[str, list[Tensor]]


class Bank:
    """A ring of ``size`` slots with ``columns``, of which those with a ``dim`` can be searched.

    ``key`` addresses the initial rows. ``start="random"``: unit vectors of random direction that take part in
    searches, as MSF and MoCo have them, with -1 for integers; ``"empty"``: only pushed slots take part. Rows and
    queries must be of unit length: the caller normalises. ``search.nearest`` explains ``prefilter`` and
    ``exact``. Raises ``ConfigError`` for options that cannot be meant.
    """

    def __init__(self, size: int, columns: Mapping[str, ColumnSpec], world: World, *,
                 placement: str = "replicated", key: int, start: str = "random",
                 dtype: torch.dtype = torch.float32, prefilter: str = "fp32", exact: bool | None = None):
        _choice("bank.placement", placement, PLACEMENTS)
        _choice("bank.start", start, STARTS)
        _choice("bank.prefilter", prefilter, search.PREFILTERS)
        if size < 1 or not columns:
            raise ConfigError("the bank", got=f"{size} slots, {len(columns)} columns",
                              expected="one or more", mend="set bank.size to the number of rows to remember")
        self.size, self.world, self.sharded = size, world, placement == "sharded"
        share = -(-size // world.size)
        self._block = (min(size, world.rank * share), min(size, (world.rank + 1) * share))
        self.first, self.last = self._block if self.sharded else (0, size)  # the slots that this rank holds
        self.pointer, self.filled, self._serial = 0, size if start == "random" else 0, 0
        self.prefilter, self.exact = prefilter, exact
        self.columns = {name: spec.typed(name, dtype) for name, spec in columns.items()}
        self._rows = {name: self._blank(spec) for name, spec in self.columns.items()}
        if start == "random":
            for name, rows in self._rows.items():
                if rows.dim() == 2:
                    self._draw(rows, rng.key(key, "bank", name))

    def _blank(self, spec: ColumnSpec) -> Tensor:
        held, absent = self.last - self.first, -1 if spec.dim is None else 0
        shape = (held,) if spec.dim is None else (held, spec.dim)
        return torch.full(shape, absent, dtype=spec.dtype, device=self.world.device)

    def _draw(self, rows: Tensor, key: int) -> None:
        """Random directions, drawn on the CPU in blocks of slots: the same for any world and placement."""
        for start in range(self.first // _BLOCK * _BLOCK, self.last, _BLOCK):
            drawn = torch.randn(_BLOCK, rows.shape[1], generator=rng.generator(rng.key(key, start)))
            low, high = max(self.first, start), min(self.last, start + _BLOCK)
            unit = F.normalize(drawn[low - start:high - start].double(), dim=1)
            rows[low - self.first:high - self.first] = unit.to(rows.dtype)

    # -- the ring ---------------------------------------------------------------------------------------------

    def push(self, slots: Tensor | None = None, /, **rows: Tensor) -> Ticket:
        """Write every rank's rows, [b, D] or [b] for each column, over the oldest slots, in the batch's order.

        ``slots`` [W·b] int64 (``slots_at``): write there instead (below 0: nowhere), and leave the pointer where it is.
        Raises ``ConfigError`` for other columns or shapes than the bank's, ``WorldError`` if W·b > N.
        """
        self._check(rows)
        count = len(next(iter(rows.values()))) * self.world.size
        if slots is None and count > self.size:
            raise WorldError("a push into the bank", got=f"{count} rows from {self.world.size} ranks at once",
                             expected=f"at most its {self.size} slots",
                             mend="raise bank.size to the global batch or more")
        pieces, replaced = self._pieces(count) if slots is None else self._scattered(slots), {}
        for name, held in self._rows.items():
            batch = self.world.whole_batch(rows[name].to(held.dtype))
            replaced[name] = [held[to].clone() for _, to in pieces]
            for source, to in pieces:
                held[to] = batch[source]
        self._serial += 1
        ticket = Ticket(self._serial, self.pointer, self.filled, [to for _, to in pieces], replaced)
        if slots is None:
            self.pointer, self.filled = (self.pointer + count) % self.size, min(self.size, self.filled + count)
        return ticket

    def slots_at(self, key: int, count: int) -> Tensor | None:
        """``count`` different slots drawn at the address ``key``, for ``push``; None, which means the next ones,
        until every slot is filled. No collective."""
        if self.filled < self.size:
            return None
        return torch.from_numpy(rng.permutation(key, self.size)[:count]).to(self.world.device)

    def take_back(self, ticket: Ticket) -> None:
        """Undo the last push, bit for bit. No collective. ``ValueError`` for the ticket of any other push."""
        if ticket.serial != self._serial:
            raise ValueError(f"ticket {ticket.serial}: only the last push can be taken back, and only once")
        self.pointer, self.filled = ticket.pointer, ticket.filled
        for name, held in self._rows.items():
            for to, old in zip(ticket.places, ticket.replaced[name], strict=True):
                held[to] = old
        self._serial += 1

    def rewrite(self, column: str, source: str, made: Callable[[Tensor], Tensor]) -> None:
        """Set ``column`` in every row to what ``made`` makes of the row's ``source``. No collective."""
        self._rows[column].copy_(made(self._rows[source]))
        self._serial += 1  # a ticket from before would bring old values back

    def _pieces(self, count: int) -> list[tuple[slice, slice]]:
        """Where ``count`` rows from the pointer on land here: (rows of the batch, rows held here)."""
        straight, pieces = min(count, self.size - self.pointer), []
        for slot, source, n in ((self.pointer, 0, straight), (0, straight, count - straight)):
            low, high = max(slot, self.first), min(slot + n, self.last)
            if low < high:
                pieces.append((slice(source + low - slot, source + high - slot),
                               slice(low - self.first, high - self.first)))
        return pieces

    def _scattered(self, slots: Tensor) -> list[tuple[Tensor, Tensor]]:
        source = ((slots >= self.first) & (slots < self.last)).nonzero()[:, 0]
        return [(source, slots[source] - self.first)]

    # -- lookups ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def nearest(self, query: Tensor, k: int, *, column: str = "key",
                among: tuple[str, Tensor] | None = None) -> Hits:
        """The k rows of ``column`` with the largest inner product with each of this rank's ``query`` [b, D].

        ``among=("label", value [b])`` allows query i only the rows whose label equals value[i]; a value below 0
        means "unknown" and allows none. A row that is not allowed is never returned. Equal ones by lower slot.
        """
        self._check_query(query, k, column)
        asked, value = query.to(self._rows[column].dtype), None
        held = max(0, min(self.last, self.filled) - self.first)
        if among is not None:
            self._column(among[0])
            value = among[1].to(torch.int64)
        if self.sharded:
            asked = self.world.gather(asked)
            value = None if value is None else self.world.gather(value)
        allowed = None if among is None else (self._rows[among[0]][:held], value)
        score, slot = search.nearest(asked, self._rows[column][:held], k, among=allowed,
                                     prefilter=self.prefilter, exact=self.exact)
        slot = torch.where(slot < 0, slot, slot + self.first)
        if self.sharded:
            slot = self._best_of_ranks(score, slot, k)
        rows = self._fetch(column, slot)
        if self.sharded:
            slot, rows = self.world.part(slot), self.world.part(rows)
        return _hits(query, slot, rows)

    @torch.no_grad()
    def best(self, query: Tensor, slot: Tensor, k: int, *, column: str = "key") -> Hits:
        """The k nearest among each query's own ``slot`` [b, m], where those below 0 do not count; k ≤ m."""
        self._check_query(query, k, column)
        slot, _ = slot.sort(dim=1)  # equal ones by lower slot
        rows = self.get(column, slot)
        score = search.scores(query, rows).masked_fill_(slot < 0, -torch.inf)
        order = score.sort(dim=1, descending=True, stable=True).indices[:, :k]
        return _hits(query, slot.gather(1, order), rows.gather(1, order[:, :, None].expand(-1, -1, rows.shape[2])))

    @torch.no_grad()
    def mean(self, among: tuple[str, Tensor], *, column: str = "key") -> tuple[Tensor, Tensor]:
        """(mean [b, D] of the rows that ``nearest`` would allow each query, their count [b]); without any 0 and 0.

        The same bits in either placement: rows are rounded to a grid on which their sum is exact.
        """
        self._column(among[0])
        value, held = among[1].to(torch.int64), max(0, min(self.last, self.filled) - self.first)
        value = self.world.gather(value) if self.sharded else value
        sum_, count = search.sums(self._rows[column][:held], (self._rows[among[0]][:held], value), most=self.size)
        if self.sharded:
            sum_, count = self.world.part(self.world.sum(sum_)), self.world.part(self.world.sum(count))
        return (sum_ / count.clamp(min=1).unsqueeze(1)).to(self._rows[column].dtype), count

    def get(self, column: str, slot: Tensor) -> Tensor:
        """The column's values at this rank's ``slot`` […]; where it is below 0: -1 (integers), 0 (vectors)."""
        self._column(column)
        if not self.sharded:
            return self._fetch(column, slot)
        return self.world.part(self._fetch(column, self.world.gather(slot)))

    def everything(self, column: str) -> Tensor:
        """Every filled slot's value, [filled, D] or [filled], in slot order, without gradient: for losses over the
        whole bank, which are the same bits in either placement. A replicated bank gives a view of the living rows,
        to be used before the next push; a sharded one gathers all N."""
        self._column(column)
        held = self._rows[column]
        if self.sharded:  # every rank but the last ones holds as many rows as the first
            padded = held.new_zeros(-(-self.size // self.world.size), *held.shape[1:])
            padded[:len(held)] = held
            held = self.world.gather(padded)
        return held[:self.filled]

    def _best_of_ranks(self, score: Tensor, slot: Tensor, k: int) -> Tensor:
        """Second stage: the best k of every rank's k candidates, for all W·b queries, on every rank."""
        def side_by_side(x):
            return self.world.gather(x).unflatten(0, (self.world.size, -1)).transpose(0, 1).flatten(1)
        return search.merge(side_by_side(score), side_by_side(slot), k)[1]

    def _fetch(self, column: str, slot: Tensor) -> Tensor:
        """Values at ``slot``, which is the same on all ranks of a sharded bank. Owners fill in their rows and
        the others zeros; they are added as integers, so that every bit arrives."""
        held = self._rows[column]
        here = (slot >= self.first) & (slot < self.last)
        if len(held):
            found = held[(slot - self.first).clamp(0, len(held) - 1)]
        else:  # the last ranks of a large world may own no slot
            found = held.new_zeros(*slot.shape, *held.shape[1:])
        found = found.masked_fill(~here if held.dim() == 1 else ~here.unsqueeze(-1), 0)
        if self.sharded:
            found = self.world.sum(found.view(_BITS[held.dtype])).view(held.dtype)
        return found.masked_fill(slot < 0, -1) if held.dim() == 1 else found

    # -- saving -----------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Part], dict[str, int]]:
        """(this rank's part of every column, small numbers, equal on all ranks). No collective.

        A replicated bank is saved like a sharded one: each rank its block. The tensors are views of the living
        rows; copy them before the next push.
        """
        low, high = self._block[0] - self.first, self._block[1] - self.first
        parts = {name: Part(rows[low:high], self._block[0], self.size) for name, rows in self._rows.items()}
        return parts, {"pointer": self.pointer, "filled": self.filled}

    def replicas(self) -> dict[str, Tensor]:
        return {} if self.sharded else dict(self._rows)

    def load(self, numbers: Mapping[str, int], read: Callable[[str, int, int], Tensor]) -> None:
        """Take over a saved bank of this size, from any number of ranks and either placement. No collective.

        ``read(column, start, stop)`` gives the saved column's rows start … stop-1, whichever rank wrote them
        (``rows_of`` makes one from the parts). Raises ``ResumeError`` if they do not fit.
        """
        pointer, filled = int(numbers.get("pointer", -1)), int(numbers.get("filled", -1))
        if not (0 <= pointer < self.size and 0 <= filled <= self.size):
            raise ResumeError("the saved bank", got=f"pointer {pointer}, {filled} filled slots",
                              expected=f"a bank of {self.size} slots",
                              mend="resume with the bank.size of the run")
        for name, held in self._rows.items():
            for start in range(self.first, self.last, 2**16):  # bounds the memory that reading takes
                stop = min(self.last, start + 2**16)
                rows, room = read(name, start, stop), held[start - self.first:stop - self.first]
                if rows.shape != room.shape or rows.dtype != room.dtype:
                    raise ResumeError(f"the saved bank's column {name!r}",
                                      got=f"{tuple(rows.shape)} {rows.dtype}",
                                      expected=f"{tuple(room.shape)} {room.dtype}",
                                      mend="resume with the bank's size, columns and precision of the run")
                room.copy_(rows)
        self.pointer, self.filled = pointer, filled
        self._serial += 1  # a ticket from before is void

    # -- checks -----------------------------------------------------------------------------------------------

    def _column(self, name: str) -> ColumnSpec:
        if name not in self.columns:
            raise ConfigError("the bank", got=f"column {name!r}", expected="one of its columns",
                              mend=nearest_name(name, self.columns))
        return self.columns[name]

    def _check_query(self, query: Tensor, k: int, column: str) -> None:
        width = self._column(column).dim
        if width is None or query.dim() != 2 or query.shape[1] != width or k < 1:
            raise ConfigError(f"the {k} nearest in the bank's column {column!r}",
                              got=f"queries {tuple(query.shape)}",
                              expected=f"[b, {width or 'D'}], a column of vectors, and k of 1 or more",
                              mend="search a column that was declared with the width of the queries")

    def _check(self, rows: Mapping[str, Tensor]) -> None:
        shapes = {name: tuple(x.shape) for name, x in rows.items()}
        b = next((shape[0] for shape in shapes.values() if shape), 0)
        wanted = {name: (b,) if spec.dim is None else (b, spec.dim) for name, spec in self.columns.items()}
        if shapes != wanted:
            raise ConfigError("a push into the bank", got=str(shapes), expected=str(wanted),
                              mend="push every declared column, with one row per image")


def _hits(query: Tensor, slot: Tensor, rows: Tensor) -> Hits:
    valid = slot >= 0
    # from the rows, in float64: the same number whichever search found them
    similarity = rows.to(torch.float64, copy=True).mul_(query.double().unsqueeze(1)).sum(-1)
    return Hits(slot, similarity.masked_fill_(~valid, 0).to(query.dtype), valid, rows)


def _choice(what: str, got: str, known: Sequence[str]) -> None:
    if got not in known:
        raise ConfigError(what, got=repr(got), expected=" or ".join(known), mend=nearest_name(str(got), known))
