"""The meaning of failures of the listening session, and when to try again. Pure decisions.

A failure is one of two:

- lost: the session ended, or none could be opened. It is tried again soon, with exponential backoff and full jitter, as
  for refreshes.
- impossible: LISTEN cannot work there. It is tried again slowly, until a promotion, a new connection string or a direct
  connection.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from cacheservice.base.backoff import full_jitter
from cacheservice.base.errors import NoSessionLeft, NotHeard, QueryFailed, RefreshFailed
from cacheservice.sources.postgres.listening.pace import Pace

_SILENT_SESSIONS = 2
"""After this many sessions in a row that listened and received nothing, the cause is not chance."""
_READ_ONLY = "25006"
"""The SQLSTATE of LISTEN during recovery."""
_STANDBY = "the server is a standby, where LISTEN cannot work"
_NO_CONNECTION = "refreshes have priority, and no connection is left for listening"
_POOLED = (
    "LISTEN does not work here, as behind a proxy that pools transactions (PgBouncer); "
    "name a direct connection in postgres.dsn"
)


class HeardNothing(NotHeard):
    """A session listened, and not even its first canary came back."""


class Problem(NamedTuple):
    """Why nothing listens, in one line, and when it is tried again; `is_new` if it differs from the last event."""

    kind: Literal["lost", "impossible"]
    text: str
    retry_in_s: float
    is_new: bool


class Failures:
    """The failures in a row since a session was last proven, and the last event, which the log has once.

    `count` is the number of failures that were tried again soon.
    """

    def __init__(self, pace: Pace) -> None:
        self._retry_slowly_s = pace.retry_slowly_s
        self._delay_s = full_jitter(pace.retry_initial_s, pace.retry_max_s, pace.random)
        self._silent = 0  # the newest failures in a row whose sessions listened and received nothing
        self._last: tuple[str, str] | None = None
        self.count = 0

    def proven(self) -> bool:
        """Note that a session was proven; return whether that is new."""
        self.count = self._silent = 0
        return self._is_new("began", "")

    def failed(self, error: RefreshFailed) -> Problem:
        """Return what a failure means."""
        self._silent = self._silent + 1 if isinstance(error, HeardNothing) else 0
        if isinstance(error, QueryFailed) and error.sqlstate == _READ_ONLY:
            return self._impossible(_STANDBY)
        if isinstance(error, NoSessionLeft):
            return self._impossible(f"{_NO_CONNECTION}: {error}")
        if self._silent >= _SILENT_SESSIONS:
            return self._impossible(_POOLED)
        return self.lost(str(error))

    def lost(self, text: str) -> Problem:
        """Return the problem of a session that was lost."""
        retry_in_s = self._delay_s(self.count)
        self.count += 1
        return Problem("lost", text, retry_in_s, self._is_new("lost", ""))

    def _impossible(self, text: str) -> Problem:
        return Problem("impossible", text, self._retry_slowly_s, self._is_new("impossible", text))

    def _is_new(self, event: str, text: str) -> bool:
        before, self._last = self._last, (event, text)
        return before != self._last
