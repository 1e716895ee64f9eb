"""Frees the rows of dropped snapshots slice by slice.

Freeing a million rows at once would hold the reactor for 30 ms.

The rows of each shard are scattered over the memory, so the system gets nothing back until the last neighbours of a
page are freed. Whole shards are freed first, which takes a third of the time of freeing their rows one by one. The last
sixteenth of the shards is freed row by row, in the order of their addresses, because freeing the last shard whole would
return all memory at once and hold the reactor for 20 ms (all measured). Of a fixed number of shards, each row would
return the more memory the more shards there are.

Patched rows share most of their shards with the rows that follow them. Shards with other holders are only released.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from sys import getrefcount

from twisted.internet.task import Cooperator

from cacheservice.base.interfaces import Clock
from cacheservice.base.timers import next_turns
from cacheservice.cache.collectors import Shards
from cacheservice.cache.rows import Groups

_SLICE_ROWS = 256
_MOST_SHARD_ROWS = 5000
"""A shard of this size is freed at once, in half a millisecond if its rows are in the processor's cache."""
_TURN_ROWS = 2500
"""Smaller shards are freed together up to so many rows. A row of ten million is in no cache, and takes several times as
long."""
_ROW_BY_ROW = 16
"""One of so many shards is freed row by row, the last ones."""
_SAMPLE = 64
"""The number of shards that are sampled to find out whether nearly all are shared."""
_OURS = 2
"""The references to an unshared group or shard: the list's, and the argument of `getrefcount`."""


class Drain:
    """Frees one shard of ordinary size, or some hundred rows, in each turn of the reactor.

    :param clock: `IReactorTime`.
    """

    def __init__(self, clock: Clock) -> None:
        self._cooperator = Cooperator(
            terminationPredicateFactory=lambda: lambda: True,
            scheduler=next_turns(clock),
        )
        self._stopped = False

    def add(self, groups: Groups) -> None:
        """Take over `groups`; the caller keeps no reference, and nothing is freed in this turn."""
        if not self._stopped:
            self._cooperator.cooperate(_emptied(groups))

    def stop(self) -> None:
        """Stop freeing slice by slice."""
        self._stopped = True
        self._cooperator.stop()


def _nearly_all_are_shared(shards: Shards) -> bool:
    """Return whether releasing the shards frees few of them, as after a patch."""
    sample = range(0, len(shards), max(1, len(shards) // _SAMPLE))
    own = sum(getrefcount(shards[place]) == _OURS for place in sample)
    return own * 16 <= len(sample)


def _emptied(groups: Groups) -> Iterator[None]:
    yield  # what the turn of the publish has written is sent first
    own = [number for number in range(len(groups)) if getrefcount(groups[number]) == _OURS]
    shards = list(chain.from_iterable(groups[number] for number in own))
    groups.clear()
    if _nearly_all_are_shared(shards):
        shards.clear()
    freed, last = 0, max(_ROW_BY_ROW, len(shards) // _ROW_BY_ROW)
    while len(shards) > last:
        rows = len(shards[-1])
        is_large = rows > _MOST_SHARD_ROWS and getrefcount(shards[-1]) == _OURS
        if freed and freed + rows > _TURN_ROWS:
            yield
            freed = 0
        if is_large:
            for _ in range(_SLICE_ROWS):
                shards[-1].popitem()
            yield
        else:
            del shards[-1]
            freed += rows + 1  # an empty shard has a little to free as well
    if freed:
        yield
    shards[:] = [shards[place] for place in range(len(shards)) if getrefcount(shards[place]) == _OURS]
    while shards:
        some = shards[:_SLICE_ROWS]
        del shards[: len(some)]
        for shard in some:
            for _ in range(min(len(shard), _SLICE_ROWS // len(some))):
                shard.popitem()
        shards += filter(None, some)
        yield
