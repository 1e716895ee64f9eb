"""Laws of a link between two processes, without a socket."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.errors import UnknownDataset
from cacheservice.replication.link import CallFailed, CallTimedOut, LinkLost
from cacheservice.replication.messages import MAX_PAYLOAD_BYTES, MessageTooLarge, Plain
from tests.kit.links import LinkPair


class LinkTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.pair = LinkPair()
        self.main, self.worker = self.pair.ends
        self.addCleanup(lambda: self.assertEqual(self.pair.clock.getDelayedCalls(), []))

    def called(self, name: str, **fields: Plain) -> Deferred[Plain]:
        """Call a handler of the worker, and deliver everything."""
        answered = self.main.call(name, **fields)
        self.pair.deliver()
        return answered


class Messages(LinkTestCase):
    def test_order(self) -> None:
        """Events and frames are handled in the order in which they were sent."""
        seen: list[object] = []

        def handler(number: int) -> None:
            seen.append(number)

        self.worker.handle("seen", handler)
        for number in range(3):
            self.main.send("seen", number=number)
            self.main.send_frames(b"%d" % number)
        self.pair.deliver()
        self.assertEqual((seen, self.pair.frames), ([0, 1, 2], [b"0", b"1", b"2"]))

    def test_both_ends_call(self) -> None:
        """Each end numbers its own calls."""
        self.worker.handle("add", lambda a, b: a + b)
        self.main.handle("add", lambda a, b: 10 * (a + b))
        one, two = self.main.call("add", a=1, b=2), self.worker.call("add", a=1, b=2)
        self.pair.deliver()
        self.assertEqual((self.successResultOf(one), self.successResultOf(two)), (3, 30))

    def test_late_replies(self) -> None:
        """A handler that takes its time does not hold up the next call."""
        slow: Deferred[Plain] = Deferred()
        self.worker.handle("slow", lambda: slow)

        async def quick() -> Plain:
            return "quick"

        self.worker.handle("quick", quick)
        first, second = self.called("slow"), self.called("quick")
        self.assertNoResult(first)
        self.assertEqual(self.successResultOf(second), "quick")
        slow.callback({"late": True})
        self.pair.deliver()
        self.assertEqual(self.successResultOf(first), {"late": True})


class Failures(LinkTestCase):
    def test_refusals(self) -> None:
        """An error of this package is the caller's message. Any other one is a bug: logged, and not shown."""

        def fail(error: Exception) -> Any:
            def handler() -> Plain:
                raise error

            return handler

        self.worker.handle("refuse", fail(UnknownDataset("unknown dataset 'x'")))
        self.worker.handle("break", fail(ZeroDivisionError("secret")))
        self.worker.handle("odd", object)
        self.assertEqual(str(self.failureResultOf(self.called("refuse"), CallFailed).value), "unknown dataset 'x'")
        self.assertEqual(self.pair.log.lines, [])
        for name in ("break", "odd"):
            self.assertEqual(str(self.failureResultOf(self.called(name), CallFailed).value), "an internal error")
        self.assertIn("does not handle 'none'", str(self.failureResultOf(self.called("none"), CallFailed).value))
        self.main.send("break")
        self.pair.deliver()
        self.assertEqual(self.pair.log.names(), ["internal_error"] * 3)

    def test_no_answer_in_time(self) -> None:
        """A call without a reply fails at its time limit, and a reply after that is ignored."""
        late: Deferred[Plain] = Deferred()
        self.worker.handle("late", lambda: late)
        answered = self.called("late")
        self.pair.clock.advance(4.9)
        self.assertNoResult(answered)
        self.pair.clock.advance(0.2)
        self.assertIn("did not answer 'late' within 5 s", str(self.failureResultOf(answered, CallTimedOut).value))
        late.callback(None)
        self.pair.deliver()

    def test_a_cancelled_call(self) -> None:
        """Its reply is ignored."""
        self.worker.handle("ping", lambda: None)
        answered = self.main.call("ping")
        answered.cancel()
        self.failureResultOf(answered, CancelledError)
        self.pair.deliver()

    def test_a_lost_link(self) -> None:
        """Calls fail at once, before and after; events and frames are dropped."""
        self.worker.handle("never", Deferred)
        waiting = self.called("never")
        self.main.send_frames(bytes(3 << 20))
        sent = self.main.wait_until_sent()
        self.pair.cut()
        for failed in (waiting, sent, self.main.call("never"), self.main.wait_until_sent()):
            self.failureResultOf(failed, LinkLost)
        self.main.send("event")
        self.main.send_frames(b"frames")
        self.main.finish()
        self.assertEqual(self.main.unsent_bytes, 0)
        self.assertEqual([name for name, _ in self.pair.lost], ["main", "worker"])

    def test_a_stream_of_something_else(self) -> None:
        """The link is closed, and the reason is logged and passed on."""
        self.worker.dataReceived(b"GET / HTTP/1.1\r\n")
        self.worker.dataReceived(b"more")
        self.assertTrue(self.pair.wires[1].is_aborted)
        self.pair.deliver()
        self.assertEqual(self.pair.log.names(), ["link_broken"])
        self.assertIn("kind b'G'", dict(self.pair.lost)["worker"])

    def test_too_large(self) -> None:
        """A message that is too large is refused where it is sent, and a reply fails its call."""
        with self.assertRaises(MessageTooLarge):
            self.main.send_frames(bytes(MAX_PAYLOAD_BYTES + 1))
        self.failureResultOf(self.main.call("x", data=bytes(MAX_PAYLOAD_BYTES)), MessageTooLarge)
        self.worker.handle("all", lambda: bytes(MAX_PAYLOAD_BYTES))
        self.assertIn("does not fit", str(self.failureResultOf(self.called("all"), CallFailed).value))


class BackPressure(LinkTestCase):
    def test_unsent_bytes(self) -> None:
        """A sender waits while 1 MiB or more is unsent. The transport gets little at a time."""
        self.successResultOf(self.main.wait_until_sent())
        for _ in range(3):
            self.main.send_frames(bytes(1 << 20))
        self.assertLess(len(self.pair.wires[0].unsent), 1 << 18)
        self.assertGreater(self.main.unsent_bytes, 2 << 20)
        sent, cancelled = self.main.wait_until_sent(), self.main.wait_until_sent()
        cancelled.cancel()
        self.failureResultOf(cancelled, CancelledError)
        self.assertNoResult(sent)
        self.pair.deliver()
        self.successResultOf(sent)
        self.assertEqual(([len(data) for data in self.pair.frames], self.main.unsent_bytes), ([1 << 20] * 3, 0))

    def test_finish(self) -> None:
        """What was sent before arrives; what is sent after does not."""
        self.main.send_frames(bytes(1 << 20))
        self.main.finish()
        self.main.send_frames(b"dropped")
        self.assertFalse(self.pair.wires[0].is_closed)
        self.pair.deliver()
        self.assertEqual([len(data) for data in self.pair.frames], [1 << 20])
        self.assertEqual([name for name, _ in self.pair.lost], ["main", "worker"])
