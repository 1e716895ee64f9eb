"""Reads the facts of another process from its JSON, which `json` has rendered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime

from cacheservice.views.facts import (
    Attempt,
    Capture,
    Change,
    ConnectionCap,
    Database,
    Dataset,
    Facts,
    Fleet,
    Held,
    Lag,
    Progress,
    Rejection,
    Service,
    Worker,
)


def facts(line: str, at: datetime) -> Facts:
    """Return the facts of a line, as of `at`.

    :raises ValueError: if the line is not the status of a cacheservice.
    """
    everything = Members(json.loads(line))
    datasets = {name: _dataset(name, each) for name, each in everything.required("datasets").each()}
    return Facts(at, _service(everything.required("service")), _database(everything.required("postgres")), datasets)


class Members:
    """The members of a JSON object, by type.

    A missing member counts as null, because older versions of the service lack some.

    :raises ValueError: if the value, or a member that is asked for, is of another type.
    """

    def __init__(self, value: object) -> None:
        if not isinstance(value, dict):
            raise ValueError("not an object")
        self._members: dict[str, object] = value

    def each(self) -> Iterator[tuple[str, Members]]:
        """Yield all members, which must be objects, with their names."""
        for name, value in self._members.items():
            yield name, Members(value)

    def names(self) -> Iterator[str]:
        yield from self._members

    def members(self, name: str) -> Members | None:
        value = self._members.get(name)
        return None if value is None else Members(value)

    def list_of_members(self, name: str) -> list[Members]:
        value = self._members.get(name)
        return [Members(each) for each in value] if isinstance(value, list) else []

    def required(self, name: str) -> Members:
        return Members(self._members.get(name))

    def text(self, name: str) -> str | None:
        value = self._members.get(name)
        if value is None or isinstance(value, str):
            return value
        raise ValueError(f"{name} is not text")

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._members.get(name)
        return tuple(map(str, value)) if isinstance(value, list) else ()

    def number(self, name: str) -> float | None:
        value = self._members.get(name)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        raise ValueError(f"{name} is not a number")

    def count(self, name: str) -> int | None:
        value = self.number(name)
        return None if value is None else int(value)

    def flag(self, name: str) -> bool:
        return bool(self._members.get(name))

    def moment(self, name: str) -> datetime | None:
        value = self.text(name)
        return None if value is None else datetime.fromisoformat(value)


def _service(found: Members) -> Service:
    version, ready = found.text("version"), found.flag("ready")
    if version is None:
        raise ValueError("the service has no version")
    cap, rejection, not_ready = map(found.members, ("connection_cap", "configuration_rejected", "not_ready"))
    return Service(
        version=version,
        ready=ready,
        pid=found.count("pid") or 0,
        uptime_s=found.number("uptime_s") or 0.0,
        not_ready={} if not_ready is None else {name: not_ready.text(name) or "" for name in not_ready.names()},
        connection_cap=None
        if cap is None
        else ConnectionCap(cap.count("limit") or 0, cap.count("configured") or 0, cap.count("open_files") or 0),
        rejection=None
        if rejection is None
        else Rejection(rejection.text("problem") or "", rejection.number("rejected_s") or 0.0),
        workers=tuple(map(_worker, found.list_of_members("workers"))),
    )


def _worker(found: Members) -> Worker:
    connections = found.members("connections")
    return Worker(
        number=found.count("number") or 0,
        pid=found.count("pid"),
        state=found.text("state") or "unknown",
        connections={} if connections is None else {port: connections.count(port) or 0 for port in connections.names()},
        restarts=found.count("restarts") or 0,
        memory_bytes=found.count("memory_bytes") or 0,
    )


def _database(found: Members) -> Database:
    return Database(
        state=found.text("state") or "unknown",
        error=found.text("error"),
        connections=found.count("connections") or 0,
        listening=found.flag("listening"),
        listening_wanted=found.flag("listening_wanted"),
        listening_problem=found.text("listening_problem"),
        standby=_lag(found.members("standby")),
        recorded_changes=found.count("recorded_changes"),
        oldest_change_s=found.number("oldest_recorded_change_s"),
        prune_problem=found.text("prune_problem"),
        capture=_capture(found.members("capture")),
    )


def _capture(found: Members | None) -> Capture | None:
    if found is None:
        return None
    restarts = found.members("restarts")
    return Capture(
        state=found.text("state") or "unknown",
        problem=found.text("problem"),
        slot=found.text("slot"),
        lag_bytes=found.count("lag_bytes") or 0,
        lag_s=found.number("lag_s") or 0.0,
        retained_bytes=found.count("retained_bytes"),
        limit_bytes=found.count("limit_bytes"),
        kept_keys=found.count("kept_keys") or 0,
        kept_bytes=found.count("kept_bytes") or 0,
        transactions=found.count("transactions") or 0,
        keys=found.count("keys") or 0,
        restarts={} if restarts is None else {reason: restarts.count(reason) or 0 for reason in restarts.names()},
    )


def _dataset(name: str, found: Members) -> Dataset:
    return Dataset(
        name=name,
        state=found.text("state") or "unknown",
        interval_s=found.number("interval_s") or 0.0,
        timeout_s=found.number("timeout_s") or 0.0,
        max_age_s=found.number("max_age_s") or 0.0,
        refreshing=found.flag("refreshing"),
        held=_held(found.members("held")),
        pinned=found.flag("pinned"),
        rows=found.count("rows") or 0,
        bytes=found.count("bytes") or 0,
        generation=found.count("generation") or 0,
        as_of=found.moment("as_of"),
        age_s=found.number("age_s"),
        age_uncertain=found.text("age_uncertain"),
        source=found.text("source"),
        progress=_progress(found.members("progress")),
        consecutive_failures=found.count("consecutive_failures") or 0,
        next_refresh_in_s=found.number("next_refresh_in_s"),
        last_attempt=_attempt(found.members("last_attempt")),
        last_change=_change(found.members("last_change")),
        standby=_lag(found.members("standby")),
        save_problem=found.text("save_problem"),
        without_deltas_s=found.number("without_deltas_s"),
        capture=found.text("capture"),
        not_logical=found.text("not_logical"),
        fleet=_fleet(found.members("cluster")),
    )


def _fleet(found: Members | None) -> Fleet | None:
    if found is None:
        return None
    return Fleet(
        role=found.text("role") or "unknown",
        process=found.text("process") or "",
        epoch=found.count("epoch"),
        leader=found.text("leader"),
        lag_generations=found.count("lag_generations"),
        leader_silent_s=found.number("leader_silent_s") or 0.0,
        valkey_problem=found.text("valkey_problem"),
        publish_problem=found.text("publish_problem"),
        lead_problem=found.text("lead_problem"),
    )


def _held(found: Members | None) -> Held | None:
    since = None if found is None else found.moment("since")
    if found is None or since is None:
        return None
    return Held(found.text("reason") or "", since, found.count("rows") or 0)


def _progress(found: Members | None) -> Progress | None:
    return None if found is None else Progress(found.count("rows") or 0, found.count("expected_rows"))


def _attempt(found: Members | None) -> Attempt | None:
    started_at = None if found is None else found.moment("started_at")
    if found is None or started_at is None:
        return None
    return Attempt(
        outcome=found.text("outcome") or "unknown",
        trigger=found.text("trigger") or "unknown",
        started_at=started_at,
        took_s=found.number("took_s") or 0.0,
        rows=found.count("rows"),
        error=found.text("error"),
        advice=found.text("advice"),
        blocked_by=found.texts("blocked_by"),
    )


def _change(found: Members | None) -> Change | None:
    if found is None:
        return None
    return Change(found.count("added") or 0, found.count("changed") or 0, found.count("removed") or 0)


def _lag(found: Members | None) -> Lag | None:
    if found is None:
        return None
    return Lag(found.number("lag_s") or 0.0, found.flag("known"), found.text("problem") or "")
