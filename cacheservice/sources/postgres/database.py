"""Reads datasets in one transaction.

A read returns all rows of a query, the changed rows, or only whether any row has changed.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any, Literal, NamedTuple, NoReturn
from weakref import WeakKeyDictionary

import psycopg2
from twisted.internet.defer import CancelledError, Deferred

from cacheservice.base.errors import (
    BadResult,
    Blocker,
    CacheServiceError,
    DatabaseUnavailable,
    LockTimeout,
    QueryFailed,
)
from cacheservice.base.interfaces import Reactor
from cacheservice.base.timers import pause
from cacheservice.cache.cache import DatabaseStatus
from cacheservice.cache.dataset import Snapshot
from cacheservice.cache.dependencies import Dependencies
from cacheservice.cache.identity import ServerIdentity, why_another
from cacheservice.cache.lag import NO_LAG, Lag
from cacheservice.cache.rows import Rows, RowsBuilder
from cacheservice.config import DatasetSettings
from cacheservice.sources.postgres import bad_bytes, deltas, dependencies, dependency_search, recorded
from cacheservice.sources.postgres.blockers import find_blockers
from cacheservice.sources.postgres.connector import Connector
from cacheservice.sources.postgres.guard import GuardedConnection
from cacheservice.sources.postgres.keys import Key, KeyForm, literal
from cacheservice.sources.postgres.prepared import Prepared
from cacheservice.sources.postgres.recorded import Recorded
from cacheservice.sources.postgres.server import LIFE, Life, Servers
from cacheservice.sources.postgres.session_settings import (
    Limits,
    begin_reading,
    pinning_expression,
    without_transaction_timeout,
)
from cacheservice.sources.postgres.sessions import Sessions
from cacheservice.sources.postgres.standby import Standbys
from cacheservice.sources.postgres.statements import (
    FEW_ROWS,
    columns_query,
    first_rows,
    probe_query,
    quoted,
    rows_query,
    small_answer,
    whole_query,
)
from cacheservice.sources.postgres.target import Resolve, Target

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
SELECT {pinning}, extract(epoch FROM now()), pg_current_snapshot()::text, pg_backend_pid(), {can_tell},
       concat_ws(' ', {digests}), {own_settings}, {path}::text, {life}"""
"""The pinned settings come first, because a digest is of the settings in effect."""
_BEGIN_SEARCH = "SAVEPOINT search; SET LOCAL lock_timeout = 500"
"""The search may wait for a lock on a table that the query does not read; this limits the wait."""
_END_SEARCH = "ROLLBACK TO SAVEPOINT search"
_PRUNE = """
BEGIN READ WRITE;
SET LOCAL statement_timeout = {statement_ms};
SET LOCAL lock_timeout = {statement_ms};
SET LOCAL client_connection_check_interval = 1000;
SELECT cacheservice.prune({keep_s} * interval '1 s')
"""

PRUNED_A_CALL = 10_000
"""The default of `cacheservice.prune`."""

_STATEMENT_SHARE = 0.95
"""The server's own timeouts come a little before our deadline, because its errors are more specific than silence."""
_LOCK_SHARE = 0.9
_ASK_SHARE = 0.75
"""Blockers are asked for before the wait for a lock ends; afterwards the server no longer knows them."""
_ASK_TIMEOUT_S = 5.0
_MOST_READS = 4
"""Reads per attempt, plus one for each further dataset. A read is repeated only if the previous one was unusable."""
_MOST_BEGINS = 5
"""A standby is asked for its lag before the transaction, so a first one, or one on another server, begins again."""

