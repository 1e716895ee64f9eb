"""Translates the notifications of the database, and captured changes, into changed datasets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol

from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.identity import Visibility
from cacheservice.config import OWN_CHANNEL
from cacheservice.sources.postgres.deltas import watched_ids


class Receiver(Protocol):
    """The receiver of changes: `cacheservice.refresh.service.CacheService`."""

    def note_changed(self, name: str, keys: Sequence[str] | None) -> object:
        """Note changed rows of a dataset: None for any row, no keys if triggers have recorded the rows."""

    def missed(self) -> object:
        """Look for changes whose notifications may have been missed."""


class Notifications:
    """Knows which channels the datasets need, and which datasets a notification is about.

    Applications send to a dataset's own channel, with the changed keys as JSON if they like. The triggers of watched
    tables send to `OWN_CHANNEL`; they have recorded the keys.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._has_triggers = True
        self._receivers: list[Receiver] = []

    def deliver_to(self, receiver: Receiver) -> None:
        """Report changes to `receiver`, too, from now on."""
        self._receivers.append(receiver)

    def use_triggers(self, yes: bool) -> None:
        """Note whether the notifications of triggers matter."""
        self._has_triggers = yes

    def channels(self) -> set[str]:
        """Return the LISTEN channels of the datasets, and the service's own channel if a table is watched.

        Changes of datasets that another process refreshes do not matter here.
        """
        declared = [dataset.settings for dataset in self._cache.datasets.values() if dataset.is_refreshed_here]
        named = {settings.notify for settings in declared if settings.notify}
        return named | {OWN_CHANNEL} if self._has_triggers and self.watching() else named

    def watching(self) -> set[str]:
        """Return the datasets whose tables are watched, and that this process refreshes."""
        datasets = self._cache.datasets.values()
        return {each.name for each in datasets if each.settings.watch and each.is_refreshed_here}

    def bases(self, slot: str) -> list[Visibility]:
        """Return the snapshots from which deltas may start that use a slot of the capture."""
        newest = [self._cache.datasets[name].newest() for name in self.watching()]
        return [
            Visibility.of(each.database_snapshot, in_recovery=each.server is not None and each.server.in_recovery)
            for each in newest
            if each is not None and slot in each.watch_state
        ]

    def heard(self, channel: str, payload: str) -> None:
        """Report the datasets that a notification is about."""
        for name, dataset in self._cache.datasets.items():
            if channel == OWN_CHANNEL and dataset.settings.watch and _is_watched(dataset, payload):
                self._note_changed(name, ())
            elif channel == dataset.settings.notify:
                self._note_changed(name, keys_of(payload))

    def captured(self, name: str) -> None:
        """Report that watched tables of a dataset have changed, by the capture."""
        if name in self._cache.datasets:
            self._note_changed(name, ())

    def missed(self) -> None:
        """Report that notifications may have been missed."""
        for receiver in self._receivers:
            receiver.missed()

    def _note_changed(self, name: str, keys: Sequence[str] | None) -> None:
        for receiver in self._receivers:
            receiver.note_changed(name, keys)


def _is_watched(dataset: Dataset, payload: str) -> bool:
    """Return whether the payload "changed 7" may be of a table that the dataset watches."""
    newest = dataset.newest()
    word, _, number = payload.partition(" ")
    if word != "changed" or not number.isdecimal() or newest is None or not newest.watch_state:
        return True
    known = watched_ids(newest.watch_state)
    # The state does not contain watches with a problem, and the payload may be of one of these.
    return int(number) in known or len(known) < len(dataset.settings.watch)


def keys_of(payload: str) -> list[str] | None:
    """Return the keys of a payload that is a JSON list of keys; None, which means any row, for other payloads."""
    try:
        keys = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    if not isinstance(keys, list) or not all(isinstance(key, str | int) and not isinstance(key, bool) for key in keys):
        return None
    return [str(key) for key in keys]
