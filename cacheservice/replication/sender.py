"""Sends the publishes of a cache to one receiver, in the order in which they belong together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from twisted.internet.defer import CancelledError, Deferred

from cacheservice.base.interfaces import Clock, Log
from cacheservice.base.tasks import Tasks
from cacheservice.base.timers import pause
from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.events import Ended, Event, Noted, Published, Renewed
from cacheservice.cache.snapshot import Snapshot
from cacheservice.replication.encoder import Encoder
from cacheservice.replication.outbox import Outbox, Update

COMMIT, LIVE, TAKEN, RESEND, WITHDRAW = "commit", "live", "taken", "resend", "withdraw"
"""The events beside the frames. The sender sends `commit` after the updates that belong together, `withdraw` with the
name of a dataset that serves nothing any more, and `live` once after the first updates. The receiver sends `taken` with
the number of bytes that it has applied, and `resend` with the name of a dataset that it lacks."""

WINDOW_BYTES = 2 * 1024 * 1024
"""Bytes that the receiver may still have to apply, or to report, before it is sent more."""

_MESSAGE_BYTES = 1024 * 1024
"""The most bytes of one message; a row may be larger."""


class Carrier(Protocol):
    """The sender's side of a connection to the receiver."""

    def send(self, name: str, /, **fields: str | int) -> None:
        """Send an event."""

    def send_frames(self, data: bytes, /) -> None:
        """Send bytes of frames, in order with the events."""

    def lose(self) -> None:
        """Close the connection, so that the receiver begins again."""


class _Message(NamedTuple):
    """An update with its snapshot, taken in the turn in which its batch begins."""

    dataset: Dataset
    snapshot: Snapshot
    update: Update


class Sender:
    """Sends one receiver all that the cache publishes.

    It is idle, or sends a batch: the newest updates of all datasets that have changed. What is published meanwhile is
    in the next batch. The receiver publishes a batch as a whole. Batches begin a turn after the publish, so that all
    datasets of a group are in the same batch.

    :param encoder: shared by all senders of the cache.
    :param clock: `IReactorTime`.
    """

    def __init__(self, cache: Cache, carrier: Carrier, encoder: Encoder, clock: Clock, log: Log) -> None:
        self._cache = cache
        self._carrier = carrier
        self._encoder = encoder
        self._clock = clock
        self._outbox = Outbox()
        self._tasks = Tasks(log)
        self._is_sending = False
        self._is_live = False
        self._unsubscribe: Callable[[], None] | None = None
        self._not_taken_bytes = 0
        self._window: Deferred[None] | None = None

    def start(self) -> None:
        """Send the snapshots of all datasets, and from now on each change."""
        self._unsubscribe = self._cache.events.subscribe(self._happened, Published, Renewed, Noted, Ended)
        for name in self._cache.datasets:
            self.resend(name)
        self._begin()

    def stop(self) -> None:
        """Send nothing any more."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        self._tasks.cancel()

    # What the receiver sends

    def taken(self, size_bytes: int) -> None:
        """Note that the receiver has applied bytes of frames."""
        self._not_taken_bytes -= size_bytes
        if self._window is not None and self._not_taken_bytes <= WINDOW_BYTES:
            window, self._window = self._window, None
            window.callback(None)

    def resend(self, name: str) -> None:
        """Send all rows of a dataset, because the receiver lacks them."""
        dataset = self._cache.datasets.get(name)
        if dataset is not None and dataset.snapshot is not None:
            self._outbox.resend(name, dataset.snapshot.generation)
            self._begin()

    # What the cache publishes

    def _happened(self, event: Event) -> None:
        if isinstance(event, Published):
            self._outbox.published(event)
        elif isinstance(event, Renewed):
            self._outbox.renewed(event.dataset)
        elif isinstance(event, Ended):
            self._outbox.forget(event.dataset)
        elif self._outbox.has(event.dataset) and self._cache.dataset(event.dataset).snapshot is None:
            self._outbox.forget(event.dataset)
            self._carrier.send(WITHDRAW, name=event.dataset)
        if not self._outbox.is_empty:
            self._begin()

    def _begin(self) -> None:
        if not self._is_sending and self._unsubscribe is not None:
            self._is_sending = True
            self._tasks.run(self._send())

    async def _send(self) -> None:
        try:
            await pause(self._clock)
            while not self._outbox.is_empty:
                for message in self._batch():
                    await self._send_one(message)
                self._carrier.send(COMMIT)
            if not self._is_live:
                self._is_live = True
                self._carrier.send(LIVE)
        except CancelledError:
            raise
        except Exception:
            # A bug, which is logged. The receiver begins again, because it does not know what it lacks.
            self._carrier.lose()
            raise
        finally:
            self._is_sending = False

    def _batch(self) -> Sequence[_Message]:
        messages = []
        for name, update in self._outbox.take().items():
            dataset = self._cache.datasets.get(name)
            if dataset is not None and dataset.snapshot is not None:
                assert dataset.snapshot.generation == update.generation, "each publish is noted"
                messages.append(_Message(dataset, dataset.snapshot, update))
        return messages

    async def _send_one(self, message: _Message) -> None:
        update = message.update
        for data in self._encoder.frames(message.dataset.settings, message.snapshot, update):
            for start in range(0, len(data), _MESSAGE_BYTES):
                self._carrier.send_frames(data[start : start + _MESSAGE_BYTES])
            self._not_taken_bytes += len(data)
            if self._not_taken_bytes > WINDOW_BYTES:
                self._window = Deferred()
                await self._window
            elif update.delta is None:
                await pause(self._clock)
