"""The plans of the refreshes, which the main process sends to its workers.

The ports of a worker need the time of the next refresh for ``Retry-After``, the end of the last attempt to distinguish
`LOADING` from `NOTLOADED`, and the server that was read last for `CACHE.WAIT`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, cast

from cacheservice.base.interfaces import Clock, DelayedCall
from cacheservice.base.timers import is_active
from cacheservice.cache.cache import Cache
from cacheservice.cache.events import Added, AttemptEnded, Changed, Event, Noted, Published, Renewed
from cacheservice.cache.identity import ServerIdentity
from cacheservice.replication.link import Link
from cacheservice.replication.messages import Plain

Plan = tuple[float | None, float | None]
"""When the next attempt is planned, and when the last one ended, on the monotonic clock; None for neither."""

_KINDS = (Added, Changed, Noted, AttemptEnded, Published, Renewed)


class PlanSender:
    """Sends one worker the plans of all datasets, and then those that change, once in each turn of the reactor.

    The server is sent before a snapshot that was read from it, if `start` is called before that of the snapshots.

    :param clock: `IReactorTime`.
    """

    def __init__(self, cache: Cache, link: Link, clock: Clock) -> None:
        self._cache = cache
        self._link = link
        self._clock = clock
        self._server: ServerIdentity | None = None
        self._changed: set[str] = set()
        self._turn: DelayedCall | None = None
        self._unsubscribe = cache.events.subscribe(self._note, *_KINDS)

    def start(self) -> None:
        """Send everything."""
        self._send_server()
        self._changed = set(self._cache.datasets)
        self._send()

    def stop(self) -> None:
        self._unsubscribe()
        if is_active(self._turn):
            self._turn.cancel()

    def _note(self, event: Event) -> None:
        if self._cache.database.server is not self._server:
            self._send_server()
        self._changed.add(event.dataset)
        if self._turn is None:
            self._turn = self._clock.callLater(0, self._send)

    def _send_server(self) -> None:
        self._server = server = self._cache.database.server
        self._link.send("server", identity=None if server is None else asdict(server))

    def _send(self) -> None:
        self._turn = None
        changed, self._changed = self._changed, set()
        datasets = self._cache.datasets
        plans: dict[str, Plain] = {
            name: [datasets[name].refresh.next_at, datasets[name].last_ended_at] for name in changed if name in datasets
        }
        self._link.send("plans", plans=plans)


def follow_plans(cache: Cache, link: Link) -> None:
    """Note in the cache of a worker what the main process sends of its plans."""

    def take_server(identity: Plain) -> None:
        database = cache.database
        server = None if identity is None else ServerIdentity(**cast("dict[str, Any]", identity))
        database.seen(server, database.lag)

    # Those of datasets that the worker does not know yet, because changed settings are applied after earlier snapshots.
    early: dict[str, Plan] = {}

    def take_plans(plans: Mapping[str, Plan]) -> None:
        for name, plan in plans.items():
            if name in cache.datasets:
                note(name, plan)
            else:
                early[name] = plan

    def note(name: str, plan: Plan) -> None:
        dataset, (next_at, ended_at) = cache.dataset(name), plan
        dataset.note_refresh(replace(dataset.refresh, next_at=next_at))
        if ended_at is not None:
            dataset.attempted_elsewhere(ended_at)

    def added(event: Event) -> None:
        plan = early.pop(event.dataset, None)
        if plan is not None:
            note(event.dataset, plan)

    cache.events.subscribe(added, Added)

    link.handle("server", take_server)
    link.handle("plans", take_plans)
