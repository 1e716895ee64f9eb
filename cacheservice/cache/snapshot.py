"""One result of a dataset's query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from cacheservice.cache.changes import Change
from cacheservice.cache.dependencies import Dependencies
from cacheservice.cache.identity import ServerIdentity, is_visible, why_another
from cacheservice.cache.lag import NO_LAG, Lag
from cacheservice.cache.rows import Groups, Rows, RowsBuilder
from cacheservice.config import DatasetSettings


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Snapshot:
    """One complete, immutable result of a dataset's query.

    :param as_of: the database clock at the start of the transaction that read it, minus `lag`.
    :param read_at: this machine's monotonic clock in seconds just before that transaction began, minus `lag`.
    :param database_snapshot: the result of `pg_current_snapshot()` in that transaction.
    :param columns: the names of the query's columns.
    :param change: what its publish changed; None if it was not read from the database.
    :param rolled_back_to: the saved generation that a rollback published again as this one.
    :param watch_state: the state of the watched tables by `cacheservice.changes`; empty if deltas cannot start here.
    :param probe: the value of the probe; None without a probe.
    :param server: the server that it was read from.
    :param lag: how far that server was behind its primary.
    :param content_since: `as_of` of the first read with the same content; None if this read was the first.
    :param dependencies: what the form of its documents depends on; None if that is not known.
    :param age_uncertain: why `read_at` is uncertain, which is possible only for saved rows; None if it is certain.
    """

    generation: int
    rows: Rows
    as_of: datetime
    read_at: float
    database_snapshot: str
    columns: tuple[str, ...] = ()
    source: Literal["postgres", "disk", "valkey"] = "postgres"
    change: Change | None = None
    rolled_back_to: int | None = None
    watch_state: str = ""
    probe: str | None = None
    server: ServerIdentity | None = None
    lag: Lag = NO_LAG
    content_since: datetime | None = None
    dependencies: Dependencies | None = None
    age_uncertain: str | None = None

    @property
    def began_at(self) -> float:
        """The monotonic clock in seconds just before its transaction began."""
        return self.read_at + self.lag.seconds

    @property
    def modified_as_of(self) -> datetime:
        """The database clock at the first read that returned this content."""
        return self.content_since or self.as_of

    def includes(self, transaction_id: int, present: ServerIdentity | None) -> bool:
        """Return whether it includes a committed transaction of the server `present`."""
        if self.server is None or why_another(self.server, present) is not None:
            return False
        return is_visible(transaction_id, self.database_snapshot, in_recovery=self.server.in_recovery)

    def without_states(self) -> Snapshot:
        """Return it without what a delta or a probe starts from, so that the next read is a full one."""
        return replace(self, watch_state="", probe=None, dependencies=None)


def rows_builder(settings: DatasetSettings, release: Callable[[Groups], None]) -> RowsBuilder:
    """Return a builder for the rows of a dataset; `release` takes over their groups in the end."""
    patched = bool(settings.watch or settings.notify)
    return RowsBuilder(release, max_rows=settings.max_rows, max_bytes=settings.max_bytes, patched=patched)
