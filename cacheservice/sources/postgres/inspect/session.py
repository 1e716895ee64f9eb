"""The session of `cacheservice check --db`, and the order of its checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

import psycopg2

from cacheservice.base.errors import InspectionFailed
from cacheservice.base.interfaces import BlockingConnection, BlockingCursor
from cacheservice.cache.lag import GRANT
from cacheservice.config import DatasetSettings, PostgresSettings
from cacheservice.sources.postgres import deltas
from cacheservice.sources.postgres.inspect import keys
from cacheservice.sources.postgres.inspect.blind import look_for_blind_spots
from cacheservice.sources.postgres.inspect.failures import step
from cacheservice.sources.postgres.inspect.findings import Column, Finding, Inspection, Server
from cacheservice.sources.postgres.inspect.look import LOCK_TIMEOUT_MS, STATEMENT_TIMEOUT_MS, Look
from cacheservice.sources.postgres.inspect.own_settings import own_settings
from cacheservice.sources.postgres.inspect.paths import compare_paths
from cacheservice.sources.postgres.inspect.tables import explain
from cacheservice.sources.postgres.inspect.watching import (
    describe_deltas,
    look_at_channel,
    look_at_probe,
    look_at_watches,
    split_advice,
)
from cacheservice.sources.postgres.lock_watch import LockWatch
from cacheservice.sources.postgres.logical import environment
from cacheservice.sources.postgres.oldest import too_old
from cacheservice.sources.postgres.refusal import NO_ANSWER, lead_of
from cacheservice.sources.postgres.session_settings import Limits, begin_reading, without_transaction_timeout
from cacheservice.sources.postgres.standby import SEES_RECEIVER
from cacheservice.sources.postgres.statements import columns_query
from cacheservice.sources.postgres.target import parse
from cacheservice.sources.postgres.translate import translate

_LIMITS = Limits(statement_ms=STATEMENT_TIMEOUT_MS, lock_ms=LOCK_TIMEOUT_MS, idle_ms=STATEMENT_TIMEOUT_MS)

_OF_SETTINGS = "correct postgres.settings, or the settings of the dataset"


class Inspector:
    """A session to inspect datasets with; `inspecting` opens and closes it."""

    def __init__(
        self,
        connection: BlockingConnection,
        arguments: Mapping[str, object],
        postgres: PostgresSettings,
        datasets: Sequence[DatasetSettings],
    ) -> None:
        """Read the server's facts.

        :param arguments: the arguments with which the connection was opened.
        """
        self._connection = connection
        self._arguments = arguments
        self._postgres = postgres
        self.server = _server(connection, postgres, datasets)

    def inspect(self, dataset: DatasetSettings) -> Inspection:
        """Inspect one dataset; its problems are findings, not errors.

        The inspection has a transaction of its own, which leaves nothing behind.
        """
        found = Inspection(dataset.name)
        with self._connection.cursor() as cursor:
            try:
                # A statement of its own: pgpool sends several statements at once to the primary only, and a later
                # savepoint to a standby that is not in the transaction; then it ends the session.
                cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                cursor.execute(begin_reading(dataset, _LIMITS))
                cursor.execute(without_transaction_timeout(self._connection.server_version) or "SELECT")
                cursor.execute("SELECT pg_backend_pid()")
                (pid,) = cursor.fetchone()
                with LockWatch(self._arguments, pid) as watch:
                    _look_at_all(Look(self._connection, cursor, self._postgres, self.server, dataset, found, watch))
            except (psycopg2.errors.InvalidParameterValue, psycopg2.errors.UndefinedObject) as error:
                # Only the transaction's settings can fail here; errors of a query are findings by then.
                found.findings.append(Finding("problem", f"settings: {error.diag.message_primary}", _OF_SETTINGS))
            finally:
                if not self._connection.closed:
                    cursor.execute("ROLLBACK")
        return found


@contextmanager
def inspecting(postgres: PostgresSettings, datasets: Sequence[DatasetSettings]) -> Iterator[Inspector]:
    """Open a session in the datasets' database.

    :raises InspectionFailed: if the database cannot be reached, is too old, or is lost meanwhile.
    """
    dsn = postgres.dsn.get_secret_value()
    target = parse(dsn)
    is_open = False
    try:
        arguments = target.blocking_arguments() | {
            "connect_timeout": max(2, round(postgres.connect_timeout_s)),  # libpq does not accept less
            "application_name": target.application_name("check"),
            "client_encoding": "UTF8",
        }
        connection = psycopg2.connect(**arguments)
        is_open = True
        with closing(connection):
            connection.autocommit = True
            if (refusal := too_old(connection.server_version)) is not None:
                raise InspectionFailed(refusal)
            yield Inspector(connection, arguments, postgres, datasets)
    except psycopg2.Error as error:
        # If an open session fails here it was lost, because errors of a query are findings.
        translated = translate(error, target, connecting=not is_open)
        advice = translated.advice
        if not is_open and lead_of(str(error)) == NO_ANSWER:
            advice += ", or raise postgres.connect_timeout_s"
        raise InspectionFailed(f"{translated}; {advice}") from error


def _look_at_all(look: Look) -> None:
    described = None
    with step(look, "the query"):
        look.cursor.execute(columns_query(look.dataset.query))
        described = look.cursor.description
    look_at_probe(look)
    look_at_channel(look)
    if described is None:
        look_at_watches(look, ())
        return
    types = keys.types_of(look, [column.type_code for column in described])
    columns = zip(described, types, strict=True)
    look.found.note_columns(tuple(Column(column.name, kind.name) for column, kind in columns))
    keys.warn_of_same_names(look)
    places = keys.key_places(look)
    if places is None:
        return
    plan = explain(look)
    if plan is None:
        return
    compare_paths(look)
    origins = [(described[place].table_oid, described[place].table_column) for place in places]
    index = keys.unique_index(look, plan, origins)
    sample = keys.take_sample(look)
    keys.judge_size(look, plan, sample)
    key_types = [types[place] for place in places]
    look.found.note_key(keys.judge_key(look, places, key_types, index, sample))
    found_before = len(look.found.findings)
    describe_deltas(look, [kind.oid for kind in key_types], origins if index else [])
    look_for_blind_spots(look, plan, places, origins, looks_fine=len(look.found.findings) == found_before)


def _server(connection: BlockingConnection, postgres: PostgresSettings, datasets: Sequence[DatasetSettings]) -> Server:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT current_setting('server_version'), current_database(), format('%I', current_user), "
            f"pg_is_in_recovery(), pg_backend_pid(), {deltas.CAN_ASK}, {SEES_RECEIVER}"
        )
        version, database, role, standby, pid, migrated, sees_receiver = cursor.fetchone()
        hints = own_settings(cursor, datasets)
        cursor.execute(environment.facts_sql(postgres.publication))
        not_logical = environment.problem(environment.facts(cursor.fetchone()), postgres.publication)
        pgpool = _is_pgpool(cursor)
    # PgBouncer reports process ids of its own to its clients, for cancel requests. Through pgpool a standby may have
    # answered.
    pooled = not pgpool and connection.info.backend_pid != pid
    server = Server(version, database, role, standby, pooled, migrated, not_logical, hints)
    if postgres.capture == "auto" and not_logical is not None and any(dataset.watch for dataset in datasets):
        text, todo = split_advice(not_logical)
        server.findings.append(Finding("hint", f"changes are not read from the write-ahead log: {text}", todo))
    heard = [dataset.name for dataset in datasets if dataset.watch or dataset.notify]
    if heard and standby:
        server.findings.append(
            Finding(
                "hint",
                f"LISTEN does not work on a standby: {', '.join(heard)} will be refreshed on their intervals only",
                "read from the primary if changes must be seen at once",
            )
        )
    if standby and not sees_receiver:
        server.findings.append(
            Finding(
                "hint",
                f"{role} may not see whether this standby hears from its primary: while the primary is idle, ages "
                "count from its last commit",
                f"on the primary: {GRANT.format(role=role)};",
            )
        )
    if pgpool:
        server.findings.append(
            Finding(
                "hint",
                "this is pgpool-II: it sends refreshes to the primary, because their limits are set in the transaction",
                "connect to a standby itself to take refreshes off the primary",
            )
        )
    if heard and pooled:
        server.findings.append(
            Finding(
                "hint",
                "this is a connection pooler (PgBouncer): if it pools transactions, LISTEN does not work through it, "
                f"and {', '.join(heard)} will be refreshed on their intervals only",
                "connect to the server itself",
            )
        )
    return server


def _is_pgpool(cursor: BlockingCursor) -> bool:
    try:
        cursor.execute("SHOW pool_version")
    except psycopg2.Error:
        if cursor.connection.closed:
            raise
        return False
    return True
