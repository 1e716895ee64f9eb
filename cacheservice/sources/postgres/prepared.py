"""Prepared statements of each session, so that they are parsed and planned once."""

from __future__ import annotations

import hashlib
from weakref import WeakKeyDictionary

from cacheservice.sources.postgres.guard import GuardedConnection

_MOST_KEPT = 200
"""More statements than this can only come from changed datasets; all are then deallocated."""


class Prepared:
    """Remembers the prepared statements of each session.

    Behind a pooler no statement can be kept, because the next transaction has another session. A session that failed is
    never used again, so the statements that were sent are the statements that it has.
    """

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[GuardedConnection, set[str]] = WeakKeyDictionary()

    def began(self, guard: GuardedConnection, pid: int) -> None:
        """Record that the session works, with the server's process `pid`.

        A pooler reports other process ids to its clients.
        """
        if guard.pid == pid:
            self._kept.setdefault(guard, set())

    def can_keep(self, guard: GuardedConnection) -> bool:
        """Return whether the session is known to be direct, without a pooler."""
        return guard in self._kept

    def sql(self, guard: GuardedConnection, select: str) -> str:
        """Return the SQL that runs `select`, as a prepared statement if possible."""
        kept = self._kept.get(guard)
        if kept is None:
            return f"{select};"
        name = f"cacheservice_{hashlib.blake2b(select.encode(), digest_size=12).hexdigest()}"
        if name in kept:
            return f"EXECUTE {name};"
        forget = ""
        if len(kept) >= _MOST_KEPT:
            forget = "DEALLOCATE ALL; "
            kept.clear()
        kept.add(name)
        return f"{forget}PREPARE {name} AS {select}; EXECUTE {name};"
