"""Reads one dataset within a transaction, step by step.

`cacheservice.sources.full_or_delta.next_step` decides each step; this module takes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from cacheservice.base.errors import BadResult, QueryFailed
from cacheservice.cache.identity import why_another
from cacheservice.cache.rows import RowsBuilder
from cacheservice.config import DatasetSettings
from cacheservice.sources import full_or_delta
from cacheservice.sources.base import AllRows, ChangedRows, ReadPlan, ReadResult, Unchanged
from cacheservice.sources.full_or_delta import Key, Known, NotifiedRows
from cacheservice.sources.postgres import deltas
from cacheservice.sources.postgres.capturing import Capturing
from cacheservice.sources.postgres.fetching import Column, Fetching
from cacheservice.sources.postgres.keys import KeyForm
from cacheservice.sources.postgres.quoting import quoted
from cacheservice.sources.postgres.statements import first_rows, probe_query, whole_query
from cacheservice.sources.postgres.transaction import ReadAllAgain, Transaction, Transactions

_DATA_EXCEPTION = "22"
"""The SQLSTATE class for values that do not fit a type."""


class DatasetReader:
    """Reads datasets within transactions."""

    def __init__(self, transactions: Transactions, fetching: Fetching, capturing: Capturing) -> None:
        self._transactions = transactions
        self._fetching = fetching
        self._capturing = capturing

    async def read(self, transaction: Transaction, read: ReadPlan, builder: RowsBuilder) -> ReadResult:
        """Read one dataset.

        :param builder: takes the rows of a full read.
        :raises ReadAllAgain: if recorded keys do not fit the query's.
        """
        another = None if read.since is None else why_another(read.since.server, transaction.moment.server)
        if another is not None:
            read = read._replace(since=None)
        altered = another or await self._transactions.altered(transaction, read.since, read.dataset)
        known = Known(altered, self._capturing.can_ask(transaction))
        while True:
            step = full_or_delta.next_step(read, known)
            match step:
                case full_or_delta.AskProbe():
                    known = replace(known, probe=await _probe(transaction, read.dataset))
                case full_or_delta.AskChanges():
                    known = replace(known, changes=await self._capturing.changes(transaction, read))
                case full_or_delta.AskNotified():
                    assert read.notified is not None, "that step asks for the notified rows"
                    known = replace(known, notified=NotifiedRows(await read.notified()))
                case full_or_delta.ReadAll():
                    return await self._all(transaction, read, builder, known, step)
                case _:
                    return await self._less(transaction, read, known, step)

    async def _less(
        self,
        transaction: Transaction,
        read: ReadPlan,
        known: Known,
        step: full_or_delta.ReadNothing | full_or_delta.ReadKeys | full_or_delta.ReadNotified,
    ) -> ChangedRows | Unchanged:
        """Read what has changed since the snapshot."""
        since, changes = read.since, known.changes
        assert since is not None, "a delta starts from a snapshot"
        with _keys_fit(read.dataset):
            match step:
                case full_or_delta.ReadNothing():
                    changed = {}
                case full_or_delta.ReadKeys():
                    changed = await self._recorded_rows(transaction, read, step.keys)
                case full_or_delta.ReadNotified():
                    changed = await self._notified_rows(transaction, read, step.keys)
        result = Unchanged(
            moment=transaction.moment,
            columns=since.columns,
            watch_state=since.watch_state if changes is None else changes.state,
            # A changed probe may concern other rows, too: the next attempt must still see that it changed.
            probe=since.probe if isinstance(step, full_or_delta.ReadNotified) else known.probe,
            dependencies=since.dependencies,
        )
        if isinstance(step, full_or_delta.ReadNothing) or not step.keys:
            return result
        return ChangedRows(
            moment=result.moment,
            columns=result.columns,
            watch_state=result.watch_state,
            probe=result.probe,
            dependencies=result.dependencies,
            changed=changed,
        )

    async def _recorded_rows(
        self, transaction: Transaction, read: ReadPlan, keys: Sequence[Key]
    ) -> dict[bytes, bytes | None]:
        dataset = read.dataset
        columns = [f"q.{quoted(column)}" for column in dataset.key]
        if any(None in key for key in keys):
            # A row of a watched table without a key may also be a row of the query, and must be detected.
            nulls = " OR ".join(f"{column} IS NULL" for column in columns)
            sql = first_rows(f"{whole_query(dataset.query)} WHERE {nulls}", 1)
            if (await self._fetching.execute(transaction, sql, dataset.name)).rowcount:
                raise BadResult("the key of a row is NULL; every row needs a key")
        predicate = KeyForm.of(dataset).predicate(columns, keys)
        found = await self._fetching.some_rows(transaction, read, predicate, len(keys))
        return {**dict.fromkeys(_served(dataset, keys)), **found}

    async def _notified_rows(
        self, transaction: Transaction, read: ReadPlan, keys: frozenset[str]
    ) -> dict[bytes, bytes | None]:
        if not keys:
            return {}
        columns = [f"q.{quoted(column)}" for column in read.dataset.key]
        form = KeyForm.of(read.dataset)
        if len(columns) == 1:
            predicate = form.predicate(columns, [(key,) for key in keys])
        else:
            predicate = form.joined_predicate(columns, keys)
        found = await self._fetching.some_rows(transaction, read, predicate, len(keys))
        return {**{key.encode(): None for key in keys}, **found}

    async def _all(
        self, transaction: Transaction, read: ReadPlan, builder: RowsBuilder, known: Known, step: full_or_delta.ReadAll
    ) -> AllRows:
        dataset, since = read.dataset, read.since
        columns = await self._fetching.all_rows(transaction, read, builder)
        dependencies = since.dependencies if since is not None and known.altered is None else None
        if dependencies is None and (dataset.watch or dataset.probe or dataset.notify):
            oids = [column.type_oid for column in columns]
            dependencies = await self._transactions.dependencies(transaction, dataset, oids)
        watch_state = known.changes.state if known.changes is not None else ""
        unfit = await _unfit_key(transaction, dataset, columns) if watch_state else None
        may_differ = None if step.may_differ is None else frozenset(_served(dataset, step.may_differ))
        return AllRows(
            moment=transaction.moment,
            columns=tuple(column.name for column in columns),
            watch_state="" if unfit is not None else watch_state,
            probe=known.probe,
            dependencies=dependencies,
            no_delta=unfit or step.no_delta,
            rows=builder,
            because=unfit or step.because,
            may_differ=may_differ,
        )


async def _probe(transaction: Transaction, dataset: DatasetSettings) -> str:
    cursor = await transaction.guard.execute(probe_query(dataset.probe))
    return deltas.value_of(cursor.fetchone()[0])


async def _unfit_key(transaction: Transaction, dataset: DatasetSettings, columns: Sequence[Column]) -> str | None:
    types = {column.name: column.type_oid for column in columns}
    sql = deltas.key_types_sql(dataset, [types[column] for column in dataset.key])
    return deltas.unfit_key((await transaction.guard.execute(sql)).fetchall(), dataset)


def _served(dataset: DatasetSettings, keys: Sequence[Key]) -> list[bytes]:
    """Return recorded keys in their served form, except keys that have a NULL."""
    form = KeyForm.of(dataset)
    return [form.join(key) for key in keys if None not in key]


@contextmanager
def _keys_fit(dataset: DatasetSettings) -> Iterator[None]:
    """Read all rows again if a key does not fit the type of the query's column.

    :raises ReadAllAgain: for any data exception; a recorded key that does not fit is its likely cause.
    """
    try:
        yield
    except QueryFailed as error:
        if not error.sqlstate.startswith(_DATA_EXCEPTION):
            raise
        because = f"the keys that changed do not fit the key of the query ({error}); give both the same type"
        raise ReadAllAgain({dataset.name: because}) from error
