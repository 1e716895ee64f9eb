"""Checks that watch, notify and probe can detect changes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cacheservice.config import DatasetSettings
from cacheservice.sources.postgres import deltas
from cacheservice.sources.postgres.inspect.failures import step
from cacheservice.sources.postgres.inspect.findings import Finding, Inspection
from cacheservice.sources.postgres.inspect.look import Look
from cacheservice.sources.postgres.logical import tables
from cacheservice.sources.postgres.statements import probe_query


def describe_deltas(look: Look, key_oids: Sequence[int], origins: Sequence[tuple[int | None, int | None]]) -> None:
    """Describe the watched tables, or the requirements of a watch if there is none."""
    dataset, key = look.dataset, look.found.key
    assert key is not None
    if not dataset.watch:
        look.found.note_deltas(_possible(look, origins) if key.fit else "not by a key of that type")
        return
    watched = ", ".join(f"{watch.table} by {':'.join(watch.key)}" for watch in dataset.watch)
    look.found.note_deltas(f"watches {watched}")
    if way := look_at_watches(look, key_oids):
        look.found.note_deltas(f"watches {watched}, {way}")


def look_at_watches(look: Look, key_oids: Sequence[int]) -> str | None:
    """Add the problems that prevent the configured deltas; return how changes are found, None if they are not.

    :param key_oids: the types of the key; empty if they are not known.
    """
    dataset, mode = look.dataset, look.postgres.capture
    if not dataset.watch:
        return None
    with step(look, "watch"):
        if key_oids:
            look.cursor.execute(deltas.key_types_sql(dataset, key_oids))
            if unfit := deltas.unfit_key(look.cursor.fetchall(), dataset):
                look.found.findings.append(_no_deltas(unfit))
                return None
        not_logical = None if mode == "triggers" else _not_logical(look)
        if mode != "triggers" and not_logical is None:
            return "in the write-ahead log"
        if mode == "logical":
            assert not_logical is not None
            look.found.findings.append(_no_deltas(not_logical))
            return None
        if mode == "auto" and look.server.not_logical is None:
            text, todo = split_advice(not_logical or "")
            look.add("hint", f"watch: changes are not read from the write-ahead log: {text}", todo)
        if (problem := _no_triggers(look)) is None:
            return "by triggers"
        look.found.findings.append(_no_deltas(problem))
    return None


def _not_logical(look: Look) -> str | None:
    """Return why the changes cannot be read from the write-ahead log."""
    if look.server.not_logical is not None:
        return look.server.not_logical
    dataset, publication = look.dataset, look.postgres.publication
    look.cursor.execute(tables.facts_sql(dataset, publication, "", look.connection.server_version))
    return tables.problem(tables.facts(look.cursor.fetchone()), dataset, publication)


def _no_triggers(look: Look) -> str | None:
    """Return why triggers do not record the changes."""
    if not look.server.migrated:
        return deltas.CANNOT_ASK.replace("NAME", look.server.role)
    look.cursor.execute(deltas.lock_sql([look.dataset]))
    look.cursor.execute(deltas.changes_sql(look.dataset, None, 0))
    problem: str | None = look.cursor.fetchone()[1]
    return problem


def _possible(look: Look, origins: Sequence[tuple[int | None, int | None]]) -> str:
    """Return how to get deltas of a query whose rows are rows of one table."""
    if not origins:
        return "possible for tables whose columns hold the key; see `watch`"
    table_oid, numbers = origins[0][0], [number for _, number in origins]
    look.cursor.execute(
        "SELECT format('%%I.%%I', n.nspname, c.relname), "
        "ARRAY(SELECT a.attname FROM unnest(%s::smallint[]) WITH ORDINALITY AS k (number, place) "
        "JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = k.number ORDER BY k.place)::text[] "
        "FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = %s",
        (numbers, table_oid),
    )
    table, columns = look.cursor.fetchone()
    return f"possible: cacheservice watch {table}{''.join(f' --key {column}' for column in columns)}"


HOLDING_PROBE = "concat(count(*), ' ', sum(hashtextextended(concat(ctid, xmin), 0)))"
"""Each INSERT, UPDATE and DELETE changes it, whatever the order of the commits."""


def look_at_probe(look: Look) -> None:
    if not look.dataset.probe:
        return
    with step(look, "probe"):
        look.cursor.execute(probe_query(look.dataset.probe))
        if look.cursor.fetchone()[0] is None:
            look.add("hint", "probe: it returns NULL now; while it does, no rows are read after the first load")
    look.found.findings.extend(_probe_findings(look.dataset))


def inspect_text(dataset: DatasetSettings) -> Inspection:
    """Inspect the declaration alone, without a database."""
    found = Inspection(dataset.name)
    found.findings.extend(_probe_findings(dataset))
    return found


def _probe_findings(dataset: DatasetSettings) -> list[Finding]:
    if not misses_changes(dataset.probe):
        return []
    text = (
        "probe: a DELETE does not change the greatest value, nor does a transaction that began earlier and commits "
        f"later; such changes wait for full_interval_s = {dataset.full_interval_s:g}"
    )
    return [Finding("hint", text, f"use a value that does, such as {HOLDING_PROBE}")]


def misses_changes(probe: str) -> bool:
    """Return whether a probe looks only for the greatest value.

    An example is `SELECT max(updated_at) FROM products`.
    """
    greatest = re.search(r"\b(max|last_value)\b|\bDESC\b.*\bLIMIT\b", probe, re.IGNORECASE | re.DOTALL)
    return greatest is not None and not re.search(r"\bxmin\b|\bsum\b|pg_current_snapshot|_agg\b", probe, re.IGNORECASE)


def look_at_channel(look: Look) -> None:
    channel = look.dataset.notify
    if channel and not re.fullmatch(r"[a-z_][a-z0-9_$]*", channel):
        quoted = channel.replace('"', '""')
        look.add("hint", f'notify: the channel "{channel}" has to be quoted', f'use NOTIFY "{quoted}"')


def _no_deltas(why: str) -> Finding:
    """Return the problem that deltas are not possible.

    :param why: the obstacle, usually followed by a semicolon and the next step.
    """
    text, todo = split_advice(why)
    return Finding("problem", f"watch: {text}; all rows are read instead", todo)


def split_advice(problem: str) -> tuple[str, str]:
    """Return a problem and the next step, which follows a semicolon."""
    text, _, todo = problem.partition("; ")
    return text, todo
