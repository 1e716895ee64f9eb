"""What PostgreSQL says of the declared queries before the service runs: `cacheservice check --db`. It blocks: for the
command line, never for the service.

Each dataset is looked at in a transaction of its own, read only and with the settings of a real refresh, so that what
is found here is what a refresh finds. No query is run whole: the columns come from a result without rows, the figures
from the planner, and what the planner does not know from a sample with a statement timeout.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import psycopg2

from cacheservice.config import DatasetSettings, PostgresSettings
from cacheservice.errors import InspectionFailed
from cacheservice.postgres import deltas
from cacheservice.postgres.database import columns_query, probe_query, rows_query, whole_query
from cacheservice.postgres.session_settings import Limits, begin_reading
from cacheservice.postgres.target import parse
from cacheservice.postgres.translate import translate

_STATEMENT_TIMEOUT_MS = 10_000
_LOCK_TIMEOUT_MS = 3000
_SAMPLE_TIMEOUT_MS = 5000
SAMPLE_ROWS = 10_000
_OLDEST_VERSION = 140_000

_LIMITS = Limits(statement_ms=_STATEMENT_TIMEOUT_MS, lock_ms=_LOCK_TIMEOUT_MS, idle_ms=_STATEMENT_TIMEOUT_MS)
_SCHEMAS = ("pg_catalog", "public")
"""Where names are looked for that have no schema."""


class Finding(NamedTuple):
    """Something to know about a dataset or the server; a problem is what would keep a refresh from succeeding, or
    from doing what the configuration says. `todo` is what to do about it, empty if nothing or if the text says it."""

    level: Literal["problem", "hint"]
    text: str
    todo: str = ""


class Column(NamedTuple):
    name: str
    type: str


class Key(NamedTuple):
    """`unique` is None where nobody knows; `how` says how it is known. `fit` is whether deltas can go by it."""

    columns: tuple[Column, ...]
    unique: bool | None
    how: str
    fit: bool


class Size(NamedTuple):
    """Estimates of the planner; `document_bytes` is the average of a sample, None if it could not be taken."""

    rows: int
    row_bytes: int
    document_bytes: int | None
    cost: float

    @property
    def bytes(self) -> int:
        return self.rows * (self.document_bytes or self.row_bytes)


class Node(NamedTuple):
    """A node of the plan, named as EXPLAIN does, and its share of the whole cost without its children, 0 to 1."""

    name: str
    share: float


@dataclass(slots=True)
class Inspection:
    """What was found of one dataset; what could not be found out is None or empty, and a finding says why."""

    name: str
    columns: tuple[Column, ...] = ()
    key: Key | None = None
    size: Size | None = None
    worst: Node | None = None
    deltas: str = ""
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(finding.level != "problem" for finding in self.findings)


@dataclass(slots=True)
class Server:
    """Whom we are connected to, and as whom: `role` is quoted where SQL needs it."""

    version: str
    database: str
    role: str
    standby: bool
    pooled: bool
    migrated: bool
    findings: list[Finding] = field(default_factory=list)


class Inspector:
    """A session to look at datasets with; `inspecting` opens and closes it."""

    def __init__(self, connection: Any, dsn: str, datasets: Sequence[DatasetSettings]) -> None:
        self._connection = connection
        self._dsn = dsn
        self.server = _server(connection, datasets)

    def inspect(self, dataset: DatasetSettings) -> Inspection:
        """What there is to know about one; its problems are findings, not errors."""
        return _Look(self._connection, self._dsn, self.server, dataset).look()


@contextmanager
def inspecting(postgres: PostgresSettings, datasets: Sequence[DatasetSettings]) -> Iterator[Inspector]:
    """A session in the database that the datasets are to be read from.

    :raises InspectionFailed: if the database cannot be reached, or is lost on the way.
    """
    dsn = postgres.dsn.get_secret_value()
    target = parse(dsn)
    try:
        connection = psycopg2.connect(
            dsn,
            connect_timeout=max(2, round(postgres.connect_timeout_s)),  # libpq takes no less
            application_name=target.application_name("check"),
            client_encoding="UTF8",
        )
        with closing(connection):
            connection.autocommit = True
            yield Inspector(connection, dsn, datasets)
    except psycopg2.Error as error:
        # A session that opened and failed can only have been lost: what a query does wrong is a finding.
        translated = translate(error, target, connecting=True)
        raise InspectionFailed(f"{translated}; {translated.advice}") from error


def _server(connection: Any, datasets: Sequence[DatasetSettings]) -> Server:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT current_setting('server_version'), current_database(), format('%I', current_user), "
            f"pg_is_in_recovery(), pg_backend_pid(), {deltas.CAN_TELL}"
        )
        version, database, role, standby, pid, migrated = cursor.fetchone()
    # A pooler gives its clients process ids of its own, to cancel by.
    pooled = connection.info.backend_pid != pid
    server = Server(version, database, role, standby, pooled, migrated)
    if connection.server_version < _OLDEST_VERSION:
        server.findings.append(Finding("problem", f"PostgreSQL {version} is too old", "use PostgreSQL 14 or later"))
    heard = [dataset.name for dataset in datasets if dataset.watch or dataset.notify]
    if heard and standby:
        server.findings.append(
            Finding(
                "hint",
                f"a standby takes no LISTEN: {', '.join(heard)} will be refreshed on their intervals only",
                "read from the primary where changes are to be seen at once",
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


class _Look:
    """One look at one dataset."""

    def __init__(self, connection: Any, dsn: str, server: Server, dataset: DatasetSettings) -> None:
        self._connection = connection
        self._dsn = dsn
        self._server = server
        self._dataset = dataset
        self._found = Inspection(dataset.name)

    def look(self) -> Inspection:
        """In a transaction of its own, which leaves nothing behind."""
        with self._connection.cursor() as cursor:
            cursor.execute(begin_reading(self._dataset, _LIMITS))
            try:
                self._look_at_all(cursor)
            finally:
                if not self._connection.closed:
                    cursor.execute("ROLLBACK")
        return self._found

    def _look_at_all(self, cursor: Any) -> None:
        described = None
        with self._step(cursor, "the query"):
            cursor.execute(columns_query(self._dataset.query))
            described = cursor.description
        self._probe(cursor)
        self._channel()
        if described is None:
            self._watched(cursor, ())
            return
        types = self._types(cursor, [column.type_code for column in described])
        self._found.columns = tuple(
            Column(column.name, kind.name) for column, kind in zip(described, types, strict=True)
        )
        self._same_names()
        places = self._key_places()
        if places is None:
            return
        plan = self._plan(cursor)
        if plan is None:
            return
        origins = [(described[place].table_oid, described[place].table_column) for place in places]
        index = self._unique_index(cursor, plan, origins)
        sample = self._sample(cursor)
        self._size(plan, sample)
        key_types = [types[place] for place in places]
        self._found.key = self._key(places, key_types, index, sample)
        self._deltas(cursor, [kind.oid for kind in key_types], origins if index else [])

    @contextmanager
    def _step(self, cursor: Any, what: str) -> Iterator[None]:
        """A part that may fail on its own: the rest goes on, and the reason becomes a finding."""
        cursor.execute("SAVEPOINT step")
        try:
            yield
        except psycopg2.Error as error:
            if self._connection.closed:
                raise
            cursor.execute("ROLLBACK TO SAVEPOINT step")
            self._found.findings.append(self._finding(cursor, what, error))

    def _finding(self, cursor: Any, what: str, error: psycopg2.Error) -> Finding:
        translated = translate(error, parse(self._dsn))
        told = str(translated)
        match error.pgcode:
            case "42501":
                return Finding("problem", f"{what}: {told}", self._grants(cursor, told))
            case "42P01" | "42883" | "3F000":
                return Finding("problem", f"{what}: {told}", self._elsewhere(cursor, told))
            case "55P03":
                return Finding("problem", f"{what}: a table is locked by another session", "try again later")
            case "57014":
                return Finding("problem", f"{what}: not answered within {_STATEMENT_TIMEOUT_MS // 1000} s", "try again")
        if error.diag.statement_position and what == "the query":
            # Before it stands what makes a subquery of it.
            characters = int(error.diag.statement_position) - 1 - whole_query("").index("\n") - 1
            told += f", line {self._dataset.query[: max(0, characters)].count(chr(10)) + 1} of the query"
        return Finding("problem", f"{what}: {told}", error.diag.message_hint or translated.advice)

    def _grants(self, cursor: Any, told: str) -> str:
        """The GRANTs that the role lacks for the tables that the query names: all, not only the first."""
        if found := re.search(r"permission denied for (function|procedure) (\S+)", told):
            return f"GRANT EXECUTE ON {found[1].upper()} {found[2]} TO {self._server.role};"
        cursor.execute(
            """
            SELECT format('%%I', n.nspname), format('%%I.%%I', n.nspname, c.relname),
                   has_schema_privilege(n.oid, 'USAGE'), has_table_privilege(c.oid, 'SELECT')
            FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
            WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relname = ANY (%(words)s)
              AND (n.nspname = ANY (%(words)s) OR n.nspname = ANY (%(schemas)s))
            ORDER BY 2
            """,
            {"words": self._words(), "schemas": list(_SCHEMAS)},
        )
        found_tables = cursor.fetchall()
        schemas = sorted({schema for schema, _, usage, _ in found_tables if not usage})
        tables = [table for _, table, _, select in found_tables if not select]
        role = self._server.role
        grants = [f"GRANT USAGE ON SCHEMA {', '.join(schemas)} TO {role};"] if schemas else []
        grants += [f"GRANT SELECT ON {', '.join(tables)} TO {role};"] if tables else []
        return " ".join(grants) or f"grant {role} what the query reads"

    def _elsewhere(self, cursor: Any, told: str) -> str:
        """Where what was not found may be meant, because search_path is pinned."""
        found = re.search(r'(?:relation|function|schema) "?([^"( ]+)', told)
        wanted = found[1].split(".")[-1] if found else ""
        catalog, name, kind = (
            ("pg_proc", "proname", "pronamespace") if "function" in told else ("pg_class", "relname", "relnamespace")
        )
        cursor.execute(
            f"SELECT DISTINCT format('%%I.%%I', n.nspname, o.{name}) FROM {catalog} AS o "  # noqa: S608  # three constants
            f"JOIN pg_namespace AS n ON n.oid = o.{kind} WHERE o.{name} = %s AND n.nspname <> ALL (%s) ORDER BY 1",
            (wanted, list(_SCHEMAS)),
        )
        others = [other for (other,) in cursor.fetchall()]
        pinned = f"names without a schema are looked for in {' and '.join(_SCHEMAS)} alone"
        if others:
            return f"write {' or '.join(others)}: {pinned}"
        return f"correct the name, or create it; {pinned}"

    def _words(self) -> list[str]:
        """Everything in the query that may be a name, as the catalog spells it."""
        text = " ".join([self._dataset.query, self._dataset.probe, *(watch.table for watch in self._dataset.watch)])
        quoted = [name.replace('""', '"') for name in re.findall(r'"((?:[^"]|"")+)"', text)]
        return [*quoted, *(word.lower() for word in re.findall(r"[^\W\d][\w$]*", text))]

    def _types(self, cursor: Any, oids: Sequence[int]) -> list[_Type]:
        cursor.execute(
            "SELECT o.oid, format_type(o.oid, NULL), t.typtype = 'e' "
            "FROM unnest(%s::oid[]) WITH ORDINALITY AS o (oid, place) JOIN pg_type AS t ON t.oid = o.oid "
            "ORDER BY o.place",
            (list(oids),),
        )
        return [_Type(*row) for row in cursor.fetchall()]

    def _same_names(self) -> None:
        names = [column.name for column in self._found.columns]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            self._found.findings.append(
                Finding("hint", f"columns of the same name: {', '.join(twice)}", "name them apart with AS")
            )

    def _key_places(self) -> list[int] | None:
        """Where the key's columns stand; None if one is not there."""
        names = [column.name for column in self._found.columns]
        missing = [column for column in self._dataset.key if column not in names]
        for column in missing:
            near = difflib.get_close_matches(column, names, 1)
            todo = f'did you mean "{near[0]}"?' if near else f"the query has {', '.join(names) or 'no columns'}"
            self._found.findings.append(Finding("problem", f"key: the query has no column {column}", todo))
        return None if missing else [names.index(column) for column in self._dataset.key]

    def _plan(self, cursor: Any) -> Mapping[str, Any] | None:
        with self._step(cursor, "EXPLAIN"):
            cursor.execute(f"EXPLAIN (FORMAT JSON, VERBOSE) {whole_query(self._dataset.query)}")
            (answer,) = cursor.fetchone()
            plan: Mapping[str, Any] = (answer if isinstance(answer, list) else json.loads(answer))[0]["Plan"]
            self._found.worst = worst_node(plan)
            self._tables(cursor, plan)
            return plan
        return None

    def _tables(self, cursor: Any, plan: Mapping[str, Any]) -> None:
        """What a person would not see in the result: rows that are hidden, estimates that are guesses."""
        scanned = sorted({_table(node) for node in _nodes(plan) if "Relation Name" in node})
        # By name, not to_regclass: behind a view there may be a schema that the role must not use.
        cursor.execute(
            """
            SELECT format('%%I.%%I', n.nspname, c.relname), row_security_active(c.oid), c.reltuples < 0
            FROM unnest(%s::text[], %s::text[]) AS u (schema, name)
            JOIN pg_namespace AS n ON n.nspname = u.schema
            JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = u.name
            ORDER BY 1
            """,
            ([schema for schema, _ in scanned], [name for _, name in scanned]),
        )
        for table, hidden, unknown in cursor.fetchall():
            if hidden:
                text = (
                    f"row security is active on {table}: {self._server.role} gets the rows that its policies let it see"
                )
                self._found.findings.append(Finding("hint", text, "see that those are all that are meant"))
            if unknown:
                text = f"{table} has never been analyzed: rows, bytes and cost are guesses"
                self._found.findings.append(Finding("hint", text, f"ANALYZE {table};"))

    def _unique_index(
        self, cursor: Any, plan: Mapping[str, Any], origins: Sequence[tuple[int | None, int | None]]
    ) -> _Index | None:
        """The unique index that makes the key unique, where each row of the query is one of a single table."""
        table_oid = origins[0][0]
        if not table_oid or any(oid != table_oid for oid, _ in origins):
            return None
        scanned = _only_table(plan)
        if scanned is None:
            return None
        cursor.execute(
            "SELECT c.oid FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace "
            "WHERE (n.nspname, c.relname) = (%s, %s)",
            scanned,
        )
        if cursor.fetchone() != (table_oid,):
            return None
        cursor.execute(
            """
            SELECT i.indexrelid::regclass::text,
                   (SELECT bool_and(a.attnotnull) FROM pg_attribute AS a
                    WHERE a.attrelid = i.indrelid AND a.attnum = ANY (%(columns)s::smallint[]))
            FROM pg_index AS i
            WHERE i.indrelid = %(table)s AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
              -- The columns after indnkeyatts are only INCLUDEd; 0 is an expression.
              AND (i.indkey::smallint[])[0:i.indnkeyatts - 1] <@ %(columns)s::smallint[]
            ORDER BY i.indisprimary DESC, 1 LIMIT 1
            """,
            {"table": table_oid, "columns": [number for _, number in origins]},
        )
        row = cursor.fetchone()
        return _Index(*row) if row else None

    def _sample(self, cursor: Any) -> _Sample | None:
        """What some rows of the query say; None, and a hint, if they were not to be had in time."""
        cursor.execute("SAVEPOINT sample")
        try:
            cursor.execute(f"SET LOCAL statement_timeout = {_SAMPLE_TIMEOUT_MS}")
            rows = f"{rows_query(self._dataset.query, self._dataset.key)} LIMIT {SAMPLE_ROWS}"
            cursor.execute(
                "SELECT count(*), count(DISTINCT s.key), count(*) FILTER (WHERE s.key IS NULL), "  # noqa: S608
                f"max(octet_length(s.key)), avg(octet_length(s.document)) FROM ({rows}) AS s (key, document)"
            )
            return _Sample(*cursor.fetchone())
        except psycopg2.Error as error:
            if self._connection.closed:
                raise
            cursor.execute("ROLLBACK TO SAVEPOINT sample")
            if error.pgcode == "57014":
                text = f"no {SAMPLE_ROWS:,} rows of it came within {_SAMPLE_TIMEOUT_MS // 1000} s; its deadline is "
                self._found.findings.append(
                    Finding("hint", f"{text}timeout_s = {self._dataset.timeout_s:g}", "see that it is long enough")
                )
            else:
                self._found.findings.append(self._finding(cursor, "the rows", error))
            return None
        finally:
            if not self._connection.closed:
                cursor.execute(f"SET LOCAL statement_timeout = {_STATEMENT_TIMEOUT_MS}")

    def _size(self, plan: Mapping[str, Any], sample: _Sample | None) -> None:
        rows, row_bytes = int(plan["Plan Rows"]), int(plan["Plan Width"])
        if sample is not None and sample.is_all:
            rows = sample.rows
        elif sample is not None:
            rows = max(rows, sample.rows)
        document_bytes = round(sample.document_bytes) if sample and sample.document_bytes is not None else None
        self._found.size = size = Size(rows, row_bytes, document_bytes, float(plan["Total Cost"]))
        dataset, findings = self._dataset, self._found.findings
        if dataset.max_rows and size.rows > dataset.max_rows:
            findings.append(
                Finding(
                    "problem",
                    f"about {size.rows:,} rows pass max_rows = {dataset.max_rows:,}",
                    "raise it, or select less",
                )
            )
        if dataset.max_bytes and size.bytes > dataset.max_bytes:
            findings.append(
                Finding(
                    "problem",
                    f"about {size.bytes:,} bytes pass max_bytes = {dataset.max_bytes:,}",
                    "raise it, or select less",
                )
            )
        if sample is not None and sample.is_all and sample.rows < dataset.min_rows:
            findings.append(
                Finding(
                    "problem", f"{sample.rows:,} rows are fewer than min_rows = {dataset.min_rows:,}: it would be held"
                )
            )

    def _key(self, places: Sequence[int], types: Sequence[_Type], index: _Index | None, sample: _Sample | None) -> Key:
        findings = self._found.findings
        columns = tuple(self._found.columns[place] for place in places)
        fit = all(deltas.is_fit(kind.oid, is_enum=kind.is_enum) for kind in types)
        if sample is not None and sample.nulls:
            findings.append(
                Finding(
                    "problem",
                    f"the key is NULL in {sample.nulls:,} of {sample.rows:,} rows",
                    "leave them out with WHERE",
                )
            )
        elif index is not None and not index.not_null:
            findings.append(
                Finding(
                    "hint",
                    "the key may become NULL, which fails a refresh",
                    "make the column NOT NULL, or leave them out",
                )
            )
        if sample is not None and sample.longest_key is not None and sample.longest_key > 65536:
            findings.append(Finding("problem", "a key is longer than 64 KiB", "choose another key"))
        if index is not None:
            return Key(columns, True, f"unique index {index.name}", fit)
        if sample is None:
            return Key(columns, None, "neither an index nor a sample tells", fit)
        how = f"all {sample.rows:,} rows counted" if sample.is_all else f"counted in a sample of {sample.rows:,} rows"
        twice = sample.rows - sample.nulls - sample.distinct
        if twice:
            findings.append(
                Finding(
                    "problem",
                    f"the key is not unique: {twice:,} rows of {sample.rows:,} repeat one",
                    "add a column to key",
                )
            )
        return Key(columns, not twice, how, fit)

    def _deltas(self, cursor: Any, key_oids: Sequence[int], origins: Sequence[tuple[int | None, int | None]]) -> None:
        """Whether what is watched can be, or what it would take where nothing is."""
        dataset, key = self._dataset, self._found.key
        assert key is not None
        if not dataset.watch:
            self._found.deltas = self._possible(cursor, origins) if key.fit else "not by a key of that type"
            return
        tables = ", ".join(f"{watch.table} by {':'.join(watch.key)}" for watch in dataset.watch)
        self._found.deltas = f"watches {tables}"
        self._watched(cursor, key_oids)

    def _watched(self, cursor: Any, key_oids: Sequence[int]) -> None:
        """What is in the way of the deltas that are configured.

        :param key_oids: the types of the key; empty if they are not known.
        """
        dataset = self._dataset
        if not dataset.watch:
            return
        if not self._server.migrated:
            self._found.findings.append(_no_deltas(deltas.CANNOT_TELL.replace("NAME", self._server.role)))
            return
        with self._step(cursor, "watch"):
            cursor.execute(deltas.lock_sql([dataset]))
            cursor.execute(deltas.changes_sql(dataset, None, 0))
            state, problem, _ = cursor.fetchone()
            if problem is None and key_oids:
                problem = deltas.unfit_key(state, dataset, key_oids)
            if problem:
                self._found.findings.append(_no_deltas(problem))

    def _possible(self, cursor: Any, origins: Sequence[tuple[int | None, int | None]]) -> str:
        """How to get deltas of a query whose rows are those of one table."""
        if not origins:
            return "possible for tables whose columns hold the key; see `watch`"
        table_oid, numbers = origins[0][0], [number for _, number in origins]
        cursor.execute(
            "SELECT format('%%I.%%I', n.nspname, c.relname), "
            "ARRAY(SELECT a.attname FROM unnest(%s::smallint[]) WITH ORDINALITY AS k (number, place) "
            "JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = k.number ORDER BY k.place)::text[] "
            "FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = %s",
            (numbers, table_oid),
        )
        table, columns = cursor.fetchone()
        return f"possible: cacheservice watch {table}{''.join(f' --key {column}' for column in columns)}"

    def _probe(self, cursor: Any) -> None:
        if not self._dataset.probe:
            return
        with self._step(cursor, "probe"):
            cursor.execute(probe_query(self._dataset.probe))
            if cursor.fetchone()[0] is None:
                self._found.findings.append(
                    Finding("hint", "probe: it gives NULL now; while it does, nothing is fetched after the first load")
                )

    def _channel(self) -> None:
        channel = self._dataset.notify
        if channel and not re.fullmatch(r"[a-z_][a-z0-9_$]*", channel):
            quoted = channel.replace('"', '""')
            self._found.findings.append(
                Finding("hint", f'notify: the channel "{channel}" has to be quoted', f'say: NOTIFY "{quoted}"')
            )


