"""Frees the rows of dropped snapshots slice by slice; all at once would hold the reactor for 30 ms a million rows.

The rows of each shard lie all over the memory, so nothing goes back to the system until the last rows around it are
freed. Whole shards are freed first, which takes a third of the time that their rows take one by one; the last few of
them row by row, in the order in which the rows lie there, because to free the last shard whole would give everything
back at once and hold the reactor for 20 ms (all measured).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from twisted.internet.task import Cooperator

from cacheservice.cache.rows import Shards

_SLICE_ROWS = 256
_MOST_SHARD_ROWS = 5000
"""Freed at once, in less than half a millisecond."""
_ROW_BY_ROW = 16
"""Shards."""


class Drain:
    """Frees one shard, or some hundred rows, per turn of the reactor.

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
    while len(shards) > _ROW_BY_ROW:
        shard = shards[-1]
        if len(shard) > _MOST_SHARD_ROWS:
            for _ in range(_SLICE_ROWS):
                shard.popitem()
        else:
            del shard, shards[-1]
        yield
    while shards:
        for shard in shards:
            for _ in range(min(len(shard), _SLICE_ROWS // _ROW_BY_ROW)):
                shard.popitem()
        shards[:] = filter(None, shards)
        yield
