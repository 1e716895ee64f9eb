"""Makes the `json` object of docs/status-port.md from the cache alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from cacheservice import __version__
from cacheservice.base.errors import Blocker
from cacheservice.cache.cache import Cache, DatabaseStatus
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.history import Attempt, Point
from cacheservice.cache.lag import Lag
from cacheservice.cache.served import Held


def describe(cache: Cache) -> dict[str, Any]:
    """Return the whole object; ages and durations are in seconds, sizes in bytes."""
    return {
        "service": describe_service(cache),
        "postgres": describe_database(cache.database),
        "datasets": {name: describe_dataset(dataset) for name, dataset in cache.datasets.items()},
    }


def describe_service(cache: Cache) -> dict[str, Any]:
    """Return the service's part of `json`."""
    not_ready = cache.not_ready()
    return {
        "version": __version__,
        "pid": os.getpid(),
        "uptime_s": seconds(cache.now() - cache.started_at),
        "ready": cache.is_ready,
        "not_ready": {name: str(state) for name, state in not_ready.items()},
        "connection_cap": cache.connection_cap._asdict() if cache.connection_cap else None,
        "configuration_rejected": None
        if (rejection := cache.rejection) is None
        else {"problem": in_short(rejection.problems), "rejected_s": seconds(cache.now() - rejection.at)},
    }


def describe_database(database: DatabaseStatus) -> dict[str, Any]:
    """Return the database's part of `json`."""
    return {
        "state": database.state,
        "error": database.error,
        "connections": database.connections,
        "listening": database.listening,
        "listening_wanted": database.listening_wanted,
        "listening_problem": database.listening_problem,
        "standby": None if database.server is None or not database.server.in_recovery else _lag(database.lag),
        "recorded_changes": database.recorded_changes,
        "oldest_recorded_change_s": None if database.oldest_change_s is None else seconds(database.oldest_change_s),
        "prune_problem": database.prune_problem,
    }


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """Return a dataset's part of `json`."""
    snapshot, settings = dataset.snapshot, dataset.settings
    return {
        "state": str(dataset.state()),
        "refreshing": dataset.refresh.is_running,
        "held": _held(dataset.held),
        "pinned": dataset.pinned,
        "rows": snapshot.rows.count if snapshot else 0,
        "bytes": snapshot.rows.size_bytes if snapshot else 0,
        "generation": snapshot.generation if snapshot else 0,
        "as_of": iso(snapshot.as_of) if snapshot else None,
        "age_s": _optional_seconds(dataset.age_s()),
        "age_uncertain": snapshot.age_uncertain if snapshot else None,
        "interval_s": settings.interval_s,
        "timeout_s": settings.timeout_s,
        "max_age_s": settings.max_age_s,
        "source": snapshot.source if snapshot else None,
        "progress": {"rows": progress.rows.count, "expected_rows": progress.expected}
        if (progress := dataset.refresh.progress)
        else None,
        "consecutive_failures": dataset.consecutive_failures,
        "next_refresh_in_s": _optional_seconds(dataset.next_refresh_in_s()),
        "last_attempt": describe_attempt(dataset.attempts[-1]) if dataset.attempts else None,
        "last_change": snapshot.change._asdict() if snapshot and snapshot.change else None,
        "standby": _lag(snapshot.lag) if snapshot and snapshot.lag.problem else None,
        "save_problem": dataset.save_problem,
        "without_deltas_s": _optional_seconds(dataset.without_deltas_s()),
    }


def _lag(lag: Lag) -> dict[str, Any]:
    return {"lag_s": seconds(lag.seconds), "known": lag.known, "problem": lag.problem}


def _held(held: Held | None) -> dict[str, Any] | None:
    return {"reason": held.reason, "since": iso(held.since), "rows": held.rows} if held else None


def describe_attempt(attempt: Attempt) -> dict[str, Any]:
    """Return an attempt's part of `json`."""
    return {
        "outcome": attempt.outcome,
        "trigger": attempt.trigger,
        "started_at": iso(attempt.started_at),
        "took_s": seconds(attempt.took_s),
        "rows": attempt.rows,
        "error": attempt.error,
    }


def describe_point(point: Point, now: float) -> dict[str, Any]:
    """Return a point of the last hour as an object; times are in seconds."""
    return {
        "slot": point.slot,
        "ago_s": seconds(now - point.ended_at),
        "took_s": seconds(point.took_s),
        "age_s": None if point.age_s is None else seconds(point.age_s),
        "outcome": point.outcome,
    }


def describe_hour(points: list[Point], now: float) -> dict[str, list[Any]]:
    """Return the points of the last hour as one list for each field."""
    described = [describe_point(point, now) for point in points]
    return {field: [each[field] for each in described] for field in ("slot", "ago_s", "took_s", "age_s", "outcome")}


def describe_blocker(blocker: Blocker) -> str:
    """Describe a session that blocks a refresh, without the parts that the role may not see."""
    words = f"session {blocker.pid}"
    if blocker.user:
        words += f" of {blocker.user}"
    if blocker.application:
        words += f" ({blocker.application})"
    if blocker.lock_mode:
        words += f" holds {blocker.lock_mode}"
        if blocker.relation:
            words += f" on {blocker.relation}"
    else:
        words += " holds the lock"
    if blocker.transaction_since:
        words += f", in a transaction since {iso(blocker.transaction_since)}"
    if blocker.state:
        words += f", {blocker.state}"
    if blocker.statement_kind:
        running = "running" if blocker.state == "active" else "last ran"
        words += f", {running} {blocker.statement_kind}"
    return words


def in_short(problems: Sequence[str]) -> str:
    """Return the first problem of a configuration, and the number of the others."""
    first, *others = problems
    return f"{first} (and {len(others)} more)" if others else first


def seconds(value: float) -> float:
    """Return a duration to the millisecond, at least 0."""
    return max(0.0, round(value, 3))


def iso(moment: datetime) -> str:
    """Return a time in ISO 8601, in UTC with a Z."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _optional_seconds(value: float | None) -> float | None:
    return None if value is None else seconds(value)
