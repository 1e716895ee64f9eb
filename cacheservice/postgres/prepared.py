"""Statements that a session keeps by name, so that they are parsed and planned once."""

from __future__ import annotations

import hashlib
from weakref import WeakKeyDictionary

from cacheservice.postgres.guard import GuardedConnection

_MOST_KEPT = 200
"""More than that come from datasets that were changed; then all are forgotten."""


class Prepared:
    """Which statements each session has. Behind a pooler none can be kept: the next transaction has another session.

    A session that failed is never used again, so what was sent is what it has.
    """

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[GuardedConnection, set[str]] = WeakKeyDictionary()

    def began(self, guard: GuardedConnection, pid: int) -> None:
        """The session works, with the server's process `pid`; a pooler shows its clients other numbers."""
        if guard.pid == pid:
            self._kept.setdefault(guard, set())

    def can_keep(self, guard: GuardedConnection) -> bool:
        """Whether the session is known to be one of the server itself."""
        return guard in self._kept

    def sql(self, guard: GuardedConnection, select: str) -> str:
        """The statements that run `select` in the session, by its name where it can be kept."""
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
