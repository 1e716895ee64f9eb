"""The channels of the RESP port: `cache:NAME` has a message for each publish of a dataset."""

from __future__ import annotations

import json
from typing import Protocol

from cacheservice.base.text import iso
from cacheservice.cache.cache import Cache
from cacheservice.cache.events import Event, Published

_PREFIX = b"cache:"


class Subscriber(Protocol):
    """A client that receives the messages of channels."""

    def push(self, channel: bytes, message: bytes) -> None:
        """Send a message."""


class Subscriptions:
    """The subscribers by channel.

    A subscription survives the removal of its dataset, and its clients are notified again when the dataset returns.
    """

    def __init__(self, cache: Cache) -> None:
        self.channels: dict[bytes, set[Subscriber]] = {}
        self._cache = cache
        cache.events.subscribe(self._published, Published)

    def is_channel(self, channel: bytes) -> bool:
        """Return whether the channel is that of a declared dataset."""
        name = channel.removeprefix(_PREFIX)
        return name != channel and name.decode("utf-8", "replace") in self._cache.datasets

    def add(self, channel: bytes, subscriber: Subscriber) -> None:
        self.channels.setdefault(channel, set()).add(subscriber)

    def remove(self, channel: bytes, subscriber: Subscriber) -> None:
        subscribers = self.channels[channel]
        subscribers.discard(subscriber)
        if not subscribers:
            del self.channels[channel]

    def _published(self, event: Event) -> None:
        dataset = self._cache.dataset(event.dataset)
        channel = _PREFIX + dataset.name.encode()
        subscribers = self.channels.get(channel)
        if not subscribers or dataset.snapshot is None:
            return
        change = dataset.snapshot.change
        message = {
            "dataset": dataset.name,
            "generation": dataset.snapshot.generation,
            "as_of": iso(dataset.snapshot.as_of),
            "added": change.added if change else None,
            "changed": change.changed if change else None,
            "removed": change.removed if change else None,
        }
        text = json.dumps(message, separators=(",", ":")).encode()
        for subscriber in list(subscribers):
            subscriber.push(channel, text)