_MOST_CHUNK_ROWS = 1000
_CHUNK_BYTES = 256 * 1024
"""1000 rows or 256 KiB are fetched at a time; with fewer the server would wait for us."""
_SMALL_ROWS = FEW_ROWS // 2
_SMALL_BYTES = 256 * 1024
"""If the last result was smaller than this, the next read tries a single answer. The rows may double until then."""
_MOST_ANSWER_BYTES = 4 * 1024 * 1024
"""The limit for the documents in a single answer, which is in memory twice until it is unpacked."""
_SIGNIFICANT_BITS = 7
_DATA_EXCEPTION = "22"
"""The SQLSTATE class for values that do not fit a type."""
_SLICE_ROWS = 64
"""Rows unpacked in one turn of the reactor, which takes a fifth of a millisecond; clients wait meanwhile."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The result of a read, and its moment.

    The moment is known by the database's clock and snapshot, and by our monotonic clock just before it. `columns` are
    the names of the query's columns, in their order. `kind` is "all", with all rows in `rows`; "delta", with the
    changed rows in `changed` (None for a removed row); or "unchanged". `because` is the reason for a full read although
    there was a snapshot to start from; `no_delta` is the reason why the changed rows are not known, with or without
    such a snapshot. `may_differ` holds the keys that the triggers recorded as changed, None if that is not known; no
    other row may differ from the snapshot. `server` is the server that was read. `as_of` and `read_at` are earlier by
    the `lag` of a standby.
    """

    as_of: datetime
    read_at: float
    database_snapshot: str
    columns: tuple[str, ...] = ()
    kind: Literal["all", "delta", "unchanged"] = "all"
    because: str | None = None
    no_delta: str | None = None
    changed: Mapping[bytes, bytes | None] = field(default_factory=dict)
    may_differ: frozenset[bytes] | None = None
    watch_state: str = ""
    probe: str | None = None
    server: ServerIdentity | None = None
    dependencies: Dependencies | None = None
    rows: RowsBuilder | None = None
    lag: Lag = NO_LAG

    @property
    def began_at(self) -> float:
        """Return the monotonic clock just before the transaction began."""
        return self.read_at + self.lag.seconds


class Wanted(NamedTuple):
    """A dataset to read.

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


class _ReadAllAgain(Exception):
    """Some datasets' results are unusable: read all their rows in another transaction.

    :param because: the reasons, by the names of the datasets.
    """

    def __init__(self, because: Mapping[str, str]) -> None:
        super().__init__(because)
        self.because = because


class _SettingsAltered(Exception):
    """This session has outdated settings, because they changed after it began."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Moment(NamedTuple):
    """An open transaction: its session, its deadline, and an empty `Reading` to fill.

    `digests` holds the digests of the dependencies of the datasets' earlier results, by name. `path` holds the searched
    schemas.
    """

    guard: GuardedConnection
    deadline_at: float
    pid: int
    can_tell: bool
    reading: Reading
    digests: Mapping[str, str]
    path: bytes


