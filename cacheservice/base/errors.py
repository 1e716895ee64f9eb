"""The base class of the package's errors, and the errors that modules share.

An error of a single module is defined in it, for example `sources.disk.lock.DirectoryTaken`,
`ports.http.problem.Problem` and `ports.resp.reply.CommandError`; not all of these derive from the base class.
Programs can distinguish errors by class. A message names the event, the dataset or the setting, and the next step; it
never contains a password, a DSN or a row. `let_go` frees the frames that an error keeps in memory.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from cacheservice.base.text import iso


class CacheServiceError(Exception):
    """The base class of the tree. It is never raised itself."""


class ConfigError(CacheServiceError):
    """The configuration has problems. Fix each line of `problems`, then start again.

    `problems` are complete lines such as
    ``cacheservice.toml: datasets.products.interval_s: must be greater than 0``.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class PortUnavailable(CacheServiceError):
    """A port cannot be opened at start. Free it, or configure another one."""


class UnknownDataset(CacheServiceError):
    """A reader or an operator named a dataset that the configuration does not declare."""


class NothingToPin(CacheServiceError):
    """An operator tried to pin a dataset without a snapshot. Wait for its first load."""


class NothingToRollBackTo(CacheServiceError):
    """No saved generation precedes the served one. Saving needs persistence.directory."""


class Stopped(CacheServiceError):
    """The service is stopping, or this process does not refresh its datasets, so the request was dropped.

    Repeat it after the restart, or ask the process that refreshes.
    """


class FollowsLeader(Stopped):
    """Another process of the fleet refreshes the dataset. Send the command to that one."""


class MainUnavailable(CacheServiceError):
    """The main process did not answer one of its workers.

    It is busy, or it has ended. Repeat the request; a worker whose main process has ended ends too.
    """


class RefreshFailed(CacheServiceError):
    """A refresh of a dataset failed. Readers keep the previous snapshot.

    The service retries without intervention. `advice` is the next step for an operator.
    """

    advice = "nothing to do: the service retries"

    def advised(self, advice: str) -> Self:
        """Return this error with another next step."""
        self.advice = advice
        return self


class DatabaseUnavailable(RefreshFailed):
    """PostgreSQL is unreachable, refuses the session, or the session broke.

    Check the server and the network path to it. The service reconnects without intervention.
    """

    advice = "check that PostgreSQL is running and can be reached from this machine"


class DeadlineExceeded(DatabaseUnavailable):
    """PostgreSQL did not answer before the deadline; the session was aborted.

    Look for a frozen or overloaded server or a lost network path, or raise timeout_s.
    """

    advice = "look for a frozen or overloaded server, or a lost network path; or raise timeout_s"


class NoSessionLeft(DatabaseUnavailable):
    """PostgreSQL has no free connection (SQLSTATE 53300).

    The limit may be that of the role, of the database or of the server. Raise the limit that the message names, or end
    other sessions.
    """

    advice = "raise the limit that the message names, or end other sessions"


class LoginRefused(DatabaseUnavailable):
    """PostgreSQL or a pooler refused the role or its password (SQLSTATE 28P01, 28000).

    Check the user, its password and pg_hba.conf. If the secret was rotated in its file, the service reads it again
    without intervention.
    """

    advice = "check the user, its password and pg_hba.conf"


class ServerTooOld(DatabaseUnavailable):
    """The server is older than PostgreSQL 14. Its session is closed before any query."""

    advice = "upgrade the server, or read from another one"


class NotHeard(DatabaseUnavailable):
    """A listening session did not receive its own test notification and was aborted.

    If it does not recover, look for a proxy between the service and the server that pools transactions.
    """

    advice = "connect to the server directly, not through a proxy that pools transactions"


