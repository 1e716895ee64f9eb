"""Frees the rows of dropped snapshots slice by slice; all at once would hold the reactor for 30 ms a million rows.

A slice is smaller than a shard: the rows of each shard lie all over the memory, so nothing goes back to the
system until the last one is freed, and that alone would hold the reactor for 20 ms (measured).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from twisted.internet.task import Cooperator

from cacheservice.cache.rows import Shards

_SLICE_ROWS = 500


class Drain:
    """Frees at most 500 rows of one shard per turn of the reactor.

    :param clock: `IReactorTime`.
    """

    def __init__(self, clock: Any) -> None:
        self._cooperator = Cooperator(
            terminationPredicateFactory=lambda: lambda: True,
            scheduler=lambda call: clock.callLater(0, call),
        )
        self._stopped = False

    def add(self, shards: Shards) -> None:
        """Take over `shards`, of which the caller keeps no reference."""
        if not self._stopped:
            self._cooperator.cooperate(_emptied(shards))

    def stop(self) -> None:
        """Leave the rest to the end of the process."""
        self._stopped = True
        self._cooperator.stop()


def _emptied(shards: Shards) -> Iterator[None]:
    while shards:
        shard = shards[-1]
        for _ in range(min(_SLICE_ROWS, len(shard))):
            shard.popitem()
        if not shard:
            shards.pop()
        yield