class Database:
    """Reads from the database over the sessions of a pool. All reads pass through it.

    :param connect_timeout_s: for one session to open, name look-ups included.
    :param status: receives the number of open sessions, and the server in use.
    """

    def __init__(self, reactor: Reactor, target: Target, connect_timeout_s: float, status: DatabaseStatus) -> None:
        self._reactor = reactor
        self._status = status
        self._servers = Servers()
        self._standbys = Standbys()
        self._sessions = Sessions(reactor, target, connect_timeout_s, status)
        self._prepared = Prepared()
        self._own_settings: WeakKeyDictionary[GuardedConnection, bytes] = WeakKeyDictionary()
        self._outgrown: set[str] = set()  # datasets that were larger than expected, until a cursor has read them

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
        self._servers.forget()
        self._standbys.forget()
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

    def read(
        self, dataset: DatasetSettings, build: Callable[[], RowsBuilder], expect: Callable[[int], None] | None = None
    ) -> Deferred[Reading]:
        """Read one dataset, as `read_together` does."""
        return self.read_together([Wanted(dataset, build, expect)]).addCallback(itemgetter(0))

    def read_together(self, wanted: Sequence[Wanted]) -> Deferred[list[Reading]]:
        """Read the datasets' queries as (key, JSON document) in one transaction.

        All rows are of one moment. The limit for the whole read is the `timeout_s` of the first dataset. There is a
        reading for each dataset, in their order.

        :raises RefreshFailed: one of its subclasses. Cancelling the Deferred ends the session at once.
        """
        return Deferred.fromCoroutine(self._read_together(wanted))

    async def _read_together(self, wanted: Sequence[Wanted]) -> list[Reading]:
        first = wanted[0].dataset
        deadline_at = self._reactor.seconds() + first.timeout_s

        async def use(guard: GuardedConnection) -> list[Reading]:
            try:
                return await self._read(guard, wanted, deadline_at)
            except QueryFailed as error:
                named = await self._naming_row(guard, wanted, error) if bad_bytes.is_about_bytes(error) else None
                if named is None:
                    raise
                raise named from error

        # A notification may arrive at any moment, and opening a session then takes longer than the delta.
        notified = any(each.dataset.watch or each.dataset.notify for each in wanted)
        again_in_s = 0.0 if notified else first.interval_s
        try:
            most = len(wanted) - 1 + _MOST_READS
            for _ in range(most):
                try:
                    return await self._sessions.use(first.group or first.name, deadline_at, use, again_in_s=again_in_s)
                except _ReadAllAgain as again:
                    because = again.because
                    wanted = [
                        each._replace(since=None, notified=None, because=because[each.dataset.name])
                        if each.dataset.name in because
                        else each
                        for each in wanted
                    ]
            name, reason = next(iter(because.items()))
            raise QueryFailed(f"{name} was read {most} times, and in the end {reason}")
        finally:
            wanted = ()  # an error keeps `use`, and through it the old snapshots

    def prune(self, keep_s: float, timeout_s: float) -> Deferred[int]:
        """Delete recorded changes older than `keep_s`; return the number deleted.

        It is at most `PRUNED_A_CALL` for each watch.

        :raises RefreshFailed: one of its subclasses.
        """
        deadline_at = self._reactor.seconds() + timeout_s

        async def use(guard: GuardedConnection) -> int:
            statement_ms = _rounded(guard.remaining_s() * 1000 * _STATEMENT_SHARE)
            cursor = await guard.execute(_PRUNE.format(statement_ms=statement_ms, keep_s=keep_s))
            ((deleted,),) = cursor.fetchall()
            await guard.execute("COMMIT")
            return int(deleted)

        return self._sessions.use("prunes", deadline_at, use)

    def recorded(self, timeout_s: float) -> Deferred[Recorded]:
        """Ask for the recorded changes that the database keeps.

        A standby answers, too.

        :raises RefreshFailed: one of its subclasses.
        """
        deadline_at = self._reactor.seconds() + timeout_s

        async def use(guard: GuardedConnection) -> Recorded:
            return await recorded.ask(guard, _rounded(guard.remaining_s() * 1000 * _STATEMENT_SHARE))

        return self._sessions.use("prunes", deadline_at, use)

    async def _read(
        self,
        guard: GuardedConnection,
        wanted: Sequence[Wanted],
        deadline_at: float,
    ) -> list[Reading]:
        builders = [each.build() for each in wanted]
        try:
            moment = await self._begin(guard, wanted, deadline_at)
            readings = [await self._read_one(moment, *each) for each in zip(wanted, builders, strict=True)]
            await self._check_not_promoted(moment)
            await self._commit(moment, wanted, readings)
        except BaseException as error:
            for builder in builders:
                builder.discard()
            if isinstance(error, _SettingsAltered):
                raise _ReadAllAgain(dict.fromkeys([each.dataset.name for each in wanted], error.reason)) from error
            raise
        return readings

    async def _commit(self, moment: _Moment, wanted: Sequence[Wanted], readings: Sequence[Reading]) -> None:
        """End the transaction, and refuse its rows if definitions changed during it.

        The server looks up definitions as they are now, not as in the snapshot. Therefore rows of one read might have
        the forms of two moments, or come from the partitions of two moments.

        :raises _ReadAllAgain: if definitions changed.
        """
        recorded = {
            each.dataset.name: reading.dependencies
            for each, reading in zip(wanted, readings, strict=True)
            if reading.kind != "unchanged" and reading.dependencies is not None
        }
        digests = ", ".join(dependencies.catalog_digest_sql(each.found) for each in recorded.values())
        ask = self._prepared.sql(moment.guard, f"SELECT concat_ws(' ', {digests})") if recorded else ""
        answer = await self._sessions.commit(moment.guard, moment.pid, ask)
        if answer is None:
            return
        now = dict(zip(recorded, answer.fetchone()[0].decode().split(), strict=True))
        if changed := [name for name in recorded if now[name] != dependencies.catalog_part(recorded[name].digest)]:
            raise _ReadAllAgain(dict.fromkeys(changed, "definitions that it depends on changed during the read"))

    async def _check_not_promoted(self, moment: _Moment) -> None:
        """Refuse a transaction during which the standby was promoted.

        `cacheservice.changes()` compares snapshots of a standby differently from snapshots of a primary, and it asks
        the server for its current role.

        :raises DatabaseUnavailable: if the standby was promoted after the transaction had begun.
        """
        assert moment.reading.server is not None, "each transaction identifies its server"
        if not moment.reading.server.in_recovery:
            return
        cursor = await moment.guard.execute("SELECT pg_is_in_recovery()")
        if not cursor.fetchone()[0]:
            raise DatabaseUnavailable("the standby was promoted during the read")

    async def _naming_row(
        self, guard: GuardedConnection, wanted: Sequence[Wanted], error: QueryFailed
    ) -> QueryFailed | None:
        """Return `error` with the row that caused it; None if no row is found."""
        for dataset in (each.dataset for each in wanted):
            begin = begin_reading(dataset, _limits(guard.remaining_s()))
            rows_sql = rows_query(dataset.query, dataset.key, KeyForm.of(dataset))
            named = await bad_bytes.name_row(self._reactor, guard, begin, rows_sql, dataset.name, error)
            if named is not None:
                return named
        return None

    async def _begin(self, guard: GuardedConnection, wanted: Sequence[Wanted], deadline_at: float) -> _Moment:
        for _ in range(_MOST_BEGINS):
            moment = await self._begin_once(guard, wanted, deadline_at)
            if moment is not None:
                return moment
            await guard.execute("ROLLBACK")
        raise DatabaseUnavailable("each statement came to another server; name one server, or pool by session")

    async def _begin_once(
        self, guard: GuardedConnection, wanted: Sequence[Wanted], deadline_at: float
    ) -> _Moment | None:
        """Begin a transaction and read its moment.

        None if the server is a standby that was not asked for its lag before, or was promoted since then.
        """
        read_at = self._reactor.seconds()
        facts = await self._standbys.ask(guard)
        datasets, attempt = [each.dataset for each in wanted], wanted[0].attempt
        first = datasets[0]  # the datasets of a group share the settings that matter here
        purpose = first.group or first.name
        lock = deltas.lock_sql(datasets)
        limits = _limits(guard.remaining_s())
        keeps = self._prepared.can_keep(guard)
        asked = [each for each in wanted if each.since and not dependencies.problem(each.since, each.dataset)]
        # A snapshot records the settings of its read; a first read has only those of the session.
        asks_settings = guard not in self._own_settings or any(each.since is None for each in wanted)
        ask = _ASK.format(
            pinning=pinning_expression(first.settings) if keeps else "''",
            can_tell=deltas.CAN_TELL if lock else "false",
            digests=", ".join(dependencies.digest_of(each.since) for each in asked) or "''",
            path=dependencies.PATH,
            own_settings=dependencies.OWN_SETTINGS if asks_settings else "''",
            life=LIFE.format(crashes=str(any(each.watch or each.probe for each in datasets)).lower()),
        )
        begin = _BEGIN.format(
            begin=begin_reading(first, limits, pinned=not keeps),
            no_transaction_timeout=without_transaction_timeout(guard.server_version),
            application_name=literal(self._sessions.target.application_name(purpose)),
            attempt_name=literal(self._sessions.target.application_name(purpose, attempt)),
            lock=lock,
            ask=self._prepared.sql(guard, ask),
        )
        cursor = await self._execute_asking(guard, begin, purpose, guard.pid, deadline_at)
        ((_, epoch_s, snapshot, pid, can_tell, told, own_settings, path, *life),) = cursor.fetchall()
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
        reading = Reading(as_of, read_at - lag.seconds, snapshot.decode(), server=server, lag=lag)
        digests = dict(zip([each.dataset.name for each in asked], told.decode().split(), strict=True))
        return _Moment(guard, deadline_at, pid, can_tell, reading, digests, path)

    async def _altered(self, moment: _Moment, wanted: Wanted) -> str | None:
        """Return why documents may have another form than in the snapshot.

        None if they have the same form.
        """
        since = wanted.since
        if since is None:
            return None
        if (problem := dependencies.problem(since, wanted.dataset)) is not None:
            return problem
        assert since.dependencies is not None, "that would be a problem"
        if moment.digests[wanted.dataset.name] == since.dependencies.digest:
            return None
        cursor = await moment.guard.execute(dependencies.versions_sql(since.dependencies.found))
        difference = dependencies.difference(since.dependencies.found, cursor.fetchall())
        if difference.of_settings:
            self._end_with_old_settings(difference.reason)
        return difference.reason

    def _end_with_old_settings(self, reason: str) -> NoReturn:
        """End the kept sessions, which have outdated settings.

        The session in use ends with the error.
        """
        self._sessions.end_kept()
        raise _SettingsAltered(reason)

    async def _dependencies(
        self, moment: _Moment, dataset: DatasetSettings, type_oids: Sequence[int]
    ) -> Dependencies | None:
        """Return the dependencies of the rows that were just read.

        None if this role may not query them.
        """
        guard = moment.guard
        await guard.execute(_BEGIN_SEARCH)
        try:
            found = await self._search(moment, dataset, type_oids)
        except QueryFailed:
            found = None
        await guard.execute(_END_SEARCH)
        return found

    async def _search(self, moment: _Moment, dataset: DatasetSettings, type_oids: Sequence[int]) -> Dependencies | None:
        guard = moment.guard
        objects = await dependency_search.find(guard, dataset, type_oids)
        if objects is None:
            return None
        found = dependencies.with_session(objects, dataset)
        cursor = await guard.execute(dependencies.versions_sql(found))
        found = dependencies.with_versions(found, cursor.fetchall())
        cursor = await guard.execute(f"SELECT {dependencies.digest_sql(found)}, {dependencies.PATH}::text")
        digest, path = cursor.fetchone()
        # Otherwise names of the query may have been found in other schemas than those of the digest.
        return Dependencies(found, digest.decode()) if path == moment.path else None

    async def _read_one(self, moment: _Moment, wanted: Wanted, builder: RowsBuilder) -> Reading:
        dataset, reading = wanted.dataset, moment.reading
        another = None if wanted.since is None else why_another(wanted.since.server, reading.server)
        if another is not None:
            wanted = wanted._replace(since=None)
        since = wanted.since
        altered = another or await self._altered(moment, wanted)
        if since is not None:
            reading = replace(
                reading, columns=since.columns, dependencies=since.dependencies if altered is None else None
            )
        if dataset.probe:
            cursor = await moment.guard.execute(probe_query(dataset.probe))
            reading = replace(reading, probe=deltas.value_of(cursor.fetchone()[0]))
            same = since is not None and altered is None and since.probe == reading.probe
            if since is not None and same and not (dataset.watch and moment.can_tell):
                # If changes are recorded, an unchanged probe does not hide them.
                if wanted.trust_probe and not wanted.check:
                    return replace(reading, kind="unchanged", watch_state=since.watch_state)
                if wanted.check and not dataset.watch:
                    reading = replace(reading, may_differ=frozenset())
        because = altered or wanted.because
        if wanted.check and not dataset.watch and altered is None:
            because = "it is a check of the probe"
        if dataset.watch:
            told = await self._changes(moment, wanted)
            reading = replace(reading, watch_state=told.state, no_delta=told.problem)
            because = told.problem or because
            if because is None and since is not None:
                form = KeyForm.of(dataset)
                served = dict.fromkeys(form.join(key) for key in told.keys if None not in key)
                reading = replace(reading, may_differ=frozenset(served))
                if not wanted.check:
                    with _keys_fit(dataset):
                        return await self._read_keys(moment, wanted, reading, told.keys, served)
                because = "it is a check of the deltas"
        elif since is not None and altered is None and wanted.notified is not None:
            notified = await wanted.notified()
            if notified is not None and len(notified) <= wanted.most_keys:
                # A changed probe may concern other rows, too: the next attempt must still see that it changed.
                with _keys_fit(dataset):
                    return await self._read_notified(moment, wanted, replace(reading, probe=since.probe), notified)
        return await self._read_all(moment, wanted, builder, replace(reading, because=because))

    async def _changes(self, moment: _Moment, wanted: Wanted) -> deltas.Changes:
        if not moment.can_tell:
            return deltas.Changes("", deltas.CANNOT_TELL, ())
        dataset, since = wanted.dataset, wanted.since
        cursor = await moment.guard.execute(deltas.changes_sql(dataset, since, wanted.most_keys))
        told = deltas.changes(cursor.fetchall(), dataset, since)
        if len(told.keys) > wanted.most_keys:
            return told._replace(problem=f"more than {wanted.most_keys:,} keys changed, see max_delta", keys=())
        return told

    async def _read_keys(
        self,
        moment: _Moment,
        wanted: Wanted,
        reading: Reading,
        keys: Sequence[Key],
        served: Mapping[bytes, None],
    ) -> Reading:
        """Read the rows of the recorded keys.

        :param served: the same keys in their served form, except keys that have a NULL.
        """
        dataset = wanted.dataset
        if not keys:
            return replace(reading, kind="unchanged")
        columns = [f"q.{quoted(column)}" for column in dataset.key]
        if any(None in key for key in keys):
            # A row of a watched table without a key may also be a row of the query, and must be detected.
            nulls = " OR ".join(f"{column} IS NULL" for column in columns)
            sql = first_rows(f"{whole_query(dataset.query)} WHERE {nulls}", 1)
            if (await self._execute_asking_in(moment, sql, dataset.name)).rowcount:
                raise BadResult("the key of a row is NULL; every row needs a key")
        predicate = KeyForm.of(dataset).predicate(columns, keys)
        found = await self._read_some(moment, wanted, predicate, len(keys))
        return replace(reading, kind="delta", changed={**served, **found.rows})

    async def _read_notified(self, moment: _Moment, wanted: Wanted, reading: Reading, keys: frozenset[str]) -> Reading:
        """Read the rows of the notified keys."""
        dataset = wanted.dataset
        if not keys:
            return replace(reading, kind="unchanged")
        columns = [f"q.{quoted(column)}" for column in dataset.key]
        form = KeyForm.of(dataset)
        if len(columns) == 1:
            predicate = form.predicate(columns, [(key,) for key in keys])
        else:
            predicate = form.joined_predicate(columns, keys)
        found = await self._read_some(moment, wanted, predicate, len(keys))
        served = {key.encode(): None for key in keys}
        return replace(reading, kind="delta", changed={**served, **found.rows})

    async def _read_some(self, moment: _Moment, wanted: Wanted, predicate: str, most: int) -> deltas.ChangedRows:
        dataset, last = wanted.dataset, wanted.last
        form = KeyForm.of(dataset)
        found = deltas.ChangedRows()
        sql = f"{rows_query(dataset.query, dataset.key, form)} WHERE {predicate}"
        average_bytes = last.size_bytes // last.count if last is not None and last.count else 0
        is_small = most <= FEW_ROWS or most * average_bytes <= _MOST_ANSWER_BYTES
        # More rows than keys means that a key occurs twice; both ways detect that.
        if not is_small or not await self._read_at_once(moment, sql, dataset.name, found, most):
            await self._execute_asking_in(moment, f"DECLARE rows NO SCROLL CURSOR FOR {sql}", dataset.name)
            await self._fetch_all(moment.guard, found)
            await moment.guard.execute("CLOSE rows")
        return found

    async def _read_at_once(
        self, moment: _Moment, sql: str, name: str, into: RowsBuilder | deltas.ChangedRows, most: int
    ) -> bool:
        """Read rows in one answer, without a cursor.

        :returns: False if there are more than `most` rows or `_MOST_ANSWER_BYTES` bytes; `into` is then unchanged.
        """
        answer = small_answer(sql, most, _MOST_ANSWER_BYTES)
        cursor = await self._execute_asking_in(moment, answer, name)
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
            await moment.guard.execute("SELECT 1")  # raises why the session ended before all rows were unpacked
            raise
        return True

    async def _read_all(self, moment: _Moment, wanted: Wanted, builder: RowsBuilder, reading: Reading) -> Reading:
        dataset, guard = wanted.dataset, moment.guard
        rows_sql = rows_query(dataset.query, dataset.key, KeyForm.of(dataset))
        is_small = await self._is_small(moment, wanted, rows_sql, builder)
        if is_small and await self._read_few(moment, dataset, rows_sql, builder):
            described = (await guard.execute(columns_query(dataset.query))).description
        else:
            described = await self._read_by_cursor(moment, dataset, rows_sql, builder)
        reading = replace(reading, columns=tuple(column.name for column in described), rows=builder)
        if reading.dependencies is None and (dataset.watch or dataset.probe or dataset.notify):
            oids = [column.type_code for column in described]
            reading = replace(reading, dependencies=await self._dependencies(moment, dataset, oids))
        if not reading.watch_state:
            return reading
        types = {column.name: column.type_code for column in described}
        cursor = await guard.execute(deltas.key_types_sql(dataset, [types[column] for column in dataset.key]))
        unfit = deltas.unfit_key(cursor.fetchall(), dataset)
        return reading if unfit is None else replace(reading, watch_state="", because=unfit, no_delta=unfit)

    async def _is_small(self, moment: _Moment, wanted: Wanted, rows_sql: str, builder: RowsBuilder) -> bool:
        """Return whether one answer is expected to hold all rows.

        The size of the last result decides, or the planner's estimate before the first result.
        """
        name, last = wanted.dataset.name, wanted.last
        if last is None:
            cursor = await self._execute_asking_in(moment, f"EXPLAIN (FORMAT JSON) {rows_sql}", name)
            planned_rows = _planned_rows(cursor.fetchone()[0])
            builder.expect(planned_rows)
            if wanted.expect is not None:
                wanted.expect(planned_rows)
            is_small = planned_rows <= FEW_ROWS
        else:
            is_small = last.count <= _SMALL_ROWS and last.size_bytes <= _SMALL_BYTES
        return is_small and name not in self._outgrown

    async def _read_few(self, moment: _Moment, dataset: DatasetSettings, rows_sql: str, builder: RowsBuilder) -> bool:
        """Read all rows in one answer; return False if they are too many for one."""
        name = dataset.name
        if await self._read_at_once(moment, rows_sql, name, builder, FEW_ROWS):
            return True
        # If the time does not suffice to run the query twice, the next attempt must not try one answer again.
        self._outgrown.add(name)
        return False

    async def _read_by_cursor(
        self, moment: _Moment, dataset: DatasetSettings, rows_sql: str, builder: RowsBuilder
    ) -> Any:
        """Read any number of rows.

        :returns: the driver's description of the query's columns.
        """
        guard = moment.guard
        await self._execute_asking_in(moment, f"DECLARE rows NO SCROLL CURSOR FOR {rows_sql}", dataset.name)
        cursor = await guard.execute(columns_query(dataset.query))
        described = cursor.description
        await self._fetch_all(guard, builder)
        await guard.execute("CLOSE rows")
        self._outgrown.discard(dataset.name)
        return described

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

    async def _unpack(self, cursor: Any, into: RowsBuilder | deltas.ChangedRows) -> None:
        while rows := cursor.fetchmany(_SLICE_ROWS):
            into.add(rows)
            if cursor.rownumber < cursor.rowcount:
                await pause(self._reactor)

    def _execute_asking_in(self, moment: _Moment, sql: str, name: str) -> Awaitable[Any]:
        return self._execute_asking(moment.guard, sql, name, moment.pid, moment.deadline_at)

    async def _execute_asking(self, guard: GuardedConnection, sql: str, name: str, pid: int, deadline_at: float) -> Any:
        """Execute a statement that takes locks; meanwhile ask which sessions block it."""
        asked: list[Deferred[tuple[Blocker, ...]]] = []
        ask_timer = self._reactor.callLater(
            guard.remaining_s() * _ASK_SHARE, lambda: asked.append(self._ask(name, pid, deadline_at))
        )
        try:
            return await guard.execute(sql)
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
        d: Deferred[tuple[Blocker, ...]] = self._sessions.use(
            f"{name} (who blocks it)", ask_by, lambda guard: find_blockers(guard, pid)
        )

        def none_told(failure: Any) -> tuple[Blocker, ...]:
            # Only the failure of the refresh is reported; a failure to find blockers is not a second one.
            failure.trap(CacheServiceError, CancelledError)
            return ()

        return d.addErrback(none_told)


