"""`cacheservice unwatch` without options: ends both ways of change capture for a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cacheservice.base.errors import WatchFailed
from cacheservice.sources.postgres import publishing, tables, watch
from cacheservice.sources.postgres.admin import Session
from cacheservice.sources.postgres.tables import NotWatched


class Unwatched(NamedTuple):
    """What was undone.

    :param recorded: the tables whose changes triggers no longer record.
    :param published: the removal from the publication; None if the table was not in it.
    :param left: why the table is still published; empty if it is not.
    """

    recorded: tuple[str, ...]
    published: publishing.Removal | None
    left: str


def unwatch(
    dsn: str,
    table: str,
    publication: str,
    dry_run: bool,
    show: Callable[[str], None],
    dsn_source: str = "postgres.dsn",
) -> Unwatched:
    """Remove all triggers of `watch` from a table, and the table from the publication.

    A publication that has the table and must not be changed does not keep the triggers from being removed.

    :raises WatchFailed: if the table is watched in neither way, or the database refuses.
    """
    with tables.transaction(dsn, dsn_source, restore=not dry_run) as session:
        recorded, not_recorded = _recorded(session, table)
        published, left = None, ""
        if session.value("SELECT to_regclass(%s) IS NOT NULL", (table,)):
            try:
                published = publishing.removal_of(session, table, publication)
            except NotWatched:
                pass
            except WatchFailed as error:
                if recorded is None:
                    raise
                left = str(error)
        if recorded is None and published is None:
            assert not_recorded is not None
            raise not_recorded
        statements = [*(recorded.statements if recorded else ()), *(published.statements if published else ())]
        tables.run(session.cursor, statements, dry_run, show)
        return Unwatched(tuple(recorded.names if recorded else ()), published, left)


def _recorded(session: Session, table: str) -> tuple[watch.Removal | None, NotWatched | None]:
    try:
        return watch.removal_of(session, table, ()), None
    except NotWatched as error:
        return None, error
