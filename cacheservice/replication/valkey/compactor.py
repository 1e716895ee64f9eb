"""Keeps the chains of deltas in the Valkey short, while deltas go on being published."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

from twisted.internet.defer import CancelledError, Deferred

from cacheservice.base.errors import CacheServiceError
from cacheservice.base.interfaces import Clock, Log
from cacheservice.base.tasks import Tasks
from cacheservice.base.timers import pause
from cacheservice.cache.change_log import Merge
from cacheservice.cache.delta import Delta
from cacheservice.cache.rows import Rows
from cacheservice.replication.codec import Head, encoded
from cacheservice.replication.valkey.chains import is_long, mergeable, substituted
from cacheservice.replication.valkey.manifest import Member, Piece
from cacheservice.replication.valkey.store import Store

_MOST_ROWS = 2000
"""Of a delta that is merged with others. A larger one may stay a piece of its own."""
_MOST_MERGED_ROWS = 20_000
"""Of a merged delta that is merged again with the deltas after it. With a million rows and commits of single rows, half
a table is 25 such pieces. Until a piece has as many rows it is written again with each merge, 10,000 rows on average,
which takes 15 ms of CPU for 32 publishes."""
_PAUSE_S = 0.001
"""Between two steps of a third of a millisecond, so that neither readers nor deltas notice the work."""
_RETRY_S = 10.0
"""After a failure."""

_Kind = Literal["snapshot", "merge"]
_KINDS: tuple[_Kind, ...] = ("snapshot", "merge")
_Key = tuple[str, _Kind]
"""A dataset, and what replaces a part of its chain."""


class Written(NamedTuple):
    """The frames of a piece before they were encoded."""

    head: Head
    content: Rows | Delta


class _Running(NamedTuple):
    run: tuple[Piece, ...]
    work: Deferred[None]


class _Ready(NamedTuple):
    run: tuple[Piece, ...]
    piece: Piece
    written: Written | None  # if it may be merged again


class Compactor:
    """Replaces runs of pieces by single pieces with the same effect.

    A chain is the pieces of a member. All of its pieces up to some generation are replaced by a snapshot of that
    generation, or some of its deltas by their merge. The new piece is written in the background under a name that no
    manifest has. Then it is ready, and the next publish names it. If the chain does not have the run any more, because
    a snapshot has been published since, the piece is dropped.

    A dataset has at most one of each kind, running or ready. Their runs have no piece in common.

    :param ready: called with the name of a dataset once a piece waits for a publish.
    """

    def __init__(self, store: Store, clock: Clock, log: Log, ready: Callable[[str], object]) -> None:
        self._store = store
        self._clock = clock
        self._log = log
        self._is_ready = ready
        self._tasks = Tasks(log)
        self._held: dict[str, dict[str, Written]] = {}
        self._running: dict[_Key, _Running] = {}
        self._ready: dict[_Key, _Ready] = {}

    def cancel(self) -> None:
        """Drop all work. What was written expires."""
        for name in {*self._held, *(name for name, _ in (*self._running, *self._ready))}:
            self.forget(name)

    def forget(self, name: str) -> None:
        """Drop the work for a dataset, whose chain begins again."""
        self._held.pop(name, None)
        for kind in _KINDS:
            self._drop((name, kind))

    def wrote(self, name: str, piece: Piece, written: Written) -> None:
        """Note a delta that the next publish names; it may be merged later."""
        if written.head.put + written.head.removed <= _MOST_ROWS:
            self._held.setdefault(name, {})[piece.token] = written

    def compacted(self, name: str, member: Member) -> Member:
        """Return the member with the pieces that are ready; the caller publishes it, or calls `cancel`."""
        for kind in _KINDS:
            ready = self._ready.pop((name, kind), None)
            if ready is None:
                continue
            shorter = substituted(member, ready.run, ready.piece)
            if shorter is None:
                self._store.forget(ready.piece)
                continue
            member = shorter
            if ready.written is not None:
                self._held.setdefault(name, {})[ready.piece.token] = ready.written
        return member

    def published(self, members: Mapping[str, Member], all_rows: Mapping[str, Callable[[], Written]]) -> None:
        """Drop the work that has become useless, and begin what is useful.

        :param members: of the manifest that is current.
        :param all_rows: return all rows of the current generation, for the members that were just published.
        """
        for name in self._held.keys() - members.keys():
            self.forget(name)
        for name, member in members.items():
            tokens = {piece.token for piece in member.pieces}
            held = self._held.get(name, {})
            self._held[name] = {token: written for token, written in held.items() if token in tokens}
            for key, running in list(self._running.items()):
                if key[0] == name and not tokens.issuperset(piece.token for piece in running.run):
                    self._drop(key)
            self._begin(name, member, all_rows.get(name))

    def _begin(self, name: str, member: Member, all_rows: Callable[[], Written] | None) -> None:
        rewriting = self._run_of((name, "snapshot"))
        if self._run_of((name, "merge")):
            return
        if not rewriting and all_rows is not None and is_long(member):
            self._start((name, "snapshot"), member.pieces, [all_rows()])
            return
        held = self._held[name]
        run = mergeable(member.deltas[max(0, len(rewriting) - 1) :], held)
        if run:
            self._start((name, "merge"), run, [held[piece.token] for piece in run])

    def _run_of(self, key: _Key) -> tuple[Piece, ...]:
        """Return the run that is being replaced; empty if there is none."""
        work = self._running.get(key) or self._ready.get(key)
        return () if work is None else work.run

    def _start(self, key: _Key, run: tuple[Piece, ...], parts: list[Written]) -> None:
        self._running[key] = _Running(run, self._tasks.run(self._write(key, run, parts)))

    async def _write(self, key: _Key, run: tuple[Piece, ...], parts: list[Written]) -> None:
        try:
            await pause(self._clock)
            head, content = parts[0] if key[1] == "snapshot" else await self._merged(parts)
            frames = encoded(head, content, compress=True)
            piece = await self._store.write(run[-1].generation, run[0].base, frames, _PAUSE_S)
            is_open = key[1] == "merge" and head.put + head.removed <= _MOST_MERGED_ROWS
            self._ready[key] = _Ready(run, piece, Written(head, content) if is_open else None)
        except CancelledError:
            raise
        except CacheServiceError as error:
            # The chain stays longer. Publishes, which fail for the same reasons, are not concerned.
            self._log.warning("compaction_failed", dataset=key[0], error=str(error))
            await pause(self._clock, _RETRY_S)
        finally:
            self._running.pop(key, None)
        if key in self._ready:
            self._is_ready(key[0])

    async def _merged(self, parts: Iterable[Written]) -> Written:
        heads, contents = zip(*parts, strict=True)
        merge = Merge(contents)
        for _ in merge:
            await pause(self._clock, _PAUSE_S)
        delta = merge.delta
        head = replace(heads[-1], base=heads[0].base, put=len(delta.put), removed=len(delta.removed))
        return Written(head, delta)

    def _drop(self, key: _Key) -> None:
        running, ready = self._running.pop(key, None), self._ready.pop(key, None)
        if running is not None:
            running.work.cancel()
        if ready is not None:
            self._store.forget(ready.piece)
