"""Every error this package raises on purpose, as one small tree.

A message says what happened, to which dataset or setting, and what to do; it never
holds a password, a DSN or a row. The class tells a program what kind of thing it was.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime


class CacheServiceError(Exception):
    """The base of the tree; never raised itself."""


class ConfigError(CacheServiceError):
    """The configuration has problems. Mend each line of `problems`, then start again.

    `problems` are whole lines such as
    ``cacheservice.toml: datasets.products.interval_s: must be greater than 0``.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class PortUnavailable(CacheServiceError):
    """A port cannot be listened on at start. Free it, or set another in the configuration."""


class UnknownDataset(CacheServiceError):
    """A reader or an operator named a dataset that the configuration does not declare."""


class NothingToPin(CacheServiceError):
    """An operator wanted to pin a dataset that has not been loaded. Wait for its first load."""


class NothingToRollBackTo(CacheServiceError):
    """There is no saved generation to go back to. Set persistence.directory and let some be saved."""


class Stopped(CacheServiceError):
    """The service is stopping; what was asked for will not happen. Ask again when it runs."""


class RefreshFailed(CacheServiceError):
    """One attempt to refresh a dataset failed; what readers see did not change.

    The refresh is tried again by itself. `advice` says what an operator can do.
    """

    advice = "nothing to do: it is tried again by itself"


class DatabaseUnavailable(RefreshFailed):
    """PostgreSQL cannot be reached, refuses the session, or the session broke.

    Look at the server and the network between; the service reconnects by itself.
    """

    advice = "check that PostgreSQL runs and can be reached from here"


class DeadlineExceeded(DatabaseUnavailable):
    """PostgreSQL did not answer before the deadline and the session was abandoned.

    Look for a frozen or overloaded server, a lost network path, or raise timeout_s.
    """

    advice = "look for a frozen or overloaded server or a lost network path; or raise timeout_s"


class NoSessionLeft(DatabaseUnavailable):
    """PostgreSQL has no connection left for the role, for the database or at all (SQLSTATE 53300).

    Raise the limit that the message names, or end other sessions.
    """

    advice = "raise the limit that the message names, or end other sessions"


class LoginRefused(DatabaseUnavailable):
    """PostgreSQL, or a pooler in front of it, refused the role or its password (SQLSTATE 28P01, 28000).

    Check the user, its password and pg_hba.conf. A secret that was rotated in its file is read again by itself.
    """

    advice = "check the user, its password and pg_hba.conf"


class ServerTooOld(DatabaseUnavailable):
    """The server is older than PostgreSQL 14. The session is ended before anything is sent to it."""

    advice = "upgrade the server, or read from another"


class NotHeard(DatabaseUnavailable):
    """A session listens, and a notification that was sent to prove it did not arrive; the session was abandoned.

    Nothing to do if it ends by itself; else look at what is between here and the server.
    """

    advice = "connect to the server itself, not through a proxy that pools transactions"


class QueryFailed(RefreshFailed):
    """PostgreSQL answered the dataset's query with an error. Mend the query, the rights or the schema.

    `sqlstate` is the five-character code of the PostgreSQL manual, appendix A.
    """

    advice = "correct the query, or what it reads"

    def __init__(self, message: str, sqlstate: str = "", advice: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        if advice is not None:
            self.advice = advice


class QueryTimeout(QueryFailed):
    """PostgreSQL ended the query because it took longer than the deadline left to it.

    Make the query cheaper, or raise timeout_s.
    """

    advice = "make the query cheaper, or raise timeout_s"


@dataclass(frozen=True, slots=True)
class Blocker:
    """A session that kept a refresh waiting for a lock, as the database told it at that time.

    What the role may not see is None.
    """

    pid: int
    user: str | None
    application: str | None
    lock_mode: str | None
    relation: str | None
    transaction_since: datetime | None
    state: str | None
    statement_kind: str | None


class LockTimeout(QueryFailed):
    """The query waited for a lock for as long as its deadline allowed.

    `blockers` are the sessions that held it, asked for while it still waited; end or wait for them.
    """

    advice = "end the session that holds the lock, or wait for it"

    def __init__(self, message: str, sqlstate: str = "", blockers: Sequence[Blocker] = ()) -> None:
        super().__init__(message, sqlstate)
        self.blockers = tuple(blockers)


class StandbyConflict(QueryFailed):
    """A standby ended the query, because what it read stood in the way of changes that the primary had sent.

    Set hot_standby_feedback on the standby, or let it wait longer with max_standby_streaming_delay.
    """

    advice = (
        "set hot_standby_feedback = on on the standby, or a larger max_standby_streaming_delay; "
        "or make the query shorter, or read from the primary"
    )


class SerializationFailed(QueryFailed):
    """PostgreSQL could not give the query a view of its own beside concurrent changes. Only a new try helps."""

    advice = "nothing to do unless it repeats: the database asks for a retry, which comes by itself"


class Deadlock(QueryFailed):
    """The query and another session waited for each other's locks, and PostgreSQL ended the query.

    A plain SELECT hardly does: look for a function that locks, and for what locks the same in another order.
    """

    advice = (
        "nothing to do unless it repeats: then look in the server's log for the other session, "
        "which takes the same locks in another order"
    )


class BadResult(RefreshFailed):
    """The query ran, but its result cannot be a snapshot: a NULL key, a key twice, a key too long.

    Mend the query or the key setting; the message names the key.
    """

    advice = "correct the query or its key"


class ResultTooLarge(BadResult):
    """The result passed max_rows or max_bytes. Raise the limit, or select less."""

    advice = "select less, or raise the limit"


class SnapshotRejected(CacheServiceError):
    """A saved snapshot is damaged, of an unknown format, or of another dataset, query or key.

    Nothing of it is served. Its file is moved aside; delete it, or keep it to find out what happened to it.
    """


class OfAnotherDatabase(SnapshotRejected):
    """A saved snapshot was read from another database, or by another role. It is not served here, and stays on disk."""


class UnknownGeneration(CacheServiceError):
    """That generation of the dataset is not on disk. The ones that are, are told beside it."""


class MigrationFailed(CacheServiceError):
    """`cacheservice migrate` could not reach the database or was refused. Mend what the message says
    and run it again.
    """


class WatchFailed(CacheServiceError):
    """`cacheservice watch` or `unwatch` could not reach the database, or was refused. The message says what to do."""


class NoAnswer(CacheServiceError):
    """A service was asked over its status port and did not answer. See that it runs, and --host and --port."""


class AddressUnknown(CacheServiceError):
    """A command cannot find the service, because of the configuration. The message names the problem and an option."""


class Refused(CacheServiceError):
    """A service answered a question over its status port with an error, which the message repeats."""


class InspectionFailed(CacheServiceError):
    """`cacheservice check --db` could not reach the database. Mend what the message says and run it again."""


class DemoFailed(CacheServiceError):
    """The demo could not start. The message says what is in its way."""


def let_go(error: BaseException | None) -> None:
    """Free what the calls that raised `error` still hold.

    Errors of sessions and Deferreds stand in cycles with those calls: without this, the snapshot that a failed read
    began from stays in memory after it was replaced, until the garbage collector comes by.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            left += [each.__cause__, each.__context__]
