"""The transaction of a read: how it begins, which moment it is of, and how it ends.

All datasets of a group are read in one transaction, so that their rows are of one moment. `Transactions.begin` asks in
one round trip for all that a read has to know of that moment. `Transactions.commit` refuses rows that were read while
definitions changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple, NoReturn
from weakref import WeakKeyDictionary

from twisted.internet.defer import Deferred

from cacheservice.base.errors import DatabaseUnavailable, QueryFailed
from cacheservice.base.interfaces import Cursor, Reactor
from cacheservice.cache.cache import DatabaseStatus
from cacheservice.cache.dependencies import Dependencies
from cacheservice.cache.lag import NO_LAG
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings
from cacheservice.sources.base import Moment, ReadPlan, ReadResult, Unchanged
from cacheservice.sources.postgres import deltas, dependencies, dependency_search
from cacheservice.sources.postgres.blocked import BlockedStatements
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.prepared import Prepared
from cacheservice.sources.postgres.quoting import literal
from cacheservice.sources.postgres.server import LIFE, Life, Servers
from cacheservice.sources.postgres.session_settings import (
    begin_reading,
    limits,
    pinning_expression,
    without_transaction_timeout,
)
from cacheservice.sources.postgres.sessions import Sessions
from cacheservice.sources.postgres.standby import Standbys

# Values that differ between attempts stand in a SELECT: the server would count each text of any other statement as a
# new statement (pg_stat_statements of PostgreSQL 17 and older).
_BEGIN = """\
{begin}
{no_transaction_timeout}
SET LOCAL application_name = {application_name};
{lock}
SELECT set_config('application_name', {attempt_name}, true);
{ask}
"""
_ASK = """\
SELECT {pinning}, extract(epoch FROM now()), pg_current_snapshot()::text, pg_backend_pid(), {can_ask},
       concat_ws(' ', {digests}), {own_settings}, {path}::text, {life}"""
"""The pinned settings come first, because a digest is of the settings in effect."""
_BEGIN_SEARCH = "SAVEPOINT search; SET LOCAL lock_timeout = 500"
"""The search may wait for a lock on a table that the query does not read; this limits the wait."""
_END_SEARCH = "ROLLBACK TO SAVEPOINT search"
_MOST_BEGINS = 5
"""A standby is asked for its lag before the transaction, so a first one, or one on another server, begins again."""


class ReadAllAgain(Exception):
    """Some datasets' results are unusable: read all their rows in another transaction.

    :param because: the reasons, by the names of the datasets.
    """

    def __init__(self, because: Mapping[str, str]) -> None:
        super().__init__(because)
        self.because = because


class SettingsAltered(Exception):
    """This session has outdated settings, because they changed after it began.

    The kept sessions have been ended.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Transaction(NamedTuple):
    """An open transaction.

    :param pid: the server process that runs it.
    :param can_record: whether this role may ask for recorded changes.
    :param digests: the digests of the dependencies of the datasets' earlier results, by name.
    :param path: the searched schemas.
    """

    guard: GuardedConnection
    deadline_at: float
    pid: int
    can_record: bool
    moment: Moment
    digests: Mapping[str, str]
    path: bytes


