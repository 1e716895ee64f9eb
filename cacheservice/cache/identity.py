"""Identifies the server that a snapshot was read from, and compares it with the present server.

Transaction numbers, probes and recorded changes mean something only on the server that they came from: a restart, a
crash or a failover may lose transactions whose numbers are then assigned again, and another database may have a probe
of the same value.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """One life of one PostgreSQL server, and the database and role of the session.

    :param started_us: start of the postmaster, in microseconds since 1970; None if the server did not report it.
    :param counted_since_us: reset of the background writer's statistics, which a crash causes as well, although the
        postmaster lives on; None if it was not asked for.
    :param timeline: of a primary the present one. A standby follows a new one without losing what it has replayed.
    :param system_identifier: of the cluster, primary and standbys alike; None if the role may not read it.
    """

    database: str
    database_oid: int
    role: str
    in_recovery: bool
    started_us: int | None
    counted_since_us: int | None = None
    timeline: int | None = None
    system_identifier: str | None = None


def why_another(before: ServerIdentity | None, now: ServerIdentity | None) -> str | None:
    """Return why a snapshot read from `before` proves nothing about `now`; None if both are the same.

    Such a snapshot includes no transaction, satisfies no probe and is the base of no delta. The start of the postmaster
    distinguishes lives, so an unknown start is never equal. The other parts are compared if both are known: within one
    life, a part that only one read could see has not changed.
    """
    if before is None or now is None:
        return "the server that was read before is not known"
    if _differ(before.system_identifier, now.system_identifier):
        return "the last read was of another cluster"
    if (before.database_oid, before.database) != (now.database_oid, now.database):
        return f"the last read was of another database, {before.database}"
    if before.role != now.role:
        return f"the last read was by another role, {before.role}"
    if before.in_recovery and not now.in_recovery:
        return "the last read was of a standby, which was promoted since or is another server"
    if now.in_recovery and not before.in_recovery:
        return "the last read was of a primary, and this server is a standby"
    if _differ(before.timeline, now.timeline):
        return "the server follows another timeline since a failover"
    if before.started_us is None or before.started_us != now.started_us:
        return "the server was restarted, and could have lost what had been read"
    if _differ(before.counted_since_us, now.counted_since_us):
        return "the server crashed or its statistics were reset, and it could have lost what had been read"
    return None


def why_elsewhere(before: ServerIdentity | None, now: ServerIdentity | None) -> str | None:
    """Return why a snapshot must not be served here; None if it may be.

    It must be of the same database and role. A restart, a promotion or a failover to a standby does not change these.
    """
    if before is None or now is None:
        return None
    if _differ(before.system_identifier, now.system_identifier):
        return f"it is of another cluster, {before.system_identifier}; here is {now.system_identifier}"
    if (before.database_oid, before.database) != (now.database_oid, now.database):
        return (
            f"it is of another database, {before.database} (oid {before.database_oid}); "
            f"here is {now.database} (oid {now.database_oid})"
        )
    if before.role != now.role:
        return f"it is of another role, {before.role}; here is {now.role}"
    return None


def _differ(before: str | int | None, now: str | int | None) -> bool:
    return before is not None and now is not None and before != now


@dataclass(frozen=True, slots=True)
class Visibility:
    """The transactions that a snapshot of the database includes.

    PostgreSQL manual, 9.28.2: every transaction before xmin has ended, none from xmax on has, and between them the
    listed ones have not. In recovery none are listed, so that only transactions before xmin are known to have ended.

    :param in_progress: the listed ones; None in recovery.
    """

    xmin: int
    xmax: int
    in_progress: frozenset[int] | None

    @staticmethod
    def of(database_snapshot: str, *, in_recovery: bool) -> Visibility:
        """Return the meaning of a snapshot, as `pg_current_snapshot()` writes it (xmin:xmax:xip,…)."""
        xmin, xmax, listed = database_snapshot.split(":")
        in_progress = None if in_recovery else frozenset(map(int, filter(None, listed.split(","))))
        return Visibility(int(xmin), int(xmax), in_progress)

    def includes(self, transaction_id: int) -> bool:
        """Return whether a committed transaction is visible."""
        if transaction_id < self.xmin:
            return True
        if self.in_progress is None or transaction_id >= self.xmax:
            return False
        return transaction_id not in self.in_progress


def is_visible(transaction_id: int, database_snapshot: str, *, in_recovery: bool = False) -> bool:
    """Return whether a snapshot includes a committed transaction; see `Visibility`."""
    return Visibility.of(database_snapshot, in_recovery=in_recovery).includes(transaction_id)