class QueryFailed(RefreshFailed):
    """PostgreSQL answered the query with an error. Fix the query, rights or schema.

    `sqlstate` is the five-character code of the PostgreSQL manual, appendix A.
    """

    advice = "fix the query, or the objects that it reads"

    def __init__(self, message: str, sqlstate: str = "", advice: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        if advice is not None:
            self.advice = advice


class QueryTimeout(QueryFailed):
    """PostgreSQL ended the query because it exceeded the rest of its deadline.

    Make the query cheaper, or raise timeout_s.
    """

    advice = "make the query cheaper, or raise timeout_s"


@dataclass(frozen=True, slots=True)
class Blocker:
    """A session that held a lock for which a refresh was waiting, at that time.

    Fields that the role may not read are None. As text it is a description without them. The pid of a prepared
    transaction is 0.
    """

    pid: int
    user: str | None
    application: str | None
    lock_mode: str | None
    relation: str | None
    transaction_since: datetime | None
    state: str | None
    statement_kind: str | None

    def __str__(self) -> str:
        words = f"session {self.pid}" if self.pid else "a prepared transaction (pg_prepared_xacts)"
        if self.user:
            words += f" of {self.user}"
        if self.application:
            words += f" ({self.application})"
        if self.lock_mode:
            words += f" holds {self.lock_mode}"
            if self.relation:
                words += f" on {self.relation}"
        else:
            words += " holds the lock"
        if self.transaction_since:
            words += f", in a transaction since {iso(self.transaction_since)}"
        if self.state:
            words += f", {self.state}"
        if self.statement_kind:
            words += f", {'running' if self.state == 'active' else 'last ran'} {self.statement_kind}"
        return words


class LockTimeout(QueryFailed):
    """The query waited for a lock until its deadline.

    `blockers` are the sessions that held the lock, queried while the refresh was waiting. End them or wait.
    """

    advice = "end the session that holds the lock, or wait for it"

    def __init__(self, message: str, sqlstate: str = "", blockers: Sequence[Blocker] = ()) -> None:
        super().__init__(message, sqlstate)
        self.blockers = tuple(blockers)


class StandbyConflict(QueryFailed):
    """A standby ended the query because it conflicted with changes from the primary.

    Set hot_standby_feedback on the standby, or raise its max_standby_streaming_delay.
    """

    advice = (
        "set hot_standby_feedback = on on the standby, or a larger max_standby_streaming_delay; "
        "or make the query shorter, or read from the primary"
    )


class SerializationFailed(QueryFailed):
    """PostgreSQL could not isolate the query from concurrent changes.

    It must be retried.
    """

    advice = "nothing to do unless it repeats: PostgreSQL requires a retry, and the service retries"


class Deadlock(QueryFailed):
    """PostgreSQL ended the query because of a deadlock with another session.

    A plain SELECT hardly ever deadlocks: look for a function that takes locks, and for a session that takes the same
    locks in another order.
    """

    advice = (
        "nothing to do unless it repeats: then look in the server's log for the other session, "
        "which takes the same locks in another order"
    )


class BadResult(RefreshFailed):
    """The result cannot become a snapshot: a NULL, duplicate or overlong key.

    Fix the query or the key setting. The message names the key.
    """

    advice = "fix the query or its key"


class ResultTooLarge(BadResult):
    """The result exceeded max_rows or max_bytes. Raise the limit, or select less."""

    advice = "select fewer rows or columns, or raise the limit"


class SnapshotRejected(CacheServiceError):
    """A saved snapshot is damaged, or does not fit the dataset.

    Its format may be unknown, or it may be of another dataset, query or key. No part of it is served. Its file is moved
    aside: delete it, or keep it for an investigation.
    """


class OfAnotherDatabase(SnapshotRejected):
    """A saved snapshot was read from another database or as another role.

    It is not served, and stays on disk.
    """


class UnknownGeneration(CacheServiceError):
    """The requested generation is not on disk. The error lists the saved generations."""


class MigrationFailed(CacheServiceError):
    """`cacheservice migrate` could not reach the database or was refused.

    Fix the problem that the message names, then run the command again.
    """


class WatchFailed(CacheServiceError):
    """`cacheservice watch` or `unwatch` could not reach the database or was refused.

    The message names the next step.
    """


class NoAnswer(CacheServiceError):
    """The service did not answer on its status port.

    Check that it runs, and check --host and --port.
    """


class AddressUnknown(CacheServiceError):
    """The configuration does not lead to the service.

    The message names the problem, and an option to use instead.
    """


class Refused(CacheServiceError):
    """The service answered a command on its status port with an error.

    The message repeats the error.
    """


class InspectionFailed(CacheServiceError):
    """`cacheservice check --db` could not reach the database.

    Fix the problem that the message names and run it again.
    """


class DemoFailed(CacheServiceError):
    """The demo could not start. The message names the obstacle."""


def let_go(error: BaseException | None) -> None:
    """Clear the frames of the traceback of `error` and its causes.

    Errors of sessions and Deferreds form reference cycles with these frames. Without this function, the snapshot that a
    failed read started from would stay in memory after its replacement until the next garbage collection.

    An error that was merely being handled when this one was raised is only detached: a coroutine that handled it may be
    waiting now, and clearing its frame would end it (before Python 3.13).
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        if error.__context__ is not error.__cause__:
            error.__context__ = None
        error = error.__cause__
