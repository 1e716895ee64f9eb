"""Reads one dataset's query, whole, in one transaction of a session of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any, NamedTuple

import psycopg2
from sqlparse.lexer import tokenize
from sqlparse.tokens import Comment, Whitespace
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater

from cacheservice.cache.cache import DatabaseStatus
from cacheservice.cache.rows import RowsBuilder
from cacheservice.config import DatasetSettings
from cacheservice.errors import Blocker, CacheServiceError, LockTimeout
from cacheservice.postgres.blockers import find_blockers
from cacheservice.postgres.guard import GuardedConnection
from cacheservice.postgres.resolve import Resolver
from cacheservice.postgres.target import Target

# What a session may do is bounded by its grants; this bounds what it may do by mistake. Settings are LOCAL and come
# after BEGIN because a transaction-pooling proxy would leak them to other clients otherwise.
_BEGIN = """
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
SET LOCAL search_path = pg_catalog, public, pg_temp;
SET LOCAL statement_timeout = {statement_ms};
SET LOCAL lock_timeout = {lock_ms};
SET LOCAL idle_in_transaction_session_timeout = {idle_ms};
SET LOCAL client_connection_check_interval = 1000;
SET LOCAL cursor_tuple_fraction = 1;
SELECT extract(epoch FROM now())::float8, pg_current_snapshot()::text, pg_backend_pid()
"""

_STATEMENT_SHARE = 0.95
"""The server's own timeouts come a little before our deadline, because its error tells more than our silence."""
_LOCK_SHARE = 0.9
_ASK_SHARE = 0.75
"""Who holds the lock is asked for before the wait for it ends: afterwards the server no longer knows."""
_ASK_TIMEOUT_S = 5.0

_MOST_CHUNK_ROWS = 1000
_CHUNK_BYTES = 256 * 1024
"""1000 rows or 256 KiB are asked for at a time; fewer would leave the server waiting."""
_SLICE_ROWS = 64
"""What is unpacked in one turn of the reactor, in a fifth of a millisecond: readers wait behind it."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Of which moment the rows are, by the database's clock and snapshot, and by our monotonic clock just before it.

    `columns` are the names of the query's columns, in their order.
    """

    as_of: datetime
    read_at: float
    database_snapshot: str
    columns: tuple[str, ...] = ()


class Wanted(NamedTuple):
    """A dataset to read, into what, and who gets the planner's estimate of its rows before they come, if anybody."""

    dataset: DatasetSettings
    into: RowsBuilder
    expect: Callable[[int], None] | None = None


