"""A ring buffer of rows that all ranks push into: the last N rows of the whole world, in named columns.

    N slots, W ranks, b rows per rank and step, D entries per row

Each push writes the rows of all ranks, in the order of the global batch, at the pointer, over the oldest ones.
``replicated`` keeps all N slots on every rank, which gathers all rows; ``sharded`` one block of them, and each row goes
to its owner only. Both hold the same rows on any number of ranks, and each can load what the other saved.

Methods are collectives unless they say otherwise: all ranks call them, in the same order, with equally many rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from hpcssl import rng
from hpcssl.checkpoint.shard import TensorShard
from hpcssl.distributed.batch_layout import BatchLayout
from hpcssl.distributed.devices import to_device
from hpcssl.distributed.world import World
from hpcssl.errors import ConfigError, ResumeError, WorldError, require_choice, suggest
from hpcssl.memory.checkpointed import RowReader
from hpcssl.memory.columns import ColumnSpec
from hpcssl.memory.shard_exchange import PushRoute, fetch_rows
from hpcssl.memory.slots import Piece, PushUndo, allocate, block_of, chosen_pieces, fill_randomly, next_pieces

PLACEMENTS = ("replicated", "sharded")
INITS = ("random", "empty")
_RNG_NAMES = {"previous_epoch": "twin", "second_modality": "twin"}  # former names, kept: another key changes every run
_READ_ROWS = 2**16  # rows that ``load`` reads at a time, which bounds the memory it takes


class RingBuffer:
    """``size`` slots with named ``columns``, replicated on all ranks or sharded over them.

    Args:
        size: number of slots, N.
        columns: name → width and dtype.
        world: the ranks that push together.
        layout: how pushed rows are split over micro-batches and ranks; None means one micro-batch.
        placement: ``replicated`` or ``sharded``.
        key: RNG key of the initial rows.
        init: ``random`` fills vectors with unit vectors of random direction, which take part in searches as in MSF and
            MoCo, and integers with -1. ``empty``: only slots that were pushed take part.
        dtype: dtype of vectors whose column states none.
        fill: whether to draw random rows at once; else ``load`` or ``fill`` comes before any other call.

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
    ):
        require_choice("bank.placement", placement, PLACEMENTS)
        require_choice("bank.init", init, INITS)
        if size < 1 or not columns:
            raise ConfigError(
                "the bank",
                got=f"{size} slots, {len(columns)} columns",
                expected="one or more of each",
                fix="set bank.size to the number of rows to remember",
            )
        self.size, self.world, self.layout, self.sharded = size, world, layout, placement == "sharded"
        self._block = block_of(world, size)
        self.first, self.last = self._block if self.sharded else (0, size)  # the slots that this rank holds
        self.pointer, self.filled, self._version = 0, size if init == "random" else 0, 0
        self.columns = {name: spec.resolve(name, dtype) for name, spec in columns.items()}
        held = self.last - self.first
        self._stored = {name: allocate(spec, held, world.device) for name, spec in self.columns.items()}
        self._rows = {name: stored[:held] for name, stored in self._stored.items()}  # without the spare row
        self._key = key if init == "random" else None  # of rows that are still to be drawn
        if fill:
            self.fill()

    def fill(self) -> None:
        """Draw the initial rows, unless that was done or rows were loaded. Not a collective."""
        vectors = {name: rows for name, rows in self._rows.items() if rows.dim() == 2}
        if self._key is not None:
            for name, rows in vectors.items():
                fill_randomly(rows, rng.key(self._key, "bank", _RNG_NAMES.get(name, name)), self.first, self.last)
        self._key = None

    # -- writing ----------------------------------------------------------------------------------------------

    def push(self, slots: Tensor | None = None, taken: Tensor | None = None, /, **rows: Tensor) -> PushUndo:
        """Write the rows of every rank over the oldest slots, in the order of the global batch.

        Args:
            slots: [W·b] int64, equal on all ranks: write to these slots instead (below 0: nowhere) and leave the
                pointer where it is. See ``draw_slots``. If they lie on a GPU, every rank receives all rows, also with
                a sharded buffer: to know which rows go where, the host would have to wait for the GPU.
            taken: bool [], equal on all ranks; where it is false, no row is changed although the pointer moves. None
                means True. It is not read by the host.
            **rows: [b, D] or [b] for every column.

        Returns:
            What ``undo`` needs to restore the rows that were overwritten.

        Raises:
            ConfigError: if columns or shapes differ from the declared ones.
            WorldError: if W·b > N.
        """
        self._check_rows(rows)
        count = len(next(iter(rows.values()))) * self.world.size
        if slots is None and count > self.size:
            raise WorldError(
                "a push into the bank",
                got=f"{count} rows from {self.world.size} ranks at once",
                expected=f"at most its {self.size} slots",
                fix="raise bank.size to the global batch or more",
            )
        route: PushRoute | None = None
        pieces: list[Piece]
        if self.sharded and self.world.size > 1 and (slots is None or slots.device.type == "cpu"):
            targets = (self.pointer + np.arange(count)) % self.size if slots is None else slots.numpy()
            route = PushRoute(self.world, targets, self.size, self.layout)
            pieces = [(slice(None), route.place)]
        elif slots is not None:
            pieces = chosen_pieces(slots, self.first, self.last)
        else:
            pieces = next_pieces(self.pointer, count, self.size, self.first, self.last)
        replaced = {}
        for name, stored in self._stored.items():
            row = rows[name].to(stored.dtype)
            batch = route.send(row) if route else self.world.all_gather_rows(row, self.layout)
            replaced[name] = [stored[place].clone() for _, place in pieces]
            for (source, place), old in zip(pieces, replaced[name], strict=True):
                stored[place] = batch[source] if taken is None else torch.where(taken, batch[source], old)
        self._version += 1
        undo = PushUndo(self._version, self.pointer, self.filled, [place for _, place in pieces], replaced)
        if slots is None:
            self.pointer, self.filled = (self.pointer + count) % self.size, min(self.size, self.filled + count)
        return undo

    def draw_slots(self, key: int, count: int) -> Tensor | None:
        """Draw ``count`` different slots for ``push``. Not a collective.

        Args:
            key: RNG key.
            count: number of slots.

        Returns:
            int64 [count]; or None, which makes ``push`` take the next slots, until every slot is filled.
        """
        if self.filled < self.size:
            return None
        return to_device(rng.permutation_slice(key, self.size, 0, count), self.world.device)

    def undo(self, push: PushUndo, unless: Tensor | None = None) -> None:
        """Undo the last push, bit for bit. Not a collective.

        Args:
            push: what the push returned.
            unless: bool [], equal on all ranks; where it is true, the rows stay as they were pushed. It is not read by
                the host: pointer and filled slots stay those after the push, and the caller restores them once it
                knows the value. None undoes all.

        Raises:
            ValueError: if the buffer has changed since that push.
        """
        if push.version != self._version:
            raise ValueError(f"push {push.version}: only the last push can be undone, and only once")
        if unless is None:
            self.pointer, self.filled = push.pointer, push.filled
        for name, stored in self._stored.items():
            for place, old in zip(push.places, push.replaced[name], strict=True):
                stored[place] = old if unless is None else torch.where(unless, stored[place], old)
        self._version += 1

    def rewrite(self, column: str, source: str, function: Callable[[Tensor], Tensor]) -> None:
        """Set ``column`` in every row to ``function`` of the row's ``source`` column. Not a collective."""
        self._rows[column].copy_(function(self._rows[source]))
        self._version += 1  # undoing an earlier push would bring old values back

    # -- reading ----------------------------------------------------------------------------------------------

    def get(self, column: str, slot: Tensor) -> Tensor:
        """Return the column's values at this rank's slots.

        Args:
            column: name of the column.
            slot: int64 of any shape, below N. Slots below 0 give -1 for integers and 0 for vectors.

        Returns:
            The shape of ``slot``, with a last dimension D for vectors.
        """
        self._check_column(column)
        stored = self._rows[column]
        if self.sharded:
            values = fetch_rows(self.world, stored, slot.flatten(), self.size).view(*slot.shape, *stored.shape[1:])
        else:
            values = stored[slot.clamp(0, self.size - 1)]
            if stored.dim() == 2:
                return values.masked_fill((slot < 0).unsqueeze(-1), 0)
        return values.masked_fill(slot < 0, -1) if stored.dim() == 1 else values

    def all_rows(self, column: str) -> Tensor:
        """Return every filled slot's value, [filled, D] or [filled], in slot order and without gradient.

        For losses over the whole bank, which have the same bits in either placement. A replicated buffer returns a view
        of its rows, which the next push overwrites; a sharded one gathers all N rows.
        """
        self._check_column(column)
        stored = self._rows[column]
        if self.sharded:  # the last ranks hold fewer rows than the first
            padded = stored.new_zeros(-(-self.size // self.world.size), *stored.shape[1:])
            padded[: len(stored)] = stored
            stored = self.world.all_gather(padded)
        return stored[: self.filled]

    def _filled_here(self) -> int:
        """Number of filled slots that this rank holds."""
        return max(0, min(self.last, self.filled) - self.first)

    # -- checkpoints ------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, TensorShard], dict[str, int]]:
        """Return this rank's shard of every column, and pointer and filled slots. Not a collective.

        A replicated buffer is saved like a sharded one: each rank saves its block of slots. The tensors are views of
        the rows; copy them before the next push.
        """
        low, high = self._block[0] - self.first, self._block[1] - self.first
        shards = {name: TensorShard(rows[low:high], self._block[0], self.size) for name, rows in self._rows.items()}
        return shards, {"pointer": self.pointer, "filled": self.filled}

    def replicas(self) -> dict[str, Tensor]:
        """Return the columns that every rank holds completely: all of a replicated buffer, none of a sharded one."""
        return {} if self.sharded else dict(self._rows)

    def load(self, numbers: Mapping[str, int], read: RowReader) -> None:
        """Load a saved buffer of this size, from any number of ranks and either placement.

        See ``CheckpointedMemory.load``.

        Args:
            numbers: pointer and filled slots, from ``state``.
            read: gives rows of a saved column.

        Raises:
            ResumeError: if size, shapes or dtypes differ.
        """
        pointer, filled = int(numbers.get("pointer", -1)), int(numbers.get("filled", -1))
        if not (0 <= pointer < self.size and 0 <= filled <= self.size):
            raise ResumeError(
                "the saved bank",
                got=f"pointer {pointer}, {filled} filled slots",
                expected=f"a bank of {self.size} slots",
                fix="resume with the bank.size of the run",
            )
        for name, stored in self._rows.items():
            for start in range(self.first, self.last, _READ_ROWS):
                stop = min(self.last, start + _READ_ROWS)
                rows, destination = read(name, start, stop), stored[start - self.first : stop - self.first]
                if rows.shape != destination.shape or rows.dtype != destination.dtype:
                    raise ResumeError(
                        f"the saved bank's column {name!r}",
                        got=f"{tuple(rows.shape)} {rows.dtype}",
                        expected=f"{tuple(destination.shape)} {destination.dtype}",
                        fix="resume with the bank's size, columns and precision of the run",
                    )
                destination.copy_(rows)
        self.pointer, self.filled, self._key = pointer, filled, None
        self._version += 1  # earlier pushes can no longer be undone

    # -- checks -----------------------------------------------------------------------------------------------

    def _check_column(self, name: str) -> ColumnSpec:
        if name not in self.columns:
            raise ConfigError(
                "the bank", got=f"column {name!r}", expected="one of its columns", fix=suggest(name, self.columns)
            )
        return self.columns[name]

    def _check_rows(self, rows: Mapping[str, Tensor]) -> None:
        shapes = {name: tuple(x.shape) for name, x in rows.items()}
        b = next((shape[0] for shape in shapes.values() if shape), 0)
        expected = {name: (b,) if spec.dim is None else (b, spec.dim) for name, spec in self.columns.items()}
        if shapes != expected:
            raise ConfigError(
                "a push into the bank",
                got=str(shapes),
                expected=str(expected),
                fix="push every declared column, with one row per image",
            )
