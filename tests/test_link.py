"""Laws of a link between two processes, over a real socket."""

from __future__ import annotations

import socket

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.trial.unittest import TestCase

from cacheservice.replication.link import Link, LinkLost
from cacheservice.replication.sockets import adopt
from tests.kit.logs import Log


class RealLink(TestCase):
    timeout = 60

    async def setUp(self) -> None:
        self.log = Log()
        self.frames: list[bytes] = []
        self.lost: Deferred[str] = Deferred()
        ends = socket.socketpair()
        self.main = adopt(reactor, ends[0], Link(reactor, self.log))
        self.worker = adopt(reactor, ends[1], Link(reactor, self.log, self.frames.append, self.lost.callback))

    async def test_everything(self) -> None:
        """More frames than the socket holds arrive whole and in order, before the call that was sent after them."""
        self.worker.handle("received", lambda: len(self.frames))
        for number in range(40):
            self.main.send_frames(bytes([number]) * 500_000)
            await self.main.wait_until_sent()
        self.assertEqual(await self.main.call("received", 60), 40)
        self.assertEqual(self.frames, [bytes([number]) * 500_000 for number in range(40)])
        self.main.finish()
        await self.lost

    async def test_a_process_that_ends(self) -> None:
        """The calls that wait for it fail."""
        self.worker.handle("end", self.worker.transport.abortConnection)
        with self.assertRaises(LinkLost):
            await self.main.call("end", 60)
        await self.lost
