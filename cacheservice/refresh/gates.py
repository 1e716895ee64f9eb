"""Decides whether a result may be published: results that look wrong are held."""

from __future__ import annotations

from collections.abc import Sequence

from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings


def refusal(served: Snapshot | None, count: int, columns: Sequence[str], settings: DatasetSettings) -> str | None:
    """Return why a result must not replace the served snapshot, in words; None if it may.

    A first load cannot shrink, but `min_rows` applies to it as well.

    :param served: None also if the served snapshot is of another query.
    :param count: the rows of the result.
    :param columns: the columns of the result.
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
