"""Limits the superseded snapshots that slow readers keep in memory.

A reply with a whole dataset is streamed from the snapshot with which it began. While that snapshot is served, it costs
nothing. Once a newer one is served, a client that reads slowly keeps a copy of the dataset in memory, and twelve
clients may keep twelve. So replies may keep only a number of superseded generations of a dataset, readers of older ones
are disconnected, and a reply from a superseded generation has a time limit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from cacheservice.base.interfaces import Clock, DelayedCall, Log
from cacheservice.base.timers import is_active
from cacheservice.cache.cache import Cache
from cacheservice.cache.events import Ended, Event, Published
from cacheservice.cache.snapshot import Snapshot

T = TypeVar("T")


class Reader(Protocol):
    """A connection that receives a reply."""

    def drop_slow(self) -> str:
        """Abort the connection, count it as slow, and return its address for the log."""


class Hold:
    """One reply in progress."""

    __slots__ = ("began_at", "reader", "snapshots", "timer")

    def __init__(self, reader: Reader, snapshots: Mapping[str, Snapshot], began_at: float) -> None:
        self.reader = reader
        self.snapshots = snapshots
        self.began_at = began_at
        self.timer: DelayedCall | None = None


class Registry(Protocol):
    """Knows the replies in progress: `HeldSnapshots`, or `Unlimited`."""

    def begin(self, reader: Reader, snapshots: Mapping[str, Snapshot], /) -> Hold:
        """Register a reply to `reader`; the caller must call `end` after it."""

    def end(self, hold: Hold, /) -> None:
        """Remove a reply that has been sent or aborted."""


class Kept:
    """The snapshots, by dataset, that a reply keeps. An endless reply changes them while it is sent.

    They are registered from `begin`, when the reply is sent, to `end`.
    """

    __slots__ = ("_hold", "_reader", "_registry", "_snapshots")

    def __init__(self, snapshots: Mapping[str, Snapshot]) -> None:
        self._snapshots = snapshots
        self._registry: Registry | None = None
        self._reader: Reader | None = None
        self._hold: Hold | None = None

    def begin(self, registry: Registry, reader: Reader) -> None:
        """Register the snapshots, now that the reply is sent to `reader`."""
        self._registry, self._reader = registry, reader
        self.replace(self._snapshots)

    def replace(self, snapshots: Mapping[str, Snapshot]) -> None:
        """Keep these snapshots from now on, and no others. The time that they may take begins now."""
        if self._registry is None or self._reader is None:
            self._snapshots = snapshots
            return
        if self._hold is not None:
            self._registry.end(self._hold)
        self._snapshots = snapshots
        self._hold = self._registry.begin(self._reader, snapshots) if snapshots else None

    def end(self) -> None:
        """Keep none: the reply has been sent or aborted."""
        self.replace({})
        self._registry = self._reader = None


class Streamed(Iterator[T], Generic[T]):
    """A reply in pieces, with the snapshots that it keeps.

    :param kept: the snapshots by dataset, to be kept until the end of the reply, or a `Kept` that the pieces change.
    """

    __slots__ = ("_pieces", "kept")

    def __init__(self, pieces: Iterator[T], kept: Mapping[str, Snapshot] | Kept) -> None:
        self._pieces = pieces
        self.kept = kept if isinstance(kept, Kept) else Kept(kept)

    def __next__(self) -> T:
        return next(self._pieces)


def too_old(holds: Collection[Hold], dataset: str, served: int, most: int) -> list[Hold]:
    """Return the replies to abort because they keep too many generations.

    After that, at most `most` generations of `dataset` are kept besides the served one.
    """
    kept = sorted({hold.snapshots[dataset].generation for hold in holds if dataset in hold.snapshots} - {served})
    ended = set(kept[: max(0, len(kept) - most)])
    return [hold for hold in holds if dataset in hold.snapshots and hold.snapshots[dataset].generation in ended]


class HeldSnapshots:
    """The replies in progress of all ports.

    :param clock: `IReactorTime`, monotonic.
    :param most_generations: the superseded generations of a dataset that replies may keep.
    :param most_s: the time that a reply may take once its generation is superseded.
    """

    def __init__(self, cache: Cache, clock: Clock, log: Log, most_generations: int, most_s: float) -> None:
        self._cache = cache
        self._clock = clock
        self._log = log
        self._most_generations = most_generations
        self._most_s = most_s
        self._holds: dict[Hold, None] = {}
        cache.events.subscribe(self._supersede, Published, Ended)

    def begin(self, reader: Reader, snapshots: Mapping[str, Snapshot]) -> Hold:
        """Register a reply to `reader`; the caller must call `end` after it."""
        hold = Hold(reader, snapshots, self._clock.seconds())
        self._holds[hold] = None
        return hold

    def end(self, hold: Hold) -> None:
        """Remove a reply that has been sent or aborted."""
        self._holds.pop(hold, None)
        if is_active(hold.timer):
            hold.timer.cancel()

    def superseded(self) -> dict[tuple[str, int], int]:
        """Return the bytes of each superseded generation, by dataset and number.

        Generations published by deltas share most of their rows, so their sum is more than the memory that they use.
        """
        served = {name: dataset.last_generation for name, dataset in self._cache.datasets.items()}
        return {
            (name, snapshot.generation): snapshot.rows.size_bytes
            for hold in self._holds
            for name, snapshot in hold.snapshots.items()
            if snapshot.generation != served.get(name)
        }

    def _supersede(self, event: Event) -> None:
        assert isinstance(event, Published | Ended), "it subscribed to these"
        name, now = event.dataset, self._clock.seconds()
        for hold in too_old(self._holds, name, event.generation, self._most_generations):
            self._drop(hold, f"{self._most_generations} newer generations of {name} are being read")
        for hold in self._holds:
            if hold.timer is None and name in hold.snapshots:
                left_s = max(0.0, hold.began_at + self._most_s - now)
                hold.timer = self._clock.callLater(left_s, self._drop, hold, f"it took longer than {self._most_s:g} s")

    def _drop(self, hold: Hold, reason: str) -> None:
        self.end(hold)
        generations = {name: snapshot.generation for name, snapshot in hold.snapshots.items()}
        took_s = round(self._clock.seconds() - hold.began_at, 3)
        client = hold.reader.drop_slow()
        self._log.warning("slow_reader_ended", client=client, generations=generations, took_s=took_s, reason=reason)


class Unlimited:
    """Sets no limit, for a port without `HeldSnapshots`."""

    def begin(self, reader: Reader, snapshots: Mapping[str, Snapshot]) -> Hold:
        return Hold(reader, snapshots, 0.0)

    def end(self, hold: Hold) -> None:
        """Do nothing: `begin` registers nothing."""
