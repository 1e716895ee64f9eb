"""The head of the frames for what a dataset serves."""

from __future__ import annotations

from cacheservice.cache.delta import Delta
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import DatasetSettings
from cacheservice.replication.codec import Head
from cacheservice.sources.frames.clocks import Clocks
from cacheservice.sources.frames.header import header_of


def head_of(
    settings: DatasetSettings, snapshot: Snapshot, clocks: Clocks, *, base: int = 0, delta: Delta | None = None
) -> Head:
    """Return the head for a snapshot, or for the delta that leads to it.

    :param base: the generation that `delta` applies to.
    :param delta: None for all rows.
    """
    return Head(
        header_of(settings, snapshot, clocks.read_on(snapshot.read_at)),
        base,
        snapshot.rows.count if delta is None else len(delta.put),
        0 if delta is None else len(delta.removed),
        clocks.age_us(snapshot.read_at),
        snapshot.source,
        snapshot.change,
        snapshot.lag,
        snapshot.rolled_back_to,
        snapshot.age_uncertain,
    )
