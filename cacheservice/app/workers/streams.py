"""Replies in pieces, which the main process makes and a worker sends to its client.

The worker pulls each piece when its client can take it, so that a slow client costs one piece, and an endless reply
ends with its client.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from cacheservice.base.errors import MainUnavailable
from cacheservice.base.interfaces import Clock, DelayedCall
from cacheservice.base.timers import is_active
from cacheservice.ports.connection import Closeable, Piece
from cacheservice.ports.http.bodies import cut
from cacheservice.replication.link import Link
from cacheservice.replication.messages import Plain

PULLED_BYTES = 256 * 1024
"""The size of one pull, without its last piece."""
UNUSED_S = 60.0
"""The time until the first pull, after which a worker does not want the reply any more."""
SILENCE_S = 2.0
"""An empty piece answers a pull for which there was nothing to send in this time, long before the call times out."""


class _Source:
    """The rest of one reply; `pending` is what its next piece waits for."""

    def __init__(self, pieces: Iterator[Piece], unused: DelayedCall) -> None:
        self._pieces = pieces
        self._unused = unused
        self._pending: Deferred[None] | None = None
        self._wake: Callable[[], None] | None = None

    def use(self) -> None:
        """Note that the reply is wanted."""
        if self._unused.active():
            self._unused.cancel()

    def take(self) -> bytes | None:
        """Return the pieces that are ready: empty if none is; None after the last one."""
        out: list[bytes] = []
        size_bytes = 0
        while self._pending is None and size_bytes < PULLED_BYTES:
            piece = next(self._pieces, None)
            if piece is None:
                return b"".join(out) or None
            if isinstance(piece, Deferred):
                self._pending = piece
                piece.addBoth(self._ready)
            else:
                out.append(piece)
                size_bytes += len(piece)
        return b"".join(out)

    def when_ready(self, wake: Callable[[], None]) -> None:
        """Call `wake` once the next piece is ready, which it was not."""
        self._wake = wake

    def close(self) -> None:
        """Take no more pieces; the pull in progress gets the end."""
        self.use()
        if isinstance(self._pieces, Closeable):
            self._pieces.close()
        self._pieces = iter(())
        self._ready(None)

    def _ready(self, _: object) -> None:
        self._pending = None
        wake, self._wake = self._wake, None
        if wake is not None:
            wake()


class Streams:
    """The replies in pieces that one worker has begun to send, in the main process.

    :param clock: `IReactorTime`.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._numbers = count(1)
        self._sources: dict[int, _Source] = {}

    def __len__(self) -> int:
        return len(self._sources)

    def begin(self, pieces: Iterator[Piece]) -> int:
        """Keep the pieces of a reply; return its number."""
        number = next(self._numbers)
        # Its worker may have stopped waiting for the reply.
        unused = self._clock.callLater(UNUSED_S, self.end, number)
        self._sources[number] = _Source(pieces, unused)
        return number

    def pull(self, number: int) -> bytes | Deferred[bytes | None] | None:
        """Return the next pieces; empty after `SILENCE_S` without any, None after the last one."""
        source = self._sources.get(number)
        if source is None:
            return None
        source.use()
        found = self._take(number, source)
        if found != b"":
            return found
        coming: Deferred[bytes | None] = Deferred()
        timer = self._clock.callLater(SILENCE_S, lambda: coming.callback(b""))

        def ready() -> None:
            if is_active(timer):
                timer.cancel()
                coming.callback(self._take(number, source))

        source.when_ready(ready)
        return coming

    def end(self, number: int) -> None:
        """Forget a reply whose client has gone, or that was sent."""
        source = self._sources.pop(number, None)
        if source is not None:
            source.close()

    def end_all(self) -> None:
        """Forget all replies, because the worker has gone."""
        for number in list(self._sources):
            self.end(number)

    def _take(self, number: int, source: _Source) -> bytes | None:
        found = source.take()
        if found is None:
            self.end(number)
        return found


class Pulled:
    """The pieces of a reply that the main process makes, in a worker.

    The main process forgets the reply when this object is closed, or is not used any more.

    :param endless: whether the reply may end early, when the main process has gone. Otherwise it must not, and the next
        piece raises `MainUnavailable`.
    """

    def __init__(self, link: Link, number: int, *, endless: bool) -> None:
        self._link = link
        self._number = number
        self._endless = endless
        self._ready: Iterator[bytes] = iter(())
        self._answer: list[Plain | Failure] = []
        self._end = weakref.finalize(self, link.send, "end", stream=number)
        self._end.atexit = False

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        piece = next(self._ready, None)
        if piece is not None:
            return piece
        if self._answer:
            answer = self._answer.pop()
            if answer is None or (self._endless and isinstance(answer, Failure)):
                raise StopIteration
            if not isinstance(answer, bytes):
                raise MainUnavailable("the main process has not sent the rest of a reply")
            self._ready = cut(answer)
            return next(self)
        woken: Deferred[None] = Deferred()
        arrived = partial(_arrived, self._answer, woken)
        self._link.call("pull", stream=self._number).addBoth(arrived)
        return woken

    def close(self) -> None:
        """Have the main process forget the rest."""
        self._end()


def _arrived(answers: list[Plain | Failure], woken: Deferred[None], answer: Plain | Failure) -> None:
    # A function of its own: a method would keep the object alive until the answer.
    answers.append(answer)
    woken.callback(None)
