"""Laws of every connection: turns, back-pressure, time, waiting, streams and the end, over a transport in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.ports import clients
from cacheservice.ports.admission import RESERVE_S, Door, Room
from cacheservice.ports.client_socket import ENDING, LINGER_S, Phase
from cacheservice.ports.clients import ClientFactory, Limits
from cacheservice.ports.connection import READ_AHEAD_BYTES, Connection, Piece
from cacheservice.ports.held import Streamed
from tests.kit.clocks import one_turn, started_clock
from tests.kit.waiting import GIVE_UP_S
from tests.kit.wire import Wire

IDLE_S = 60.0


class Lines(Connection):
    """A port that answers each byte: a small letter with its capital, in a turn of its own."""

    def __init__(self, factory: ClientFactory[Lines]) -> None:
        self.factory = factory
        self.input = b""
        self.answers: list[object] = []

    def dataReceived(self, data: bytes) -> None:
        self.input += data
        if self.phase is Phase.READING:
            self.work()
        elif self.phase is Phase.WAITING:
            self.count_read_ahead(len(data))

    def work(self) -> None:
        letter, self.input = self.input[:1], self.input[1:]
        if letter:
            self.send(letter.upper())
            self.yield_turn()
        elif self.input_ended:
            self.finish()

    def input_over(self) -> None:
        if self.phase is Phase.READING:
            self.finish()

    def turn_away(self) -> None:
        self.note_refusal()
        self.send(b"full")
        self.finish(linger=False)

    def wait(self, coming: Deferred[object]) -> None:
        self.wait_for(coming, self.answers.append, self.answers.append)


class ConnectionTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.patch(clients, "TURN_S", GIVE_UP_S)  # a machine that is busy must not end a turn early
        self.clock = started_clock()
        self.factory: ClientFactory[Lines] = ClientFactory(Limits(10, IDLE_S), self.clock)
        self.addCleanup(self.check_the_end)

    def check_the_end(self) -> None:
        """When a connection has ended nothing is left of it."""
        self.factory.close_clients()
        self.assertEqual(self.factory.clients, set())
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def connect(self, room_bytes: int | None = None) -> tuple[Lines, Wire]:
        client = Lines(self.factory)
        return client, Wire(client, room_bytes)

    def turn(self) -> None:
        one_turn(self.clock)


class Turns(ConnectionTestCase):
    def test_a_step_a_turn(self) -> None:
        """Clients that have more to do take one step in each turn, and none of them is read meanwhile."""
        wires = [self.connect()[1] for _ in range(3)]
        for wire in wires:
            wire.receive(b"abc")
        self.assertEqual([wire.take() for wire in wires], [b"A"] * 3)
        self.assertFalse(any(wire.is_reading for wire in wires))
        for expected in (b"B", b"C"):
            self.turn()
            self.assertEqual([wire.take() for wire in wires], [expected] * 3)
        self.turn()
        self.assertTrue(all(wire.is_reading for wire in wires))

    def test_a_bug_ends_its_client_alone(self) -> None:
        """A step that raises is logged and aborts its connection; the others of the turn go on."""
        (broken, broken_wire), (_, wire) = self.connect(), self.connect()
        for each in (broken_wire, wire):
            each.receive(b"ab")
        broken.work = lambda: 1 // 0  # type: ignore[method-assign,assignment]
        self.turn()
        self.assertEqual((broken_wire.ended, wire.take()), ("aborted", b"AB"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)


class BackPressure(ConnectionTestCase):
    def test_a_client_that_does_not_read(self) -> None:
        """Output that the socket does not take is queued; nothing is read or done until it is sent, in its order."""
        client, wire = self.connect(room_bytes=0)
        wire.receive(b"abc")
        self.assertTrue(client.is_choked)
        self.turn()
        self.assertEqual((wire.take(), wire.queue, wire.is_reading), (b"", b"A", False))
        wire.client_reads()
        self.assertFalse(client.is_choked)
        self.turn()
        self.turn()
        self.assertEqual((wire.take(), wire.is_reading), (b"ABC", True))

    def test_a_part(self) -> None:
        """What the socket takes in part is continued where it stopped."""
        client, wire = self.connect(room_bytes=4)
        client.send(b"abcdef")
        self.assertEqual((wire.sent, wire.queue), (b"abcd", b"ef"))
        client.send(b"abcdef")
        wire.client_reads()
        self.assertEqual(wire.take(), b"abcdef" * 2)
        client.send(b"abcdef")
        self.assertEqual(wire.take(), b"abcdef")

    def test_a_broken_socket(self) -> None:
        """A socket that fails ends its connection."""
        client, wire = self.connect()
        wire.is_broken = True
        client.send(b"a")
        self.assertEqual(wire.ended, "aborted")

    def test_nothing_read_within_the_idle_time(self) -> None:
        """A choked client that reads nothing for the idle time is dropped and counted; any progress restarts it."""
        _, wire = self.connect(room_bytes=0)
        wire.receive(b"a")
        self.clock.advance(IDLE_S - 1)
        self.assertIsNone(wire.ended)
        self.clock.advance(2)
        self.assertEqual((wire.ended, self.factory.rejected["slow_client"]), ("aborted", 1))

    def test_the_idle_time_begins_with_the_queue(self) -> None:
        """A client that was silent for a long time has the whole idle time to read what comes without a request."""
        client, wire = self.connect(room_bytes=0)
        client.wait(Deferred())
        self.patch(client, "patience_s", lambda: IDLE_S if client.is_choked else math.inf)
        for _ in range(21):  # to the middle between two looks at the time
            self.clock.advance(IDLE_S / 2)
        client.send(b"a")
        self.clock.advance(IDLE_S - 1)
        self.assertIsNone(wire.ended)
        self.clock.advance(1)
        self.assertEqual(wire.ended, "aborted")


class Waiting(ConnectionTestCase):
    def test_a_reply_comes_later(self) -> None:
        """The reply or its failure is handed on, and the client is read again."""
        client, wire = self.connect()
        for result in (b"reply", Failure(ValueError())):
            coming: Deferred[object] = Deferred()
            client.wait(coming)
            self.assertIs(client.phase, Phase.WAITING)
            coming.callback(result)
            self.assertIs(client.phase, Phase.READING)
        self.assertEqual(client.answers[0], b"reply")
        assert isinstance(client.answers[1], Failure)
        self.assertTrue(wire.is_reading)

    def test_the_client_leaves(self) -> None:
        """What is prepared for a client that has left or is being aborted is cancelled, and its result ignored."""
        for leave in (Wire.client_leaves, Wire.abortConnection, lambda wire: wire.protocol.abort()):
            client, wire = self.connect()
            cancelled: list[object] = []
            client.wait(Deferred(cancelled.append))
            leave(wire)
            self.assertEqual((len(cancelled), client.answers), (1, []))

    def test_read_ahead(self) -> None:
        """While it waits, a client is read up to a limit, and read again when its reply has come."""
        client, wire = self.connect()
        coming: Deferred[object] = Deferred()
        client.wait(coming)
        wire.receive(b"x" * READ_AHEAD_BYTES)
        self.assertTrue(wire.is_reading)
        wire.receive(b"x")
        self.assertFalse(wire.is_reading)
        coming.callback(b"")
        self.assertTrue(wire.is_reading)


class Streams(ConnectionTestCase):
    def test_in_turns(self) -> None:
        """A turn sends `bytes_per_turn` and the rest of a piece; an empty piece ends it; then the client goes on."""
        client, wire = self.connect()
        client.bytes_per_turn = 4
        client.stream(iter([b"aa", b"bbb", b"c", b"", b"d", b"e"]))
        self.assertEqual(wire.take(), b"aabbb")
        for expected in (b"c", b"de"):
            self.assertIs(client.phase, Phase.STREAMING)
            self.turn()
            self.assertEqual(wire.take(), expected)
        self.turn()
        self.assertIs(client.phase, Phase.READING)
        wire.receive(b"a")
        self.assertEqual(wire.take(), b"A")

    def test_a_client_that_does_not_read(self) -> None:
        """No piece is made for a client that is choked."""
        client, wire = self.connect(room_bytes=0)
        client.bytes_per_turn = 1
        pieces = iter([b"a", b"b", b"c"])
        client.stream(pieces)
        self.turn()
        self.assertEqual(wire.queue, b"a")
        wire.client_reads(1)
        self.assertEqual((wire.take(), wire.queue, list(pieces)), (b"a", b"b", [b"c"]))

    def test_a_piece_that_is_not_ready(self) -> None:
        """A Deferred among the pieces is waited for, with the client read meanwhile; the pieces before it are sent."""
        client, wire = self.connect()
        coming: Deferred[None] = Deferred()
        client.stream(iter([b"a", coming, b"b"]))
        self.assertEqual((wire.take(), wire.is_reading), (b"a", True))
        self.turn()
        self.assertEqual(wire.take(), b"")
        coming.callback(None)
        self.turn()
        self.assertEqual(wire.take(), b"b")

    def test_a_client_that_reads_before_the_next_piece(self) -> None:
        """A client that was choked is read again while its next piece is awaited, so that its end is noticed."""
        client, wire = self.connect(room_bytes=0)
        client.stream(iter([b"a", Deferred()]))
        self.assertFalse(wire.is_reading)
        wire.client_reads()
        self.assertEqual((wire.take(), wire.is_reading, client.phase), (b"a", True, Phase.STREAMING))

    def test_an_end_before_its_time(self) -> None:
        """The pieces of a client that leaves, is dropped or is finished with are closed; a late piece is ignored."""
        ends = (lambda _, wire: wire.client_leaves(), lambda client, _: client.drop_slow(), lambda c, _: c.finish())
        for end in ends:
            closed: list[bool] = []
            coming: Deferred[None] = Deferred()

            def pieces(closed: list[bool] = closed, coming: Deferred[None] = coming) -> Iterator[Piece]:
                try:
                    yield coming
                    yield b"never"
                finally:
                    closed.append(True)

            client, wire = self.connect()
            client.stream(pieces())
            end(client, wire)
            self.assertEqual(closed, [True])
            coming.callback(None)
            self.turn()
            self.assertEqual(wire.take(), b"")

    def test_a_failure(self) -> None:
        """A piece that fails is logged and aborts the connection: a part is not taken for the whole."""

        def raising() -> Iterator[Piece]:
            yield b"a"
            raise ZeroDivisionError

        def failing() -> Iterator[Piece]:
            coming: Deferred[None] = Deferred()
            coming.errback(Failure(ZeroDivisionError()))
            yield coming

        for pieces in (raising(), failing()):
            client, wire = self.connect()
            client.stream(pieces)
            self.assertEqual((wire.ended, wire.take()), ("aborted", b""))
            self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_held(self) -> None:
        """A reader of snapshots is registered until its reply has ended."""
        held: list[str] = []
        begin, end = self.factory.held.begin, self.factory.held.end
        self.patch(self.factory.held, "begin", lambda *of: held.append("begin") or begin(*of))
        self.patch(self.factory.held, "end", lambda hold: held.append("end") or end(hold))
        client, wire = self.connect()
        client.stream(Streamed(iter([b"a", b"", b"b"]), {}))
        self.assertEqual(held, ["begin"])
        self.turn()
        self.assertEqual((held, wire.take()), (["begin", "end"], b"ab"))


class Ends(ConnectionTestCase):
    def test_linger(self) -> None:
        """After the last output the client has to close: what it sends is ignored, and it has `LINGER_S`."""
        client, wire = self.connect()
        client.send(b"last")
        client.finish()
        self.assertEqual((wire.take(), wire.is_write_closed, wire.is_reading), (b"last", True, True))
        wire.receive(b"abc")
        self.assertEqual(wire.take(), b"")
        self.clock.advance(LINGER_S)
        self.assertEqual((wire.ended, self.factory.rejected["slow_client"]), ("closed", 0))

    def test_all_output_first(self) -> None:
        """Queued output is sent before the end, with or without a linger."""
        for linger in (True, False):
            client, wire = self.connect(room_bytes=0)
            client.send(b"last")
            client.finish(linger=linger)
            self.assertEqual((wire.ended, wire.is_write_closed), (None, False))
            wire.client_reads()
            self.assertEqual((wire.take(), wire.is_write_closed), (b"last", linger))
            self.assertEqual(wire.ended, None if linger else "closed")

    def test_half_closed(self) -> None:
        """A client that closes its side gets its replies, and is not lingered for."""
        for left in (b"", b"ab"):
            _, wire = self.connect()
            wire.receive(b"x" + left)
            wire.client_closes_its_side()
            for _ in range(4):
                self.turn()
            self.assertEqual((wire.take(), wire.ended), (b"X" + left.upper(), "closed"))

    def test_closes_while_lingered_for(self) -> None:
        """The client's end is the end."""
        client, wire = self.connect()
        client.finish()
        wire.client_closes_its_side()
        self.assertEqual(wire.ended, "closed")

    def test_a_slow_reader(self) -> None:
        """It is aborted, counted, and named for the log."""
        client, wire = self.connect()
        self.assertEqual(client.drop_slow(), "192.0.2.1:50000")
        self.assertEqual((wire.ended, self.factory.rejected["slow_client"]), ("aborted", 1))


