"""Fetches rows: in one answer if they are few, otherwise through a cursor and in chunks.

Rows are unpacked a few at a time, so that the reactor serves clients meanwhile.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import psycopg2

from cacheservice.base.interfaces import Cursor, Reactor
from cacheservice.base.timers import pause
from cacheservice.cache.rows import RowsBuilder
from cacheservice.config import DatasetSettings
from cacheservice.sources.base import ReadPlan
from cacheservice.sources.postgres import deltas
from cacheservice.sources.postgres.blocked import BlockedStatements
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.keys import KeyForm
from cacheservice.sources.postgres.session_settings import rounded
from cacheservice.sources.postgres.statements import FEW_ROWS, columns_query, rows_query, small_answer
from cacheservice.sources.postgres.transaction import Transaction

_MOST_CHUNK_ROWS = 1000
_CHUNK_BYTES = 256 * 1024
"""1000 rows or 256 KiB are fetched at a time; with fewer the server would wait for us."""
_SMALL_ROWS = FEW_ROWS // 2
_SMALL_BYTES = 256 * 1024
"""If the last result was smaller than this, the next read tries a single answer. The rows may double until then."""
_MOST_ANSWER_BYTES = 4 * 1024 * 1024
"""The limit for the documents in a single answer, which is in memory twice until it is unpacked."""
_SLICE_ROWS = 64
"""Rows unpacked in one turn of the reactor, which takes a fifth of a millisecond; clients wait meanwhile."""


class Column(NamedTuple):
    """A column of the query: its name, and the OID of its type."""

    name: str
    type_oid: int


class Fetching:
    """Fetches the rows of queries within transactions."""

    def __init__(self, reactor: Reactor, statements: BlockedStatements) -> None:
        self._reactor = reactor
        self._statements = statements
        self._outgrown: set[str] = set()  # datasets that were larger than expected, until a cursor has read them

    async def all_rows(self, transaction: Transaction, read: ReadPlan, builder: RowsBuilder) -> list[Column]:
        """Fetch all rows of a dataset's query into `builder`, and return the query's columns."""
        dataset = read.dataset
        rows_sql = rows_query(dataset.query, dataset.key, KeyForm.of(dataset))
        if await self._is_small(transaction, read, rows_sql, builder):
            if await self._at_once(transaction, rows_sql, dataset.name, builder, FEW_ROWS):
                return _columns(await transaction.guard.execute(columns_query(dataset.query)))
            # If the time does not suffice to run the query twice, the next attempt must not try one answer again.
            self._outgrown.add(dataset.name)
        columns = await self._by_cursor(transaction, dataset, rows_sql, builder)
        self._outgrown.discard(dataset.name)
        return columns

    async def some_rows(
        self, transaction: Transaction, read: ReadPlan, predicate: str, most: int
    ) -> dict[bytes, bytes | None]:
        """Return the rows of a dataset's query for which `predicate` is true, at most about `most`.

        :raises BadResult: if a key occurs twice.
        """
        dataset, last = read.dataset, read.last
        found = deltas.ChangedRows()
        sql = f"{rows_query(dataset.query, dataset.key, KeyForm.of(dataset))} WHERE {predicate}"
        average_bytes = last.size_bytes // last.count if last is not None and last.count else 0
        is_small = most <= FEW_ROWS or most * average_bytes <= _MOST_ANSWER_BYTES
        # More rows than keys means that a key occurs twice; both ways detect that.
        if not is_small or not await self._at_once(transaction, sql, dataset.name, found, most):
            await self.execute(transaction, f"DECLARE rows NO SCROLL CURSOR FOR {sql}", dataset.name)
            await self._fetch_all(transaction.guard, found)
        return found.rows

    async def execute(self, transaction: Transaction, sql: str, name: str) -> Cursor:
        """Execute a statement that may wait for a lock; return the driver's cursor.

        :raises LockTimeout: with the blocking sessions, if they were found.
        """
        return await self._statements.execute(transaction.guard, sql, name, transaction.pid, transaction.deadline_at)

    async def _is_small(self, transaction: Transaction, read: ReadPlan, rows_sql: str, builder: RowsBuilder) -> bool:
        """Return whether one answer is expected to hold all rows.

        The size of the last result decides, or the planner's estimate before the first result.
        """
        name, last = read.dataset.name, read.last
        if last is None:
            cursor = await self.execute(transaction, f"EXPLAIN (FORMAT JSON) {rows_sql}", name)
            planned_rows = _planned_rows(cursor.fetchone()[0])
            builder.expect(planned_rows)
            if read.expect is not None:
                read.expect(planned_rows)
            is_small = planned_rows <= FEW_ROWS
        else:
            is_small = last.count <= _SMALL_ROWS and last.size_bytes <= _SMALL_BYTES
        return is_small and name not in self._outgrown

    async def _at_once(
        self, transaction: Transaction, sql: str, name: str, into: RowsBuilder | deltas.ChangedRows, most: int
    ) -> bool:
        """Fetch rows in one answer, without a cursor.

        :returns: False if there are more than `most` rows or `_MOST_ANSWER_BYTES` bytes; `into` is then unchanged.
        """
        answer = small_answer(sql, most, _MOST_ANSWER_BYTES)
        cursor = await self.execute(transaction, answer, name)
        if cursor.rowcount > most:
            return False
        try:
            if cursor.rowcount:
                cursor.scroll(cursor.rowcount - 1, mode="absolute")
                _, last = cursor.fetchone()
                if last is None:
                    return False
                cursor.scroll(0, mode="absolute")
            await self._unpack(cursor, into)
        except psycopg2.InterfaceError:
            await transaction.guard.execute("SELECT 1")  # raises why the session ended before all rows were unpacked
            raise
        return True

    async def _by_cursor(
        self, transaction: Transaction, dataset: DatasetSettings, rows_sql: str, builder: RowsBuilder
    ) -> list[Column]:
        """Fetch any number of rows, and return the query's columns."""
        await self.execute(transaction, f"DECLARE rows NO SCROLL CURSOR FOR {rows_sql}", dataset.name)
        columns = _columns(await transaction.guard.execute(columns_query(dataset.query)))
        await self._fetch_all(transaction.guard, builder)
        return columns

    async def _fetch_all(self, guard: GuardedConnection, into: RowsBuilder | deltas.ChangedRows) -> None:
        # The first chunks are small, because the size of a row is not known yet.
        chunk_rows = 1
        cursor = await guard.execute(_fetch(chunk_rows))
        while cursor.rowcount:
            # The next chunk is requested before the last one is unpacked, so that the server renders meanwhile.
            chunk_rows = _next_chunk_rows(chunk_rows, into)
            pending = guard.execute(_fetch(chunk_rows))
            try:
                await self._unpack(cursor, into)
            except psycopg2.InterfaceError:
                await pending  # raises if the session was found lost, and the cursor's rows with it
                await guard.execute("SELECT 1")  # raises if it ended at its deadline, after the next rows had arrived
                raise
            cursor = await pending
        await guard.execute("CLOSE rows")

    async def _unpack(self, cursor: Cursor, into: RowsBuilder | deltas.ChangedRows) -> None:
        while rows := cursor.fetchmany(_SLICE_ROWS):
            into.add(rows)
            if cursor.rownumber < cursor.rowcount:
                await pause(self._reactor)


def _columns(cursor: Cursor) -> list[Column]:
    return [Column(column.name, column.type_code) for column in cursor.description or ()]


def _fetch(rows: int) -> str:
    return f"FETCH FORWARD {rows} FROM rows"


def _next_chunk_rows(last: int, taken: RowsBuilder | deltas.ChangedRows) -> int:
    average_bytes = taken.size_bytes // taken.count if taken.count else _CHUNK_BYTES
    return rounded(min(last * 4, _MOST_CHUNK_ROWS, _CHUNK_BYTES // max(1, average_bytes)))


def _planned_rows(plan: list[Any] | str | bytes) -> int:
    """Return the planner's estimate; the driver may have parsed the JSON already."""
    parsed = plan if isinstance(plan, list) else json.loads(plan)
    return int(parsed[0]["Plan"]["Plan Rows"])
