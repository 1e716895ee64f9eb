"""Translates the driver's exceptions to ours, without passwords or data."""

from __future__ import annotations

import re
from typing import Protocol

import psycopg2

from cacheservice.base.errors import (
    DatabaseUnavailable,
    Deadlock,
    LockTimeout,
    QueryFailed,
    QueryTimeout,
    RefreshFailed,
    SerializationFailed,
    StandbyConflict,
)
from cacheservice.sources.postgres import advice
from cacheservice.sources.postgres.refusal import lead_of, no_descriptor_left
from cacheservice.sources.postgres.target import Target

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
"""The server function that raises the error; the message itself may be translated."""
_OF_ENCODINGS = ("22021", "22P05")
"""The messages quote names of encodings, and show the bytes."""
_BYTES = re.compile(r"0x[0-9a-f]{2}( 0x[0-9a-f]{2})*")
_QUOTED = re.compile(r'"[^"]*"')


class Diagnostics(Protocol):
    """The server's report of an error, as the driver returns it."""

    message_primary: str | None
    source_function: str | None
    message_detail: str | None


def translate(error: psycopg2.Error, target: Target, *, connecting: bool = False) -> RefreshFailed:
    """Return our exception for any exception of the driver.

    The caller raises it `from` the driver's.
    """
    sqlstate: str = getattr(error, "pgcode", None) or ""
    diagnostics: Diagnostics | None = getattr(error, "diag", None)
    original = (diagnostics and diagnostics.message_primary) or str(error)
    if connecting and (spent := no_descriptor_left(original)) is not None:
        return spent
    original = original or f"{type(error).__name__} without a message"
    # Before the password is removed: a short password may be part of the words that decide the advice.
    todo = advice.for_login(sqlstate, original) if connecting else advice.for_query(sqlstate)
    message = target.redact(original)
    if diagnostics and sqlstate in (_SERIALIZATION_FAILURE, _DEADLOCK_DETECTED) and not connecting:
        return _try_again(sqlstate, message, diagnostics)
    if connecting or _SESSION_LOST.fullmatch(sqlstate) or not sqlstate:
        what = lead_of(original) if connecting else "the connection to PostgreSQL was lost"
        unavailable = DatabaseUnavailable(f"{what}: {message}")
        return unavailable if todo is None else unavailable.advised(todo)
    if sqlstate == _LOCK_NOT_AVAILABLE:
        return LockTimeout("waited for a lock as long as the deadline allows", sqlstate)
    if sqlstate == _QUERY_CANCELED:
        if "user request" in message:
            return QueryFailed("an administrator cancelled the query", sqlstate, "nothing to do: it is tried again")
        return QueryTimeout("the query took longer than its deadline allows", sqlstate)
    if _SHOWS_DATA.fullmatch(sqlstate):
        message = _BYTES.sub("…", message) if sqlstate in _OF_ENCODINGS else _QUOTED.sub('"…"', message)
    return QueryFailed(f"PostgreSQL: {message} (SQLSTATE {sqlstate})", sqlstate, todo)


def _try_again(sqlstate: str, message: str, diagnostics: Diagnostics) -> QueryFailed:
    """Return the error for a conflict that another try may avoid.

    A standby uses the same codes if replay took precedence (PostgreSQL manual, 26.4.2). Between two statements it ends
    the session instead, and then the driver only reports that the session is lost.
    """
    of_recovery = _OF_RECOVERY.search(message) or _RECOVERY_FUNCTION.search(diagnostics.source_function or "")
    if of_recovery:
        why = f": {diagnostics.message_detail}".rstrip(".") if diagnostics.message_detail else ""
        return StandbyConflict(f"the standby ended the query to continue replaying its primary{why}", sqlstate)
    if sqlstate == _DEADLOCK_DETECTED:
        return Deadlock("deadlock: the query and another session waited for each other's locks", sqlstate)
    return SerializationFailed("the query could not be isolated from concurrent changes", sqlstate)
