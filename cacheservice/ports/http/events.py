"""The server-sent events of the dashboard.

The first event has the whole state, later ones its changes. The data of an event are the `json` object of
docs/status-port.md with more fields for each dataset, but only for the datasets that have changed. `names` lists all
datasets in order, and is present if it has changed. Ages are as of `told_at_s`, on the clock of `service.uptime_s`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from twisted.internet.defer import Deferred

from cacheservice.base.interfaces import Clock, DelayedCall, Json
from cacheservice.base.text import in_short, seconds
from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset, State
from cacheservice.cache.events import Added, AttemptEnded, Changed, Ended, Event, Noted, Published, Renewed
from cacheservice.ports.http.bodies import Piece, cut
from cacheservice.views import collect
from cacheservice.views import json as as_json

PERIOD_S = 1.0
"""The time between two scans of the datasets, so that a client gets at most one event in it."""
HEARTBEAT_S = 10.0
"""After this time without an event, an event without changes shows that the connection is alive."""
RETRY_MS = 2000
TURN_S = 0.002
"""The longest turn of a scan. 500 datasets take 1 ms if none has changed, and 17 ms in nine turns if all have
(measured)."""

_KINDS = (Published, Renewed, Noted, AttemptEnded, Added, Changed, Ended)


class _Described(NamedTuple):
    """The last description of one dataset.

    It has the version of the state, what may change without an event, and the JSON member.
    """

    version: int
    drifting: tuple[State, int | None]
    member: bytes


class Feed:
    """Sends all listeners the same bytes, rendered once.

    A slow listener gets all changes since its last event in one event. While the feed has listeners, it notes the
    datasets of all events of the cache. Once a second it describes these datasets again, and those that have changed
    without an event because they have become stale or rows have arrived, a few in each turn of the reactor.

    :param clock: `IReactorTime`, monotonic.
    :param turn_s: how long a scan may block the reactor before it continues in the next turn.
    """

    def __init__(self, cache: Cache, clock: Clock, turn_s: float = TURN_S) -> None:
        self._cache = cache
        self._clock = clock
        self._turn_s = turn_s
        self._listeners = 0
        self._timer: DelayedCall | None = None
        self._version = 0
        self._is_current = self._has_changed = False
        self._described: dict[str, _Described] = {}
        self._names: tuple[str, ...] = ()
        self._names_version = 0
        self._rest: dict[str, Json] = {}
        self._workers: Sequence[tuple[int, str]] = ()
        self._sent_at = 0.0
        self._events: dict[int, bytes] = {}
        self._waiting: list[Deferred[None]] = []
        self._changed: set[str] = set()
        self._unsubscribe: Callable[[], None] | None = None

    def follow(self, access: str, admin: bool) -> Iterator[Piece]:
        """Yield an endless body for one listener.

        :param access: "read" or "admin": the rights of the listener's token.
        :param admin: whether a token for commands is configured.
        """
        self._listeners += 1
        if self._listeners == 1:
            self._unsubscribe = self._cache.events.subscribe(self._note, *_KINDS)
            self._described.clear()
            self._timer = self._clock.callLater(0, self._look)
        seen = 0
        try:
            hello = json.dumps({"access": access, "admin": admin}).encode()
            yield b"retry: %d\nevent: hello\ndata: %b\n\n" % (RETRY_MS, hello)
            while True:
                if self._is_current and seen < self._version:
                    event, seen = self._event(seen), self._version
                    yield from cut(event)
                else:
                    woken: Deferred[None] = Deferred()
                    self._waiting.append(woken)
                    yield woken
        finally:
            self._listeners -= 1
            if not self._listeners:
                self.stop()

    def stop(self) -> None:
        """Stop scanning; remaining listeners get no more events."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        self._is_current = False
        self._waiting.clear()
        self._events.clear()

    def _note(self, event: Event) -> None:
        self._changed.add(event.dataset)

    def _look(self) -> None:
        self._go_on(self._changes())

    def _go_on(self, changes: Iterator[None]) -> None:
        ends_at = time.perf_counter() + self._turn_s
        for _ in changes:
            if time.perf_counter() >= ends_at:
                self._timer = self._clock.callLater(0, self._go_on, changes)
                return
        self._timer = self._clock.callLater(PERIOD_S, self._look)
        now: float = self._clock.seconds()
        if self._has_changed or not self._is_current or now - self._sent_at >= HEARTBEAT_S:
            self._version += 1
            self._is_current, self._has_changed = True, False
            self._sent_at = now
            self._events.clear()
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                each.callback(None)

    def _changes(self) -> Iterator[None]:
        """Record the changes of all datasets, one dataset per step."""
        version, datasets = self._version + 1, self._cache.datasets
        changed, self._changed = self._changed, set()
        for name, dataset in datasets.items():
            described, drifting = self._described.get(name), _drifting(dataset)
            if described is None or name in changed or described.drifting != drifting:
                member = f"{json.dumps(name)}:{_packed(self._describe(dataset))}".encode()
                self._described[name] = _Described(version, drifting, member)
                self._has_changed = True
            yield
        if self._names != tuple(datasets):
            self._names, self._names_version, self._has_changed = tuple(datasets), version, True
            self._described = {name: self._described[name] for name in datasets}
        rest = _steady(self._describe_rest())
        workers = [(each.number, each.state) for each in self._cache.workers()]
        if rest != self._rest or workers != self._workers:
            self._rest, self._workers, self._has_changed = rest, workers, True

    def _event(self, seen: int) -> bytes:
        """Return the changes since the version `seen`; for version 0 the whole state."""
        event = self._events.get(seen)
        if event is None:
            event = self._events[seen] = self._make_event(seen)
        return event

    def _make_event(self, seen: int) -> bytes:
        service = as_json.service(collect.service(self._cache))
        head = _packed({"service": service, **self._describe_rest()})[:-1].encode()
        if self._names_version > seen:
            head += b',"names":' + _packed(self._names).encode()
        members = b",".join([each.member for each in self._described.values() if each.version > seen])
        # The comment lets a client check that the stream is alive without parsing events.
        return b': alive\nevent: state\ndata: %b,"datasets":{%b}}\n\n' % (head, members)

    def _describe_rest(self) -> dict[str, Json]:
        """Return the state outside datasets, without the service's own values, which change all the time."""
        rejection = self._cache.rejection
        return {
            "postgres": as_json.database(collect.database(self._cache)),
            "configuration_rejected": None if rejection is None else in_short(rejection.problems),
        }

    def _describe(self, dataset: Dataset) -> dict[str, Json]:
        now = self._cache.now()
        newest, behind_s = dataset.last_hour.newest(), dataset.behind_s()
        return as_json.dataset(collect.dataset(dataset)) | {
            "told_at_s": round(now - self._cache.started_at, 3),
            "required": dataset.settings.required,
            "group": dataset.settings.group,
            "on_expired": dataset.settings.on_expired,
            "accepts_next": dataset.accepts_next,
            "behind_s": None if behind_s is None else seconds(behind_s),
            "differences": dataset.counts.differences,
            "save_problem": dataset.save_problem,
            "newest_point": None if newest is None else as_json.point(collect.point(newest, now)),
        }


def _steady(rest: dict[str, Json]) -> dict[str, Json]:
    """Return the state outside datasets without the figures of the capture, which change with each transaction."""
    postgres = rest["postgres"]
    assert isinstance(postgres, dict), "it is an object"
    capture = postgres["capture"]
    if isinstance(capture, dict):
        capture = {name: capture[name] for name in ("state", "problem", "slot")}
    return rest | {"postgres": postgres | {"capture": capture}}


def _drifting(dataset: Dataset) -> tuple[State, int | None]:
    """Return what changes without an event: the state by the age, and the number of rows read so far."""
    progress = dataset.refresh.progress
    return dataset.state(), progress.rows.count if progress is not None else None


def _packed(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