def _limits(remaining_s: float) -> Limits:
    remaining_ms = remaining_s * 1000
    return Limits(
        statement_ms=_rounded(remaining_ms * _STATEMENT_SHARE),
        lock_ms=_rounded(remaining_ms * _LOCK_SHARE),
        idle_ms=_rounded(remaining_ms),
    )


def _fetch(rows: int) -> str:
    return f"FETCH FORWARD {rows} FROM rows"


def _next_chunk_rows(last: int, taken: RowsBuilder | deltas.ChangedRows) -> int:
    average_bytes = taken.size_bytes // taken.count if taken.count else _CHUNK_BYTES
    return _rounded(min(last * 4, _MOST_CHUNK_ROWS, _CHUNK_BYTES // max(1, average_bytes)))


def _rounded(number: float) -> int:
    """Round a number for the text of a statement down, to 64 steps per octave.

    The server counts each text as another statement (pg_stat_statements), so few values are used. The result is at
    least 1, because 0 would mean "no limit".
    """
    whole = max(1, int(number))
    step = 1 << max(0, whole.bit_length() - _SIGNIFICANT_BITS)
    return whole // step * step


@contextmanager
def _keys_fit(dataset: DatasetSettings) -> Iterator[None]:
    """Read all rows again if a key does not fit the type of the query's column.

    :raises _ReadAllAgain: for any data exception; a recorded key that does not fit is its likely cause.
    """
    try:
        yield
    except QueryFailed as error:
        if not error.sqlstate.startswith(_DATA_EXCEPTION):
            raise
        because = f"the keys that changed do not fit the key of the query ({error}); give both the same type"
        raise _ReadAllAgain({dataset.name: because}) from error


def _planned_rows(plan: Any) -> int:
    parsed = plan if isinstance(plan, list) else json.loads(plan)
    return int(parsed[0]["Plan"]["Plan Rows"])
