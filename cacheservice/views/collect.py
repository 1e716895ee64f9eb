"""Takes the facts from the cache: the one place where an operator's view reads live objects."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import UTC, datetime

from cacheservice import __version__
from cacheservice.base.text import in_short
from cacheservice.cache import dataset as live
from cacheservice.cache import history
from cacheservice.cache.cache import Cache
from cacheservice.cache.capture import CapturedBy, CaptureStatus, captured_by
from cacheservice.cache.lag import Lag
from cacheservice.cache.workers import WorkerStatus
from cacheservice.views import facts
from cacheservice.views.facts import Attempt, Database, Dataset, Details, Facts, Held, Point, Progress, Service


def everything(cache: Cache) -> Facts:
    """Return all that the renderers of the whole service need."""
    datasets = {name: dataset(each) for name, each in cache.datasets.items()}
    return Facts(datetime.now(UTC), service(cache), database(cache), datasets)


def service(cache: Cache) -> Service:
    """Return the facts about the process."""
    cap, file = cache.connection_cap, cache.config_file
    return Service(
        version=__version__,
        ready=cache.is_ready,
        pid=os.getpid(),
        uptime_s=cache.now() - cache.started_at,
        not_ready={name: str(state) for name, state in cache.not_ready().items()},
        connection_cap=None if cap is None else facts.ConnectionCap(cap.limit, cap.configured, cap.open_files),
        rejection=rejection(cache),
        stopping=cache.stopping,
        configured_at=None if file is None else file.modified_at,
        workers=tuple(map(_worker, cache.workers())),
    )


def rejection(cache: Cache) -> facts.Rejection | None:
    """Return the newer configuration that was refused, if any."""
    refused = cache.rejection
    return None if refused is None else facts.Rejection(in_short(refused.problems), cache.now() - refused.at)


def database(cache: Cache) -> Database:
    """Return the facts about PostgreSQL."""
    status = cache.database
    proven_at = status.listening_proven_at
    return Database(
        state=status.state,
        error=status.error,
        connections=status.connections,
        listening=status.listening,
        listening_wanted=status.listening_wanted,
        listening_problem=status.listening_problem,
        listening_proven_s=None if proven_at is None else cache.now() - proven_at,
        standby=_lag(status.lag) if status.server is not None and status.server.in_recovery else None,
        recorded_changes=status.recorded_changes,
        oldest_change_s=status.oldest_change_s,
        prune_problem=status.prune_problem,
        capture=_capture(status.capture),
    )


def _capture(source: CaptureStatus) -> facts.Capture | None:
    if source.state == "off":
        return None
    return facts.Capture(
        state=source.state,
        problem=source.problem,
        slot=source.slot,
        lag_bytes=source.lag_bytes,
        lag_s=source.lag_s,
        retained_bytes=source.retained_bytes,
        limit_bytes=source.limit_bytes,
        kept_keys=source.kept_keys,
        kept_bytes=source.kept_bytes,
        transactions=source.transactions,
        keys=source.keys,
        restarts=dict(source.restarts),
    )


def dataset(source: live.Dataset) -> Dataset:
    """Return the facts about one dataset."""
    snapshot, settings, held = source.snapshot, source.settings, source.held
    change, progress = snapshot.change if snapshot else None, source.refresh.progress
    captured = _captured(source)
    return Dataset(
        name=source.name,
        state=str(source.state()),
        interval_s=settings.interval_s,
        timeout_s=settings.timeout_s,
        max_age_s=settings.max_age_s,
        refreshing=source.refresh.is_running,
        held=None if held is None else Held(held.reason, held.since, held.rows),
        pinned=source.pinned,
        rows=snapshot.rows.count if snapshot else 0,
        bytes=snapshot.rows.size_bytes if snapshot else 0,
        generation=snapshot.generation if snapshot else 0,
        as_of=snapshot.as_of if snapshot else None,
        age_s=source.age_s(),
        age_uncertain=snapshot.age_uncertain if snapshot else None,
        source=snapshot.source if snapshot else None,
        progress=None if progress is None else Progress(progress.rows.count, progress.expected),
        consecutive_failures=source.consecutive_failures,
        next_refresh_in_s=source.next_refresh_in_s(),
        last_attempt=_attempt(source.attempts[-1]) if source.attempts else None,
        last_change=None if change is None else facts.Change(change.added, change.changed, change.removed),
        standby=_lag(snapshot.lag) if snapshot and snapshot.lag.problem else None,
        save_problem=source.save_problem,
        without_deltas_s=source.without_deltas_s(),
        capture=None if captured is None else captured.way,
        not_logical=None if captured is None else captured.not_logical,
        behind_s=source.behind_s(),
        fleet=_fleet(source),
    )


def details(source: live.Dataset, cache: Cache) -> Details:
    """Return all that may be shown of one dataset."""
    snapshot, held, ended_at = source.snapshot, source.held, source.last_ended_at
    without = source.refresh.without_deltas
    return Details(
        dataset=dataset(source),
        settings=source.settings,
        attempts=tuple(map(_attempt, source.attempts)),
        last_ended_s=None if ended_at is None else cache.now() - ended_at,
        held_for_s=0.0 if held is None else (datetime.now(UTC) - held.since).total_seconds(),
        candidate_rows=None if source.candidate is None else source.candidate.rows.count,
        rolled_back_to=snapshot.rolled_back_to if snapshot else None,
        redefined=source.redefined,
        accepts_next=source.accepts_next,
        missed_ticks=source.counts.missed_ticks,
        last_put_off_s=source.refresh.put_off_s,
        without_deltas_because=None if without is None else without.because,
        differences=source.counts.differences,
    )


def point(source: history.Point, now: float) -> Point:
    """Return a point of the last hour; `now` is on the monotonic clock, in seconds."""
    return Point(source.slot, now - source.ended_at, source.took_s, source.age_s, source.outcome)


def points(sources: Iterable[history.Point], now: float) -> list[Point]:
    """Return the points of the last hour, the oldest first."""
    return [point(each, now) for each in sources]


def _captured(source: live.Dataset) -> CapturedBy | None:
    state = source.watch_state()
    return None if state is None else captured_by(state)


def _fleet(source: live.Dataset) -> facts.Fleet | None:
    status = source.fleet
    if status is None:
        return None
    return facts.Fleet(
        role=status.role,
        process=status.process,
        epoch=status.epoch,
        leader=status.leader,
        lag_generations=status.lag,
        leader_silent_s=source.silent_s() or 0.0,
        valkey_problem=status.valkey_problem,
        publish_problem=status.publish_problem,
        lead_problem=status.lead_problem,
    )


def _worker(source: WorkerStatus) -> facts.Worker:
    return facts.Worker(
        number=source.number,
        pid=source.pid,
        state=source.state,
        connections=dict(source.connections),
        restarts=source.restarts,
        memory_bytes=source.memory_bytes,
    )


def _lag(lag: Lag) -> facts.Lag:
    return facts.Lag(lag.seconds, lag.known, lag.problem)


def _attempt(attempt: history.Attempt) -> Attempt:
    return Attempt(
        outcome=attempt.outcome,
        trigger=attempt.trigger,
        started_at=attempt.started_at,
        took_s=attempt.took_s,
        rows=attempt.rows,
        error=attempt.error,
        advice=attempt.advice,
        blocked_by=tuple(map(str, attempt.blockers)),
        id=attempt.id,
        how=attempt.how,
    )
