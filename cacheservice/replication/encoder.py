"""Encodes what a cache publishes, for any number of receivers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import NamedTuple

from cacheservice.cache.delta import Delta
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings
from cacheservice.replication.codec import encoded
from cacheservice.replication.heads import head_of
from cacheservice.replication.outbox import Update
from cacheservice.sources.frames.clocks import Clocks

_SMALL_ROWS = 512
"""A delta of so many rows is encoded in one step."""


class _Last(NamedTuple):
    """What was encoded last. The snapshot is not kept in memory for it."""

    snapshot: weakref.ref[Snapshot]
    settings: DatasetSettings
    delta: Delta
    base: int
    frames: tuple[bytes, ...]


class Encoder:
    """Encodes a small delta once for all receivers that are sent it, one after the other.

    :param clocks: the clocks of this machine.
    """

    def __init__(self, clocks: Clocks) -> None:
        self._clocks = clocks
        self._last: _Last | None = None

    def frames(self, settings: DatasetSettings, snapshot: Snapshot, update: Update) -> Iterable[bytes]:
        """Return the frames of an update, see `encoded`.

        :param snapshot: the one that the update leads to.
        """
        delta, last = update.delta, self._last
        if (
            last is not None
            and last.snapshot() is snapshot
            and last.settings is settings
            and last.delta is delta
            and last.base == update.base
        ):
            return last.frames
        head = head_of(settings, snapshot, self._clocks, base=update.base, delta=delta)
        if delta is None:
            return encoded(head, snapshot.rows, compress=False)
        frames = encoded(head, delta, compress=False)
        if len(delta.put) + len(delta.removed) > _SMALL_ROWS:
            return frames
        self._last = _Last(weakref.ref(snapshot), settings, delta, update.base, tuple(frames))
        return self._last.frames