class NothingAfterTheEnd(ConnectionTestCase):
    """Laws of a connection that has been aborted, or finished, before the transport has reported its end."""

    def ended(self) -> Iterator[tuple[Lines, Wire]]:
        """Connections that have ended in each way."""
        for end in (Lines.abort, Lines.finish, lambda client: client.send(b"lost")):
            client, wire = self.connect()
            wire.aborts_late = wire.is_broken = True
            end(client)
            self.assertIn(client.phase, ENDING)
            yield client, wire

    def test_no_turn(self) -> None:
        """A client that has yielded gets no turn after its end, and none if it yields after it."""
        for yields_before in (True, False):
            for end in (Lines.abort, Lines.finish):
                client, wire = self.connect()
                wire.aborts_late = True
                if yields_before:
                    wire.receive(b"ab")
                    wire.take()
                client.input = b"b"
                end(client)
                if not yields_before:
                    client.yield_turn()
                for _ in range(2):
                    self.turn()
                self.assertEqual((wire.take(), client.input), (b"", b"b"))
                self.assertIn(client.phase, ENDING)
                wire.abort_arrives()

    def test_nothing_is_awaited(self) -> None:
        """A reply that would be awaited is cancelled, and the end stays."""
        for client, wire in self.ended():
            cancelled: list[object] = []
            client.wait(Deferred(cancelled.append))
            self.assertEqual((len(cancelled), client.answers), (1, []))
            self.assertIn(client.phase, ENDING)
            wire.abort_arrives()

    def test_nothing_is_streamed(self) -> None:
        """Pieces are closed and none is taken, and their snapshots are not held."""
        held: list[object] = []
        self.patch(self.factory.held, "begin", lambda *of: held.append(of))
        for client, wire in self.ended():
            pieces = (piece for piece in [b"a", b"b"])
            client.stream(pieces)
            client.stream(Streamed(iter([b"a"]), {}))
            self.assertEqual((list(pieces), held), ([], []))
            self.assertIn(client.phase, ENDING)
            wire.abort_arrives()

    def test_a_piece_that_breaks_the_socket(self) -> None:
        """A stream whose output fails is not read again while it awaits a piece, and its next piece is not taken."""
        client, wire = self.connect()
        wire.aborts_late = wire.is_broken = True
        coming: Deferred[None] = Deferred()
        pieces = iter([b"a", coming, b"b"])
        self.patch(wire, "resumeProducing", lambda: self.fail("an aborted transport is read"))
        client.stream(pieces)
        coming.callback(None)
        self.turn()
        self.assertEqual((wire.ended, list(pieces)), ("aborted", [b"b"]))
        wire.abort_arrives()


class Admission(ConnectionTestCase):
    def test_reserve(self) -> None:
        """Over the limit a client has little time, and is turned away for the next one."""
        self.factory.door = Door("", Room(), 1, None, self.clock.seconds)
        self.factory.set_limits(max_connections=1, idle_timeout_s=IDLE_S)
        (inside, _), (first, first_wire) = self.connect(), self.connect()
        self.assertEqual((inside.is_admitted, first.is_admitted), (True, False))
        _, second_wire = self.connect()
        self.assertEqual((first_wire.take(), first_wire.ended), (b"full", "closed"))
        self.assertEqual(self.factory.rejected["too_many_connections"], 1)
        self.clock.advance(RESERVE_S)
        self.assertEqual(second_wire.ended, "aborted")
        self.assertEqual(len(self.factory.clients), 1)
