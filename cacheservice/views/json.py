"""Renders facts as the `json` object of docs/status-port.md; `parse` reads them from it.

Ages and durations are in seconds, sizes in bytes, times in ISO 8601.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from cacheservice.base.interfaces import Json
from cacheservice.base.text import iso, seconds
from cacheservice.views.facts import Attempt, Capture, Database, Dataset, Facts, Fleet, Lag, Point, Service, Worker

Object = dict[str, Json]


def line(facts: Facts) -> str:
    """Return the whole status as one line."""
    return _packed(
        {
            "service": service(facts.service),
            "postgres": database(facts.database),
            "datasets": {name: dataset(each) for name, each in facts.datasets.items()},
        }
    )


def only_datasets(line: str, names: Collection[str]) -> str:
    """Return a line with the named datasets only; with all of them without names.

    All members stay, also those of another version of the service.
    """
    if not names:
        return line
    everything = json.loads(line)
    return _packed(everything | {"datasets": {name: everything["datasets"][name] for name in names}})


def _packed(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def service(facts: Service) -> Object:
    """Return the service's part."""
    cap, rejection = facts.connection_cap, facts.rejection
    workers: Object = {"workers": [worker(each) for each in facts.workers]} if facts.workers else {}
    common: Object = {
        "version": facts.version,
        "pid": facts.pid,
        "uptime_s": seconds(facts.uptime_s),
        "ready": facts.ready,
        "not_ready": dict(facts.not_ready),
        "connection_cap": None
        if cap is None
        else {"limit": cap.limit, "configured": cap.configured, "open_files": cap.open_files},
        "configuration_rejected": None
        if rejection is None
        else {"problem": rejection.problem, "rejected_s": seconds(rejection.ago_s)},
    }
    return common | workers


def worker(facts: Worker) -> Object:
    """Return a worker's part."""
    return {
        "number": facts.number,
        "pid": facts.pid,
        "state": facts.state,
        "connections": dict(facts.connections),
        "restarts": facts.restarts,
        "memory_bytes": facts.memory_bytes,
    }


def database(facts: Database) -> Object:
    """Return the database's part."""
    return {
        "state": facts.state,
        "error": facts.error,
        "connections": facts.connections,
        "listening": facts.listening,
        "listening_wanted": facts.listening_wanted,
        "listening_problem": facts.listening_problem,
        "standby": _lag(facts.standby),
        "recorded_changes": facts.recorded_changes,
        "oldest_recorded_change_s": _optional_seconds(facts.oldest_change_s),
        "prune_problem": facts.prune_problem,
        "capture": None if facts.capture is None else capture(facts.capture),
    }


def capture(facts: Capture) -> Object:
    """Return the part about the stream of changes."""
    return {
        "state": facts.state,
        "problem": facts.problem,
        "slot": facts.slot,
        "lag_bytes": facts.lag_bytes,
        "lag_s": seconds(facts.lag_s),
        "retained_bytes": facts.retained_bytes,
        "limit_bytes": facts.limit_bytes,
        "kept_keys": facts.kept_keys,
        "kept_bytes": facts.kept_bytes,
        "transactions": facts.transactions,
        "keys": facts.keys,
        "restarts": dict(facts.restarts),
    }


def dataset(facts: Dataset) -> Object:
    """Return a dataset's part."""
    held, progress, change = facts.held, facts.progress, facts.last_change
    common: Object = {
        "state": facts.state,
        "refreshing": facts.refreshing,
        "held": None if held is None else {"reason": held.reason, "since": iso(held.since), "rows": held.rows},
        "pinned": facts.pinned,
        "rows": facts.rows,
        "bytes": facts.bytes,
        "generation": facts.generation,
        "as_of": None if facts.as_of is None else iso(facts.as_of),
        "age_s": _optional_seconds(facts.age_s),
        "age_uncertain": facts.age_uncertain,
        "interval_s": facts.interval_s,
        "timeout_s": facts.timeout_s,
        "max_age_s": facts.max_age_s,
        "source": facts.source,
        "progress": None if progress is None else {"rows": progress.rows, "expected_rows": progress.expected_rows},
        "consecutive_failures": facts.consecutive_failures,
        "next_refresh_in_s": _optional_seconds(facts.next_refresh_in_s),
        "last_attempt": None if facts.last_attempt is None else attempt(facts.last_attempt),
        "last_change": None
        if change is None
        else {"added": change.added, "changed": change.changed, "removed": change.removed},
        "standby": _lag(facts.standby),
        "save_problem": facts.save_problem,
        "without_deltas_s": _optional_seconds(facts.without_deltas_s),
        "capture": facts.capture,
        "not_logical": facts.not_logical,
    }
    return common if facts.fleet is None else common | {"cluster": fleet(facts.fleet)}


def fleet(facts: Fleet) -> Object:
    """Return the part of a dataset about the fleet."""
    return {
        "role": facts.role,
        "process": facts.process,
        "epoch": facts.epoch,
        "leader": facts.leader,
        "lag_generations": facts.lag_generations,
        "leader_silent_s": seconds(facts.leader_silent_s),
        "valkey_problem": facts.valkey_problem,
        "publish_problem": facts.publish_problem,
        "lead_problem": facts.lead_problem,
    }


def attempt(facts: Attempt) -> Object:
    """Return an attempt's part."""
    return {
        "outcome": facts.outcome,
        "trigger": facts.trigger,
        "started_at": iso(facts.started_at),
        "took_s": seconds(facts.took_s),
        "rows": facts.rows,
        "error": facts.error,
        "advice": facts.advice,
        "blocked_by": list(facts.blocked_by),
    }


def point(facts: Point) -> Object:
    """Return a point of the last hour."""
    return {
        "slot": facts.slot,
        "ago_s": seconds(facts.ago_s),
        "took_s": seconds(facts.took_s),
        "age_s": _optional_seconds(facts.age_s),
        "outcome": facts.outcome,
    }


def hour(points: Sequence[Point]) -> Object:
    """Return the points of the last hour as one list for each field."""
    objects = [point(each) for each in points]
    return {field: [each[field] for each in objects] for field in ("slot", "ago_s", "took_s", "age_s", "outcome")}


def _lag(lag: Lag | None) -> Object | None:
    return None if lag is None else {"lag_s": seconds(lag.seconds), "known": lag.known, "problem": lag.problem}


def _optional_seconds(value: float | None) -> float | None:
    return None if value is None else seconds(value)
