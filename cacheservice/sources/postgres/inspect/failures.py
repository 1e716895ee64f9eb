"""Explains a server error for the inspected dataset, with the next step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2

from cacheservice.sources.postgres.inspect.findings import Finding
from cacheservice.sources.postgres.inspect.look import STATEMENT_TIMEOUT_MS, Look
from cacheservice.sources.postgres.statements import whole_query
from cacheservice.sources.postgres.target import parse
from cacheservice.sources.postgres.translate import translate


@contextmanager
def step(look: Look, what: str) -> Iterator[None]:
    """Run a check that may fail without stopping the others.

    The cause of its failure becomes a finding.
    """
    look.cursor.execute("SAVEPOINT step")
    try:
        yield
    except psycopg2.Error as error:
        if look.connection.closed:
            raise
        look.cursor.execute("ROLLBACK TO SAVEPOINT step")
        look.found.findings.append(finding(look, what, error))


def finding(look: Look, what: str, error: psycopg2.Error) -> Finding:
    translated = translate(error, parse(look.postgres.dsn.get_secret_value()))
    message = str(translated)
    match error.pgcode:
        case "42501":
            return Finding("problem", f"{what}: {message}", _grants(look, message))
        case "42P01" | "42883" | "3F000":
            return Finding("problem", f"{what}: {message}", _elsewhere(look, message))
        case "55P03":
            locked = f"{what}: {look.locks.relation or 'a table'} is locked by another session"
            if not look.locks.sessions:
                return Finding("problem", locked, "try again later")
            return Finding("problem", f"{locked}: {look.locks.sessions}", "end that session, or wait for it")
        case "57014":
            return Finding("problem", f"{what}: not answered within {STATEMENT_TIMEOUT_MS // 1000} s", "try again")
    if error.diag.statement_position and what == "the query":
        # The position counts the text that makes the query a subquery.
        characters = int(error.diag.statement_position) - 1 - whole_query("").index("\n") - 1
        message += f", line {look.dataset.query[: max(0, characters)].count(chr(10)) + 1} of the query"
    return Finding("problem", f"{what}: {message}", error.diag.message_hint or translated.advice)


def _grants(look: Look, message: str) -> str:
    """Return all missing GRANTs for the tables that the query names."""
    if found := re.search(r"permission denied for (function|procedure) (\S+)", message):
        return f"GRANT EXECUTE ON {found[1].upper()} {found[2]} TO {look.server.role};"
    look.cursor.execute(
        """
        SELECT format('%%I', n.nspname), format('%%I.%%I', n.nspname, c.relname),
               has_schema_privilege(n.oid, 'USAGE'), has_table_privilege(c.oid, 'SELECT')
        FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relname = ANY (%(words)s)
          AND (n.nspname = ANY (%(words)s) OR n.nspname = ANY (%(schemas)s))
        ORDER BY 2
        """,
        {"words": _words(look), "schemas": _schemas(look)},
    )
    found_tables = look.cursor.fetchall()
    schemas = sorted({schema for schema, _, usage, _ in found_tables if not usage})
    tables = [table for _, table, _, select in found_tables if not select]
    role = look.server.role
    grants = [f"GRANT USAGE ON SCHEMA {', '.join(schemas)} TO {role};"] if schemas else []
    grants += [f"GRANT SELECT ON {', '.join(tables)} TO {role};"] if tables else []
    return " ".join(grants) or f"grant {role} what the query reads"


def _elsewhere(look: Look, message: str) -> str:
    """Return other places of an object that was not found.

    It may be in another schema, because search_path is pinned.
    """
    found = re.search(r'(?:relation|function|schema) "?([^"( ]+)', message)
    wanted = found[1].split(".")[-1] if found else ""
    catalog, name, kind = (
        ("pg_proc", "proname", "pronamespace") if "function" in message else ("pg_class", "relname", "relnamespace")
    )
    look.cursor.execute(
        f"SELECT DISTINCT format('%%I.%%I', n.nspname, o.{name}) FROM {catalog} AS o "  # noqa: S608  # three constants
        f"JOIN pg_namespace AS n ON n.oid = o.{kind} WHERE o.{name} = %s AND n.nspname <> ALL (%s) ORDER BY 1",
        (wanted, _schemas(look)),
    )
    others = [other for (other,) in look.cursor.fetchall()]
    pinned = f"names without a schema are looked for in {' and '.join(_schemas(look))} alone"
    if others:
        return f"write {' or '.join(others)}: {pinned}"
    return f"correct the name, or create it; {pinned}"


def _schemas(look: Look) -> list[str]:
    """Return the schemas in which unqualified names are looked up."""
    look.cursor.execute("SELECT current_schemas(true)::text[]")
    (schemas,) = look.cursor.fetchone()
    return list(schemas)


def _words(look: Look) -> list[str]:
    """Return every part of the query that may be a name, as the catalog spells it."""
    text = " ".join([look.dataset.query, look.dataset.probe, *(watch.table for watch in look.dataset.watch)])
    quoted = [name.replace('""', '"') for name in re.findall(r'"((?:[^"]|"")+)"', text)]
    return [*quoted, *(word.lower() for word in re.findall(r"[^\W\d][\w$]*", text))]
