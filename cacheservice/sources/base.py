"""The interface of a source: read plans in, results out.

`sources.postgres` reads from the database. `refresh` knows this module alone, so that another source needs no change
there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, Protocol

from twisted.internet.defer import Deferred

from cacheservice.cache.dependencies import Dependencies
from cacheservice.cache.identity import ServerIdentity
from cacheservice.cache.lag import NO_LAG, Lag
from cacheservice.cache.rows import Rows, RowsBuilder
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings


class ReadPlan(NamedTuple):
    """How to read one dataset, as decided before its transaction.

    :param build: makes an empty builder as each transaction begins. A builder never outlives its transaction, so that
        one builder never holds rows of two moments.
    :param expect: called with the planner's estimate of the number of rows before they arrive, if there is an estimate.
    :param last: the rows of the last result. Its size decides whether a full read needs a cursor.
    :param since: the snapshot to start from; None if there is none, or if all rows are to be read unconditionally.
    :param check: read all rows although a delta is possible, and report the rows that may differ.
    :param most_keys: of a delta; if more have changed, all rows are read.
    :param notified: returns the keys of the notifications once they are known, None for any row. Only these rows are
        read then.
    :param trust_probe: whether an unchanged value of the probe means that no row has changed.
    :param attempt: the id of the attempt, by which the server's views and logs name its statements.
    :param because: the reason for a full read although there is a snapshot to start from, if it is known beforehand.
    """

    dataset: DatasetSettings
    build: Callable[[], RowsBuilder]
    expect: Callable[[int], None] | None = None
    last: Rows | None = None
    since: Snapshot | None = None
    check: bool = False
    most_keys: int = 0
    notified: Callable[[], Awaitable[frozenset[str] | None]] | None = None
    trust_probe: bool = True
    attempt: str = ""
    because: str | None = None


@dataclass(frozen=True, slots=True)
class Moment:
    """The moment of a read, which all datasets of one read share.

    It is known by the source's clock and snapshot, and by our monotonic clock just before it. `as_of` and `read_at` are
    earlier by the `lag` of a standby.
    """

    as_of: datetime
    read_at: float
    database_snapshot: str
    server: ServerIdentity | None = None
    lag: Lag = NO_LAG

    @property
    def began_at(self) -> float:
        """Return the monotonic clock just before the transaction began."""
        return self.read_at + self.lag.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    moment: Moment
    columns: tuple[str, ...] = ()
    watch_state: str = ""
    probe: str | None = None
    dependencies: Dependencies | None = None
    no_delta: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AllRows(_Result):
    """All rows of the query.

    :param columns: the names of the query's columns, in their order.
    :param because: the reason for a full read although there was a snapshot to start from.
    :param no_delta: the reason why the changed rows are not known, with or without such a snapshot.
    :param may_differ: the keys that the triggers recorded as changed, None if that is not known. No other row may
        differ from the snapshot.
    """

    rows: RowsBuilder
    because: str | None = None
    may_differ: frozenset[bytes] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedRows(_Result):
    """The rows that may have changed since a snapshot; None stands for a removed row."""

    changed: Mapping[bytes, bytes | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unchanged(_Result):
    """No row has changed since a snapshot."""


ReadResult = AllRows | ChangedRows | Unchanged


class Source(Protocol):
    """Reads datasets."""

    def read(self, plans: Sequence[ReadPlan]) -> Deferred[list[ReadResult]]:
        """Read the datasets, all of one moment. There is a result for each plan, in their order.

        The limit for the whole read is the `timeout_s` of the first dataset.

        :raises RefreshFailed: one of its subclasses. Cancelling the Deferred ends the read at once.
        """

    def end_kept(self) -> None:
        """End what is kept between reads, because no read will follow for a while."""
