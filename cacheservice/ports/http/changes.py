"""Change streams: the rows of a dataset, and then its changes for as long as the client stays.

A stream is a loop over one question: by what does the client's generation differ from the served one? The log of the
dataset's changes answers it. If the log does not reach back to the client's generation, the client gets the whole
snapshot. So a client that reads slowly misses no change: it gets all changes since its last generation at once, merged,
and costs no memory for those that it has not asked for yet. A stream keeps a snapshot in memory only while it sends it.

An event is always sent whole, and a generation is complete with the event that names it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from twisted.internet.defer import Deferred

from cacheservice.base.interfaces import Clock, DelayedCall
from cacheservice.base.timers import is_active
from cacheservice.cache import reading
from cacheservice.cache.cache import Cache
from cacheservice.cache.change_log import ChangeLog, Merge, Position
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.delta import Delta
from cacheservice.cache.drain import Drain
from cacheservice.cache.events import Ended, Event, Published, Renewed
from cacheservice.cache.reading import NotLoaded, TooOld
from cacheservice.ports.held import Kept, Streamed
from cacheservice.ports.http import parameters, response_heads
from cacheservice.ports.http.bodies import GzipBodies, Piece
from cacheservice.ports.http.change_events import FORMS, Form, State
from cacheservice.ports.http.messages import (
    GZIP_FROM_BYTES,
    Reply,
    Request,
    WallClock,
    negotiated,
    query_of,
    wants_gzip,
)
from cacheservice.ports.http.reads import Reads, served

HEARTBEAT_S = 10.0
"""A client that receives nothing for longer than this has lost its connection."""
_MANY_ROWS = 2000
"""Freeing more rows of a delta in one turn would take more than a third of a millisecond."""
_RETRY_MS = (1000, 4000)
"""Browsers reconnect after a random time in this range, so that they do not all come at once after a restart."""
_HEADERS = b"Vary: Accept, Accept-Encoding\r\nX-Content-Type-Options: nosniff\r\nX-Accel-Buffering: no\r\n"
"""nginx would hold back the events until its buffer is full."""


class ChangeStreams:
    """Sends the changes of datasets to any number of clients, and keeps the logs of the changes.

    `count` is the number of open streams.

    :param clock: `IReactorTime`, monotonic.
    """

    def __init__(self, cache: Cache, clock: Clock) -> None:
        self._cache = cache
        self._clock = clock
        self._logs: dict[str, ChangeLog] = {}
        self._waiting: dict[str, dict[Deferred[None], None]] = {}
        self._timer: DelayedCall | None = None
        self._beats = 0
        self._stopping = False
        self._drain = Drain(clock)
        self.count = 0
        for name, dataset in cache.datasets.items():
            if dataset.snapshot is not None:
                self._log(name).add(dataset.snapshot, 0, None)
        cache.events.subscribe(self._changed, Published, Renewed, Ended)

    def follow(self, dataset: Dataset, at: Position | None, form: Form, kept: Kept) -> Iterator[Piece]:
        """Yield an endless body for one client. It ends when the dataset is removed, and with the service.

        :param at: the position of the rows that the client has; None if it has none.
        :param kept: keeps the snapshot while it is sent.
        """
        self.count += 1
        if self._timer is None:
            self._timer = self._clock.callLater(HEARTBEAT_S, self._beat)
        try:
            yield form.hello(random.randint(*_RETRY_MS))  # noqa: S311  # not for cryptography
            yield from self._events(dataset, at, form, kept)
        finally:
            self.count -= 1
            if not self.count and is_active(self._timer):
                self._timer.cancel()
                self._timer = None

    def stop(self) -> None:
        """End all streams, each after a whole event."""
        self._stopping = True
        self._drain.stop()
        for name in list(self._waiting):
            self._wake(name)

    # What one client gets

    def _events(self, dataset: Dataset, at: Position | None, form: Form, kept: Kept) -> Iterator[Piece]:
        beats, read_at = self._beats, None
        while not self._stopping:
            state = self._state(dataset)
            if dataset.removed:
                yield form.ended(dataset.name)
                return
            if state is not None and (read_at is None or state.position != at):
                yield from self._update(dataset, at, state, form, kept)
                at, read_at = state.position, state.read_at
            elif state is not None and state.read_at != read_at:
                yield form.generation("renewed", dataset.name, state, self._cache.now())
                read_at = state.read_at
            elif beats != self._beats:
                beats = self._beats
                yield form.alive()
            else:
                yield from self._wait(dataset.name)

    def _update(self, dataset: Dataset, at: Position | None, state: State, form: Form, kept: Kept) -> Iterator[Piece]:
        """Yield the events that lead a client from its position to the served generation."""
        deltas = None if at is None else self._log(dataset.name).since(at)
        if deltas is None:
            yield from self._snapshot(dataset, state, form, kept)
        else:
            yield from self._delta(deltas, form)
        if not self._stopping:
            kind = "renewed" if deltas is not None and not deltas else "generation"
            yield form.generation(kind, dataset.name, state, self._cache.now())

    def _snapshot(self, dataset: Dataset, state: State, form: Form, kept: Kept) -> Iterator[Piece]:
        snapshot = dataset.snapshot
        assert snapshot is not None, "it has a state"
        kept.replace({dataset.name: snapshot})
        yield form.snapshot(dataset.name, state)
        yield from self._whole(form.rows(snapshot.rows))
        kept.replace({})

    def _delta(self, deltas: Sequence[Delta], form: Form) -> Iterator[Piece]:
        merge = Merge(deltas)
        for _ in merge:
            yield b""
        yield from self._whole(form.delta(merge.delta))

    def _whole(self, events: Iterator[Iterator[bytes]]) -> Iterator[Piece]:
        """Yield the pieces of events; after a stop, only those of an event that has begun."""
        for event in events:
            if self._stopping:
                return
            yield from event

    def _wait(self, name: str) -> Iterator[Piece]:
        """Wait for a change, a heartbeat or the stop."""
        woken: Deferred[None] = Deferred()
        waiting = self._waiting.setdefault(name, {})
        waiting[woken] = None
        try:
            yield woken
        finally:
            waiting.pop(woken, None)

    # What happens

    def _state(self, dataset: Dataset) -> State | None:
        """Return the state of what may be served now; None if nothing may be."""
        try:
            snapshot = reading.served(dataset)
        except (NotLoaded, TooOld):
            return None
        position = self._log(dataset.name).newest
        assert position is not None, "it was published"
        return State.of(snapshot, position)

    def _log(self, name: str) -> ChangeLog:
        return self._logs.setdefault(name, ChangeLog())

    def _changed(self, event: Event) -> None:
        if isinstance(event, Published):
            for dropped in self._log(event.dataset).add(event.snapshot, event.previous, event.delta):
                if isinstance(dropped.put, dict) and len(dropped.put) > _MANY_ROWS:
                    self._drain.add([[dropped.put]])
        elif isinstance(event, Ended):
            self._logs.pop(event.dataset, None)
        self._wake(event.dataset)

    def _wake(self, name: str) -> None:
        for woken in list(self._waiting.pop(name, ())):
            woken.callback(None)

    def _beat(self) -> None:
        self._beats += 1
        self._timer = self._clock.callLater(HEARTBEAT_S, self._beat)
        for name in list(self._waiting):
            self._wake(name)


class Changes:
    """Answers requests for change streams.

    :param wall_s: returns seconds since the epoch, for dates.
    """

    def __init__(self, reads: Reads, streams: ChangeStreams, bodies: GzipBodies, wall_s: WallClock) -> None:
        self._reads = reads
        self._streams = streams
        self._bodies = bodies
        self._wall_s = wall_s

    def stream(self, request: Request, name: bytes) -> Reply:
        """Return the change stream of a dataset; `name` is as in the path."""
        dataset, headers = self._reads.dataset(name), request.headers
        at = parameters.after(query_of(request))
        if last := headers.get(b"last-event-id"):
            # A position that cannot be parsed is of a generation that is not kept. A refusal would end a browser's
            # stream for good.
            at = Position.parse(last.decode("ascii", "replace"))
        served(dataset)
        form = FORMS[negotiated(request, tuple(FORMS))]
        is_zipped = b"accept-encoding" in headers and wants_gzip(headers, GZIP_FROM_BYTES)
        dataset.counts.http.hit()
        head = response_heads.plain_head(200, form.content_type, self._wall_s()) + _HEADERS
        kept = Kept({})
        pieces = self._streams.follow(dataset, at, form, kept)
        if is_zipped:
            head, pieces = head + b"Content-Encoding: gzip\r\n", self._bodies.flushed(pieces)
        return Reply(head, Streamed(pieces, kept), endless=True)
