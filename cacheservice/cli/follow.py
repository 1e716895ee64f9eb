"""Derives the events of a service from its messages and its status, each event once.

A message of the RESP port reports one publish, and none is missed while the connection lasts. The status, polled twice
a second, shows failed and held refreshes, expired datasets, and the generations, whose numbers reveal publishes without
a message. All of this is a function of what arrives, without a socket.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from cacheservice.base.text import iso
from cacheservice.views.facts import Dataset, Facts

Value = str | int | float | None


class Event(NamedTuple):
    """An event of the service.

    :param at: its time, in UTC; by the service's clock for failed and held refreshes, else by this machine's clock.
    :param name: as in the service's log, which users know: refresh_published, refresh_failed …
    :param fields: its details; JSON values.
    """

    at: datetime
    name: str
    dataset: str | None
    fields: Mapping[str, Value]


class Follower:
    """Derives the events.

    :param names: the datasets to follow; empty for all, including those that are added later.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        self._names = names
        self._pid: int | None = None
        self._reported: dict[str, int] = {}
        """The latest generation of each dataset for which an event was created."""
        self._due: dict[str, int] = {}
        """The generation that the last poll found without a message, which may still be on its way."""
        self._attempts: dict[str, datetime] = {}
        """The start of the last attempt of each dataset."""
        self._states: dict[str, str] = {}

    def follows(self, name: str) -> bool:
        return not self._names or name in self._names

    def knows(self, name: str) -> bool:
        """Return True if the last status had a dataset with this name."""
        return name in self._reported

    def message(self, text: bytes) -> Iterator[Event]:
        """Yield the event of a publish from a message of ``cache:NAME``."""
        fields = json.loads(text)
        name, generation = fields.pop("dataset"), fields["generation"]
        reported = self._reported.get(name, _before(generation))
        if generation > reported:
            self._reported[name] = generation
            yield Event(datetime.now(UTC), "refresh_published", name, fields | _missed(reported, generation))

    def restart(self, facts: Facts) -> Iterator[Event]:
        """Yield an event if another process answers than before.

        Call it before processing messages of a new connection.
        """
        pid = facts.service.pid
        if self._pid is not None and self._pid != pid:
            # Generations restart, or continue after a warm start; the generations served now are reported.
            self._reported = {name: _before(dataset.generation) for name, dataset in facts.datasets.items()}
            self._due.clear()
            self._pid = pid
            yield Event(datetime.now(UTC), "service_restarted", None, {"pid": pid})

    def poll(self, facts: Facts, *, subscribed: bool) -> Iterator[Event]:
        """Yield the events in a status of the service.

        :param subscribed: whether messages report publishes; otherwise they are derived from the status.
        """
        first = self._pid is None
        self._pid = facts.service.pid
        for name, dataset in facts.datasets.items():
            if not self.follows(name):
                continue
            if name not in self._reported:
                self._reported[name] = dataset.generation if first else _before(dataset.generation)
            yield from self._publishes(dataset, subscribed=subscribed)
            yield from self._attempt(dataset, quiet=first)
            yield from self._state(dataset, quiet=first)

    def _publishes(self, dataset: Dataset, *, subscribed: bool) -> Iterator[Event]:
        name, generation, reported = dataset.name, dataset.generation, self._reported[dataset.name]
        if generation <= reported:
            self._due.pop(name, None)
            return
        if subscribed and name not in self._due:
            # Its message was sent before this status, over another connection, and will have arrived at the next poll.
            self._due[name] = generation
            return
        if subscribed:
            # Messages of publishes after the last poll may still be on their way.
            generation = self._due.pop(name)
            if generation <= reported:
                return
        self._reported[name] = generation
        fields: dict[str, Value] = {"generation": generation}
        if generation == dataset.generation:
            fields["as_of"] = None if dataset.as_of is None else iso(dataset.as_of)
            if (change := dataset.last_change) is not None:
                fields |= {"added": change.added, "changed": change.changed, "removed": change.removed}
        yield Event(datetime.now(UTC), "refresh_published", name, fields | _missed(reported, generation))

    def _attempt(self, dataset: Dataset, *, quiet: bool) -> Iterator[Event]:
        last = dataset.last_attempt
        if last is None or self._attempts.get(dataset.name) == last.started_at:
            return
        self._attempts[dataset.name] = last.started_at
        if quiet or last.outcome not in ("failed", "held"):
            return
        fields = {
            "error": last.error,
            "trigger": last.trigger,
            "took_s": last.took_s,
            "consecutive_failures": dataset.consecutive_failures,
            "retry_in_s": dataset.next_refresh_in_s,
        }
        ended_at = last.started_at + timedelta(seconds=last.took_s)
        yield Event(ended_at, f"refresh_{last.outcome}", dataset.name, fields)

    def _state(self, dataset: Dataset, *, quiet: bool) -> Iterator[Event]:
        before, self._states[dataset.name] = self._states.get(dataset.name), dataset.state
        if quiet or before == dataset.state:
            return
        if dataset.state == "expired":
            fields = {"age_s": dataset.age_s, "max_age_s": dataset.max_age_s}
            yield Event(datetime.now(UTC), "dataset_expired", dataset.name, fields)
        elif before == "expired":
            yield Event(datetime.now(UTC), "dataset_recovered", dataset.name, {"age_s": dataset.age_s})


def _before(generation: int) -> int:
    """Return the previous generation; 0 before the first publish."""
    return max(0, generation - 1)


def _missed(reported: int, generation: int) -> dict[str, int]:
    """Return the number of unreported generations before this one, as a field."""
    return {"generations_before_it": generation - reported - 1} if generation - reported > 1 else {}
