"""The connections of clients: what all ports have in common.

A port subclasses `Connection` with its protocol, and `ClientFactory`, which creates the connections. The base owns the
transport: admission, turns, back-pressure, limits of time, and the end. A subclass parses the input, decides about the
replies, and calls `send`, `stream`, `wait_for`, `yield_turn` and `finish`.

The state of a connection is a `Phase` and two flags:

=========  =====================================================  =====================================
phase      meaning                                                ends with
=========  =====================================================  =====================================
READING    Input is processed when it arrives.                    a call of the subclass
YIELDED    More input is waiting for the next turn.               the next turn: READING
WAITING    A reply is being prepared: `wait_for`.                 its Deferred: READING
STREAMING  A reply is sent in pieces: `stream`.                   its last piece: READING, `streamed`
FINISHING  There are no more replies, and input is ignored.       all output is sent: LINGERING or CLOSED
LINGERING  The client has to close the connection.                its end, or `LINGER_S`: CLOSED
CLOSED     The connection has ended.                              -
=========  =====================================================  =====================================

- `is_choked`: the socket did not accept all output, and the transport has queued the rest. Until the queue is empty, no
  input is read, nothing continues, and no piece is taken. So a client that does not read costs the output of one turn.
  Then a client whose reply or next piece is still awaited is read again, so that its disconnection is noticed.
- `input_ended`: the client has closed its side. It still gets its replies.

An end is final: after `finish` or `abort`, also of an output that failed, `yield_turn`, `wait_for` and `stream` do not
continue the client. They release what they are passed. The transport reports an abort in a later turn only.

Whether the client is within the limit of the port, `is_admitted`, is decided once, when it connects. `heard_at` is the
time of the last progress: input, the beginning or the end of a queue of output, or a turn of the client's own work.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from cacheservice.ports.client_socket import ENDING, READING, STREAMING, WAITING, YIELDED, ClientSocket
from cacheservice.ports.clients import BYTES_PER_TURN
from cacheservice.ports.held import Hold, Streamed

READ_AHEAD_BYTES = 64 * 1024
"""The most bytes read of a client that waits for a reply. Reading detects its disconnection."""

T = TypeVar("T")
Piece = bytes | Deferred[None]
"""A part of a streamed reply, or a Deferred that fires when there is more. An empty piece marks work without output,
which ends the turn like a full one."""


@runtime_checkable
class Closeable(Protocol):
    """A generator, or another iterator that has work to do at an early end."""

    def close(self) -> None: ...


@implementer(IHalfCloseableProtocol)
class Connection(ClientSocket):
    """The connection of one client; the docstring of the module lists its states."""

    bytes_per_turn = BYTES_PER_TURN
    # Class attributes until they change, as in the base class.
    read_ahead_bytes = 0
    _awaited: Deferred[object] | None = None
    _pieces: Iterator[Piece] | None = None
    _hold: Hold | None = None

    # Turns

    @abstractmethod
    def work(self) -> None:
        """Process the input received so far.

        Called in the next turn after `yield_turn`, and when a client that was choked has read all output.
        """

    def flush(self) -> None:
        """Send output that was kept back. Called first in each turn of the client's own work."""

    def yield_turn(self) -> None:
        """Continue with `work` in the next turn, once the client has read all output."""
        if self.phase in ENDING:
            return
        self.phase = YIELDED
        self._continue_later()

    def _continue_later(self) -> None:
        # The empty queue of a choked client continues it.
        if not self.is_choked:
            self.transport.pauseProducing()
            self.factory.turns.add(self)

    def go_on(self) -> None:
        """Continue at the beginning of a turn, or after the client has read all output."""
        if self.phase in ENDING:
            return
        self.heard_at = self.factory.clock.seconds()
        self.flush()
        phase = self.phase
        if self.is_choked or phase in ENDING:
            return
        if phase is STREAMING:
            if self._awaited is None:
                self._send_pieces()
            else:
                self.read_on()
            return
        self.read_on()
        if phase is not WAITING:
            self.phase = READING
            self.work()

    def drained(self) -> None:
        if self not in self.factory.turns:
            self.go_on()

    # Replies that are not ready

    def wait_for(self, coming: Deferred[T], arrived: Callable[[T], None], failed: Callable[[Failure], None]) -> None:
        """Process no more input until a reply has been prepared, then call `arrived` or `failed`.

        If the connection ends before that, or has ended, `coming` is cancelled and neither function is called.
        """
        is_ending = self.phase in ENDING
        if not is_ending:
            self.phase = WAITING
            self._awaited, self.read_ahead_bytes = coming, 0  # type: ignore[assignment]  # only its end matters

        def has_arrived(reply: T) -> None:
            if self._end_wait():
                arrived(reply)

        def has_failed(failure: Failure) -> None:
            if self._end_wait():
                failed(failure)
            elif not failure.check(CancelledError):
                self._log.failure("a reply could not be prepared", failure)

        coming.addCallbacks(has_arrived, has_failed)
        if is_ending:
            coming.cancel()

    def _end_wait(self) -> bool:
        """End the phase WAITING; return False if the connection has ended meanwhile."""
        self._awaited = None
        if self.phase is not WAITING:
            return False
        self.phase = READING
        self.heard_at = self.factory.clock.seconds()
        self.read_on()
        return True

    def count_read_ahead(self, size_bytes: int) -> None:
        """Count input of a client that waits for a reply; stop reading if it is too much."""
        self.read_ahead_bytes += size_bytes
        if self.read_ahead_bytes > READ_AHEAD_BYTES:
            self.transport.pauseProducing()

    # Replies in pieces

    def stream(self, pieces: Iterator[Piece]) -> None:
        """Send a reply in pieces, in each turn `bytes_per_turn` and the rest of a piece; the first part now.

        `Streamed` pieces are registered as a reader of their snapshots. An exception aborts the connection, so that the
        client cannot take a part for the whole. Pieces that can be closed are closed at the end; at once, if the
        connection has ended.
        """
        if self.phase in ENDING:
            _close(pieces)
            return
        if isinstance(pieces, Streamed):
            self._hold = self.factory.held.begin(self, pieces.snapshots)
        self._pieces = pieces
        self.phase = STREAMING
        if not self.is_choked:
            self._send_pieces()

    def streamed(self) -> None:
        """Continue after a streamed reply. The default continues with the next turn."""
        self.yield_turn()

    def _send_pieces(self) -> None:
        assert self._pieces is not None, "the phase is STREAMING"
        out: list[bytes] = []
        size_bytes, most = 0, self.bytes_per_turn
        try:
            for piece in self._pieces:
                if isinstance(piece, Deferred):
                    self._awaited = piece  # type: ignore[assignment]  # only its end matters
                    break
                out.append(piece)
                size_bytes += len(piece)
                if not piece or size_bytes >= most:
                    break
            else:
                self.end_stream()
                self.phase = READING
        except Exception:
            self._log.failure("a reply could not be streamed")
            self.abort()
            return
        if size_bytes:
            self.send(b"".join(out) if len(out) > 1 else out[0])
        if self.phase is READING:
            self.streamed()
        elif self._awaited is not None:
            if self.phase is STREAMING:
                self.read_on()  # this detects a disconnection
            self._awaited.addCallbacks(self._piece_ready, self._piece_failed)
        elif self.phase is STREAMING:
            self._continue_later()

    def _piece_ready(self, _: object) -> None:
        self._awaited = None
        if self.phase is STREAMING:
            self._continue_later()

    def _piece_failed(self, failure: Failure) -> None:
        self._awaited = None
        if self.phase is STREAMING:
            self._log.failure("a reply could not be streamed", failure)
            self.abort()

    def end_stream(self) -> None:
        """Take no more pieces, and release the snapshots of the reply, if there is one."""
        if self._pieces is None:
            return
        pieces, self._pieces = self._pieces, None
        self._awaited = None  # a Deferred among the pieces belongs to their maker, and may fire late
        if self._hold is not None:
            self.factory.held.end(self._hold)
            self._hold = None
        _close(pieces)

    # The end

    def readConnectionLost(self) -> None:
        """Handle the end of the client's input."""
        self.input_ended = True
        if self.phase in ENDING:
            self.transport.loseConnection()
        else:
            self.input_over()

    @abstractmethod
    def input_over(self) -> None:
        """Continue after the end of the client's input; the client may still read."""

    def finish(self, *, linger: bool = True) -> None:
        self.end_stream()
        super().finish(linger=linger)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.end_stream()
        super().connectionLost(reason)
        self.factory.turns.discard(self)
        if self._awaited is not None:
            self._awaited.cancel()


def _close(pieces: Iterator[Piece]) -> None:
    if isinstance(pieces, Closeable):
        pieces.close()