def _no_deltas(why: str) -> Finding:
    """:param why: what is in the way, and mostly what to do about it behind a semicolon."""
    text, _, todo = why.partition("; ")
    return Finding("problem", f"watch: {text}; all rows are read instead", todo)


class _Type(NamedTuple):
    oid: int
    name: str
    is_enum: bool


class _Index(NamedTuple):
    name: str
    not_null: bool


class _Sample(NamedTuple):
    """Of up to `SAMPLE_ROWS` rows."""

    rows: int
    distinct: int
    nulls: int
    longest_key: int | None
    document_bytes: Any

    @property
    def is_all(self) -> bool:
        return self.rows < SAMPLE_ROWS


def worst_node(plan: Mapping[str, Any]) -> Node:
    """The node of the highest cost of its own."""
    total = max(float(plan["Total Cost"]), 1e-9)
    own_cost, node = max(_own_costs(plan, 1.0), key=lambda found: found[0])
    return Node(_node_name(node), min(1.0, own_cost / total))


def _own_costs(node: Mapping[str, Any], times: float) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """Of each node below and this one, as often as it runs; what the planner adds up on the way is taken off again.

    :param times: how often the planner thinks this one runs: the inner side of a nested loop, for each outer row.
    """
    children = list(node.get("Plans", ()))
    own = float(node["Total Cost"])
    for child in children:
        runs = 1.0
        cost = float(child["Total Cost"])
        if node["Node Type"] == "Nested Loop" and child.get("Parent Relationship") == "Inner" and cost > 0:
            # Not more than is left of the loop's own total: a cheaper second run (Memoize, a cache) is in it already.
            runs = max(1.0, min(float(children[0]["Plan Rows"]), (own / cost)))
        own -= cost * runs
        yield from _own_costs(child, times * runs)
    yield max(0.0, own) * times, node


