"""Records as a list of plain dicts, with a way to a pandas DataFrame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpcssl.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd


class Records(list[dict[str, Any]]):
    """Records of a run: a list of dicts with plain values, oldest first. Not all of them have the same keys.

    Example:
        The loss of each step, without and with pandas::

            losses = [row["loss"] for row in run.journal if "loss" in row]
            run.journal.frame().plot(x="step", y="loss")
    """

    def frame(self) -> pd.DataFrame:
        """Return a DataFrame with one row per record, and missing values where a record lacks a key.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ConfigError(
                "Records.frame",
                got="no package pandas",
                expected="pandas to be installed",
                fix="pip install pandas, or use the records as they are: a list of dicts",
            ) from error
        return pd.DataFrame.from_records(list(self))
