"""What stands between a finished read and its publish: results that look wrong are held back."""

from __future__ import annotations

from collections.abc import Sequence

from cacheservice.cache.dataset import Snapshot
from cacheservice.config import DatasetSettings


def refusal(served: Snapshot | None, count: int, columns: Sequence[str], settings: DatasetSettings) -> str | None:
    """Why a result of `count` rows with these columns is not to replace what is served, in words; None if it may.

    A first load has nothing to shrink from; `min_rows` holds for it as well. `served` is None also where what is
    served is of another query.
    """
    if count < settings.min_rows:
        return f"has {count:,} rows, min_rows is {settings.min_rows:,}"
    if served is None:
        return None
    before = served.rows.count
    if before - count > settings.max_shrink * before:
        return f"would drop {before:,} to {count:,} rows, limit {settings.max_shrink * 100:.10g} %"
    gone = [column for column in served.columns if column not in columns]
    if gone and columns and settings.on_column_removed == "hold":
        names = ", ".join(gone)
        return f"has no column {names} any more" if len(gone) == 1 else f"has the columns {names} no more"
    return None
