"""Finds the sessions that keep a command waiting for a lock.

It asks over a session of its own. It blocks a thread, so it is for the command line and never for the service. The
server forgets the blockers when a wait ends, so it is asked during the wait.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import closing
from types import TracebackType

import psycopg2

from cacheservice.base.errors import Blocker
from cacheservice.base.interfaces import BlockingCursor
from cacheservice.sources.postgres import blockers

_AFTER_S = 0.3
"""A command that does not wait has finished by then, and needs no second session."""
_INTERVAL_S = 0.3
_APPLICATION_NAME = "cacheservice blockers"


class LockWatch:
    """Asks the server while it is entered.

    It keeps the last answer that named a session.

    :param arguments: the driver's arguments for the session to ask over.
    :param pid: the server process of the command's session.
    """

    def __init__(self, arguments: Mapping[str, object], pid: int) -> None:
        self._arguments = {**arguments, "application_name": _APPLICATION_NAME}
        self._pid = pid
        self._found: tuple[Blocker, ...] = ()
        self._ended = threading.Event()
        # A daemon thread, so that a server that does not answer cannot keep the command from ending.
        self._thread = threading.Thread(target=self._run, name="lock watch", daemon=True)

    def __enter__(self) -> LockWatch:
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(_INTERVAL_S)

    @property
    def relation(self) -> str | None:
        """Return the quoted name of the table whose lock the command waited for."""
        return next((blocker.relation for blocker in self._found if blocker.relation), None)

    @property
    def sessions(self) -> str:
        """Return a description of the blocking sessions; empty if none is known."""
        return "; ".join(str(blocker) for blocker in self._found)

    def _run(self) -> None:
        if self._ended.wait(_AFTER_S):
            return
        try:
            with closing(psycopg2.connect(**self._arguments)) as connection:
                connection.autocommit = True
                while not self._ended.is_set():
                    with connection.cursor() as cursor:
                        self._found = _ask(cursor, self._pid) or self._found
                    self._ended.wait(_INTERVAL_S)
        except psycopg2.Error:
            return  # the command reports that it waited, without a name


def _ask(cursor: BlockingCursor, pid: int) -> tuple[Blocker, ...]:
    try:
        cursor.execute(blockers.by_function(pid))
    except psycopg2.Error as error:
        if error.pgcode not in blockers.NO_FUNCTION:
            raise
        cursor.execute(blockers.by_catalogs(pid))
    return tuple(blockers.blocker(row) for row in cursor.fetchall())