def _node_name(node: Mapping[str, Any]) -> str:
    """As EXPLAIN names it: "Seq Scan on public.products", "Index Scan using products_pkey on public.products"."""
    name = str(node["Node Type"])
    if "Join Type" in node and node["Join Type"] != "Inner":
        name = f"{name} ({node['Join Type']})"
    if "Index Name" in node:
        name += f" using {node['Index Name']}"
    if "Relation Name" in node:
        name += f" on {node['Schema']}.{node['Relation Name']}" if "Schema" in node else f" on {node['Relation Name']}"
    elif "Function Name" in node:
        name += f" on {node['Function Name']}()"
    elif "CTE Name" in node:
        name += f" on {node['CTE Name']}"
    return name


def _nodes(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)


def _table(node: Mapping[str, Any]) -> tuple[str, str]:
    """The schema and the name of the table that a node scans."""
    return str(node["Schema"]), str(node["Relation Name"])


_ROW_BY_ROW = {
    "Seq Scan", "Index Scan", "Index Only Scan", "Bitmap Heap Scan", "Bitmap Index Scan", "Tid Scan", "Tid Range Scan",
    "Sort", "Incremental Sort", "Limit", "Gather", "Gather Merge", "Subquery Scan", "Unique", "Materialize",
    "BitmapAnd", "BitmapOr", "Result",
}  # fmt: skip
"""Nodes that give no row more than once."""


def _only_table(plan: Mapping[str, Any]) -> tuple[str, str] | None:
    """Schema and name of the table, if the plan gives rows of one table, each at most once."""
    tables: list[tuple[str, str]] = []

    def walk(node: Mapping[str, Any]) -> bool:
        if "Relation Name" in node:
            tables.append(_table(node))
        # What a sub-select looks up adds no row; it hangs below as SubPlan or InitPlan.
        below = [
            child for child in node.get("Plans", ()) if child["Parent Relationship"] not in ("InitPlan", "SubPlan")
        ]
        one_source = len(below) <= 1 or node["Node Type"] in ("BitmapAnd", "BitmapOr")
        return node["Node Type"] in _ROW_BY_ROW and one_source and all(map(walk, below))

    return tables[0] if walk(plan) and len(tables) == 1 else None
