"""What one column of a memory bank holds: vectors of one width, or one integer per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpcssl.errors import ConfigError


@dataclass(frozen=True)
class ColumnSpec:
    """Width and dtype of a column.

    Attributes:
        dim: number of entries per row, D. None means one integer per row.
        dtype: float32 or float64 for vectors, int64 for integers. None means the dtype of the bank for vectors and
            int64 for integers.
    """

    dim: int | None = None
    dtype: torch.dtype | None = None

    def resolve(self, name: str, bank_dtype: torch.dtype) -> ColumnSpec:
        """Return a copy with the dtype filled in.

        Args:
            name: name of the column, for the error message.
            bank_dtype: dtype of vectors that state none.

        Raises:
            ConfigError: if width and dtype do not go together.
        """
        dtype = self.dtype or (torch.int64 if self.dim is None else bank_dtype)
        if self.dim is None:
            supported = dtype == torch.int64
        else:
            supported = self.dim >= 1 and dtype in (torch.float32, torch.float64)
        if not supported:
            raise ConfigError(
                f"the bank's column {name!r}",
                got=f"{self.dim} entries of {dtype}",
                expected="vectors of float32 or float64, or one int64 per row",
                fix="give vectors a width and a float dtype, and integers neither",
            )
        return ColumnSpec(self.dim, dtype)
