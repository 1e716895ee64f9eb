"""Declared datasets, and the rows and snapshots that they may have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from cacheservice.cache.dataset import Dataset
from cacheservice.cache.refresh_status import Phase, Progress
from cacheservice.cache.rows import Groups, Rows, RowsBuilder
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings

MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
MOMENT_WITH_MS = MOMENT.replace(microsecond=678_000)
MANY = 500
"""More datasets than anybody has."""

Table = dict[bytes, bytes]
"""Documents by their keys."""


def declared(name: str = "products", **keys: Any) -> DatasetSettings:
    """Declare a dataset that is refreshed every minute, the rest by default."""
    fields = {"name": name, "query": "SELECT 1 AS id", "key": "id", "interval_s": 60.0} | keys
    return DatasetSettings.model_validate(fields)


def planned(dataset: Dataset, next_at: float | None) -> None:
    """Plan the next attempt of a dataset, as its refresher does."""
    dataset.note_refresh(replace(dataset.refresh, next_at=next_at))


def reading(dataset: Dataset, rows: RowsBuilder | None, expected: int | None = None) -> None:
    """Have a dataset read these rows, or with None wait for a connection."""
    phase = Phase.WAITING if rows is None else Phase.READING
    progress = None if rows is None else Progress(rows, expected)
    dataset.note_refresh(replace(dataset.refresh, phase=phase, progress=progress))


def rows_builder() -> RowsBuilder:
    """Return a builder of rows that nobody waits for to be freed."""
    return RowsBuilder(lambda _: None)


def rows_of(
    table: Mapping[bytes, bytes] | Iterable[tuple[bytes | None, bytes]],
    release: Callable[[Groups], object] = lambda _: None,
) -> Rows:
    """Build rows from their keys and documents."""
    builder = RowsBuilder(release)
    builder.add(list(table.items() if isinstance(table, Mapping) else table))
    return builder.finish()


def numbered_rows(count: int) -> Rows:
    """Build so many rows, whose keys and ids are the numbers from 0."""
    return rows_of((b"%d" % number, b'{"id":%d}' % number) for number in range(count))


def snapshot_of(rows: Rows, generation: int = 1, read_at: float = 0.0, **fields: Any) -> Snapshot:
    """Make a snapshot of rows that were read from no server in particular."""
    return Snapshot(generation, rows, MOMENT, read_at, "1:1:", **fields)


def table_of(rows: Rows) -> Table:
    """Return rows as the table that they are made of."""
    return dict(rows.items())
