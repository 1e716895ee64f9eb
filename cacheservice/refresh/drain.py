"""Frees the rows of dropped snapshots slice by slice; all at once would hold the reactor for 30 ms a million rows.

The rows of each shard lie all over the memory, so nothing goes back to the system until the last rows around it are
freed. Whole shards are freed first, which takes a third of the time that their rows take one by one; the last few of
them row by row, in the order in which the rows lie there, because to free the last shard whole would give everything
back at once and hold the reactor for 20 ms (all measured).

Rows that were patched share most of their shards with those that followed. What somebody else holds is only let go.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from sys import getrefcount
from typing import Any

from twisted.internet.task import Cooperator

from cacheservice.cache.rows import Groups, Shards

_SLICE_ROWS = 256
_MOST_SHARD_ROWS = 5000
"""Freed at once, in less than half a millisecond."""
_ROW_BY_ROW = 16
"""Shards."""
_SAMPLE = 64
"""Shards that are looked at to tell whether nearly all are shared."""
_OURS = 2
"""References to a group or a shard that nobody else holds: the list's, and the argument of `getrefcount`."""


class Drain:
    """Frees one shard of ordinary size, or some hundred rows, per turn of the reactor.

    :param clock: `IReactorTime`.
    """

    def __init__(self, clock: Any) -> None:
        self._cooperator = Cooperator(
            terminationPredicateFactory=lambda: lambda: True,
            scheduler=lambda call: clock.callLater(0, call),
        )
        self._stopped = False

    def add(self, groups: Groups) -> None:
        """Take over `groups`, of which the caller keeps no reference; nothing is freed in this turn."""
        if not self._stopped:
            self._cooperator.cooperate(_emptied(groups))

    def stop(self) -> None:
        """Free slice by slice no more."""
        self._stopped = True
        self._cooperator.stop()


def _nearly_all_are_shared(shards: Shards) -> bool:
    """Whether letting them go frees a few of them at most, as it does after a patch."""
    sample = range(0, len(shards), max(1, len(shards) // _SAMPLE))
    own = sum(getrefcount(shards[place]) == _OURS for place in sample)
    return own * 16 <= len(sample)


def _emptied(groups: Groups) -> Iterator[None]:
    own = [number for number in range(len(groups)) if getrefcount(groups[number]) == _OURS]
    shards = list(chain.from_iterable(groups[number] for number in own))
    groups.clear()
    if _nearly_all_are_shared(shards):
        shards.clear()
    freed = 0
    while len(shards) > _ROW_BY_ROW:
        rows = len(shards[-1])
        is_large = rows > _MOST_SHARD_ROWS and getrefcount(shards[-1]) == _OURS
        if freed and freed + rows > _MOST_SHARD_ROWS:
            yield
            freed = 0
        if is_large:
            for _ in range(_SLICE_ROWS):
                shards[-1].popitem()
            yield
        else:
            del shards[-1]
            freed += rows + 1  # of an empty one there is a little to free as well
    if freed:
        yield
    shards[:] = [shards[place] for place in range(len(shards)) if getrefcount(shards[place]) == _OURS]
    while shards:
        for shard in shards:
            for _ in range(min(len(shard), _SLICE_ROWS // _ROW_BY_ROW)):
                shard.popitem()
        shards[:] = filter(None, shards)
        yield
