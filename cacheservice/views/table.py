"""Renders facts as the lines of the status port: `ready`, `status` and `show`."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable

from tabulate import tabulate

from cacheservice.base.text import iso
from cacheservice.views import capture, fleet
from cacheservice.views import json as as_json
from cacheservice.views.facts import Attempt, Database, Dataset, Details, Service
from cacheservice.views.units import capped, duration, last_attempt, moment, plural, rejected, standby, worker


def ready_line(service: Service) -> str:
    """Return `ready`, or `notready` with the reasons.

    The reasons are `stopping`, `NAME:never_loaded` and `NAME:expired`.
    """
    if service.ready:
        return "ready"
    reasons = ["stopping"] if service.stopping else []
    return " ".join(["notready", *reasons, *(f"{name}:{state}" for name, state in service.not_ready.items())])


def status_table(service: Service, database: Database, datasets: Iterable[Dataset]) -> str:
    """Return a head line, then an aligned line for each dataset."""
    datasets = list(datasets)
    table = tabulate(
        [_row(dataset) for dataset in datasets],
        tablefmt="plain",
        disable_numparse=True,
        colalign=("left", "left", "left", "right"),
    )
    wrong = fleet.problems([dataset.fleet for dataset in datasets if dataset.fleet is not None])
    fleet_line = ["; ".join([*fleet.line(datasets), *wrong])]
    head = [_head(service, database, datasets), *workers_lines(service), *filter(None, fleet_line)]
    lines = [*head, *(line.rstrip() for line in table.splitlines())]
    return "\n".join(lines)


def _head(service: Service, database: Database, datasets: Collection[Dataset]) -> str:
    readiness = "stopping" if service.stopping else "ready" if service.ready else "not ready"
    parts = [
        f"cacheservice {service.version}: {readiness}",
        f"PostgreSQL {database.state}",
        f"up {duration(service.uptime_s)}",
        f"configuration of {moment(service.configured_at)}" if service.configured_at else "",
        capped(service.connection_cap) if service.connection_cap else "",
        standby(database.standby),
        _listening(database),
        capture.in_short(database.capture, datasets),
        f"configuration {rejected(service.rejection)}" if service.rejection else "",
    ]
    return ", ".join(filter(None, parts))


def workers_lines(service: Service) -> list[str]:
    """Return one line that describes the workers; no line without workers."""
    if not service.workers:
        return []
    serving = sum(each.state == "serving" for each in service.workers)
    return [f"{serving} of {plural(len(service.workers), 'worker')} serving: {'; '.join(map(worker, service.workers))}"]


def _listening(database: Database) -> str:
    if not database.listening_wanted:
        return ""
    if database.listening:
        return "listening"
    return f"NOT listening: {database.listening_problem}" if database.listening_problem else "NOT listening yet"


def _row(dataset: Dataset) -> list[str]:
    limit = duration(dataset.max_age_s)
    return [
        dataset.name,
        ", ".join([dataset.state, *(["held"] if dataset.held else []), *(["pinned"] if dataset.pinned else [])]),
        f"no age yet, limit {limit}" if dataset.age_s is None else f"age {duration(dataset.age_s)} of {limit}",
        "no rows" if dataset.as_of is None else f"{dataset.rows:,} rows",
        f"generation {dataset.generation}",
        *([fleet.cell(dataset.fleet)] if dataset.fleet else []),
        _now_and_next(dataset),
        _last(dataset),
    ]


def _now_and_next(dataset: Dataset) -> str:
    if (progress := dataset.progress) is not None:
        of = f" of {progress.expected_rows:,}" if progress.expected_rows else ""
        return f"reading, {progress.rows:,}{of} rows"
    if dataset.behind_s is not None:
        return f"waits for postgres.max_load, {duration(dataset.behind_s)} behind its interval"
    if dataset.refreshing:
        return "waiting for a connection"
    return "not planned" if dataset.next_refresh_in_s is None else f"next in {duration(dataset.next_refresh_in_s)}"


def _last(dataset: Dataset) -> str:
    parts = [
        last_attempt(dataset),
        f"age uncertain: {dataset.age_uncertain}" if dataset.age_uncertain else "",
        f"not saved: {dataset.save_problem}" if dataset.save_problem else "",
    ]
    return ", ".join(filter(None, parts))


def show(details: Details) -> str:
    """Return `field: value` lines, including the last attempts, newest first."""
    settings = details.settings
    fields = as_json.dataset(details.dataset)
    del fields["last_attempt"]
    fields |= {
        "missed_ticks": details.missed_ticks,
        "required": settings.required,
        "key": ":".join(settings.key),
        "retry_initial_s": settings.retry_initial_s,
        "retry_max_s": settings.retry_max_s,
        "jitter": settings.jitter,
        "min_rows": settings.min_rows,
        "max_shrink": settings.max_shrink,
        "on_column_removed": settings.on_column_removed,
        "notify": settings.notify,
        "probe": settings.probe,
        "watch": ", ".join(f"{watch.table} by {':'.join(watch.key)}" for watch in settings.watch),
        "max_delta": settings.max_delta,
        "full_interval_s": settings.full_interval_s,
        "delta_differences": details.differences,
        "max_rows": settings.max_rows,
        "max_bytes": settings.max_bytes,
    }
    lines = [f"dataset: {details.dataset.name}", *(f"{name}: {_value(value)}" for name, value in fields.items())]
    lines += [f"attempt: {_attempt(attempt)}" for attempt in reversed(details.attempts)]
    return "\n".join(lines)


def _value(value: object) -> str:
    if isinstance(value, str):
        return value
    return "-" if value is None else json.dumps(value)


def _attempt(attempt: Attempt) -> str:
    parts = [f"{iso(attempt.started_at)} {attempt.trigger} {attempt.outcome} in {duration(attempt.took_s)}"]
    if attempt.rows is not None:
        parts.append(f"{attempt.rows:,} rows")
    if attempt.how:
        parts.append(f"read {attempt.how}")
    if attempt.id:
        parts.append(f"id {attempt.id}")
    line = ", ".join(parts)
    return f"{line}: {attempt.error}" if attempt.error else line
