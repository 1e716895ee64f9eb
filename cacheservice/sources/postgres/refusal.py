"""Explains in one line why no session opened.

The error names each address with its own cause, and advice about the most specific cause.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Sequence
from typing import NamedTuple

import psycopg2

from cacheservice.base.errors import DatabaseUnavailable, DeadlineExceeded, LoginRefused, NoSessionLeft
from cacheservice.sources.postgres import advice
from cacheservice.sources.postgres.target import Target

_FEW_DESCRIPTORS = 4
_TOO_MANY_CONNECTIONS = "53300"
_INVALID_LOGIN = "28"
_INVALID_LOGIN_WORDS = re.compile("(password|SASL) authentication failed|no password supplied")
"""PgBouncer refuses a login with SQLSTATE 08P01; libpq reports a missing password without an SQLSTATE."""
_SQLSTATE = re.compile(r"(?<=:  )([0-9A-Z]{5}): ")
_PREFIX = re.compile(r"^connection to server (at|on socket) .* failed: ")
"""libpq repeats the address, which already stands before the cause."""
_NOT_SHOWN = re.compile(r"^LOCATION: |^\s*Is the server running (on that host|locally)")
_OTHER_SERVERS_MAY_DIFFER = re.compile("08...|53...|57P0.|XX...|")
"""After a refused login no other host is tried, as in libpq. A server that is starting, stopping or full is skipped."""


NO_ANSWER = "PostgreSQL did not answer"
_SILENCE = re.compile(r"timeout expired|timed out|did not answer")
_NOT_REACHED = re.compile(
    rf"{_SILENCE.pattern}|translate host name|name look-up|No route to host|unreachable|No such file or directory"
)


class Tried(NamedTuple):
    """A failed address, or a host without an address. `cause` is not redacted."""

    where: str
    cause: str
    sqlstate: str = ""
    silent: bool = False


def tried(where: str, error: psycopg2.Error) -> Tried:
    """Return the failure at one address, from a verbose message of libpq."""
    message = str(error)
    sqlstate = _SQLSTATE.search(message)
    lines = [line for line in _SQLSTATE.sub("", message).splitlines() if not _NOT_SHOWN.match(line)]
    # With sslmode=prefer libpq tries twice, with TLS and without.
    causes = dict.fromkeys(_PREFIX.sub("", line).strip() for line in lines)
    return Tried(where, "; ".join(filter(None, causes)), sqlstate[1] if sqlstate else "")


def lead(causes: Sequence[str]) -> str:
    """Return a summary of the causes in a few words.

    A refusal is only reported if a server or a host answered.
    """
    for pattern, words in ((_SILENCE, NO_ANSWER), (_NOT_REACHED, "PostgreSQL could not be reached")):
        if causes and all(pattern.search(cause) for cause in causes):
            return words
    return "PostgreSQL refused the connection"


def lead_of(message: str) -> str:
    """Return the same for a message of libpq, which has a line for each address."""
    return lead([line for line in message.splitlines() if not _NOT_SHOWN.match(line)])


def ends_the_search(failed: Tried) -> bool:
    """Return whether the server refused the login itself.

    No other address is tried then.
    """
    return _OTHER_SERVERS_MAY_DIFFER.fullmatch(failed.sqlstate) is None


def not_connected(failed: Sequence[Tried], target: Target, waited_s: float) -> DatabaseUnavailable:
    """Return the error for a session that could not be opened at any address."""
    for each in failed:
        if (spent := no_descriptor_left(each.cause)) is not None:
            return spent
    causes = target.redact(
        "; ".join(f"{where}: {cause or 'it failed, and no reason was reported'}" for where, cause, *_ in failed)
    )
    if all(each.silent for each in failed):
        return DeadlineExceeded(f"PostgreSQL did not accept a session within {waited_s:.3g} s ({causes})")
    error = _kind(failed)(f"{lead([cause for _, cause, *_ in failed])}: {causes}")
    by_weight = sorted(failed, key=lambda each: not each.sqlstate)  # the server that answered has the best explanation
    best = next(filter(None, (advice.for_login(each.sqlstate, each.cause) for each in by_weight)), None)
    return error if best is None else error.advised(target.redact(best))


def _kind(failed: Sequence[Tried]) -> type[DatabaseUnavailable]:
    if any(each.sqlstate == _TOO_MANY_CONNECTIONS for each in failed):
        return NoSessionLeft
    refused = any(
        each.sqlstate.startswith(_INVALID_LOGIN) or _INVALID_LOGIN_WORDS.search(each.cause) for each in failed
    )
    return LoginRefused if refused else DatabaseUnavailable


def no_descriptor_left(message: str) -> DatabaseUnavailable | None:
    """Return the error if the process has no descriptor left for a socket.

    None if that is not the cause.
    """
    if message and "Too many open files" not in message:
        return None
    open_files = _spent_open_files()  # asynchronous libpq then fails without a message
    if not open_files:
        return None
    spent = DatabaseUnavailable(f"no connection could be opened: all {open_files} open files of the process are used")
    return spent.advised("raise the limit of open files (LimitNOFILE=, ulimit -n), or lower limits.max_connections")


def _spent_open_files() -> int:
    """Return the limit of open files if nearly all are used, else 0."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd"))
    except FileNotFoundError:
        return 0
    except OSError:
        return limit
    return limit if limit - used < _FEW_DESCRIPTORS else 0
