"""The database as a source: reads datasets over the sessions of a pool.

A read returns all rows of a query, the changed rows, or only whether any row has changed. `transaction` begins and ends
a read's transaction, `reading` reads a dataset in it, and `fetching` fetches rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from twisted.internet.defer import Deferred

from cacheservice.base.errors import Blocker, QueryFailed
from cacheservice.base.interfaces import Reactor
from cacheservice.cache.cache import DatabaseStatus
from cacheservice.sources.base import ReadPlan, ReadResult
from cacheservice.sources.postgres import bad_bytes, recorded
from cacheservice.sources.postgres.blocked import BlockedStatements
from cacheservice.sources.postgres.blockers import find_blockers
from cacheservice.sources.postgres.capturing import Capturing
from cacheservice.sources.postgres.connector import Connector
from cacheservice.sources.postgres.fetching import Fetching
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.keys import KeyForm
from cacheservice.sources.postgres.logical import environment
from cacheservice.sources.postgres.logical.environment import Environment, Retained
from cacheservice.sources.postgres.reading import DatasetReader
from cacheservice.sources.postgres.recorded import Pruned, Recorded
from cacheservice.sources.postgres.session_settings import begin_reading, limits
from cacheservice.sources.postgres.sessions import Sessions
from cacheservice.sources.postgres.statements import rows_query
from cacheservice.sources.postgres.target import Resolve, Target
from cacheservice.sources.postgres.transaction import ReadAllAgain, SettingsAltered, Transactions

_MOST_READS = 4
"""Reads per attempt, plus one for each further dataset. A read is repeated only if the previous one was unusable."""


class Database:
    """Reads from the database: a `cacheservice.sources.base.Source`. All reads pass through it.

    :param connect_timeout_s: for one session to open, name look-ups included.
    :param status: receives the number of open sessions, and the server in use.
    """

    def __init__(self, reactor: Reactor, target: Target, connect_timeout_s: float, status: DatabaseStatus) -> None:
        self._reactor = reactor
        self._sessions = Sessions(reactor, target, connect_timeout_s, status)
        statements = BlockedStatements(reactor, self._sessions)
        self._transactions = Transactions(reactor, self._sessions, statements, status)
        self.capturing = Capturing(self._transactions)
        self._reader = DatasetReader(self._transactions, Fetching(reactor, statements), self.capturing)

    @property
    def resolve(self) -> Resolve:
        """Return the name look-ups, for other parts of the service."""
        return self._sessions.resolve

    @property
    def connector(self) -> Connector:
        """Return the connector, for sessions opened elsewhere.

        It knows the addresses that answer.
        """
        return self._sessions.connector

    def configure(self, target: Target, connect_timeout_s: float) -> None:
        """Open sessions with these settings from now on."""
        self._transactions.forget_servers()
        self._sessions.configure(target, connect_timeout_s)

    def make_room_by(self, make_room: Callable[[], bool]) -> None:
        """Call `make_room` if the server has no connection left.

        It returns whether it gave up a connection.
        """
        self._sessions.make_room_by(make_room)

    def end_kept(self) -> None:
        """End the kept sessions, because no read will follow for a while."""
        self._sessions.end_kept()

    def stop(self) -> None:
        """End the name look-ups and the kept sessions.

        The other sessions end with the reads that hold them.
        """
        self._sessions.stop()

    def read(self, plans: Sequence[ReadPlan]) -> Deferred[list[ReadResult]]:
        """Read the datasets' queries as (key, JSON document) in one transaction.

        See `cacheservice.sources.base.Source.read`.
        """
        return Deferred.fromCoroutine(self._read(plans))

    async def _read(self, plans: Sequence[ReadPlan]) -> list[ReadResult]:
        first = plans[0].dataset
        deadline_at = self._reactor.seconds() + first.timeout_s

        async def use(guard: GuardedConnection) -> list[ReadResult]:
            try:
                return await self._read_once(guard, plans, deadline_at)
            except QueryFailed as error:
                named = await self._naming_row(guard, plans, error) if bad_bytes.is_about_bytes(error) else None
                if named is None:
                    raise
                raise named from error

        # A notification may arrive at any moment, and opening a session then takes longer than the delta.
        notified = any(each.dataset.watch or each.dataset.notify for each in plans)
        again_in_s = 0.0 if notified else first.interval_s
        if any(each.dataset.watch for each in plans):
            await self.capturing.settle()
        try:
            most = len(plans) - 1 + _MOST_READS
            for _ in range(most):
                try:
                    return await self._sessions.use(first.group or first.name, deadline_at, use, again_in_s=again_in_s)
                except ReadAllAgain as again:
                    because = again.because
                    plans = [
                        each._replace(since=None, notified=None, because=because[each.dataset.name])
                        if each.dataset.name in because
                        else each
                        for each in plans
                    ]
            name, reason = next(iter(because.items()))
            raise QueryFailed(f"{name} was read {most} times, and in the end {reason}")
        finally:
            plans = ()  # an error keeps `use`, and through it the old snapshots

    async def _read_once(
        self, guard: GuardedConnection, plans: Sequence[ReadPlan], deadline_at: float
    ) -> list[ReadResult]:
        builders = [each.build() for each in plans]
        try:
            transaction = await self._transactions.begin(guard, plans, deadline_at)
            results = [await self._reader.read(transaction, *each) for each in zip(plans, builders, strict=True)]
            await self._transactions.commit(transaction, plans, results)
        except BaseException as error:
            for builder in builders:
                builder.discard()
            if isinstance(error, SettingsAltered):
                raise ReadAllAgain(dict.fromkeys([each.dataset.name for each in plans], error.reason)) from error
            raise
        return results

    async def _naming_row(
        self, guard: GuardedConnection, plans: Sequence[ReadPlan], error: QueryFailed
    ) -> QueryFailed | None:
        """Return `error` with the row that caused it; None if no row is found."""
        for dataset in (each.dataset for each in plans):
            begin = begin_reading(dataset, limits(guard.remaining_s()))
            rows_sql = rows_query(dataset.query, dataset.key, KeyForm.of(dataset))
            named = await bad_bytes.name_row(self._reactor, guard, begin, rows_sql, dataset.name, error)
            if named is not None:
                return named
        return None

    def prune(self, keep_s: float, timeout_s: float) -> Deferred[Pruned]:
        """Delete recorded changes older than `keep_s`, or a part of them.

        :raises RefreshFailed: one of its subclasses.
        """
        return self._sessions.use(
            "prunes", self._reactor.seconds() + timeout_s, lambda guard: recorded.prune(guard, keep_s)
        )

    def environment(self, publication: str, timeout_s: float) -> Deferred[Environment]:
        """Ask whether the server can decode its log for this role.

        :raises RefreshFailed: one of its subclasses.
        """
        return self._sessions.use(
            "changes", self._reactor.seconds() + timeout_s, lambda guard: environment.ask(guard, publication)
        )

    def retained(self, slot: str, timeout_s: float) -> Deferred[Retained]:
        """Ask how much of the log the server keeps for a slot.

        :raises RefreshFailed: one of its subclasses.
        """
        return self._sessions.use(
            "changes", self._reactor.seconds() + timeout_s, lambda guard: environment.look(guard, slot)
        )

    def blockers(self, pid: int, timeout_s: float) -> Deferred[tuple[Blocker, ...]]:
        """Ask for the sessions that a server process waits for.

        :raises RefreshFailed: one of its subclasses.
        """
        return self._sessions.use(
            "changes", self._reactor.seconds() + timeout_s, lambda guard: find_blockers(guard, pid)
        )

    def flush_log(self, timeout_s: float) -> Deferred[None]:
        """Have the server write its log to the disk, by a commit of a transaction that writes nothing else.

        :raises RefreshFailed: one of its subclasses.
        """
        return self._sessions.use("changes", self._reactor.seconds() + timeout_s, environment.flush)

    def recorded(self, timeout_s: float) -> Deferred[Recorded]:
        """Ask for the recorded changes that the database keeps.

        A standby answers, too.

        :raises RefreshFailed: one of its subclasses.
        """
        return self._sessions.use("prunes", self._reactor.seconds() + timeout_s, recorded.ask)
