"""The driver's exceptions, made ours: what happened, in words that show no password and no data."""

from __future__ import annotations

import os
import re
import resource
from typing import Any

import psycopg2

from cacheservice.errors import (
    DatabaseUnavailable,
    Deadlock,
    LockTimeout,
    QueryFailed,
    QueryTimeout,
    RefreshFailed,
    SerializationFailed,
    StandbyConflict,
)
from cacheservice.postgres.target import Target

# SQLSTATEs: PostgreSQL manual, appendix A.
_LOCK_NOT_AVAILABLE = "55P03"
_QUERY_CANCELED = "57014"
_SERIALIZATION_FAILURE = "40001"
_DEADLOCK_DETECTED = "40P01"
_SESSION_LOST = re.compile("08...|57P0[1-5]|25P0[34]|53[13]00|28...|3D000")
_SHOWS_DATA = re.compile("2[23]...")
"""Data exceptions and integrity violations quote the offending value in their message."""
_OF_RECOVERY = re.compile("conflict with recovery")
_RECOVERY_FUNCTION = re.compile("RecoveryConflict")
"""The function of the server that raises it, because a message may be translated."""
_FEW_DESCRIPTORS = 4
_QUOTED = re.compile(r'"[^"]*"')

_ADVICE = {
    "28": "check the user, its password and pg_hba.conf",
    "3D000": "check the database's name in postgres.dsn",
    "42501": "grant the reader what the query reads, e.g. GRANT SELECT ON … TO …",
    "42P01": "create the table, name its schema in the query, or grant USAGE on the schema",
    "42703": "correct the column's name in the query or in key",
    "53300": "raise max_connections of the server, or lower postgres.max_connections",
}
_REFUSED = {
    "28": re.compile('password|authentication|pg_hba|role ".*" does not exist'),
    "3D000": re.compile('database ".*" does not exist'),
    "53300": re.compile("too many|connection slots"),
}
"""libpq gives no SQLSTATE for a session that did not open."""


def translate(error: psycopg2.Error, target: Target, *, connecting: bool = False) -> RefreshFailed:
    """Ours for any exception of the driver. The caller raises it `from` the driver's."""
    sqlstate: str = getattr(error, "pgcode", None) or ""
    diagnostics = getattr(error, "diag", None)
    words = (diagnostics and diagnostics.message_primary) or str(error)
    if connecting and (not words or "Too many open files" in words) and (open_files := _spent_open_files()):
        # Asynchronous libpq fails without a word where a socket cannot be made.
        spent = DatabaseUnavailable(
            f"no connection could be opened: all {open_files} open files of the process are used"
        )
        spent.advice = "raise the limit of open files (LimitNOFILE=, ulimit -n), or lower limits.max_connections"
        return spent
    message = target.redact(words or f"{type(error).__name__} without a reason")
    advice = _ADVICE.get(sqlstate) or _ADVICE.get(sqlstate[:2])
    if connecting and advice is None:
        advice = next((_ADVICE[code] for code, words in _REFUSED.items() if words.search(message)), None)
    if sqlstate in (_SERIALIZATION_FAILURE, _DEADLOCK_DETECTED) and not connecting:
        return _try_again(sqlstate, message, diagnostics)
    if connecting or _SESSION_LOST.fullmatch(sqlstate) or not sqlstate:
        what = "PostgreSQL refused the connection" if connecting else "the connection to PostgreSQL was lost"
        unavailable = DatabaseUnavailable(f"{what}: {message}")
        if advice is not None:
            unavailable.advice = advice
        return unavailable
    if sqlstate == _LOCK_NOT_AVAILABLE:
        return LockTimeout("waited for a lock as long as the deadline allows", sqlstate)
    if sqlstate == _QUERY_CANCELED:
        if "user request" in message:
            return QueryFailed("an administrator cancelled the query", sqlstate, "nothing to do: it is tried again")
        return QueryTimeout("the query took longer than its deadline allows", sqlstate)
    if _SHOWS_DATA.fullmatch(sqlstate):
        message = _QUOTED.sub('"…"', message)
    return QueryFailed(f"PostgreSQL: {message} (SQLSTATE {sqlstate})", sqlstate, advice)


def _spent_open_files() -> int:
    """The limit of open files if nearly all are used, else 0."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd"))
    except FileNotFoundError:
        return 0
    except OSError:
        return limit
    return limit if limit - used < _FEW_DESCRIPTORS else 0


def _try_again(sqlstate: str, message: str, diagnostics: Any) -> QueryFailed:
    """What another try may not meet again.

    A standby says with the same codes that replay came first (PostgreSQL manual, 26.4.2). Between two statements it
    ends the session instead, and all that the driver then tells is that the session is lost.
    """
    of_recovery = _OF_RECOVERY.search(message) or _RECOVERY_FUNCTION.search(diagnostics.source_function or "")
    if of_recovery:
        why = f": {diagnostics.message_detail}".rstrip(".") if diagnostics.message_detail else ""
        return StandbyConflict(f"the standby ended the query to go on replaying its primary{why}", sqlstate)
    if sqlstate == _DEADLOCK_DETECTED:
        return Deadlock("the query and another session waited for each other's locks, a deadlock", sqlstate)
    return SerializationFailed("the query could not be kept apart from concurrent changes", sqlstate)