class Transactions:
    """Begins and ends the transactions of reads.

    :param sessions: whose sessions the transactions use.
    :param status: is informed of the server in use.
    """

    def __init__(
        self, reactor: Reactor, sessions: Sessions, statements: BlockedStatements, status: DatabaseStatus
    ) -> None:
        self._reactor = reactor
        self._sessions = sessions
        self._statements = statements
        self._status = status
        self._servers = Servers()
        self._standbys = Standbys()
        self._prepared = Prepared()
        self._own_settings: WeakKeyDictionary[GuardedConnection, bytes] = WeakKeyDictionary()

    def forget_servers(self) -> None:
        """Forget all servers, because sessions are now opened elsewhere."""
        self._servers.forget()
        self._standbys.forget()

    async def begin(self, guard: GuardedConnection, plans: Sequence[ReadPlan], deadline_at: float) -> Transaction:
        """Begin a transaction, and ask for its moment.

        :raises SettingsAltered: if the session has outdated settings.
        """
        for _ in range(_MOST_BEGINS):
            transaction = await self._begin_once(guard, plans, deadline_at)
            if transaction is not None:
                return transaction
            await guard.execute("ROLLBACK")
        raise DatabaseUnavailable("each statement came to another server; name one server, or pool by session")

    async def _begin_once(
        self, guard: GuardedConnection, plans: Sequence[ReadPlan], deadline_at: float
    ) -> Transaction | None:
        """Begin a transaction and read its moment.

        None if the server is a standby that was not asked for its lag before, or was promoted since then.
        """
        read_at = self._reactor.seconds()
        facts = await self._standbys.ask(guard)
        datasets, attempt = [each.dataset for each in plans], plans[0].attempt
        first = datasets[0]  # the datasets of a group share the settings that matter here
        purpose = first.group or first.name
        lock = deltas.lock_sql(datasets)
        keeps = self._prepared.can_keep(guard)
        asked = [each for each in plans if each.since and not dependencies.problem(each.since, each.dataset)]
        # A snapshot records the settings of its read; a first read has only those of the session.
        asks_settings = guard not in self._own_settings or any(each.since is None for each in plans)
        ask = _ASK.format(
            pinning=pinning_expression(first.settings) if keeps else "''",
            can_ask=deltas.CAN_ASK if lock else "false",
            digests=", ".join(dependencies.digest_of(each.since) for each in asked) or "''",
            path=dependencies.PATH,
            own_settings=dependencies.OWN_SETTINGS if asks_settings else "''",
            life=LIFE.format(crashes=str(any(each.watch or each.probe for each in datasets)).lower()),
        )
        begin = _BEGIN.format(
            begin=begin_reading(first, limits(guard.remaining_s()), pinned=not keeps),
            no_transaction_timeout=without_transaction_timeout(guard.server_version),
            application_name=literal(self._sessions.target.application_name(purpose)),
            attempt_name=literal(self._sessions.target.application_name(purpose, attempt)),
            lock=lock,
            ask=self._prepared.sql(guard, ask),
        )
        cursor = await self._statements.execute(guard, begin, purpose, guard.pid, deadline_at)
        ((_, epoch_s, snapshot, pid, can_record, found, own_settings, path, *life),) = cursor.fetchall()
        self._prepared.began(guard, pid)
        if asks_settings and guard.pid == pid and self._own_settings.setdefault(guard, own_settings) != own_settings:
            self._end_with_old_settings(dependencies.ALTERED)
        server = await self._servers.identify(guard, Life(*life))
        self._standbys.expect(server.in_recovery)
        if server.in_recovery != (facts is not None) or (facts is not None and facts.started_us != server.started_us):
            return None
        lag = self._standbys.lag(facts, read_at) if server.in_recovery else NO_LAG
        self._status.seen(server, lag)
        as_of = datetime.fromtimestamp(float(epoch_s) - lag.seconds, UTC)
        moment = Moment(as_of, read_at - lag.seconds, snapshot.decode(), server, lag)
        digests = dict(zip([each.dataset.name for each in asked], found.decode().split(), strict=True))
        return Transaction(guard, deadline_at, pid, can_record, moment, digests, path)

    def ask(self, transaction: Transaction, select: str) -> Deferred[Cursor]:
        """Run a SELECT that is the same in each read of a dataset, as a prepared statement if possible."""
        return transaction.guard.execute(self._prepared.sql(transaction.guard, select))

    async def altered(self, transaction: Transaction, since: Snapshot | None, dataset: DatasetSettings) -> str | None:
        """Return why documents may have another form than in the snapshot `since`.

        None if they have the same form.

        :raises SettingsAltered: if the session has outdated settings.
        """
        if since is None:
            return None
        if (problem := dependencies.problem(since, dataset)) is not None:
            return problem
        assert since.dependencies is not None, "that would be a problem"
        if transaction.digests[dataset.name] == since.dependencies.digest:
            return None
        cursor = await transaction.guard.execute(dependencies.versions_sql(since.dependencies.found))
        difference = dependencies.difference(since.dependencies.found, cursor.fetchall())
        if difference.of_settings:
            self._end_with_old_settings(difference.reason)
        return difference.reason

    def _end_with_old_settings(self, reason: str) -> NoReturn:
        """End the kept sessions, which have outdated settings.

        The session in use ends with the error.
        """
        self._sessions.end_kept()
        raise SettingsAltered(reason)

    async def dependencies(
        self, transaction: Transaction, dataset: DatasetSettings, type_oids: Sequence[int]
    ) -> Dependencies | None:
        """Return the dependencies of the rows that were just read.

        None if this role may not query them.
        """
        guard = transaction.guard
        await guard.execute(_BEGIN_SEARCH)
        try:
            found = await _search(transaction, dataset, type_oids)
        except QueryFailed:
            found = None
        await guard.execute(_END_SEARCH)
        return found

    async def commit(self, transaction: Transaction, plans: Sequence[ReadPlan], results: Sequence[ReadResult]) -> None:
        """End the transaction, and refuse its rows if definitions changed during it.

        The server looks up definitions as they are now, not as in the snapshot. Therefore rows of one read might have
        the forms of two moments, or come from the partitions of two moments.

        :raises ReadAllAgain: if definitions changed.
        :raises DatabaseUnavailable: if the standby was promoted after the transaction had begun.
        """
        await _check_not_promoted(transaction)
        recorded = {
            each.dataset.name: result.dependencies
            for each, result in zip(plans, results, strict=True)
            if not isinstance(result, Unchanged) and result.dependencies is not None
        }
        digests = ", ".join(dependencies.catalog_digest_sql(each.found) for each in recorded.values())
        ask = self._prepared.sql(transaction.guard, f"SELECT concat_ws(' ', {digests})") if recorded else ""
        answer = await self._sessions.commit(transaction.guard, transaction.pid, ask)
        if answer is None:
            return
        now = dict(zip(recorded, answer.fetchone()[0].decode().split(), strict=True))
        if changed := [name for name in recorded if now[name] != dependencies.catalog_part(recorded[name].digest)]:
            raise ReadAllAgain(dict.fromkeys(changed, "definitions that it depends on changed during the read"))


async def _search(transaction: Transaction, dataset: DatasetSettings, type_oids: Sequence[int]) -> Dependencies | None:
    guard = transaction.guard
    objects = await dependency_search.find(guard, dataset, type_oids)
    if objects is None:
        return None
    found = dependencies.with_session(objects, dataset)
    cursor = await guard.execute(dependencies.versions_sql(found))
    found = dependencies.with_versions(found, cursor.fetchall())
    cursor = await guard.execute(f"SELECT {dependencies.digest_sql(found)}, {dependencies.PATH}::text")
    digest, path = cursor.fetchone()
    # Otherwise names of the query may have been found in other schemas than those of the digest.
    return Dependencies(found, digest.decode()) if path == transaction.path else None


async def _check_not_promoted(transaction: Transaction) -> None:
    """Refuse a transaction during which the standby was promoted.

    `cacheservice.changes()` compares snapshots of a standby differently from snapshots of a primary, and it asks the
    server for its current role.
    """
    server = transaction.moment.server
    assert server is not None, "each transaction identifies its server"
    if not server.in_recovery:
        return
    cursor = await transaction.guard.execute("SELECT pg_is_in_recovery()")
    if not cursor.fetchone()[0]:
        raise DatabaseUnavailable("the standby was promoted during the read")