class Database:
    """The one way to the database. It holds no session between reads.

    :param connect_timeout_s: for one session to open, name look-ups included.
    :param status: gets the number of sessions that are open.
    """

    def __init__(self, reactor: Any, target: Target, connect_timeout_s: float, status: DatabaseStatus) -> None:
        self._reactor = reactor
        self._target = target
        self._connect_timeout_s = connect_timeout_s
        self._resolver = Resolver(reactor)
        self._status = status

    def stop(self) -> None:
        """Let the name look-ups go; sessions end with the reads that hold them."""
        self._resolver.stop()

    def read(
        self, dataset: DatasetSettings, into: RowsBuilder, expect: Callable[[int], None] | None = None
    ) -> Deferred[Reading]:
        """Read one dataset, as `read_together` does."""
        return self.read_together([Wanted(dataset, into, expect)]).addCallback(itemgetter(0))

    def read_together(self, wanted: Sequence[Wanted]) -> Deferred[list[Reading]]:
        """Read all rows of the datasets' queries as (key, JSON document), in one transaction: of one moment.

        All of it within the `timeout_s` of the first; there is a reading for each, in their order.

        :raises RefreshFailed: one of its subclasses. Cancelling the Deferred ends the session at once.
        """
        first = wanted[0].dataset
        deadline_at = self._reactor.seconds() + first.timeout_s

        async def use(guard: GuardedConnection) -> list[Reading]:
            return await self._read(guard, wanted, deadline_at)

        return self._with_session(first.group or first.name, deadline_at, use)

    def _with_session(self, purpose: str, deadline_at: float, use: Callable[[GuardedConnection], Any]) -> Deferred[Any]:
        guard = GuardedConnection(self._reactor, self._target, deadline_at)
        self._status.connections += 1
        d = Deferred.fromCoroutine(guard.connect(self._resolver.resolve, purpose, self._connect_timeout_s))
        d.addCallback(lambda _: Deferred.fromCoroutine(use(guard)))
        d.addBoth(guard.close_and_passthrough)
        d.addBoth(self._count_closed)
        return d

    def _count_closed(self, result: Any) -> Any:
        self._status.connections -= 1
        return result

    async def _read(
        self,
        guard: GuardedConnection,
        wanted: Sequence[Wanted],
        deadline_at: float,
    ) -> list[Reading]:
        read_at = self._reactor.seconds()
        remaining_ms = guard.remaining_s() * 1000
        cursor = await guard.execute(
            _BEGIN.format(
                # 0 would mean "no limit".
                statement_ms=max(1, int(remaining_ms * _STATEMENT_SHARE)),
                lock_ms=max(1, int(remaining_ms * _LOCK_SHARE)),
                idle_ms=max(1, int(remaining_ms)),
            )
        )
        ((epoch_s, snapshot, pid),) = cursor.fetchall()
        as_of = datetime.fromtimestamp(epoch_s, UTC)
        readings = []
        for dataset, into, expect in wanted:
            rows_sql = rows_query(dataset.query, dataset.key)
            await self._declare(guard, dataset.name, rows_sql, pid, deadline_at)
            cursor = await guard.execute(columns_query(dataset.query))
            columns = tuple(column.name for column in cursor.description)
            if expect is not None:
                cursor = await guard.execute(f"EXPLAIN (FORMAT JSON) {rows_sql}")
                expect(_planned_rows(cursor.fetchone()[0]))
            await self._fetch_all(guard, into)
            readings.append(Reading(as_of, read_at, snapshot.decode(), columns))
            await guard.execute("CLOSE rows" if len(readings) < len(wanted) else "COMMIT")
        return readings

    async def _fetch_all(self, guard: GuardedConnection, into: RowsBuilder) -> None:
        # The first chunks are small, because nobody knows yet how large a row is.
        chunk_rows = 1
        cursor = await guard.execute(_fetch(chunk_rows))
        while cursor.rowcount:
            # Asked for before the last chunk is unpacked, so that the server renders while we unpack.
            chunk_rows = _next_chunk_rows(chunk_rows, into)
            pending = guard.execute(_fetch(chunk_rows))
            try:
                while rows := cursor.fetchmany(_SLICE_ROWS):
                    into.add(rows)
                    if cursor.rownumber < cursor.rowcount:
                        await deferLater(self._reactor, 0)
            except psycopg2.InterfaceError:
                await pending  # raises: the session was found lost, and with it what the cursor held
                await guard.execute("SELECT 1")  # raises, if it ended at its deadline after the next rows had come
                raise
            cursor = await pending

    async def _declare(self, guard: GuardedConnection, name: str, rows_sql: str, pid: int, deadline_at: float) -> None:
        """Open the cursor, which takes the query's locks; ask meanwhile who keeps us from them."""
        asked: list[Deferred[tuple[Blocker, ...]]] = []
        ask_timer = self._reactor.callLater(
            guard.remaining_s() * _ASK_SHARE, lambda: asked.append(self._ask(name, pid, deadline_at))
        )
        try:
            await guard.execute(f"DECLARE rows NO SCROLL CURSOR FOR {rows_sql}")
        except LockTimeout as error:
            blockers = await asked.pop() if asked else ()
            raise LockTimeout(str(error), error.sqlstate, blockers) from error
        finally:
            if ask_timer.active():
                ask_timer.cancel()
            for d in asked:
                d.cancel()

    def _ask(self, name: str, pid: int, deadline_at: float) -> Deferred[tuple[Blocker, ...]]:
        ask_by = min(deadline_at, self._reactor.seconds() + _ASK_TIMEOUT_S)
        d: Deferred[tuple[Blocker, ...]] = self._with_session(
            f"{name} (who blocks it)", ask_by, lambda guard: find_blockers(guard, pid)
        )

        def none_told(failure: Any) -> tuple[Blocker, ...]:
            # The refresh's own failure is what matters; that nobody told more is no second one.
            failure.trap(CacheServiceError, CancelledError)
            return ()

        return d.addErrback(none_told)


def _fetch(rows: int) -> str:
    return f"FETCH FORWARD {rows} FROM rows"


def _next_chunk_rows(last: int, taken: RowsBuilder) -> int:
    average_bytes = taken.size_bytes // taken.count if taken.count else _CHUNK_BYTES
    return max(1, min(last * 4, _MOST_CHUNK_ROWS, _CHUNK_BYTES // max(1, average_bytes)))


def rows_query(query: str, key: Sequence[str]) -> str:
    """The SQL that gives (key, document) of each row: PostgreSQL renders both, so types look as it shows them."""
    columns = " || ':' || ".join(f"q.{_quoted(column)}::text" for column in key)
    # q.* is the whole row even where a column is named q.
    return f"SELECT {columns}, row_to_json(q.*)::text FROM (\n{_without_ending(query)}\n) AS q"  # noqa: S608  # the operator's own query


def columns_query(query: str) -> str:
    """The SQL whose result has the query's columns and no row; PostgreSQL plans it and runs nothing."""
    return f"SELECT * FROM (\n{_without_ending(query)}\n) AS q LIMIT 0"  # noqa: S608  # the operator's own query


def _without_ending(query: str) -> str:
    """`query` up to its last word: a semicolon after it, which a comment may follow, has no place in a subquery."""
    words = list(tokenize(query))
    while words and (words[-1][0] in Whitespace or words[-1][0] in Comment or words[-1][1] == ";"):
        words.pop()
    return "".join(text for _, text in words)


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


def _planned_rows(plan: Any) -> int:
    parsed = plan if isinstance(plan, list) else json.loads(plan)
    return int(parsed[0]["Plan"]["Plan Rows"])
